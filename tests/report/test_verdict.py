"""The verdict: each fault that a curve can show is named, and a usual curve is left in peace."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from gpt2.config import Config, preset
from gpt2.report.curves import RunCurves, read_run
from gpt2.report.verdict import (
    Reference,
    Verdict,
    interpolate,
    judge,
    make_reference,
    nearest_preset,
    recipe_differences,
    reference_for,
    shipped_references,
)
from tests.report.runs import Events, gpt2_config, make_events, write_run

CONFIG = gpt2_config()
(DEMO,) = shipped_references()


def judged(tmp_path: Path, events: Events, config: Config = CONFIG, reference: Reference | None = None) -> Verdict:
    return judge(read_run(write_run(tmp_path / "run", config, events)), reference)


def found(verdict: Verdict, title: str) -> tuple[str, str]:
    (finding,) = [finding for finding in verdict.findings if finding.title == title]
    return finding.level, finding.text


def change(events: Events, kind: str, name: str, value: Any, after: int = 0) -> Events:
    """The events with one figure changed: `value` is a function of the old one, or what stands there instead."""
    return [
        {**e, name: value(e[name]) if callable(value) else value} if e["event"] == kind and e["step"] > after else e
        for e in events
    ]


def demo_events(factor: float = 0.0, slow: float = 1.0) -> tuple[Config, Events]:
    """A run of the demo preset whose validation lies in the middle of the shipped band, `factor` nats above it."""
    config = preset("demo")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, data_hash=DEMO.data_hash))
    events: Events = []
    for step in range(20, 681, 20):
        low, high, rate = DEMO.at(step)
        loss, seconds = (low + high) / 2 + factor, step / 4
        figures = {"lr": slow * rate * config.optim.lr, "grad_norm": 0.4, "tokens_per_second": 4e3, "mfu": 0.5}
        events.append({"event": "step", "step": step, "loss": loss, **figures, "train_seconds": seconds})
        if step % 100 == 0:
            events.append({"event": "val", "step": step, "loss": loss, "bits_per_byte": 1.6, "train_seconds": seconds})
    return config, events


def test_a_usual_run_is_good(tmp_path: Path) -> None:
    verdict = judged(tmp_path, make_events(CONFIG, 19_070))
    assert verdict.level == "good"
    assert verdict.headline == "Nothing unusual, by general signs."
    assert found(verdict, "No reference curve")[0] == "good"
    assert "10.82" in found(verdict, "Start")[1]
    level, text = found(verdict, "Against OpenAI")
    assert level == "good"
    assert "3.29 of OpenAI GPT-2 124M (not reached)" in text
    assert "0.2955 of OpenAI GPT-2 124M (reached)" in text
    assert "0.337 of OpenAI GPT-3 124M (not reached)" in text


def test_openais_loss_is_left_out_where_text_or_tokenizer_differ(tmp_path: Path) -> None:
    config = gpt2_config(data="data/shakespeare")
    assert "validation loss" not in found(judged(tmp_path, make_events(config, 1_000), config), "Against OpenAI")[1]


@pytest.mark.parametrize(
    ("title", "level", "kind", "name", "value", "after"),
    [
        ("Start", "bad", "step", "loss", lambda loss: loss + 4, 0),
        ("Descent", "bad", "step", "loss", lambda loss: loss + 2, 900),
        ("Descent", "bad", "step", "loss", 10.8, 0),
        ("Validation", "look", "val", "loss", lambda loss: loss + 0.5, 900),
        ("Spikes", "look", "step", "loss", 9.0, 999),
        ("Speed", "look", "step", "tokens_per_second", 1e5, 600),
        ("Figures not finite", "bad", "step", "grad_norm", math.nan, 990),
        ("Figures not finite", "bad", "val", "loss", math.inf, 990),
    ],
)
def test_each_fault_is_named(
    tmp_path: Path, title: str, level: str, kind: str, name: str, value: Any, after: int
) -> None:
    assert judged(tmp_path / "usual", make_events(CONFIG, 1_000)).level == "good"
    verdict = judged(tmp_path, change(make_events(CONFIG, 1_000), kind, name, value, after))
    assert found(verdict, title)[0] == level
    assert verdict.level in (level, "bad")
    assert title.lower() in verdict.headline


def test_a_leak_shows_at_the_first_step(tmp_path: Path) -> None:
    events = change(make_events(CONFIG, 100, every=1), "step", "loss", lambda loss: loss - 4)
    assert found(judged(tmp_path, events), "Start")[0] == "look"


def test_skipped_steps_count_by_their_share(tmp_path: Path) -> None:
    for count, level in ((1, "good"), (30, "look"), (300, "bad")):
        verdict = judged(tmp_path / str(count), make_events(CONFIG, 10_000, skips=tuple(range(1, count + 1))))
        assert found(verdict, "Skipped steps")[0] == level
    assert "and 292 more" in found(verdict, "Skipped steps")[1]


def test_damaged_and_torn_lines_are_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", CONFIG, make_events(CONFIG, 1_000))
    with open(run / "metrics.jsonl", "a") as file:
        file.write("rubbish\n{")
    number = len((run / "metrics.jsonl").read_text().splitlines()) - 1
    level, text = found(judge(read_run(run), None), "Damaged metrics")
    assert level == "look"
    assert f"line {number} of metrics.jsonl could not be read" in text
    assert "breaks off" in text


def test_a_run_without_validation_and_of_one_step_is_judged(tmp_path: Path) -> None:
    events = [e for e in make_events(CONFIG, 10) if e["event"] in ("start", "step")]
    assert found(judged(tmp_path, events), "Validation")[0] == "look"


def test_the_shipped_reference_is_sound() -> None:
    assert DEMO.preset == "demo"
    assert len(DEMO.step) == len(DEMO.low) == len(DEMO.high) == len(DEMO.factor) >= 5
    assert all(2 * DEMO.tolerance <= high - low < 0.4 for low, high in zip(DEMO.low, DEMO.high, strict=True))
    assert list(DEMO.step) == sorted(set(DEMO.step))
    assert DEMO.at(DEMO.step[1])[:2] == (DEMO.low[1], DEMO.high[1])
    assert DEMO.at(10**9)[:2] == (DEMO.low[-1], DEMO.high[-1])


def test_a_run_of_the_preset_within_the_band(tmp_path: Path) -> None:
    config, events = demo_events()
    run = read_run(write_run(tmp_path / "run", config, events))
    assert reference_for(run, [DEMO]) == DEMO
    verdict = judge(run, DEMO)
    assert verdict.headline == "Yes. It runs as the demo preset's own runs do."
    assert "All 6 compared" in found(verdict, "Reference curve")[1]


@pytest.mark.parametrize(("above", "level"), [(0.3, "bad"), (0.8, "bad")])
def test_a_run_above_the_band(tmp_path: Path, above: float, level: str) -> None:
    config, events = demo_events(above)
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, muon_lr=0.5))
    verdict = judged(tmp_path, events, config, DEMO)
    assert found(verdict, "Reference curve")[0] == level
    assert "differs from the preset in optim.muon_lr = 0.5 (0.04)" in found(verdict, "Reference curve")[1]
    assert verdict.headline.startswith("No. ")


def test_below_the_band_is_better(tmp_path: Path) -> None:
    config, events = demo_events(-0.5)
    assert "better than the reference" in found(judged(tmp_path, events, config, DEMO), "Reference curve")[1]


def test_a_rate_that_has_yet_to_decay_is_not_held_against_a_run(tmp_path: Path) -> None:
    """A faster machine does more steps in the same minutes: at a given step its rate is higher, its loss too."""
    config, events = demo_events(0.2, slow=3)
    verdict = judged(tmp_path, events, config, DEMO)
    assert found(verdict, "No reference curve")[0] == "good"


def test_a_reference_needs_the_same_data_shape_and_batch(tmp_path: Path) -> None:
    config, events = demo_events()
    run = read_run(write_run(tmp_path / "run", config, events))

    def with_(section: str, **changed: Any) -> RunCurves:
        other = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changed)})
        return dataclasses.replace(run, config=other)

    assert reference_for(with_("model", n_layer=3), [DEMO]) is None
    assert reference_for(with_("train", batch_tokens=2048), [DEMO]) is None
    assert reference_for(with_("train", data_hash="b" * 64), [DEMO]) is None
    assert reference_for(dataclasses.replace(with_("train", data_hash="b" * 64), source="sotu"), [DEMO]) == DEMO
    assert reference_for(with_("optim", lr=1.0), [DEMO]) == DEMO


def test_a_reference_holds_the_runs_it_was_made_from(tmp_path: Path) -> None:
    config, events = demo_events()
    _, other = demo_events(0.05)
    runs = [read_run(write_run(tmp_path / name, config, made)) for name, made in (("a", events), ("b", other))]
    reference = Reference.from_dict(make_reference("demo", runs, 0.1))
    assert reference.step == (100, 200, 300, 400, 500, 600)
    for run in runs:
        for step, loss in zip(run.steps("val"), run.column("val", "loss"), strict=True):
            low, high, _ = reference.at(step)
            assert low + 0.1 - 1e-4 <= loss <= high - 0.1 + 1e-4


def test_nearest_preset_and_its_differences() -> None:
    assert nearest_preset(CONFIG) == "gpt2-124m"
    assert recipe_differences(CONFIG, preset("gpt2-124m")) == {}
    faster = dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, lr=1e-3))
    assert recipe_differences(faster, preset("gpt2-124m")) == {"optim.lr": (1e-3, 6e-4)}
    assert nearest_preset(preset("finetune")) == "finetune"
    odd = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, n_layer=5))
    assert nearest_preset(odd) is None


def test_interpolation() -> None:
    assert [interpolate([1, 3], [10, 20], x) for x in (0, 1, 2, 3, 9)] == [10, 10, 15, 20, 20]

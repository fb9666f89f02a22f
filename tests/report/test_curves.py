"""Reading a run's events: what is damaged is left out and counted, and the columns hold what was logged."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2.errors import RequestError
from gpt2.report.curves import read_run, read_runs, smooth, thin
from tests.report.runs import gpt2_config, make_events, write_run

CONFIG = gpt2_config()


def test_events_come_sorted_by_kind(tmp_path: Path) -> None:
    events = make_events(CONFIG, 1000, skips=(31,))
    run = read_run(write_run(tmp_path / "run", CONFIG, events[::-1]))
    assert run.name == "run"
    assert run.config == CONFIG
    assert run.steps("step") == list(range(10, 1001, 10))
    assert run.column("step", "loss") == [e["loss"] for e in events if e["event"] == "step"]
    assert run.steps("skip") == [31]
    assert run.finished
    assert run.last_step == 1000
    assert not run.damaged
    assert not run.torn


def test_minutes_of_what_was_not_timed_lie_between_the_steps_around_it(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", CONFIG, make_events(CONFIG, 100)))
    assert run.seconds_at(20) == pytest.approx(23)
    assert run.seconds_at(15) == pytest.approx(1.15 * 15)
    assert run.seconds_at(5) == pytest.approx(1.15 * 5)
    assert run.seconds_at(1_000) == pytest.approx(115)


def test_damaged_lines_are_left_out_and_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", CONFIG, make_events(CONFIG, 100))
    whole = (run / "metrics.jsonl").read_bytes()
    bad = [
        b"\xff\xfe not UTF-8",
        b"[1, 2]",
        b'{"event": "step", "step": 7}',
        b'{"event": "step", "step": true, "loss": 1}',
        b'{"event": "val", "step": 10, "loss": "low", "bits_per_byte": 1, "train_seconds": 1}',
        b'{"event": "sample", "step": 10, "prompt": 1, "text": []}',
        b'{"event": "skip", "step": -3}',
        b'{"event": "skip", "step": 1e3}',
        b'{"event": "skip", "step": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
    ]
    (run / "metrics.jsonl").write_bytes(b"\n".join(bad) + b"\n\n" + whole + b'{"event": "step", "st')
    read = read_run(run)
    assert read.damaged == tuple(range(1, len(bad) + 1))
    assert read.torn
    assert read.steps("step") == list(range(10, 101, 10))


def test_an_event_of_an_unknown_kind_is_no_damage(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", CONFIG, [*make_events(CONFIG, 100), {"event": "weather", "step": 3}])
    assert read_run(run).damaged == ()


def test_what_is_no_run_is_told_in_words(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is no run"):
        read_run(tmp_path)
    run = write_run(tmp_path / "run", CONFIG, [])
    with pytest.raises(RequestError, match="holds no training step"):
        read_run(run)
    (run / "metrics.jsonl").write_text("rubbish\nand more\n")
    with pytest.raises(RequestError, match="2 damaged lines and no training step"):
        read_run(run)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(RequestError, match=r"has no metrics.jsonl yet"):
        read_run(run)
    (run / "metrics.jsonl").mkdir()
    with pytest.raises(RequestError, match="cannot read"):
        read_run(run)


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    events = make_events(CONFIG, 100)
    paths = [write_run(tmp_path / name, CONFIG, events) for name in ("a/run", "b/run", "c")]
    assert [run.name for run in read_runs(paths)] == ["a/run", "b/run", f"{tmp_path.name}/c"]
    assert [run.name for run in read_runs(paths[1:])] == ["run", "c"]
    with pytest.raises(RequestError, match="named twice"):
        read_runs([paths[0], paths[1], paths[0] / ".." / "run"])


@given(st.lists(st.floats(-1e6, 1e6), max_size=200))
def test_smoothing_keeps_length_and_range(values: list[float]) -> None:
    means = smooth(values)
    assert len(means) == len(values)
    assert all(min(values) - 1e-3 <= mean <= max(values) + 1e-3 for mean in means)


def test_smoothing_is_the_mean_over_neighbours() -> None:
    values = [float(i * i % 17) for i in range(100)]
    assert smooth(values)[50] == pytest.approx(sum(values[45:56]) / 11)
    assert smooth([1.0, math.nan, 3.0]) == [1.0, 2.0, 3.0]
    assert all(map(math.isnan, smooth([math.nan, math.inf])))


def test_thinning_keeps_ends_and_extremes(tmp_path: Path) -> None:
    events = make_events(CONFIG, 9_000, every=1)
    steps = [e for e in events if e["event"] == "step"]
    steps[4_321]["loss"], steps[7_777]["grad_norm"] = 99.0, 1234.0
    run = read_run(write_run(tmp_path / "run", CONFIG, events))
    kept = thin(run, 900)
    assert kept[0] == 0
    assert kept[-1] == 8_999
    assert {4_321, 7_777} <= set(kept)
    assert 300 < len(kept) <= 902
    assert json.dumps(kept) == json.dumps(sorted(set(kept)))

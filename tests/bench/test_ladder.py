"""The ladder: which rungs, in which order, and what it reports of them."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch

from gpt2.bench import ladder
from gpt2.bench.ladder import RUNGS, Options, base_config, climb, loss_report
from gpt2.bench.worker import Worker
from gpt2.config import from_dict, preset
from gpt2.errors import RequestError

CPU = torch.device("cpu")


def names(options: Options, data: Path) -> list[str]:
    return [entry.rung.name for entry in climb(options, base_config(options, data, CPU), data, CPU)]


def test_the_rungs_come_in_the_lectures_order(data: Path) -> None:
    order = ["fp32", "tf32", "bf16", "compile", "flash", "nice", "fused-adamw"]
    assert names(Options("tiny"), data)[:7] == order


def test_only_and_without_keep_the_first(data: Path) -> None:
    assert names(Options("tiny", only=("flash",)), data) == ["fp32", "flash"]
    assert "compile" not in names(Options("tiny", without=("compile",)), data)
    with pytest.raises(RequestError, match="known are fp32"):
        Options(only=("flush",))
    with pytest.raises(RequestError, match="the first rung"):
        Options(without=("fp32",))


def test_each_rung_is_one_change_over_the_rung_before(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "RUNGS", tuple(dataclasses.replace(rung, lacking=lambda _: "") for rung in RUNGS))
    entries = climb(Options("tiny"), base_config(Options("tiny"), data, CPU), data, CPU)
    first, last = entries[0].config, entries[-1].config
    assert (first.train.precision, first.train.matmul_precision, first.train.compile) == ("fp32", "highest", False)
    assert (first.model.attention, first.model.padded_vocab_size, first.optim.fused) == ("explicit", 257, False)
    assert (last.train.precision, last.train.matmul_precision, last.train.compile) == ("bf16", "high", True)
    assert (last.model.padded_vocab_size, last.optim.fused) == (384, True)
    for before, entry in itertools.pairwise(entries):
        assert entry.config == from_dict(entry.rung.change, before.config)
        assert entry.config != before.config, entry.rung.name


def test_a_rung_that_the_device_lacks_is_left_out_of_those_after_it(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder, "multiplies_bf16_fast", lambda device: False)
    entries = {e.rung.name: e for e in climb(Options("tiny"), base_config(Options("tiny"), data, CPU), data, CPU)}
    assert "no TF32" in entries["tf32"].skipped
    assert "no bfloat16" in entries["bf16"].skipped
    assert entries["tf32"].worker is None
    assert entries["fused-adamw"].config.train.precision == "fp32"
    assert entries["fused-adamw"].config.train.matmul_precision == "highest"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": -1}, "--batch -1"),
        ({"steps": 0}, "--steps 0"),
        ({"minutes": 0.0}, "--minutes 0"),
        ({"rounds": 0}, "--rounds 0"),
    ],
)
def test_wrong_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Options(**options)  # type: ignore[arg-type]


def test_the_bound_follows_the_precision() -> None:
    plain, off = [10.8, 10.0], [10.8, 10.0 + 1e-3]
    config = preset("tiny")
    fp32 = loss_report(plain, off, config)
    assert fp32["loss_difference"] == pytest.approx(1e-3)
    assert not fp32["loss_within_bound"]
    bf16 = loss_report(plain, off, from_dict({"train": {"precision": "bf16"}}, config))
    assert bf16["loss_within_bound"]
    assert bf16["loss_bound"] == pytest.approx(10.8 / 256)


def test_figures_of_the_rungs(data: Path) -> None:
    """The arithmetic of the report, on turns that are given."""
    options = Options("tiny", only=("flash", "nice"))
    entries = climb(options, base_config(options, data, CPU), data, CPU)
    for entry, seconds in zip(entries, ([1.0, 4.0, 2.0], [1.0, 1.0, 1.0]), strict=False):
        assert isinstance(entry.worker, Worker)
        entry.worker.turns, entry.worker.losses = seconds, [5.0, 4.0]
        entry.worker.facts = {"first_pass_seconds": 9.0}
    assert entries[2].worker is not None
    entries[2].worker.failure = "out of memory"
    base = base_config(options, data, CPU)
    first, flash, nice = ladder.report(entries, base, peak=1e12, loss_steps=20)
    assert first["tokens_per_second"] == base.train.batch_tokens / 2.0
    assert first["gain"] is None
    assert flash["gain"] == flash["gain_total"] == 2.0
    assert flash["loss_difference"] == 0.0
    assert flash["loss_steps"] == 2
    assert flash["compile_seconds"] == 0.0
    assert nice["skipped"] == "out of memory"


def test_the_ladder_whole(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In processes of their own: equal losses, a table, a picture."""
    options = Options("tiny", batch=2, steps=3, rounds=2, minutes=2.0, only=("fused-adamw",))
    report = ladder.ladder(options, data)
    results = report["results"]
    assert [result["name"] for result in results] == ["fp32", "fused-adamw"]
    for result in results:
        assert result["tokens_per_second"] > 0
        assert result["peak_memory"] > 1e7
        assert result["loss_within_bound"], result
        assert result["loss_steps"] == 3
    assert report["config"]["context"] == 32
    ladder.print_table(report)
    assert "fused-adamw" in capsys.readouterr().out
    ladder.plot(report, tmp_path / "ladder.png")
    assert (tmp_path / "ladder.png").stat().st_size > 1000
    json.dumps(report, allow_nan=False)

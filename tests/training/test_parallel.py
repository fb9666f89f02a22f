"""Several processes with gloo: the same losses as one, the same windows at every step, one word for all faults."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import run_ranks, start_ranks
from safetensors.torch import load_file

from gpt2.checkpoint.directory import list_checkpoints, step_of
from gpt2.config import Config
from gpt2.training.metrics import read_metrics


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in read_metrics(run) if event["event"] == "step"]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(list_checkpoints(run)[-1] / "model.safetensors")


def command(config: Config, out: Path, *options: str) -> list[str]:
    return ["train", "--data", config.train.data, "--out", str(out), "--preset", "tiny", *options]


# The recipe's rate; AdamW, no dropout.
RECIPE = ("--optim.lr", "6e-4")


@pytest.fixture(scope="module")
def one_process(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one") / "run"
    argv = ["train", "--data", str(data), "--out", str(out), "--preset", "tiny", *RECIPE]
    assert run_ranks(1, argv, out.with_name("log")) == [0]
    return out


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (2, ()),
        (4, ()),
        (2, ("--train.compile",)),
        (2, ("--train.parallel", "fsdp")),
        (2, ("--train.parallel", "fsdp", "--train.compile", "--model.recompute")),
    ],
)
def test_any_number_of_processes_gives_the_losses_of_one(
    tiny: Config, tmp_path: Path, one_process: Path, world_size: int, options: tuple[str, ...]
) -> None:
    out = tmp_path / "run"
    codes = run_ranks(world_size, command(tiny, out, *RECIPE, *options), tmp_path / "log")
    assert codes == [0] * world_size, (tmp_path / "log.0").read_text()
    assert len(losses(out)) == 20
    assert losses(out) == pytest.approx(losses(one_process), rel=1e-6)
    for kind in ("val", "checkpoint"):
        assert [e["step"] for e in read_metrics(out) if e["event"] == kind] == [
            e["step"] for e in read_metrics(one_process) if e["event"] == kind
        ]
    values = [e["loss"] for e in read_metrics(out) if e["event"] == "val"]
    assert values == pytest.approx([e["loss"] for e in read_metrics(one_process) if e["event"] == "val"], rel=1e-6)
    expected = weights(one_process)
    for name, tensor in weights(out).items():
        # The keys' bias has no gradient but rounding, out of which AdamW makes steps.
        if not name.endswith("c_attn.bias"):
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5, msg=name)
    assert (tmp_path / "log.1").read_text() == ""  # only rank 0 speaks


def test_gradients_may_travel_in_bf16(tiny: Config, tmp_path: Path, one_process: Path) -> None:
    out = tmp_path / "run"
    assert run_ranks(2, command(tiny, out, *RECIPE, "--train.gradient-type", "bf16"), tmp_path / "log") == [0, 0]
    assert losses(out) == pytest.approx(losses(one_process), rel=1e-3)
    assert losses(out)[1:] != pytest.approx(losses(one_process)[1:], rel=1e-7)


def test_a_run_goes_on_with_other_numbers_of_processes(tiny: Config, tmp_path: Path, one_process: Path) -> None:
    """1 -> 2 -> 4 -> 1 processes: the same losses at every step as a run that never changed."""
    out = tmp_path / "run"
    for stage, (world_size, layout) in enumerate([(1, "ddp"), (2, "fsdp"), (4, "ddp"), (1, "ddp")]):
        options = ["--checkpoint.every", "5"]
        if stage == 0:
            argv = command(tiny, out, *RECIPE, *options)
        else:
            argv = ["train", "--resume", str(out), "--train.parallel", layout, *options]
        ranks = start_ranks(world_size, argv, tmp_path / f"log{stage}")
        for process in ranks:
            process.join(120)
        assert [process.exitcode for process in ranks] == [0] * world_size
        if stage < 3:  # as if it had been killed after the checkpoint of this stage
            for path in list_checkpoints(out):
                if step_of(path) > 5 * (stage + 1):
                    (path / "checksums.json").unlink()
    assert len(losses(out)) == 20
    assert losses(out) == pytest.approx(losses(one_process), rel=1e-6)


def test_the_ranks_read_disjoint_parts_of_one_batch(tiny: Config, tmp_path: Path) -> None:
    from gpt2.data.loader import BatchLoader
    from gpt2.data.shards import Dataset

    loader = BatchLoader(Dataset.open(Path(tiny.train.data)).split("train"), 32, 8, seed=3)
    for step in (0, 3, 200):
        whole = loader.batch(step)[0]
        for world_size in (1, 2, 4, 8):
            each = 8 // world_size
            parts = [loader.batch(step, rank * each, each)[0] for rank in range(world_size)]
            assert (whole == [row for part in parts for row in part]).all()


def test_windows_that_cannot_be_shared_are_one_line(tiny: Config, tmp_path: Path) -> None:
    codes = run_ranks(3, command(tiny, tmp_path / "run"), tmp_path / "log")
    assert codes == [2, 2, 2]
    text = (tmp_path / "log.0").read_text()
    assert "8 windows a step cannot be shared by 3 processes: use train.batch_tokens 192 or 288" in text
    assert text.count("\n") == 1
    assert (tmp_path / "log.1").read_text() == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("receiver", [0, 1])
def test_a_signal_to_any_rank_saves_and_stops_all(tiny: Config, tmp_path: Path, receiver: int) -> None:
    out = tmp_path / "run"
    argv = command(tiny, out, "--train.steps", "1000000", "--eval.every", "0")
    ranks = start_ranks(2, argv, tmp_path / "log")
    wait_for_steps(out)
    os.kill(ranks[receiver].pid or 0, signal.SIGTERM)
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [143, 143]
    assert step_of(list_checkpoints(out)[-1]) == len(losses(out))


def test_a_dead_rank_ends_the_others_with_one_line(tiny: Config, tmp_path: Path) -> None:
    out = tmp_path / "run"
    ranks = start_ranks(2, command(tiny, out, "--train.steps", "1000000", "--eval.every", "0"), tmp_path / "log")
    wait_for_steps(out)
    ranks[1].kill()
    ranks[0].join(60)
    assert ranks[0].exitcode == 1
    assert "another process is gone" in (tmp_path / "log.0").read_text()


def test_a_hung_rank_is_given_up_after_the_timeout(tiny: Config, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ("--train.steps", "1000000", "--eval.every", "0", "--train.collective-timeout", "3")
    ranks = start_ranks(2, command(tiny, out, *options), tmp_path / "log")
    wait_for_steps(out)
    os.kill(ranks[1].pid or 0, signal.SIGSTOP)
    ranks[0].join(60)
    ranks[1].kill()
    assert ranks[0].exitcode == 1
    text = (tmp_path / "log.0").read_text()
    assert "did not answer within 3 s (train.collective_timeout)" in text
    assert "Traceback" not in text


def test_torchrun_restarts_the_group_after_kill_9_and_the_loss_is_undisturbed(tiny: Config, tmp_path: Path) -> None:
    out = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = [*RECIPE, "--checkpoint.every", "5", "--train.steps", "150"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = tmp_path / "quiet"
    assert run_ranks(2, command(tiny, quiet, *options), tmp_path / "log") == [0, 0]
    process = subprocess.Popen(
        [*torchrun, "--max-restarts", "2", "-m", "gpt2", *command(tiny, out, *options)],
        stderr=subprocess.PIPE,
        env=environment,
    )
    wait_for_steps(out, 10)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr.decode()[-2000:]
    assert sum(event["event"] == "start" for event in read_metrics(out)) == 2
    assert losses(out) == losses(quiet)


def wait_for_steps(run: Path, steps: int = 3) -> None:
    deadline = time.monotonic() + 90
    while len(losses(run)) < steps:
        assert time.monotonic() < deadline
        time.sleep(0.02)

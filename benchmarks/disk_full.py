"""A disk that is full in the middle of a save: a run on a tmpfs of 50 MB, filled while it trains.

sudo python benchmarks/disk_full.py [--steps 1000]     writes results/disk_full.json

Needs root on Linux (it mounts a tmpfs). Room is left for half a checkpoint, so that the next save breaks off in its
middle. Then: do the older checkpoints verify, does the message say what is full, does the run go on once there is space
(by itself, or by the same command where it stopped), and does it end with the same figures as a run on a roomy disk.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common

from gpt2.checkpoint.directory import list_checkpoints, verify_checkpoint
from gpt2.errors import WorkError
from gpt2.training.metrics import read_metrics

MEGABYTES = 50
EVERY = 50
# 0.8 M parameters: a checkpoint of 10 MB, three of them and the one being written fit.
FIELDS = ["--preset", "tiny", "--model.n-layer", "4", "--model.n-embd", "128", "--eval.windows", "1"]


@contextlib.contextmanager
def small_disk() -> Iterator[Path]:
    """A mounted tmpfs; unmounted afterwards."""
    with tempfile.TemporaryDirectory(prefix="disk-") as directory:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m", "tmpfs", directory])
        if done.returncode != 0:
            sys.exit("disk_full.py mounts a tmpfs: start it as root on Linux")
        try:
            yield Path(directory)
        finally:
            subprocess.run(["umount", directory], check=True)


def wait_for(what: str, condition: Callable[[], bool], seconds: float = 120) -> None:
    """Looks every 10 ms; ends the script where it does not come."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            sys.exit(f"waited {seconds:g} s in vain: {what}")
        time.sleep(0.01)


def sizes(path: Path) -> int:
    """Bytes of the files in a directory."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def damaged(run: Path) -> list[str]:
    """What is wrong with the run's checkpoints."""
    found = []
    for path in list_checkpoints(run):
        try:
            verify_checkpoint(path)
        except WorkError as error:
            found.append(str(error))
    return found


def train(data: Path, run: Path, steps: int, output: Path) -> "subprocess.Popen[bytes]":
    """`gpt2 train` under way, its words in `output`."""
    command = [sys.executable, "-m", "gpt2", "train", "--data", str(data), "--out", str(run), *FIELDS]
    command += ["--train.steps", str(steps), "--checkpoint.every", str(EVERY), "--eval.every", "0"]
    with open(output, "ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def losses(run: Path) -> dict[int, float]:
    """Step -> training loss."""
    return {event["step"]: event["loss"] for event in read_metrics(run) if event["event"] == "step"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="roomy-") as roomy, small_disk() as disk:
        data, undisturbed, output = Path(roomy, "data"), Path(roomy, "run"), Path(roomy, "output")
        prepare = [sys.executable, "-m", "gpt2", "prepare", "sotu", "--out", str(data), "--tokenizer", "bytes"]
        subprocess.run(prepare, check=True, stdout=subprocess.DEVNULL)
        if train(data, undisturbed, args.steps, Path(roomy, "undisturbed")).wait() != 0:
            sys.exit(Path(roomy, "undisturbed").read_text())

        run, ballast = disk / "run", disk / "ballast"
        process = train(data, run, args.steps, output)
        wait_for("two checkpoints", lambda: process.poll() is not None or len(list_checkpoints(run)) >= 2)
        before = [path.name for path in list_checkpoints(run)]
        checkpoint = sizes(list_checkpoints(run)[-1])
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - checkpoint // 2
        with open(ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, free)
        filled = time.monotonic()
        wait_for("a word about the full disk", lambda: process.poll() is not None or "No space left" in said(output))
        said_after = time.monotonic() - filled
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=2)
        goes_on_by_itself = process.poll() is None
        message = next(line for line in said(output).splitlines() if "No space left" in line)
        result: dict[str, Any] = {
            "name": f"tmpfs of {MEGABYTES} MB, filled up to half a checkpoint",
            "checkpoint_bytes": checkpoint,
            "checkpoints_before": before,
            "checkpoints_while_full": [path.name for path in list_checkpoints(run)],
            "damaged_while_full": damaged(run),
            "message": message,
            "message_seconds_after_filling": round(said_after, 2),
            "message_names_the_checkpoint": "step_" in message and "Traceback" not in said(output),
            "training_goes_on_while_full": goes_on_by_itself,
        }
        print(message)
        ballast.unlink()
        if not goes_on_by_itself:
            result["exit_code_when_full"] = process.returncode
            process = train(data, run, args.steps, output)
        result["exit_code_at_the_end"] = process.wait()
        ours, theirs = losses(run), losses(undisturbed)
        result |= {
            "checkpoints_at_the_end": [path.name for path in list_checkpoints(run)],
            "damaged_at_the_end": damaged(run),
            "temporaries_left": len(list(run.glob("checkpoints/.tmp-*"))),
            "steps": max(ours),
            "steps_with_another_loss_than_undisturbed": sum(ours.get(step) != loss for step, loss in theirs.items()),
            "last_loss": ours[max(ours)],
        }
        if result["exit_code_at_the_end"] != 0:
            print(said(output))
    result["passed"] = (
        result["exit_code_at_the_end"] == 0
        and result["message_names_the_checkpoint"]
        and result["training_goes_on_while_full"]
        and bool(result["checkpoints_while_full"])
        and not result["damaged_while_full"]
        and not result["damaged_at_the_end"]
        and not result["temporaries_left"]
        and not result["steps_with_another_loss_than_undisturbed"]
    )
    print(json.dumps(result, indent=2))
    print(common.write("disk_full", {"megabytes": MEGABYTES, "steps": args.steps, "every": EVERY}, [result]))
    sys.exit(0 if result["passed"] else 1)


def said(output: Path) -> str:
    """What the run has printed, without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", output.read_text(encoding="utf-8", errors="replace"))


if __name__ == "__main__":
    main()

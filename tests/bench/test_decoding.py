"""Decoding beside other programs: the same ids into each, turns in order, failures told, the figures' arithmetic."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2.bench import decoders, decoding
from gpt2.bench.compiled import Compiled
from gpt2.bench.decoders import OURS, Contender, Ids, Program, Shape
from gpt2.bench.decoding import Case, DecodeWorker
from gpt2.bench.graphs import OpenVinoGraph
from gpt2.bench.process import Child
from gpt2.cli import main
from gpt2.config import GPTConfig
from gpt2.errors import RequestError, WorkError
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer
from tests.interop.programs import greedy, make_checkpoint

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=32, n_ctx=32, vocab_size=257, pad_vocab_to=64)
SHAPE = Shape(2, 12, 257, 1)
PROMPTS = [[1, 2, 3, 4], [250, 7, 7, 0]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), CONFIG, Tokenizer.from_name("bytes"), spread=0.2)


@pytest.fixture(scope="module")
def oracle(model: Path) -> list[list[int]]:
    """8 tokens after each prompt, every position computed again for every token."""
    network = GPT.from_pretrained(model)
    return [greedy(network, prompt, 8)[0] for prompt in PROMPTS]


class Counting:
    """A contender that counts upwards from the last token of a prompt."""

    def __init__(self, converted: Path, model: Path, shape: Shape) -> None:
        self.setting: dict[str, Any] = {"weights": (converted / "made").read_text(encoding="utf-8")}

    def generate(self, prompts: Ids, tokens: int) -> list[list[int]]:
        return [[prompt[-1] + 1 + i for i in range(tokens)] for prompt in prompts]


def made(model: Path, out: Path) -> None:
    (out / "made").write_text("of nothing", encoding="utf-8")


log: list[str] = []


class Pretended(DecodeWorker):
    """A worker without a process, whose calls take what the test says."""

    seconds_a_token = 1.0

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        log.append(f"start {self.name}")
        self._process = object()  # type: ignore[assignment]
        self.facts = {"torch": True, "setting": {}}
        self.starts.append(5.0)

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        log.append(f"{self.name} {tokens}")
        if self.name == "openvino" and tokens > 2:
            raise WorkError("openvino ended (exit code 1)")
        self.ids = [list(range(tokens)) for _ in prompts]
        return 2.0 + self.seconds_a_token * (tokens - 1)

    def stop(self) -> None:
        self._process = None


def pretended(*names: str) -> list[Pretended]:
    log.clear()
    return [Pretended(name, Path(), Path(), SHAPE) for name in names]


def test_names_are_checked() -> None:
    assert decoding.parse_programs(["llama.cpp", "openvino"], "cpu") == ["llama.cpp", "openvino"]
    assert decoding.parse_programs(["all"], "cuda:0") == ["transformers", "compiled"]
    for names, device, message in (
        (["llama"], "cpu", "known are llama.cpp, openvino"),
        (["openvino", "openvino"], "cpu", "twice"),
        (["openvino"], "cuda", "runs on cpu here, not on cuda"),
        ([OURS], "cpu", "in any case"),
    ):
        with pytest.raises(RequestError, match=message):
            decoding.parse_programs(names, device)


def test_cases_are_checked() -> None:
    decoding.check(Case(1, 16, 16), 32)
    with pytest.raises(RequestError, match="16 \\+ 17 tokens are more than the model's context 32"):
        decoding.check(Case(1, 16, 17), 32)
    with pytest.raises(RequestError, match="--batch 0 must be at least 1"):
        decoding.check(Case(0, 16, 16), 32)


def test_prompts_differ_and_are_the_same_each_time() -> None:
    prompts = decoding.make_prompts(Case(16, 64, 1), 257)
    assert prompts == decoding.make_prompts(Case(16, 64, 1), 257)
    assert len({tuple(prompt) for prompt in prompts}) == 16
    assert {len(prompt) for prompt in prompts} == {64}
    assert max(max(prompt) for prompt in prompts) < 256  # 256 is end-of-text


def test_turns_are_taken_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "SETTLE_SECONDS", 0.0)
    workers = pretended("a", "b")
    case = Case(2, 4, 5, starts=2)
    assert decoding.measure(workers, PROMPTS, case, 2, float("inf"), lambda _: None) == 2
    turn = ["a 2", "a 1", "a 5", "b 2", "b 1", "b 5"]
    assert log == ["start a", "start b"] * 2 + turn * 2
    log.clear()
    assert decoding.measure(workers, PROMPTS, case, 50, 0.0, lambda _: None) == 1


def test_one_that_fails_leaves_the_others_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "SETTLE_SECONDS", 0.0)
    workers = pretended(OURS, "openvino", "llama.cpp")
    decoding.measure(workers, PROMPTS, Case(2, 4, 5), 2, float("inf"), lambda _: None)
    assert [worker.failure for worker in workers] == ["", "openvino ended (exit code 1)", ""]
    assert len(workers[2].wholes) == 2
    broken = pretended("openvino")
    with pytest.raises(WorkError, match="exit code 1"):
        decoding.measure(broken, PROMPTS, Case(2, 4, 5), 1, float("inf"), lambda _: None)


def test_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode: sequences x steps over what the longer call takes beyond the shorter; prefill: prompts over that."""
    monkeypatch.setattr(decoding, "SETTLE_SECONDS", 0.0)
    ours, other = pretended(OURS, "transformers")
    ours.seconds_a_token = 0.5
    case = Case(2, 4, 5)
    decoding.measure([ours, other], PROMPTS, case, 3, float("inf"), lambda _: None)
    other.ids[0][3] = 99
    result = decoding.result_of(other, ours, case, import_torch=3.0)
    assert result["tokens_per_second"] == pytest.approx(2.0)
    assert result["ms_per_step"] == pytest.approx(1000.0)
    assert result["ours_over_this"] == pytest.approx(2.0)
    assert result["prefill_tokens_per_second"] == pytest.approx(4.0)
    assert result["prefill_ours_over_this"] == pytest.approx(1.0)
    assert result["start_beyond_torch_seconds"] == pytest.approx(2.0)
    assert result["same_tokens"] == pytest.approx((3 / 5 + 1) / 2)
    alone = Case(2, 4, 1)
    for worker in (ours, other):
        worker.generate(PROMPTS, 1)
    assert decoding.result_of(other, ours, alone, 3.0)["tokens_per_second"] == pytest.approx(4.0)


def test_the_process_converts_opens_generates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(decoders.PROGRAMS, "counting", Program({}, made, Counting))
    answer = decoding.answers()
    answer({"do": "convert", "program": "counting", "model": "", "out": str(tmp_path / "x" / "counting")})
    shape = {"batch": 2, "context": 12, "vocabulary": 257, "threads": 1, "device": "cpu"}
    where = {"converted": str(tmp_path / "x" / "counting"), "model": "", "shape": shape}
    assert answer({"do": "open", "program": "counting", **where})["setting"] == {"weights": "of nothing"}
    said = answer({"do": "generate", "prompts": PROMPTS, "tokens": 3})
    assert said["ids"] == [[5, 6, 7], [1, 2, 3]]
    assert said["peak_bytes"] >= said["resident_bytes"] > 0
    json.dumps(said)


def test_too_few_tokens_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that ends at end-of-text would seem faster than it is."""
    worker = DecodeWorker("ctranslate2", Path(), Path(), SHAPE)
    short = {"ids": [[1, 2, 3], [1]], "seconds": 1.0, "resident_bytes": 1, "peak_bytes": 1}
    monkeypatch.setattr(Child, "ask", lambda self, request: short)
    with pytest.raises(WorkError, match=r"gave \[1, 3\] tokens where 3 were asked for"):
        worker.generate(PROMPTS, 3)


def test_what_was_made_of_another_model_is_not_used_again(model: Path, tmp_path: Path) -> None:
    before = decoding.fingerprint(model)
    assert before == decoding.fingerprint(model)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    other = decoding.fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"xy")
    assert len({before, other, decoding.fingerprint(tmp_path)}) == 3


def opened(name: str, model: Path) -> Contender:
    return decoders.program(name).open(model, model, SHAPE)


def test_ours_chooses_the_oracles_tokens(model: Path, oracle: list[list[int]]) -> None:
    ours = opened(OURS, model)
    assert ours.generate(PROMPTS, 8) == oracle
    assert ours.generate(PROMPTS, 8) == oracle  # the second call sees nothing of the first


def test_transformers_chooses_the_oracles_tokens(model: Path, oracle: list[list[int]]) -> None:
    pytest.importorskip("transformers")
    assert opened("transformers", model).generate(PROMPTS, 8) == oracle


def test_the_compiled_loop_chooses_the_oracles_tokens(
    model: Path, oracle: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda step, **options: step)
    compiled = Compiled(model, SHAPE)
    assert compiled.generate(PROMPTS, 8) == oracle
    assert compiled.generate(PROMPTS, 8) == oracle


@torch.no_grad()
def test_openvinos_graph_is_the_network(model: Path) -> None:
    """The prompt in two pieces, the second behind the keys and values of the first."""
    network = GPT.from_pretrained(model)
    graph = OpenVinoGraph(network)
    idx = torch.tensor(PROMPTS)
    empty = [torch.zeros(2, 2, 0, 16) for _ in range(4)]
    ones, places = torch.ones(2, 4, dtype=torch.long), torch.arange(4).expand(2, 4)
    _, *past = graph(idx[:, :3], ones[:, :3], places[:, :3], empty)
    logits, *_ = graph(idx[:, 3:], ones, places[:, 3:], list(past))
    torch.testing.assert_close(logits[:, -1, :257], network(idx)[0][:, -1], rtol=1e-4, atol=1e-4)


def test_bench_decode_whole(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the command line; a program that is not installed is told with its pip command."""
    monkeypatch.setattr(decoders.importlib.util, "find_spec", lambda name: None if name == "llama_cpp" else True)
    options = "--prompt 4 --tokens 4 --batch 2 --rounds 1 --starts 1 --device cpu --threads 1 --against llama.cpp"
    assert main(["bench", "decode", str(model), *options.split(), "--work", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["bench"] == "decode"
    ours, other = report["results"]
    assert ours["name"] == OURS
    assert ours["tokens_per_second"] > 0
    assert ours["same_tokens"] == 1.0
    assert other["tokens_per_second"] is None
    assert "pip install llama-cpp-python gguf" in other["failed"]
    assert main(["bench", "decode", str(model), "--prompt", "40"]) == 2
    assert "more than the model's context 32" in capsys.readouterr().err

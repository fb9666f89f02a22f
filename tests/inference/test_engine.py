"""Generation: the cache against none, stop texts, streams, seeds, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gpt2
from gpt2.checkpoint.directory import TrainingState, write_checkpoint
from gpt2.config import Config as RunConfig
from gpt2.config import GPTConfig, to_toml
from gpt2.errors import RequestError, WorkError
from gpt2.inference.engine import Engine, window
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer

BYTES = Tokenizer.from_name("bytes")
CONFIG = GPTConfig(vocab_size=257, n_ctx=16, n_layer=2, n_head=2, n_embd=32)


def network(seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    model = GPT(CONFIG)
    for parameter in model.parameters():
        parameter.data.mul_(8)  # far from an even guess
    return model


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(network(), BYTES)


@pytest.fixture(scope="module")
def oracle() -> Engine:
    return Engine(network(), BYTES, use_cache=False)


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 1.3, "seed": 4, "top_k": 5},
    {"temperature": 1.0, "seed": 5, "top_p": 0.9},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("prompt", ["", "h", "hello", "exactly 16 bytes"])
def test_cached_equals_uncached_across_the_contexts_border(
    engine: Engine, oracle: Engine, prompt: str, options: dict[str, Any]
) -> None:
    expected = oracle.generate(prompt, max_tokens=60, **options)
    assert engine.generate(prompt, max_tokens=60, **options) == expected
    many = engine.generate_many(prompt, 3, max_tokens=60, **options)
    assert many == oracle.generate_many(prompt, 3, max_tokens=60, **options)
    assert many[0] == expected


def test_sample_i_does_not_depend_on_how_many(engine: Engine) -> None:
    five = engine.generate_many("ab", 5, max_tokens=20, temperature=1.0, seed=7)
    assert engine.generate_many("ab", 2, max_tokens=20, temperature=1.0, seed=7) == five[:2]
    assert len(set(five)) > 1


def test_greedy_follows_the_plain_formula(engine: Engine) -> None:
    model = network().eval()
    ids = BYTES.encode("plain")
    for _ in range(8):
        ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    assert engine.generate("plain", max_tokens=8, temperature=0) == BYTES.decode(ids[5:])


def test_the_stream_is_the_text_in_whole_characters(engine: Engine) -> None:
    for seed in range(5):
        options = {"max_tokens": 40, "temperature": 1.5, "seed": seed}
        pieces = list(engine.stream("x", **options))
        assert "".join(pieces) == engine.generate("x", **options)
        assert all(pieces)


class Scripted(Engine):
    """Says a given text, byte by byte, whatever the logits."""

    def __init__(self, text: bytes) -> None:
        super().__init__(network(), BYTES)
        self.text = text

    def say(self, monkeypatch: pytest.MonkeyPatch) -> "Scripted":
        script = iter([*self.text, BYTES.eot])
        monkeypatch.setattr("gpt2.inference.engine.sample", lambda *_: next(script))
        return self


def test_utf8_is_never_split(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Scripted("é世界!".encode()).say(monkeypatch)
    assert list(engine.stream("", max_tokens=99)) == ["é", "世", "界", "!"]


def test_a_character_that_never_ends_is_shown_as_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Scripted("世".encode()[:2] + b"").say(monkeypatch).generate("", max_tokens=2) == "�"


@pytest.mark.parametrize(
    ("stop", "expected"), [("END", "one two "), ("two", "one "), (["zzz", "e"], "on"), ("nothing", "one two END three")]
)
def test_stop_texts_end_and_are_never_shown(
    monkeypatch: pytest.MonkeyPatch, stop: str | list[str], expected: str
) -> None:
    engine = Scripted(b"one two END three").say(monkeypatch)
    pieces = list(engine.stream("", max_tokens=99, stop=stop))
    assert "".join(pieces) == expected
    shown = ""
    for piece in pieces:
        shown += piece
        assert expected.startswith(shown)


def test_end_of_text_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Scripted(b"done").say(monkeypatch).generate("", max_tokens=99) == "done"


def test_max_tokens_bounds_the_length(engine: Engine) -> None:
    assert engine.generate("abc", max_tokens=0) == ""
    assert len(BYTES.encode(Engine(network(), BYTES).generate("abc", max_tokens=3, temperature=0))) <= 9


def test_the_window_refills_with_its_newer_half() -> None:
    lengths = [len(window(list(range(n)), 16)) for n in range(1, 40)]
    assert lengths[:16] == list(range(1, 17))
    assert lengths[16:25] == list(range(8, 17))
    assert lengths[25:34] == list(range(8, 17))
    assert window(list(range(20)), 16)[-1] == 19


def test_nothing_global_is_drawn(engine: Engine) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    engine.generate("a", max_tokens=5, temperature=1.0, seed=1)
    assert torch.equal(before, torch.get_rng_state())


def test_wrong_requests(engine: Engine) -> None:
    with pytest.raises(RequestError, match="17 tokens, the model's context 16"):
        engine.generate("seventeen bytes!!")
    with pytest.raises(RequestError, match="must be at least 1"):
        engine.generate_many("a", 0)
    with pytest.raises(RequestError, match="must be at least 0"):
        engine.generate("a", max_tokens=-1)
    with pytest.raises(RequestError, match="stop text must not be empty"):
        engine.generate("a", stop="")
    with pytest.raises(RequestError, match="do not belong together"):
        Engine(GPT(replace(CONFIG, vocab_size=300)), BYTES)


def test_padded_ids_cannot_come_out() -> None:
    model = GPT(CONFIG)
    model.wte.weight.data[257:] = 100.0  # if the padding were looked at, it would win
    tokens = {int(Engine(model, BYTES).logits([i]).argmax()) for i in range(20)}
    assert all(token < 257 for token in tokens)
    assert Engine(model, BYTES).logits([1]).shape == (257,)


def test_load_takes_a_run_a_checkpoint_and_its_newest_good_one(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(to_toml(RunConfig()))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(WorkError, match="no good checkpoint"):
        gpt2.load(tmp_path)
    for step in (1, 2):
        write_checkpoint(tmp_path, CONFIG, network(step).state_dict(), BYTES, {}, TrainingState(step=step))
    newest = gpt2.load(tmp_path)
    assert torch.equal(newest.model.wte.weight[:257], network(2).wte.weight[:257])
    (tmp_path / "checkpoints" / "step_000002" / "vocab.json").write_text("{}")
    assert torch.equal(gpt2.load(tmp_path).model.wte.weight[:257], network(1).wte.weight[:257])
    assert gpt2.load(tmp_path / "checkpoints" / "step_000001").tokenizer.name == "bytes"


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, CONFIG, network().state_dict(), BYTES, {}, TrainingState(step=1))
    for name in ("tokenizer.json", "vocab.json"):
        (path / name).unlink()
    with pytest.raises(RequestError, match="holds no tokenizer"):
        gpt2.load(path)

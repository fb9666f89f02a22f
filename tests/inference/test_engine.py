"""Generation: the cache against none, stop texts, streams, seeds, what is loaded and what is refused."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

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


def network(seed: int = 0, config: GPTConfig = CONFIG) -> GPT:
    torch.manual_seed(seed)
    model = GPT(config)
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
    expected = oracle.generate(prompt, max_tokens=40, **options)
    assert engine.generate(prompt, max_tokens=40, **options) == expected
    many = engine.generate_many(prompt, 3, max_tokens=40, **options)
    assert many == oracle.generate_many(prompt, 3, max_tokens=40, **options)
    assert many[0] == expected


@pytest.mark.parametrize("n_ctx", [1, 2, 3])
@pytest.mark.parametrize("attention", ["explicit", "flash"])
def test_cached_equals_uncached_in_the_smallest_contexts(n_ctx: int, attention: str) -> None:
    model = network(config=replace(CONFIG, n_ctx=n_ctx, attention=attention))
    for options in OPTIONS[:2]:
        expected = Engine(model, BYTES, use_cache=False).generate_many("a", 2, max_tokens=9, **options)
        assert Engine(model, BYTES).generate_many("a", 2, max_tokens=9, **options) == expected


def test_a_token_costs_one_position(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt is computed once for all samples; after that one position each, until the context is refilled."""
    shapes = []
    forward = GPT.forward

    def noted(self: GPT, idx: Tensor, *args: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
        shapes.append(tuple(idx.shape))
        return forward(self, idx, *args, **named)

    monkeypatch.setattr(GPT, "forward", noted)
    engine.generate_many("five!", 3, max_tokens=14, temperature=1.0, seed=0)
    assert shapes == [(1, 5), *[(3, 1)] * 11, (3, 8), (3, 1)]


def test_sample_i_does_not_depend_on_how_many(engine: Engine) -> None:
    five = engine.generate_many("ab", 5, max_tokens=20, temperature=1.0, seed=7)
    for n in (1, 2, 4):
        assert engine.generate_many("ab", n, max_tokens=20, temperature=1.0, seed=7) == five[:n]
    assert len(set(five)) == 5


def test_a_sample_that_has_ended_leaves_the_others_alone() -> None:
    model = network()
    model.wte.weight.data[BYTES.eot] *= 2  # end-of-text comes often
    ending = Engine(model, BYTES)
    options: dict[str, Any] = {"max_tokens": 30, "temperature": 1.0, "seed": 1}
    alone = [ending.generate_many("ab", i + 1, **options)[i] for i in range(6)]
    assert ending.generate_many("ab", 6, **options) == alone
    assert Engine(model, BYTES, use_cache=False).generate_many("ab", 6, **options) == alone
    assert len({len(BYTES.encode(text)) for text in alone}) > 2  # some ended early, at different places


def test_seeds(engine: Engine) -> None:
    def text(seed: int | None) -> str:
        return engine.generate("a", max_tokens=12, temperature=1.0, seed=seed)

    assert text(1) == text(1)
    assert text(0) != text(1) != text(-1)
    text(2**63), text(2**64 + 5)  # any whole number is a seed
    assert len({text(None) for _ in range(5)}) > 1  # short texts of few likely bytes may well agree


@pytest.mark.parametrize("seed", [None, 1])
def test_nothing_global_is_drawn_or_seeded(engine: Engine, seed: int | None) -> None:
    before = torch.get_rng_state()
    engine.generate("a", max_tokens=5, temperature=1.0, seed=seed)
    assert torch.equal(before, torch.get_rng_state())


def test_greedy_follows_the_plain_formula(engine: Engine) -> None:
    model = network().eval()
    ids = BYTES.encode("plain")
    for _ in range(8):
        ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    assert engine.generate("plain", max_tokens=8, temperature=0) == BYTES.decode(ids[5:])


def test_an_empty_prompt_starts_a_document(engine: Engine) -> None:
    logits = network().eval()(torch.tensor([[BYTES.eot]]))[0][0, -1]
    assert torch.equal(engine.logits([BYTES.eot]), logits.detach())
    first = BYTES.decode([int(logits.argmax())])
    assert engine.generate("", max_tokens=1, temperature=0) == first


def test_a_prompt_may_be_token_ids(engine: Engine) -> None:
    ids = engine.tokenizer.encode("the people")
    assert engine.generate(ids, seed=1) == engine.generate("the people", seed=1)
    assert engine.generate([], seed=1) == engine.generate("", seed=1)


def test_the_stream_is_the_text_in_whole_characters(engine: Engine) -> None:
    for seed in range(5):
        options: dict[str, Any] = {"max_tokens": 40, "temperature": 1.5, "seed": seed}
        pieces = list(engine.stream("x", **options))
        assert "".join(pieces) == engine.generate("x", **options)
        assert all(pieces)


def test_the_stream_gives_each_token_as_it_comes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def letter(*_: Any) -> int:
        drawn.append(ord("a") + len(drawn))
        return drawn[-1]

    monkeypatch.setattr("gpt2.inference.engine.sample", letter)
    for i, piece in enumerate(engine.stream("", max_tokens=5), 1):
        assert piece == "abcde"[i - 1]
        assert len(drawn) == i


class Scripted(Engine):
    """Says given tokens, whatever the logits; the network behind it is as small as can be."""

    def __init__(self, ids: list[int], tokenizer: Tokenizer = BYTES) -> None:
        super().__init__(GPT(GPTConfig(tokenizer.vocab_size, n_ctx=256, n_layer=1, n_head=1, n_embd=4)), tokenizer)
        self.ids = ids

    def _run(self, *args: Any) -> Iterator[list[str]]:
        script = iter([*self.ids, self.tokenizer.eot])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("gpt2.inference.engine.sample", lambda *_: next(script))
            yield from super()._run(*args)


def test_utf8_is_never_split() -> None:
    assert list(Scripted(BYTES.encode("é世界👍!")).stream("", max_tokens=99)) == ["é", "世", "界", "👍", "!"]


def test_a_character_that_never_ends_is_shown_as_broken() -> None:
    half = list("世".encode()[:2])
    assert Scripted(half).generate("", max_tokens=2) == "�"  # no more tokens
    assert Scripted(half).generate("", max_tokens=9) == "�"  # the end of the text
    assert list(Scripted([*half, ord("a")]).stream("", max_tokens=9)) == ["�a"]
    assert Scripted(half).generate("", max_tokens=9, stop="�") == ""


BPE = Tokenizer.train(["abab cab abc. " * 20, "the cab stops. " * 20], 272)


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.text("abc. é", max_size=24),
    st.lists(st.text("abc. é", min_size=1, max_size=5), max_size=3),
    st.sampled_from([BYTES, BPE]),
    st.integers(0, 26),
)
@example("abab cab", ["b c", "ab c"], BPE, 26)
@example("ababc", ["ababb", "abc"], BYTES, 26)
def test_stop_texts_end_and_are_never_shown(text: str, stops: list[str], tokenizer: Tokenizer, tokens: int) -> None:
    ids = tokenizer.encode(text)
    expected = tokenizer.decode(ids[:tokens])
    for n in range(len(ids[:tokens]) + 1):  # the oracle: after each token look at the whole text
        said = tokenizer.decode(ids[:n])
        places = [said.find(stop) for stop in stops if stop in said]
        if places:
            expected = said[: min(places)]
            break
    engine = Scripted(ids, tokenizer)
    pieces = list(engine.stream("", max_tokens=tokens, stop=stops))
    assert "".join(pieces) == expected  # so no piece ever held a part of a stop text that came
    assert all(pieces)
    assert engine.generate("", max_tokens=tokens, stop=stops) == expected
    assert engine.generate_many("", 1, max_tokens=tokens, stop=stops) == [expected]


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("END", "one two "),
        (["zzz", "e"], "on"),
        ([], "one two END"),
        (None, "one two END"),
        ("END of it", "one two END"),  # it began and did not come: it is said after all
    ],
)
def test_stop_is_a_text_or_several(stop: str | list[str] | None, expected: str) -> None:
    assert Scripted(list(b"one two END")).generate("", max_tokens=99, stop=stop) == expected


def test_what_may_become_a_stop_text_is_held_back_and_no_more() -> None:
    pieces = list(Scripted(list(b"a STO b STOP c")).stream("", max_tokens=99, stop="STOP"))
    assert pieces == ["a", " ", "STO ", "b", " "]


def test_generation_stops_computing_when_all_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, calls = Scripted(list(b"ab.cdef")), []
    forward = GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda *args, **named: calls.append(1) or forward(*args, **named))
    assert engine.generate("", max_tokens=200, stop=".") == "ab"
    assert len(calls) == 3


def test_end_of_text_ends_and_is_not_text() -> None:
    assert Scripted([*b"done", BYTES.eot, *b"more"]).generate("", max_tokens=99) == "done"
    assert Scripted([BYTES.eot]).generate("", max_tokens=99) == ""


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_max_tokens_counts_tokens(max_tokens: int) -> None:
    assert Scripted(list(b"abcdefgh")).generate("xyz", max_tokens=max_tokens) == "abcdefgh"[:max_tokens]


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 20), st.integers(1, 90))
def test_the_window_is_the_newest_part_and_refills_by_half(n_ctx: int, n: int) -> None:
    history = list(range(n))
    rows = window(history, n_ctx)
    assert 1 <= len(rows) <= n_ctx
    assert rows == history[-len(rows) :]
    assert len(rows) == n if n <= n_ctx else len(rows) >= max(1, n_ctx // 2)
    # The next one grows by its token, or is refilled because this one is full.
    after = len(window([*history, n], n_ctx))
    assert after == (len(rows) + 1 if len(rows) < n_ctx else max(1, n_ctx // 2))


def test_wrong_requests(engine: Engine) -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        ("the prompt has 17 tokens, the model's context 16", {"prompt": "seventeen bytes!!"}),
        ("max_tokens = -1 must be at least 0", {"max_tokens": -1}),
        ("a stop text must not be empty", {"stop": ""}),
        ("a stop text must not be empty", {"stop": ["a", ""]}),
        ("temperature -1 must be at least 0", {"temperature": -1}),
        ("top_k 0 must be at least 1", {"top_k": 0}),
        ("top_p 2 must be in", {"top_p": 2}),
    ]
    for expected, change in cases:
        # The stream is refused when it is asked for, not at its first piece.
        for call in (engine.generate, engine.stream, lambda **k: engine.generate_many(n=2, **k)):
            with pytest.raises(RequestError, match=expected):
                call(**({"prompt": "a"} | change))
    with pytest.raises(RequestError, match="n = 0 must be at least 1"):
        engine.generate_many("a", 0)
    with pytest.raises(RequestError, match="the model has 300 tokens, its tokenizer 257: they do not belong together"):
        Engine(GPT(replace(CONFIG, vocab_size=300)), BYTES)


def test_weights_that_are_no_numbers_are_one_line() -> None:
    model = network()
    model.ln_f.weight.data[0] = float("nan")
    for options in OPTIONS:
        with pytest.raises(WorkError, match="the model's output is not a number: its weights are spoilt"):
            Engine(model, BYTES).generate("a", max_tokens=3, **options)


def test_padded_ids_cannot_come_out() -> None:
    model = GPT(CONFIG)
    model.wte.weight.data[257:] = 100.0  # if the padding were looked at, it would win
    assert Engine(model, BYTES).logits([1]).shape == (257,)
    for text in Engine(model, BYTES).generate_many("a", 4, max_tokens=30, temperature=5.0, seed=0):
        BYTES.encode(text)  # an id from 257 upwards would have been refused by the tokenizer


def test_load_takes_a_run_a_checkpoint_and_its_newest_good_one(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(to_toml(RunConfig()))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(WorkError, match="no good checkpoint: it has not reached its first one"):
        gpt2.load(tmp_path)
    for step in (1, 2):
        write_checkpoint(tmp_path, CONFIG, network(step).state_dict(), BYTES, {}, TrainingState(step=step))
    newest = gpt2.load(str(tmp_path))
    assert torch.equal(newest.model.wte.weight[:257], network(2).wte.weight[:257])
    assert not newest.model.training
    assert gpt2.load(tmp_path / "checkpoints" / "step_000001").tokenizer.name == "bytes"
    assert newest.generate("a", max_tokens=9, temperature=0) == Engine(network(2), BYTES).generate(
        "a", max_tokens=9, temperature=0
    )
    (tmp_path / "checkpoints" / "step_000002" / "vocab.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"vocab\.json is altered.*step_000001 is taken instead"):
        older = gpt2.load(tmp_path)
    assert torch.equal(older.model.wte.weight[:257], network(1).wte.weight[:257])
    (tmp_path / "checkpoints" / "step_000001" / "config.json").write_text("{}")
    with pytest.raises(WorkError, match=r"no good checkpoint: .*vocab\.json is altered"):
        gpt2.load(tmp_path)


def test_load_takes_a_hugging_face_directory(tmp_path: Path) -> None:
    step = write_checkpoint(tmp_path, CONFIG, network().state_dict(), BYTES, {}, TrainingState())
    (step / "checksums.json").unlink()
    (step / "tokenizer.json").unlink()  # vocab.json and merges.txt, as OpenAI has them, will do
    assert gpt2.load(step).tokenizer.hash == BYTES.hash
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (step / name).unlink()
    with pytest.raises(RequestError, match="holds no tokenizer"):
        gpt2.load(step)


def test_weights_alone_with_gpt2s_vocabulary_have_gpt2s_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_name("gpt2")
    config = replace(CONFIG, vocab_size=50257, n_layer=1, n_embd=4)
    step = write_checkpoint(tmp_path, config, GPT(config).state_dict(), tokenizer, {}, TrainingState())
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        (step / name).unlink()
    assert gpt2.load(step).tokenizer.name == "gpt2"


def test_what_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "other").mkdir()
    step = write_checkpoint(tmp_path / "run", CONFIG, network().state_dict(), BYTES, {}, TrainingState())
    other = write_checkpoint(tmp_path / "other", CONFIG, network().state_dict(), BYTES, {}, TrainingState())
    Tokenizer.train(["some words and some more words"], 258).save(other)
    cases: list[tuple[Any, str, str]] = [
        (tmp_path / "nothing", "auto", "there is no directory"),
        (tmp_path, "auto", "holds no config.json"),
        (tmp_path / "file", "auto", "there is no directory"),
        (tmp_path / "file" / "x", "auto", "there is no directory"),
        ("/" + "x" * 5000, "auto", "there is no directory"),
        (step, "abacus", "the device 'abacus' is not here"),
        (other, "auto", "the model has 257 tokens, its tokenizer 258"),
    ]
    for model, device, expected in cases:
        with pytest.raises(RequestError, match=expected) as error:
            gpt2.load(model, device)
        assert len(str(error.value).splitlines()) == 1


def test_public_names_are_loaded_when_asked_for() -> None:
    code = """
import sys, gpt2
assert set(gpt2.__all__) == {"GPT", "GPTConfig", "__version__", "load"}
assert not {"torch", "gpt2.config", "gpt2.model"} & set(sys.modules)
assert gpt2.GPTConfig(n_layer=3).n_layer == 3
assert "torch" not in sys.modules
from gpt2 import GPT, GPTConfig, load
import gpt2.model, gpt2.inference.engine
assert GPT is gpt2.GPT is gpt2.model.GPT and load is gpt2.load is gpt2.inference.engine.load
try:
    gpt2.nothing
except AttributeError as error:
    print(error)
"""
    root = Path(gpt2.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "module 'gpt2' has no attribute 'nothing'", done.stderr

"""Many sequences in flight: the logits of the training network, and for each the tokens that it would get alone."""

import contextlib
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt2.config import GPTConfig
from gpt2.errors import RequestError, WorkError
from gpt2.inference.compiled import CompiledDecoder
from gpt2.inference.decoder import Decoder, TorchDecoder, UncachedDecoder
from gpt2.inference.engine import Completion, Engine
from gpt2.inference.native import NativeDecoder
from gpt2.inference.quantize import quantize_model
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer
from tests.inference import oracle

BYTES = Tokenizer.from_name("bytes")
CONFIG = GPTConfig(vocab_size=257, n_ctx=24, n_layer=2, n_head=2, n_embd=32)


def network(config: GPTConfig = CONFIG) -> GPT:
    torch.manual_seed(0)
    model = GPT(config)
    for parameter in model.parameters():
        parameter.data.mul_(6)  # far from an even guess
    return model.eval()


def native(model: GPT, slots: int) -> NativeDecoder:
    return NativeDecoder(quantize_model(model), slots, threads=1)


def static(model: GPT, slots: int) -> CompiledDecoder:
    """Its shapes and its cache, without the compiler, which takes long."""
    with patch.object(torch, "compile", lambda step, **options: step):
        return CompiledDecoder(model, slots)


MAKERS = [TorchDecoder, UncachedDecoder, static, native]


@pytest.mark.parametrize("attention", ["explicit", "flash"])
@pytest.mark.parametrize("make", MAKERS)
def test_logits_are_those_of_the_training_network(make: Callable[[GPT, int], Decoder], attention: str) -> None:
    """Prefill in pieces and token by token, several sequences of different lengths in one step."""
    model = network(GPTConfig(257, n_ctx=24, n_layer=2, n_head=2, n_embd=32, attention=attention))
    decoder = make(model, 4)
    texts = [torch.randint(0, 257, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (9, 20, 1)]
    if make is native:
        weights = oracle.from_quantized(quantize_model(model))
        expected = [oracle.reference(weights, text).float() for text in texts]
        # 1e-6, were it not for a number that float32 may move past the middle between two whole ones.
        tolerance = 2e-2 * expected[1].abs().max().item()
    else:
        with torch.inference_mode():
            expected = [model(torch.tensor([text]))[0][0] for text in texts]
        tolerance = 1e-4
    first, second, third = texts
    prefill = decoder.step(first[:5] + second[:12], [3] * 5 + [0] * 12, [*range(5), *range(12)], [4, 10, 16])
    given = [expected[0][4], expected[1][5], expected[1][11]]
    torch.testing.assert_close(prefill, torch.stack(given), atol=tolerance, rtol=0)
    for i in range(4):
        ids, slots, places = [first[5 + i], second[12 + i]], [3, 0], [5 + i, 12 + i]
        if i == 0:
            ids, slots, places = [*ids, third[0]], [*slots, 1], [*places, 0]
        logits = decoder.step(ids, slots, places, list(range(len(ids))))
        given = [expected[0][5 + i], expected[1][12 + i], *([expected[2][0]] if i == 0 else [])]
        torch.testing.assert_close(logits, torch.stack(given), atol=tolerance, rtol=0)
    mixed = decoder.step([*second[16:20], 7], [0] * 4 + [1], [*range(16, 20), 1], [3])
    torch.testing.assert_close(mixed[0], expected[1][19], atol=tolerance, rtol=0)


@pytest.mark.parametrize("make", MAKERS)
def test_a_copy_goes_its_own_way(make: Callable[[GPT, int], Decoder]) -> None:
    decoder = make(network(), 3)
    decoder.step([1, 2, 3], [0] * 3, [0, 1, 2], [])
    decoder.copy_slot(0, 2)
    ours = decoder.step([4, 5], [0, 2], [3, 3], [0, 1])
    alone = torch.cat([decoder.step([4], [0], [3], [0]), decoder.step([5], [2], [3], [0])])
    torch.testing.assert_close(ours, alone, atol=1e-5, rtol=0)
    decoder.free_slot(0)
    torch.testing.assert_close(decoder.step([5], [2], [3], [0])[0], ours[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", MAKERS)
def test_what_is_out_of_range_is_refused(make: Callable[[GPT, int], Decoder]) -> None:
    decoder = make(network(), 2)
    for arguments in (
        ([257], [0], [0], [0]),
        ([-1], [0], [0], [0]),
        ([1], [2], [0], [0]),
        ([1], [0], [24], [0]),
        ([1], [0], [0], [1]),
        ([1, 2], [0, 0], [0, 1], [1, 0]),
        ([1, 2], [0], [0, 1], [1]),
    ):
        with pytest.raises(RequestError):
            decoder.step(*arguments)
    assert decoder.step([], [], [], []).shape == (0, 257)


def alone(make: Callable[[GPT, int], Decoder], model: GPT, request: tuple[bytes, int, int]) -> str:
    prompt, tokens, seed = request
    engine = Engine(model, BYTES, decoder=make(model, 1))
    return engine.generate(list(prompt), tokens, temperature=1.0, seed=seed)


@pytest.mark.parametrize("make", [TorchDecoder, static, native])
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.binary(min_size=1, max_size=24), st.integers(0, 30), st.integers(0, 9)), max_size=7),
    st.data(),
)
def test_each_gets_what_it_would_get_alone(
    make: Callable[[GPT, int], Decoder], requests: list[tuple[bytes, int, int]], data: st.DataObject
) -> None:
    """Whoever joins, leaves or is cancelled beside it; with fewer slots than requests, past a full context."""
    model = network()
    engine = Engine(model, BYTES, decoder=make(model, 3))
    waiting, made = list(enumerate(requests)), dict[int, Completion]()
    cancelled = data.draw(st.sets(st.integers(0, 6), max_size=2))
    while waiting or not all(completion.ended for completion in made.values()):
        if waiting and data.draw(st.booleans()):
            number, (prompt, tokens, seed) = waiting.pop(0)
            made[number] = engine.submit(list(prompt), tokens, temperature=1.0, seed=seed)
        engine.step()
        for number in cancelled & made.keys():
            made[number].cancel()
    assert not engine.step()
    for number, completion in made.items():
        expected = alone(make, model, requests[number])
        assert completion.text == expected if number not in cancelled else expected.startswith(completion.text)


def test_a_cancelled_one_makes_room_at_once() -> None:
    engine = Engine(network(), BYTES, decoder=TorchDecoder(network(), 1))
    first, second = engine.submit("a", 20, seed=1), engine.submit("b", 1, seed=2)
    engine.step()
    assert not second.tokens
    first.cancel()
    engine.step()
    assert second.ended
    assert len(second.tokens) == 1


class Failing(TorchDecoder):
    """Fails at some of its calls; gives NaN for one slot if asked to."""

    failures: list[BaseException]
    spoilt: int | None = None

    def step(self, ids: Any, slots: Any, positions: Any, outputs: Any) -> torch.Tensor:
        if self.failures:
            raise self.failures.pop()
        logits = super().step(ids, slots, positions, outputs)
        for row, output in enumerate(outputs):
            if slots[output] == self.spoilt:
                logits[row] = float("nan")
        return logits


def test_after_a_step_that_failed_all_go_on() -> None:
    decoder = Failing(network(), 3)
    decoder.failures = []
    engine = Engine(network(), BYTES, decoder=decoder)
    completions = [engine.submit(prompt, 12, temperature=1.0, seed=5) for prompt in ("a", "bcd", "a")]
    while not all(completion.ended for completion in completions):
        decoder.failures = [WorkError("no memory"), KeyboardInterrupt()]
        for failure in (KeyboardInterrupt, WorkError):
            with pytest.raises(failure):
                engine.step()
        assert engine.step()
    for completion, prompt in zip(completions, ("a", "bcd", "a"), strict=True):
        assert completion.text == Engine(network(), BYTES).generate(prompt, 12, temperature=1.0, seed=5)


def test_an_interrupt_between_two_tokens_loses_none(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(network(), BYTES)
    completions = [engine.submit(prompt, 12, temperature=1.0, seed=5) for prompt in ("a", "bcd")]
    choose, calls = Completion._choose, iter(range(1000))

    def interrupted(self: Completion, logits: torch.Tensor) -> None:
        if next(calls) % 3 == 1:
            raise KeyboardInterrupt
        choose(self, logits)

    monkeypatch.setattr(Completion, "_choose", interrupted)
    while not all(completion.ended for completion in completions):
        with contextlib.suppress(KeyboardInterrupt):
            engine.step()
    monkeypatch.undo()
    for completion, prompt in zip(completions, ("a", "bcd"), strict=True):
        assert completion.text == Engine(network(), BYTES).generate(prompt, 12, temperature=1.0, seed=5)


def test_numbers_that_are_none_end_their_own_completion() -> None:
    decoder = Failing(network(), 3)
    decoder.failures = []
    engine = Engine(network(), BYTES, decoder=decoder)
    first, second, third = (engine.submit(prompt, 6, temperature=1.0, seed=5) for prompt in "abc")
    engine.step()
    decoder.spoilt = second._slot
    with pytest.raises(WorkError, match="not a number"):
        engine.step()
    decoder.spoilt = None
    while engine.step():
        pass
    assert (len(first.tokens), len(second.tokens), len(third.tokens)) == (6, 1, 6)


def test_a_wrong_id_is_told_at_the_call_and_a_stream_that_is_never_read_does_nothing() -> None:
    engine = Engine(network(), BYTES)
    for ids in ([257], [1, -1]):
        with pytest.raises(RequestError, match="the model has 257"):
            engine.submit(ids)
    engine.stream("abc")
    assert not engine.step()


def test_a_stream_that_nobody_reads_to_its_end_leaves() -> None:
    engine = Engine(network(), BYTES)
    pieces = engine.stream("abc", 20, temperature=1.0, seed=3)
    next(pieces)
    pieces.close()
    assert not engine.step()


def test_wrong_values_are_told_at_the_call() -> None:
    engine = Engine(network(), BYTES)
    for options, said in (({"max_tokens": -1}, "max_tokens"), ({"stop": ""}, "stop"), ({"top_k": 0}, "top_k")):
        with pytest.raises(RequestError, match=said):
            engine.stream("a", **options)
    with pytest.raises(RequestError, match="25 tokens"):
        engine.submit("x" * 25)
    assert not engine.step()

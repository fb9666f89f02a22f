"""Packed, batched scores against one sequence after the other."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpt2.config import GPTConfig
from gpt2.errors import RequestError
from gpt2.evaluation import likelihood
from gpt2.evaluation.likelihood import COMPILED_LENGTHS, Question, Score, score
from gpt2.model import GPT

CONFIG = GPTConfig(vocab_size=61, n_ctx=64, n_layer=2, n_head=2, n_embd=16, pad_vocab_to=8)
CPU = torch.device("cpu")


def make_model(config: GPTConfig = CONFIG, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # far from uniform, so that a wrong mask or position shows
    return model


def make_questions(n: int, seed: int = 0, endings: int = 4) -> list[Question]:
    draw = np.random.default_rng(seed)
    return [
        Question(
            draw.integers(0, 61, draw.integers(1, 40)).tolist(),
            [draw.integers(0, 61, draw.integers(1, 20)).tolist() for _ in range(endings)],
        )
        for _ in range(n)
    ]


@torch.no_grad()
def plain(model: nn.Module, question: Question) -> list[Score]:
    """Each ending in a pass of its own."""
    scores = []
    for ending in question.endings:
        row = torch.tensor([[*question.context, *ending]])
        logits = model(row)[0][0, len(question.context) - 1 : -1]
        target = row[0, len(question.context) :]
        nats = F.cross_entropy(logits, target, reduction="none").double().sum().item()
        scores.append(Score(nats, len(ending), bool((logits.argmax(-1) == target).all())))
    return scores


def assert_same(found: list[list[Score]], model: nn.Module, questions: list[Question]) -> None:
    assert len(found) == len(questions)
    for scores, question in zip(found, questions, strict=True):
        for one, expected in zip(scores, plain(model, question), strict=True):
            assert one.nats == pytest.approx(expected.nats, abs=1e-4)
            assert (one.tokens, one.greedy) == (expected.tokens, expected.greedy)


@pytest.mark.parametrize("attention", ["flash", "explicit"])
@pytest.mark.parametrize("batch_tokens", [1, 100, 5000])
def test_equals_one_sequence_at_a_time(attention: str, batch_tokens: int) -> None:
    model, questions = make_model(replace(CONFIG, attention=attention)), make_questions(30)
    assert_same(score(model, questions, 64, CPU, batch_tokens, greedy=True), model, questions)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 60), min_size=1, max_size=20),
            st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=9), min_size=0, max_size=6),
        ),
        max_size=5,
    ),
    st.integers(1, 80),
)
def test_any_number_of_endings_of_any_length(drawn: list[tuple[list[int], list[list[int]]]], batch_tokens: int) -> None:
    model = make_model()
    questions = [Question(context, endings) for context, endings in drawn]
    assert_same(score(model, questions, 64, CPU, batch_tokens, greedy=True), model, questions)


def test_greedy_is_found_where_it_is_so() -> None:
    model = make_model()
    context, ending = [1, 2, 3], []
    for _ in range(4):
        ending.append(int(model(torch.tensor([context + ending]))[0][0, -1].argmax()))
    question = Question(context, [ending, [*ending[:-1], (ending[-1] + 1) % 61]])
    assert [s.greedy for s in score(model, [question], 64, CPU, greedy=True)[0]] == [True, False]
    assert [s.greedy for s in score(model, [question], 64, CPU)[0]] == [False, False]


def test_endings_that_do_not_fit_into_a_row_go_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "LONGEST_ROW", 50)
    model, questions = make_model(), make_questions(10, endings=9)
    assert_same(score(model, questions, 64, CPU, greedy=True), model, questions)


def test_a_network_without_packing_gets_one_ending_a_row_and_ids_alone() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_model()

        def forward(self, idx: Tensor) -> tuple[Tensor, None]:
            return self.inner(idx)[0], None

    model, questions = Other(), make_questions(8)
    assert_same(score(model, questions, 64, CPU, 200, greedy=True), model, questions)


def test_a_context_computed_once_spares_tokens() -> None:
    model, sizes = make_model(), []
    model.register_forward_pre_hook(lambda _, args: sizes.append(args[0].numel()))
    questions = [Question(list(range(40)), [[1, 2, 3]] * 4)]
    score(model, questions, 64, CPU)
    assert sum(sizes) == 40 + 4 * 2


def test_compiled_shapes_are_few_and_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, questions = make_model(), make_questions(40)
    shapes: set[tuple[tuple[int, ...], ...]] = set()

    def record(function: object, dynamic: bool) -> object:
        assert not dynamic

        def call(*tensors: Tensor) -> object:
            shapes.add(tuple(tuple(t.shape) for t in tensors))
            return function(*tensors)  # type: ignore[operator]

        return call

    monkeypatch.setattr(torch, "compile", record)
    assert_same(score(model, questions, 64, CPU, 256, compiled=True, greedy=True), model, questions)
    assert 1 < len(shapes) <= len(COMPILED_LENGTHS)
    assert all(idx[0] == 256 // idx[1] and idx[1] in COMPILED_LENGTHS for idx, *_ in shapes)
    assert all(at == (idx[0] * idx[1],) for idx, _, at, _ in shapes)


def test_one_graph_for_each_compiled_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # traced, no machine code
    torch.compiler.reset()
    counters.clear()
    model, questions = make_model(replace(CONFIG, n_layer=1)), make_questions(12, seed=1)
    lengths = {len(q.context) + sum(len(e) - 1 for e in q.endings) > COMPILED_LENGTHS[0] for q in questions}
    assert_same(score(model, questions, 64, CPU, 256, compiled=True, greedy=True), model, questions)
    assert counters["stats"]["unique_graphs"] == len(lengths) == 2
    assert not counters["graph_break"]
    torch.compiler.reset()


def test_draws_no_random_number_and_leaves_the_mode_alone() -> None:
    model = make_model(replace(CONFIG, dropout=0.5)).train()
    state = torch.get_rng_state()
    questions = make_questions(5)
    first = score(model, questions, 64, CPU)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert first == score(model, questions, 64, CPU)
    assert score(model.eval(), questions, 64, CPU) == first
    assert not model.training


def test_bf16_is_near() -> None:
    model, questions = make_model(), make_questions(10)
    exact, near = score(model, questions, 64, CPU), score(model, questions, 64, CPU, precision="bf16")
    for a, b in zip(exact, near, strict=True):
        for one, other in zip(a, b, strict=True):
            assert other.nats == pytest.approx(one.nats, rel=0.05, abs=0.3)
            assert other.nats != one.nats


def test_progress_ends_at_the_whole() -> None:
    seen: list[tuple[int, int]] = []
    score(make_model(), make_questions(20), 64, CPU, 100, progress=lambda done, total: seen.append((done, total)))
    assert len(seen) > 3
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]


def test_refuses_what_does_not_fit_and_an_unknown_precision() -> None:
    model = make_model()
    score(model, [Question([0] * 60, [[1] * 5])], 64, CPU)  # 65 tokens: the last one is only predicted
    with pytest.raises(RequestError, match="of 66 tokens do not fit"):
        score(model, [Question([0] * 60, [[1] * 5, [1] * 6])], 64, CPU)
    with pytest.raises(RequestError, match="fp8"):
        score(model, [], 64, CPU, precision="fp8")

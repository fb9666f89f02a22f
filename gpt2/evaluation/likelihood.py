"""How likely a model finds given endings of given contexts: what multiple-choice scores are made of.

A question's endings share its context, which is computed once: a row is the context and behind it the endings, each
of which sees the context and itself.

    tokens     c c c c | a a a | b b | - -        c context, a and b endings without their last tokens, - filling
    positions  0 1 2 3 | 4 5 6 | 4 5 | 0 0        the last token of a text predicts nothing that is asked for
    segment    0 0 0 0 | 1 1 1 | 2 2 | * *        a query sees its own segment and segment 0, up to itself
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpt2.distributed import multiplies_bf16_fast
from gpt2.errors import RequestError
from gpt2.model import GPT, Packing

LONGEST_ROW = 1024  # the mask is quadratic in a row's tokens: more endings go to another row
# Row lengths under torch.compile, which makes one graph of each; longer rows are multiples of the last.
COMPILED_LENGTHS = (64, 128, 192, 256, 384, 512, 768, 1024)
PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class Question:
    """A context and its possible endings, as token ids. None of them is empty."""

    context: Sequence[int]
    endings: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Score:
    """One ending, given its context."""

    nats: float
    """Sum of the losses of the ending's tokens: minus its log-likelihood."""
    tokens: int
    """Tokens of the ending."""
    greedy: bool
    """Whether each token is the likeliest one at its place; False where that was not asked for."""


@dataclass(frozen=True)
class _Row:
    """Some of a question's endings: those from `first` on."""

    question: int
    first: int
    context: Sequence[int]
    endings: Sequence[Sequence[int]]

    @property
    def length(self) -> int:
        """Tokens that go through the network."""
        return len(self.context) + sum(len(ending) - 1 for ending in self.endings)


@dataclass(frozen=True)
class _Batch:
    """Rows as arrays: B rows of T tokens, n tokens to be predicted."""

    idx: np.ndarray
    """(B, T) int64."""
    positions: np.ndarray
    """(B, T) int64."""
    segments: np.ndarray
    """(B, T) int64: 0 for the context, i for the i-th ending, -1 for filling."""
    at: np.ndarray
    """(n,) int64: the place among the B·T from which each token is predicted."""
    targets: np.ndarray
    """(n,) int64; -100 for filling."""
    endings: list[tuple[int, int, int]]
    """(question, ending, its tokens) in the order of the targets."""


@torch.inference_mode()
def score(
    model: nn.Module,
    questions: Sequence[Question],
    n_ctx: int,
    device: torch.device,
    batch_tokens: int = 0,
    precision: str = "auto",
    compiled: bool = False,
    greedy: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Score]]:
    """The scores of each question's endings.

    model: a GPT; or another network with `logits, _ = model(idx)`, which computes the context anew for each ending.
    batch_tokens: tokens in one forward pass; 0: 512 on a CPU, 4,096 elsewhere (the logits of GPT-2 small: 0.9 GB).
    precision: bf16 runs under autocast; auto takes it where the device multiplies it fast. Losses are float32,
    their sums float64. compiled: a few fixed shapes (COMPILED_LENGTHS) under torch.compile.
    greedy: find out whether each ending is the likeliest one, token by token.
    progress: called with (tokens done, tokens in all) after each pass.
    Raises RequestError for a context and an ending that together are longer than n_ctx + 1 tokens.
    """
    for question in questions:
        longest = len(question.context) + max(map(len, question.endings), default=0)
        if longest > n_ctx + 1:
            raise RequestError(f"a context and ending of {longest} tokens do not fit into the model's {n_ctx} + 1")
    packs = isinstance(model, GPT)
    rows = [row for i, question in enumerate(questions) for row in _rows(i, question, packs)]
    batch_tokens = batch_tokens or (512 if device.type == "cpu" else 4096)

    def losses(idx: Tensor, packing: Tensor | None, at: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = _logits(model, idx, packing, at).float()  # (n, vocab_size)
        nats = F.cross_entropy(logits, targets, reduction="none", ignore_index=-100)
        return nats, logits.argmax(-1) == targets if greedy else None

    function: Callable[..., tuple[Tensor, Tensor | None]] = losses
    if compiled:
        function = torch.compile(losses, dynamic=False)
    done, total = 0, sum(row.length for row in rows)
    results: list[tuple[list[tuple[int, int, int]], Tensor, Tensor | None]] = []
    was_training = model.training
    model.eval()
    # One autocast for all passes: it keeps the weights that it has cast.
    with torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(precision, device)):
        for batch in _batches(rows, batch_tokens, compiled):
            packing = None
            if any(ending > 0 for _, ending, _ in batch.endings) or compiled:
                packing = torch.from_numpy(np.stack([batch.positions, batch.segments])).to(device)
            idx, at, targets = (torch.from_numpy(a).to(device) for a in (batch.idx, batch.at, batch.targets))
            nats, likeliest = function(idx, packing if packs else None, at, targets)
            results.append((batch.endings, nats, likeliest))
            done += int((batch.segments >= 0).sum())
            if progress is not None:
                progress(done, total)
    model.train(was_training)
    scores: list[list[Score | None]] = [[None] * len(question.endings) for question in questions]
    for endings, nats, likeliest in results:
        yes = np.zeros(len(nats), dtype=bool) if likeliest is None else likeliest.cpu().numpy()
        _spread(endings, nats.cpu().double().numpy(), yes, scores)
    return [[s for s in of_question if s is not None] for of_question in scores]


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether `precision` (auto, fp32 or bf16) is bf16 on this device. Raises RequestError for another word."""
    if precision not in PRECISIONS:
        raise RequestError(f"--precision {precision} must be one of {', '.join(PRECISIONS)}")
    return precision == "bf16" or (precision == "auto" and multiplies_bf16_fast(device))


def _logits(model: nn.Module, idx: Tensor, packing: Tensor | None, at: Tensor) -> Tensor:
    """(n, vocab_size) logits at the given places of (B, T) ids. packing: (2, B, T) positions and segments."""
    if not isinstance(model, GPT):
        logits: Tensor = model(idx)[0]
        return logits.flatten(0, 1)[at]
    packed = None
    if packing is not None:
        positions, segments = packing  # (B, T) each
        T = idx.size(1)
        causal = torch.ones(T, T, dtype=torch.bool, device=idx.device).tril()
        key, query = segments[:, None, None, :], segments[:, None, :, None]
        packed = Packing(positions, causal & ((key == 0) | (key == query)))  # (B, 1, T, T)
    logits = model(idx, packing=packed, at=at)[0]
    return logits


def _rows(i: int, question: Question, packs: bool) -> Iterator[_Row]:
    """The question's endings, as many in a row as fit into LONGEST_ROW; one in a row without packing."""
    first, length = 0, len(question.context)
    for j, ending in enumerate(question.endings):
        length += len(ending) - 1
        if j > first and (not packs or length > LONGEST_ROW):
            yield _Row(i, first, question.context, question.endings[first:j])
            first, length = j, len(question.context) + len(ending) - 1
    if question.endings:
        yield _Row(i, first, question.context, question.endings[first:])


def _batches(rows: Sequence[_Row], batch_tokens: int, fixed: bool) -> Iterator[_Batch]:
    """Rows of nearly equal length together, the longest first, so that memory that does not suffice shows at once.

    fixed: only shapes that follow from the row length: of COMPILED_LENGTHS, the number of rows and of targets.
    """
    ordered = sorted(rows, key=lambda row: row.length, reverse=True)
    start = 0
    while start < len(ordered):
        T = _padded_length(ordered[start].length, fixed)
        B = max(1, batch_tokens // T)
        chosen = ordered[start : start + B]
        if fixed:
            chosen = [row for row in chosen if _padded_length(row.length, fixed) == T]
        yield _fill(chosen, B if fixed else len(chosen), T, fixed)
        start += len(chosen)


def _padded_length(length: int, fixed: bool) -> int:
    if not fixed:
        return -(-length // 8) * 8
    longest = COMPILED_LENGTHS[-1]
    return next((n for n in COMPILED_LENGTHS if n >= length), -(-length // longest) * longest)


def _fill(rows: Sequence[_Row], B: int, T: int, fixed: bool) -> _Batch:
    """The arrays of `rows`, in B rows of T tokens; fixed: the number of targets is a multiple of B·T."""
    idx, positions = np.zeros((B, T), dtype=np.int64), np.zeros((B, T), dtype=np.int64)
    segments = np.full((B, T), -1, dtype=np.int64)
    at: list[np.ndarray] = []
    targets: list[Sequence[int]] = []
    endings: list[tuple[int, int, int]] = []
    for b, row in enumerate(rows):
        c = len(row.context)
        idx[b, :c], positions[b, :c], segments[b, :c] = row.context, np.arange(c), 0
        start = c
        for i, ending in enumerate(row.endings):
            n = len(ending)
            stop = start + n - 1
            idx[b, start:stop] = ending[:-1]
            positions[b, start:stop] = np.arange(c, c + n - 1)
            segments[b, start:stop] = i + 1
            at.append(b * T + np.array([c - 1, *range(start, stop)]))  # the context's end predicts the first token
            targets.append(ending)
            endings.append((row.question, row.first + i, n))
            start = stop
    n = sum(map(len, targets))
    size = -(-n // (B * T)) * B * T if fixed else n
    all_at, all_targets = np.zeros(size, dtype=np.int64), np.full(size, -100, dtype=np.int64)
    all_at[:n], all_targets[:n] = np.concatenate(at), np.concatenate([np.asarray(t) for t in targets])
    return _Batch(idx, positions, segments, all_at, all_targets, endings)


def _spread(
    endings: Sequence[tuple[int, int, int]], nats: np.ndarray, likeliest: np.ndarray, scores: list[list[Score | None]]
) -> None:
    """Sums a batch's (n,) losses over each ending into `scores`."""
    start = 0
    for question, ending, n in endings:
        part = slice(start, start + n)
        scores[question][ending] = Score(float(nats[part].sum()), n, bool(likeliest[part].all()))
        start += n

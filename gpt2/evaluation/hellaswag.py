"""HellaSwag (Zellers et al. 2019): which of four endings continues a text? The completion-style score.

Each ending is judged by the losses of its own tokens behind the context: `acc` takes the lowest sum, `acc_norm` the
lowest mean a token. OpenAI's GPT-2 124M has acc 0.2859 and acc_norm 0.2955; guessing has 0.25.
"""

import hashlib
import json
import os
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from gpt2.errors import RequestError, WorkError
from gpt2.evaluation.likelihood import Question, score
from gpt2.files import TEMPORARY_PREFIX, sha256_file
from gpt2.tokenizer import Tokenizer

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"  # 10,042 items, 12 MB
ENDINGS = 4


@dataclass(frozen=True)
class Item:
    """A context, four endings, and which of them is right."""

    context: str
    endings: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Items:
    """Tokenized items, cut to a model's context."""

    questions: tuple[Question, ...]
    labels: tuple[int, ...]
    contexts_cut: int
    """Contexts that lost tokens on the left."""
    endings_cut: int
    """Endings longer than the model's whole context, which lost tokens on the right."""


@dataclass(frozen=True)
class HellaSwagResult:
    """Counts over the items that were looked at: those of several processes add up."""

    items: int
    correct: int
    """By the lowest sum of losses."""
    correct_norm: int
    """By the lowest mean loss a token."""
    contexts_cut: int
    endings_cut: int
    seconds: float

    def __add__(self, other: "HellaSwagResult") -> "HellaSwagResult":
        """Both together; they ran at the same time."""
        return HellaSwagResult(
            self.items + other.items,
            self.correct + other.correct,
            self.correct_norm + other.correct_norm,
            self.contexts_cut + other.contexts_cut,
            self.endings_cut + other.endings_cut,
            max(self.seconds, other.seconds),
        )

    @property
    def acc(self) -> float:
        """Part of the items whose right ending has the lowest sum of losses."""
        return self.correct / self.items

    @property
    def acc_norm(self) -> float:
        """Part of the items whose right ending has the lowest mean loss."""
        return self.correct_norm / self.items

    def to_dict(self) -> dict[str, Any]:
        """The figures by the names of the command line."""
        return {
            "acc": self.acc,
            "acc_norm": self.acc_norm,
            "items": self.items,
            "contexts_cut": self.contexts_cut,
            "endings_cut": self.endings_cut,
            "seconds": self.seconds,
        }


def evaluate_hellaswag(
    model: nn.Module,
    items: Items,
    n_ctx: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    batch_tokens: int = 0,
    precision: str = "auto",
    compiled: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> HellaSwagResult:
    """The counts over this process's share: every world_size-th item from `rank` on.

    The other arguments are those of `likelihood.score`. Draws no random number; leaves the model in its mode.
    """
    started = time.perf_counter()
    share = slice(rank, None, world_size)
    sums, tokens = losses(model, items.questions[share], n_ctx, device, batch_tokens, precision, compiled, progress)
    labels = np.array(items.labels[share])
    return HellaSwagResult(
        items=len(labels),
        correct=int((sums.argmin(1) == labels).sum()),
        correct_norm=int(((sums / tokens).argmin(1) == labels).sum()),
        contexts_cut=items.contexts_cut if rank == 0 else 0,
        endings_cut=items.endings_cut if rank == 0 else 0,
        seconds=time.perf_counter() - started,
    )


def losses(
    model: nn.Module,
    questions: Sequence[Question],
    n_ctx: int,
    device: torch.device,
    batch_tokens: int = 0,
    precision: str = "auto",
    compiled: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """For each item and ending the (n, 4) sums of losses in nats, and the (n, 4) numbers of tokens."""
    scores = score(model, questions, n_ctx, device, batch_tokens, precision, compiled, progress=progress)
    sums = np.array([[s.nats for s in endings] for endings in scores]).reshape(-1, ENDINGS)
    tokens = np.array([[s.tokens for s in endings] for endings in scores]).reshape(-1, ENDINGS)
    return sums, tokens


def tokenize(items: Sequence[Item], tokenizer: Tokenizer, n_ctx: int) -> Items:
    """The items for a model with a context of n_ctx tokens; an ending is encoded with a space before it.

    The last token of an ending is predicted only, so n_ctx + 1 tokens fit. The four endings keep one context: it is
    cut on the left until the longest of them fits behind it. Where an ending alone does not fit, its first n_ctx
    tokens are judged.
    """
    questions, contexts_cut, endings_cut = [], 0, 0
    for item in items:
        context = tokenizer.encode(item.context) or [tokenizer.eot]
        endings = [tokenizer.encode(" " + ending) for ending in item.endings]
        endings_cut += sum(len(ending) > n_ctx for ending in endings)
        endings = [ending[:n_ctx] for ending in endings]
        room = n_ctx + 1 - max(map(len, endings))
        contexts_cut += len(context) > room
        questions.append(Question(context[-room:], endings))
    return Items(tuple(questions), tuple(item.label for item in items), contexts_cut, endings_cut)


def read_items(path: Path | None = None, limit: int = 0) -> list[Item]:
    """The items of a file of the published form (JSON lines), or of the published validation file, downloaded once.

    limit: so many items, evenly spaced over the file, whose first third is of another kind than the rest; 0: all.
    Raises RequestError where the file cannot be read or a line is no item, WorkError where the download fails.
    """
    path = path or download()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 at byte {error.start}") from error
    items = [_item(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not items:
        raise RequestError(f"{path} holds no HellaSwag items")
    if 0 < limit < len(items):
        items = [items[i * len(items) // limit] for i in range(limit)]
    return items


def _item(line: str, where: str) -> Item:
    try:
        facts = json.loads(line)
        context, endings, label = facts["ctx"], facts["endings"], int(facts["label"])
        texts = isinstance(context, str) and isinstance(endings, list) and all(isinstance(e, str) for e in endings)
        if not texts or len(endings) != ENDINGS or not 0 <= label < ENDINGS:
            raise ValueError("other types or numbers")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RequestError(
            f"{where} is no HellaSwag item ({type(error).__name__}): wanted is a JSON object with ctx, "
            f"{ENDINGS} endings and a label in 0..{ENDINGS - 1}"
        ) from error
    return Item(context, tuple(endings), label)


def cache_directory() -> Path:
    """Where downloads are kept: build-gpt2 in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "build-gpt2"


def download(url: str = URL, sha256: str = SHA256) -> Path:
    """The validation file in the user's cache, fetched if it is not there or altered.

    Raises WorkError where it cannot be fetched or is not the published file.
    """
    path = cache_directory() / "hellaswag_val.jsonl"
    if path.is_file() and sha256_file(path) == sha256:
        return path
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}")
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            data = answer.read()
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise WorkError(f"{url} is not the published HellaSwag file (SHA-256 {found}): give one with --file")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:  # urllib's own errors are OSErrors
        raise WorkError(f"cannot download {url} to {path} ({error}): fetch it elsewhere and give --file") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path

"""Loss on held-out tokens: nats a token, perplexity, bits per byte."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt2.data.shards import Dataset, Split
from gpt2.distributed import Distributed
from gpt2.errors import RequestError
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer

# Mean loss in nats of (B, T) ids against (B, T) targets, -100 ignored.
MeanLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LossResult:
    """Sums over the targets that were looked at."""

    nats: float
    """Sum over the targets."""
    tokens: int
    """Targets."""
    bytes: int
    """UTF-8 bytes that the targets stand for; end-of-text stands for none."""
    seconds: float

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """e to the loss."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Total bits over total bytes: comparable between tokenizers, and with compressors."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    def to_dict(self) -> dict[str, Any]:
        """The figures by the names of the command line."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "seconds": self.seconds,
        }


@torch.no_grad()
def evaluate_loss(
    mean_loss: MeanLoss,
    split: Split,
    tokenizer: Tokenizer,
    context: int,
    distributed: Distributed,
    batch: int = 16,
    windows: int = 0,
    stride: int = 0,
) -> LossResult:
    """The loss on the split's windows of `context` tokens, the last partial one included.

    windows: how many, from the start of the split; 0 for all. stride: tokens from one window's start to the next's;
    0 for the context, so that windows do not overlap. With a smaller one every target is still counted once, in the
    first window that holds it: all but the first window's targets have at least context - stride tokens before them.
    Every forward pass has the same shape (batch, context), filled up with ignored targets, so that a compiled
    network needs one graph. Processes share the batches, each making as many passes, and each gives the whole
    result. Raises RequestError for a stride that is not in 0..context.
    """
    started = time.perf_counter()
    if not 0 <= stride <= context:
        raise RequestError(f"--stride {stride} must be in 1..{context}, the context; or 0 for no overlap")
    stride = stride or context
    last = split.tokens - 1  # targets in the split
    count = 1 + max(0, math.ceil((last - context) / stride))
    if windows:
        count = min(windows, count)
    lengths = np.array(
        [len(tokenizer.decode_bytes([i])) if i != tokenizer.eot else 0 for i in range(tokenizer.vocab_size)]
    )
    nats, tokens, text_bytes = 0.0, 0, 0
    rounds = -(-count // (batch * distributed.world_size))
    for turn in range(rounds):
        first = (turn * distributed.world_size + distributed.rank) * batch
        idx = np.zeros((batch, context), dtype=np.int64)
        targets = np.full((batch, context), -100, dtype=np.int64)
        for row, window in enumerate(range(first, min(first + batch, count))):
            start = window * stride
            stop = min(start + context, last)
            new = 0 if window == 0 else context - stride  # targets before it were counted in earlier windows
            read = split.read(start, stop + 1).astype(np.int64)  # (n + 1,)
            idx[row, : stop - start] = read[:-1]
            targets[row, new : stop - start] = read[1 + new :]
        counted = targets[targets >= 0]  # (n,)
        x, y = (
            torch.from_numpy(idx).to(distributed.device),
            torch.from_numpy(targets).to(distributed.device),
        )  # (batch, context) each
        loss = mean_loss(x, y).item()
        nats += loss * len(counted) if len(counted) else 0.0  # a mean over nothing is NaN
        tokens += len(counted)
        text_bytes += int(lengths[counted].sum())
    nats, all_tokens, all_bytes = distributed.sum([nats, tokens, text_bytes])
    return LossResult(nats, int(all_tokens), int(all_bytes), time.perf_counter() - started)


def evaluate_model_loss(
    model: GPT,
    tokenizer: Tokenizer,
    dataset: Dataset,
    split: str = "val",
    batch: int = 16,
    windows: int = 0,
    stride: int = 0,
) -> LossResult:
    """A finished model's loss on prepared data, in windows of its context.

    Raises RequestError where the data was prepared with another tokenizer or lacks the split.
    """
    if tokenizer.hash != dataset.tokenizer.hash:
        raise RequestError(
            f"the data's tokenizer ({dataset.tokenizer.name}) differs from the model's ({tokenizer.name}): "
            f"prepare the data with --tokenizer {tokenizer.name}"
        )

    def mean_loss(idx: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = model(idx, targets)[1]
        return loss

    model.eval()
    alone = Distributed(rank=0, world_size=1, device=next(model.parameters()).device)
    n_ctx = model.config.n_ctx
    return evaluate_loss(mean_loss, dataset.split(split), tokenizer, n_ctx, alone, batch, windows, stride)

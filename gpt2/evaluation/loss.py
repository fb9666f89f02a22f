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
) -> LossResult:
    """The loss on the split's windows of `context` tokens, without overlap, the last partial one included.

    windows: how many, from the start of the split; 0 for all. Every forward pass has the same shape
    (batch, context), filled up with ignored targets, so that a compiled network needs one graph. Processes
    share the batches, each making as many passes, and each gives the whole result.
    """
    started = time.perf_counter()
    total = split.tokens - 1 if windows == 0 else min(windows * context, split.tokens - 1)
    lengths = np.array(
        [len(tokenizer.decode_bytes([i])) if i != tokenizer.eot else 0 for i in range(tokenizer.vocab_size)]
    )
    nats, text_bytes = 0.0, 0
    size, rank, world_size = batch * context, distributed.rank, distributed.world_size
    rounds = -(-total // (size * world_size))
    for start in range(rank * size, rounds * world_size * size, world_size * size):
        start = min(start, total)
        stop = min(start + size, total)
        tokens = split.read(start, stop + 1).astype(np.int64)  # (n + 1,)
        n = stop - start
        idx = np.zeros(size, dtype=np.int64)
        targets = np.full(size, -100, dtype=np.int64)
        idx[:n], targets[:n] = tokens[:-1], tokens[1:]
        x = torch.from_numpy(idx).view(batch, context).to(distributed.device)
        y = torch.from_numpy(targets).view(batch, context).to(distributed.device)
        loss = mean_loss(x, y).item()
        nats += loss * n if n else 0.0  # a mean over nothing is NaN
        text_bytes += int(lengths[tokens[1:]].sum())
    nats, whole_bytes = distributed.sum([nats, text_bytes])
    return LossResult(nats, total, int(whole_bytes), time.perf_counter() - started)


def evaluate_model_loss(
    model: GPT, tokenizer: Tokenizer, dataset: Dataset, split: str = "val", batch: int = 16, windows: int = 0
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
    return evaluate_loss(mean_loss, dataset.split(split), tokenizer, model.config.n_ctx, alone, batch, windows)

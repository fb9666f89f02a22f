"""How often two networks would write the same next token."""

from dataclasses import dataclass

import torch

from gpt2.data.shards import Split
from gpt2.inference.decoder import TorchDecoder
from gpt2.model import GPT


@dataclass(frozen=True)
class Agreement:
    """Of one network's most likely tokens with another's."""

    tokens: int
    """Tokens that were compared."""
    equal: float
    """Share of them on which the two agree."""
    first_difference: int | None
    """The earliest place in a continuation, counted from 1, at which they differ; None where they never do."""


@torch.no_grad()
def greedy_agreement(model: GPT, other: GPT, split: Split, tokens: int = 256) -> Agreement:
    """`model` continues pieces of the split by its most likely tokens; `other` is asked for its own at every place.

    The other sees the same text at each place, so that one difference does not bring the next: up to the first one
    it would have written the same by itself. The prompts are evenly spaced, a quarter of the context or 64 tokens long,
    the continuations as long as the context allows, at most 64. Both networks are on one device.
    """
    n_ctx, device = model.config.n_ctx, model.wpe.weight.device
    given = min(64, max(1, n_ctx // 4), split.tokens - 1)
    written = min(64, n_ctx - given + 1, tokens)
    count = -(-tokens // written)
    starts = torch.linspace(0, split.tokens - given, count).long().tolist()
    texts = [split.read(start, start + given).tolist() for start in starts]
    decoder, slots = TorchDecoder(model, count), range(count)
    prompts = [decoder.step(ids, [slot] * given, range(given), [given - 1]) for slot, ids in enumerate(texts)]
    likeliest = torch.cat(prompts).argmax(-1).tolist()  # (count,)
    for place in range(given, given + written):
        texts = [[*ids, token] for ids, token in zip(texts, likeliest, strict=True)]
        if place < given + written - 1:
            likeliest = decoder.step(likeliest, slots, [place] * count, slots).argmax(-1).tolist()
    text = torch.tensor(texts, device=device)  # (count, given + written)
    logits = other(text[:, :-1])[0]  # (count, given + written - 1, vocab_size)
    assert logits is not None
    same = logits[:, given - 1 :].argmax(-1) == text[:, given:]  # (count, written)
    places = torch.arange(1, written + 1, device=device).expand_as(same)
    same, places = same.flatten()[:tokens], places.flatten()[:tokens]
    differing = places[~same]
    first = int(differing.min()) if len(differing) else None
    return Agreement(tokens, same.float().mean().item(), first)

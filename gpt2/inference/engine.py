"""Generation: a prompt in, text out as it comes. Knows nothing of terminals or HTTP.

prompt ─ ids ─ prefill: one pass over the prompt ─ decode: one pass a token, over the cache ─ text
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from gpt2 import hf
from gpt2.checkpoint.directory import resolve_model
from gpt2.distributed import find_device
from gpt2.errors import RequestError
from gpt2.inference.kv_cache import KVCache
from gpt2.inference.sampling import Sampling, sample
from gpt2.model import GPT
from gpt2.tokenizer import StreamDecoder, Tokenizer


@dataclass
class _Sequence:
    """One completion in the making."""

    generator: torch.Generator
    stop: tuple[str, ...]
    decoder: StreamDecoder
    waiting: str = ""
    """Text that may yet turn out to be the beginning of a stop text."""
    pieces: list[str] = field(default_factory=list)
    ended: bool = False

    def push(self, text: str) -> str:
        """Takes new text in; gives what is certain not to belong to a stop text."""
        text, self.waiting = self.waiting + text, ""
        ends = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        if ends:
            self.ended = True
            text = text[: min(ends)]
        else:
            held = max((_overlap(text, stop) for stop in self.stop), default=0)
            text, self.waiting = text[: len(text) - held], text[len(text) - held :]
        self.pieces.append(text)
        return text

    def finish(self) -> str:
        """What is left when no more tokens come."""
        if self.ended:
            return ""
        text = self.push(self.decoder.flush())
        if not self.ended:
            self.ended = True
            self.pieces.append(self.waiting)
            text += self.waiting
        return text


class Engine:
    """A network and its tokenizer. `load` makes one from the disk."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, use_cache: bool = True) -> None:
        """use_cache=False computes every position again for every token: slow, and the cache's oracle."""
        if model.config.vocab_size != tokenizer.vocab_size:
            raise RequestError(
                f"the model has {model.config.vocab_size} tokens, its tokenizer "
                f"{tokenizer.vocab_size}: they do not belong together"
            )
        self.model, self.tokenizer, self.use_cache = model.eval(), tokenizer, use_cache

    def generate(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
    ) -> str:
        """The completion of a prompt (a text or token ids), without the prompt; an empty one starts a new document.

        It ends at end-of-text, before a `stop` text, or after max_tokens. When the context is full, the newer half
        of it is kept and generation goes on. The same seed gives the same text. Raises RequestError for a prompt
        longer than the context and for values out of range, WorkError where the network's output is no number.
        """
        return "".join(self.stream(prompt, max_tokens, temperature, top_k, top_p, stop, seed))

    def stream(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
    ) -> Iterator[str]:
        """`generate`, piece by piece: never a part of a character, never a part of a stop text.

        Raises what `generate` raises for a wrong request, and does so now, not when the first piece is asked for.
        """
        sampling = Sampling(temperature, top_k, top_p)
        sequences = self._sequences(1, max_tokens, stop, seed)
        steps = self._run(self._ids(prompt), sequences, max_tokens, sampling)
        return (texts[0] for texts in steps if texts[0])

    def generate_many(
        self,
        prompt: str,
        n: int,
        max_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
    ) -> list[str]:
        """n completions of one prompt, decoded together. The first is that of `generate` with the same seed."""
        if n < 1:
            raise RequestError(f"n = {n} must be at least 1")
        sequences = self._sequences(n, max_tokens, stop, seed)
        for _ in self._run(self._ids(prompt), sequences, max_tokens, Sampling(temperature, top_k, top_p)):
            pass
        return ["".join(sequence.pieces) for sequence in sequences]

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """(vocab_size,) logits of the token after `ids`, without a cache."""
        idx = torch.tensor([list(ids)], device=self._device)  # (1, T)
        logits: Tensor = self.model(idx)[0]  # (1, T, vocab_size)
        return logits[0, -1]

    @property
    def _device(self) -> torch.device:
        return self.model.wte.weight.device

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        ids = ids or [self.tokenizer.eot]
        if len(ids) > self.model.config.n_ctx:
            raise RequestError(
                f"the prompt has {len(ids)} tokens, the model's context {self.model.config.n_ctx}: shorten it"
            )
        return ids

    def _sequences(
        self, n: int, max_tokens: int, stop: str | Sequence[str] | None, seed: int | None
    ) -> list[_Sequence]:
        if max_tokens < 0:
            raise RequestError(f"max_tokens = {max_tokens} must be at least 0")
        stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        if any(not text for text in stops):
            raise RequestError("a stop text must not be empty")
        if seed is None:
            seed = torch.Generator().seed()  # torch.seed() would seed the caller's generator anew
        generators = [torch.Generator().manual_seed((seed + i * 0x9E3779B97F4A7C15) % 2**63) for i in range(n)]
        return [_Sequence(generator, stops, StreamDecoder(self.tokenizer)) for generator in generators]

    def _run(
        self, prompt: list[int], sequences: list[_Sequence], max_tokens: int, sampling: Sampling
    ) -> Iterator[list[str]]:
        """After each token the new text of every sequence; sequences that have ended give ""."""
        histories = [list(prompt) for _ in sequences]
        decoder = _CachedForward(self.model, len(sequences)) if self.use_cache else _PlainForward(self.model)
        for _ in range(max_tokens):
            logits = decoder.next_logits(histories)  # (n, vocab_size)
            texts = []
            for history, sequence, row in zip(histories, sequences, logits, strict=True):
                if sequence.ended:
                    history.append(self.tokenizer.eot)  # keeps the batch rectangular; nobody reads it
                    texts.append("")
                    continue
                token = sample(row, sampling, sequence.generator)
                history.append(token)
                if token == self.tokenizer.eot:
                    texts.append(sequence.finish())
                else:
                    texts.append(sequence.push(sequence.decoder.push([token])))
            yield texts
            if all(sequence.ended for sequence in sequences):
                return
        yield [sequence.finish() for sequence in sequences]


def window(history: list[int], n_ctx: int) -> list[int]:
    """The tokens that the next one is computed from.

    All of them while they fit. After that the context is refilled with the newer half each time it is full:
    position embeddings are learned and absolute, so a window cannot slide without computing all of it again.
    """
    if len(history) <= n_ctx:
        return history
    half = max(1, n_ctx // 2)
    room = n_ctx - half + 1  # lengths half … n_ctx are passed through between two refills
    excess = (len(history) - n_ctx - 1) % room
    return history[-(half + excess) :]


class _PlainForward:
    """Every position computed again for every token."""

    def __init__(self, model: GPT) -> None:
        self.model = model

    @torch.inference_mode()
    def next_logits(self, histories: list[list[int]]) -> Tensor:
        """(n, vocab_size)"""
        rows = [window(history, self.model.config.n_ctx) for history in histories]
        idx = torch.tensor(rows, device=self.model.wte.weight.device)  # (n, T)
        logits: Tensor = self.model(idx)[0]  # (n, T, vocab_size)
        return logits[:, -1]


class _CachedForward:
    """One position a token; the whole window when it is new."""

    def __init__(self, model: GPT, n: int) -> None:
        self.model, self.n = model, n
        self.cache: KVCache | None = None

    @torch.inference_mode()
    def next_logits(self, histories: list[list[int]]) -> Tensor:
        """(n, vocab_size)"""
        weight = self.model.wte.weight
        rows = [window(history, self.model.config.n_ctx) for history in histories]
        if self.cache is None and len(rows[0]) == len(histories[0]):  # the first time all rows are the prompt
            self.cache = KVCache(self.model.config, 1, weight.device, weight.dtype)
            logits = self._forward(rows[:1])
            self.cache = self.cache.repeat(self.n)
            return logits.expand(self.n, -1)
        if self.cache is None or self.cache.length + 1 != len(rows[0]):  # the window was refilled
            self.cache = KVCache(self.model.config, self.n, weight.device, weight.dtype)
            return self._forward(rows)
        return self._forward([row[-1:] for row in rows])

    def _forward(self, rows: list[list[int]]) -> Tensor:
        assert self.cache is not None
        idx = torch.tensor(rows, device=self.model.wte.weight.device)  # (n, T)
        logits: Tensor = self.model(idx, cache=self.cache)[0]  # (n, T, vocab_size)
        self.cache.advance(idx.size(1))
        return logits[:, -1]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def load(model: str | Path, device: str = "auto") -> Engine:
    """The engine of MODEL: a run (its newest checkpoint), a checkpoint, a Hugging Face GPT-2 directory or id.

    Raises RequestError where it is no GPT-2 or has no tokenizer, WorkError where a run has no good checkpoint.
    """
    directory = hf.local_directory(resolve_model(model))
    network = GPT.from_pretrained(directory)
    if any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        tokenizer = Tokenizer.load(directory)
    elif network.config.vocab_size == 50257:
        tokenizer = Tokenizer.from_name("gpt2")
    else:
        raise RequestError(f"{directory} holds no tokenizer (tokenizer.json, or vocab.json with merges.txt)")
    return Engine(network.to(find_device(device)), tokenizer)

"""Generation: prompts in, text out as it comes. Knows nothing of terminals or HTTP.

prompt ─ ids ─ prefill: its tokens, many at once ─ decode: a token a step, beside those of other sequences ─ text

Any number of completions may be in flight. They join and leave between two steps, and each gets the tokens that it
would get alone (with a network run by torch: but for the last bits of float sums in another order).
"""

import functools
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gpt2 import hf
from gpt2.checkpoint.directory import resolve_model
from gpt2.distributed import can_compile, find_device, multiplies_bf16_fast
from gpt2.errors import RequestError, WorkError
from gpt2.inference.compiled import CompiledDecoder
from gpt2.inference.decoder import Decoder, TorchDecoder, UncachedDecoder
from gpt2.inference.native import NativeDecoder, kernels_available
from gpt2.inference.quantize import int8_network, is_quantized, read_quantized
from gpt2.inference.sampling import Sampling, sample
from gpt2.model import GPT
from gpt2.tokenizer import StreamDecoder, Tokenizer

SLOTS = 16  # sequences in flight; more wait
PREFILL = 256  # prompt tokens a step at most, so that nobody in mid-sentence waits long for somebody's prompt


class Completion:
    """One text in the making, made by Engine.submit."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: list[int],
        max_tokens: int,
        sampling: Sampling,
        stop: Sequence[str],
        seed: int,
        until_eot: bool,
    ) -> None:
        self.ended = False
        """Whether nothing more will come."""
        self.tokens: list[int] = []
        """The ids chosen so far, an end-of-text included."""
        self._prompt, self._history = prompt, list(prompt)
        self._max_tokens, self._sampling, self._stop = max_tokens, sampling, stop
        self._generator = torch.Generator().manual_seed(seed)
        self._decoder, self._eot = StreamDecoder(tokenizer), tokenizer.eot if until_eot else None
        self._waiting = ""  # text that may yet turn out to be the beginning of a stop text
        self._pieces: list[str] = []
        self._taken = 0
        self._slot: int | None = None
        self._start = self._held = 0  # history[start : start + held] is in the slot
        if max_tokens == 0:
            self.ended = True

    @property
    def text(self) -> str:
        """All of it so far: never a part of a character, never a part of a stop text."""
        return "".join(self._pieces)

    def take(self) -> str:
        """What has come since the last call."""
        new = "".join(self._pieces[self._taken :])
        self._taken = len(self._pieces)
        return new

    def cancel(self) -> None:
        """It ends here; its slot is free before the next step."""
        self.ended = True

    def _choose(self, logits: Tensor) -> None:
        """The next token out of (vocab_size,) logits."""
        token = sample(logits, self._sampling, self._generator)
        self._history.append(token)
        self.tokens.append(token)
        if token == self._eot:
            self._finish()
            return
        self._push(self._decoder.push([token]))
        if len(self.tokens) == self._max_tokens:
            self._finish()

    def _push(self, text: str) -> None:
        """Passes new text on, but for what may begin a stop text."""
        text, self._waiting = self._waiting + text, ""
        ends = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if ends:
            self.ended = True
            text = text[: min(ends)]
        else:
            held = max((_overlap(text, stop) for stop in self._stop), default=0)
            text, self._waiting = text[: len(text) - held], text[len(text) - held :]
        self._pieces.append(text)

    def _finish(self) -> None:
        """No more tokens come."""
        if not self.ended:
            self._push(self._decoder.flush())
        if not self.ended:
            self._pieces.append(self._waiting)
            self.ended = True

    def _due(self, n_ctx: int) -> list[int]:
        """The tokens that must join the slot, from position `_held` on, before the next one can be chosen."""
        seen = window(self._history, n_ctx)
        start = len(self._history) - len(seen)
        if start != self._start:  # the window was refilled: all its positions are new
            self._start, self._held = start, 0
        self._held = min(self._held, len(seen) - 1)  # after a step that was cut short the last token is computed again
        return seen[self._held :]


class Engine:
    """A network and its tokenizer. `load` makes one from the disk. One thread at a time may use it."""

    def __init__(
        self,
        model: GPT | Callable[[], GPT],
        tokenizer: Tokenizer,
        use_cache: bool = True,
        decoder: Decoder | None = None,
        slots: int = SLOTS,
    ) -> None:
        """model: the network, or what makes it when somebody asks for it, where `decoder` generates without it.

        use_cache=False computes every position again for every token: slow, and the cache's oracle.
        """
        self._make_model = (lambda: model) if isinstance(model, GPT) else model
        if decoder is None:
            decoder = (TorchDecoder if use_cache else UncachedDecoder)(self.model, slots)
        if decoder.config.vocab_size != tokenizer.vocab_size:
            raise RequestError(
                f"the model has {decoder.config.vocab_size} tokens, its tokenizer "
                f"{tokenizer.vocab_size}: they do not belong together"
            )
        self.tokenizer, self.decoder, self.config = tokenizer, decoder, decoder.config
        self._waiting: deque[Completion] = deque()
        self._running: list[Completion] = []

    @functools.cached_property
    def model(self) -> GPT:
        """The network as torch runs it, in evaluation mode."""
        return self._make_model().eval()  # type: ignore[no-untyped-call]

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
        longer than the context and for values out of range.
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
        """`generate`, piece by piece: never a part of a character, never a part of a stop text."""
        return self._pieces(self._completion(prompt, max_tokens, temperature, top_k, top_p, stop, seed))

    def _pieces(self, completion: Completion) -> Iterator[str]:
        self._waiting.append(completion)
        try:
            while not completion.ended:
                self.step()
                if text := completion.take():
                    yield text
        finally:
            completion.cancel()
            self._leave()

    def generate_many(
        self,
        prompt: str | Sequence[int],
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
        seed = _seed(seed)
        seeds = [(seed + i * 0x9E3779B97F4A7C15) % 2**63 for i in range(n)]
        completions = [self.submit(prompt, max_tokens, temperature, top_k, top_p, stop, each) for each in seeds]
        try:
            while not all(completion.ended for completion in completions):
                self.step()
        finally:
            for completion in completions:
                completion.cancel()
            self._leave()
        return [completion.text for completion in completions]

    def submit(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        until_eot: bool = True,
    ) -> Completion:
        """Lines a completion up; each `step` brings it on. The arguments and errors are those of `generate`.

        until_eot=False: end-of-text is a token like others, and max_tokens of them are chosen.
        """
        completion = self._completion(prompt, max_tokens, temperature, top_k, top_p, stop, seed, until_eot)
        self._waiting.append(completion)
        return completion

    def _completion(
        self,
        prompt: str | Sequence[int],
        max_tokens: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        stop: str | Sequence[str] | None,
        seed: int | None,
        until_eot: bool = True,
    ) -> Completion:
        if max_tokens < 0:
            raise RequestError(f"max_tokens = {max_tokens} must be at least 0")
        stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        if any(not text for text in stops):
            raise RequestError("a stop text must not be empty")
        sampling = Sampling(temperature, top_k, top_p)
        return Completion(self.tokenizer, self._ids(prompt), max_tokens, sampling, stops, _seed(seed), until_eot)

    def step(self) -> bool:
        """One pass over the tokens due: a token for each completion in flight that has its prompt behind it, and up to
        PREFILL tokens of prompts. False where there was nothing to do.

        Raises WorkError where logits are NaN: the completion that they belong to has ended, the others go on. After
        any other error the next step does the same again; where memory was short, cancel what came last.
        """
        self._leave()
        self._admit()
        ids: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        outputs: list[int] = []
        joined: list[tuple[Completion, int]] = []  # tokens of each that join its slot
        chosen: list[Completion] = []
        prompt_tokens = PREFILL
        for completion in self._running:
            due = completion._due(self.config.n_ctx)
            if len(due) > 1:
                due_now = due[:prompt_tokens]
                prompt_tokens -= len(due_now)
            else:
                due_now = due
            if not due_now:
                continue
            assert completion._slot is not None
            ids += due_now
            slots += [completion._slot] * len(due_now)
            positions += range(completion._held, completion._held + len(due_now))
            joined.append((completion, len(due_now)))
            if len(due_now) == len(due):
                outputs.append(len(ids) - 1)
                chosen.append(completion)
        if ids:
            rows = self.decoder.step(ids, slots, positions, outputs).cpu()  # (len(chosen), vocab_size)
            for completion, n in joined:
                completion._held += n
            failure: WorkError | None = None
            for completion, logits in zip(chosen, rows, strict=True):
                try:
                    completion._choose(logits)
                except WorkError as error:
                    completion.ended, failure = True, error
            if failure:
                raise failure
        self._leave()
        return bool(ids)

    def _admit(self) -> None:
        """Gives free slots to those that wait, in their order. One whose prompt is under way in another slot waits
        until it can be copied from there."""
        free = sorted(set(range(self.decoder.slots)) - {completion._slot for completion in self._running}, reverse=True)
        for completion in list(self._waiting):
            if completion.ended:
                self._waiting.remove(completion)
                continue
            n = len(completion._prompt) - 1  # the last token is computed again, for its logits
            twin = next((c for c in self._running if c._prompt == completion._prompt and c._start == 0), None)
            if not free or (twin is not None and twin._held <= n):
                continue
            if twin is not None:
                assert twin._slot is not None
                self.decoder.copy_slot(twin._slot, free[-1])
                completion._held = n
            completion._slot = free.pop()
            self._waiting.remove(completion)
            self._running.append(completion)

    def _leave(self) -> None:
        """Takes slots back from those that have ended."""
        for completion in self._running:
            if completion.ended and completion._slot is not None:
                self.decoder.free_slot(completion._slot)
        self._running = [completion for completion in self._running if not completion.ended]

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """(vocab_size,) logits of the token after `ids`, without a cache."""
        idx = torch.tensor([list(ids)], device=self.model.wpe.weight.device)  # (1, T)
        logits: Tensor = self.model(idx)[0]  # (1, T, vocab_size)
        return logits[0, -1]

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        ids = ids or [self.tokenizer.eot]
        if len(ids) > self.config.n_ctx:
            raise RequestError(f"the prompt has {len(ids)} tokens, the model's context {self.config.n_ctx}: shorten it")
        if not 0 <= min(ids) <= max(ids) < self.config.vocab_size:
            raise RequestError(f"token ids {min(ids)} to {max(ids)}: the model has {self.config.vocab_size}, from 0")
        return ids


def _seed(seed: int | None) -> int:
    # torch.seed() would seed the caller's generator anew.
    return torch.Generator().seed() % 2**63 if seed is None else seed % 2**63


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


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def load(model: str | Path, device: str = "auto", slots: int = SLOTS, compile: bool = False) -> Engine:
    """The engine of MODEL: a run (its newest checkpoint), a checkpoint, an int8 directory, a Hugging Face GPT-2
    directory or id.

    slots: completions in flight at most. An int8 directory on a CPU is run by the kernels, where they can be built;
    else, after a warning, by torch.
    compile: what torch decodes goes through a compiled step, on a GPU one CUDA graph; an int8 directory then in
    bfloat16 where the device multiplies it fast. The first tokens take up to a minute.
    Raises RequestError where it is no GPT-2, has no tokenizer or nothing can be compiled, WorkError where a run has
    no good checkpoint.
    """
    directory, found = hf.local_directory(resolve_model(model)), find_device(device)
    if compile and not can_compile(found):
        raise RequestError(f"torch.compile has no compiler for {found} here (see gpt2 doctor): leave --compile out")
    int8 = is_quantized(directory)
    if int8 and found.type == "cpu":
        why_not = kernels_available()
        if why_not is None:
            weights = read_quantized(directory)
            tokenizer = _tokenizer(directory, weights.config.vocab_size)
            # The kernels have their own copy: these are dropped, and read again should somebody ask for the network.
            return Engine(
                lambda: int8_network(read_quantized(directory)), tokenizer, decoder=NativeDecoder(weights, slots)
            )
        warnings.warn(f"the int8 kernels cannot be used, torch does the work, far slower: {why_not}", stacklevel=2)
    network, tokenizer = load_network(directory, device)
    if not compile:
        return Engine(network, tokenizer, decoder=TorchDecoder(network, slots))
    if int8 and multiplies_bf16_fast(found):
        network = network.to(torch.bfloat16)
    return Engine(network, tokenizer, decoder=CompiledDecoder(network, slots))


def load_network(model: str | Path, device: str = "auto") -> tuple[GPT, Tokenizer]:
    """MODEL's network as torch runs it and its tokenizer, for evaluation and for other formats. Raises as `load` does.

    An int8 directory gives float32 activations over its int8 weights (quantize.int8_network).
    """
    directory, found = hf.local_directory(resolve_model(model)), find_device(device)
    network = int8_network(read_quantized(directory)) if is_quantized(directory) else GPT.from_pretrained(directory)
    return network.to(found), _tokenizer(directory, network.config.vocab_size)


def _tokenizer(directory: Path, vocab_size: int) -> Tokenizer:
    if any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return Tokenizer.load(directory)
    if vocab_size == 50257:
        return Tokenizer.from_name("gpt2")
    raise RequestError(f"{directory} holds no tokenizer (tokenizer.json, or vocab.json with merges.txt)")

"""Other programs as functions: a checkpoint directory or GGUF file and token ids in, greedy token ids out.

`greedy` is the oracle: our network in float32, every position computed again for every token. Used by the interop
tests and by benchmarks/interop.py.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt2.checkpoint.directory import TrainingState, write_checkpoint
from gpt2.config import GPTConfig
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer

# What byte-level BPEs get wrong: spaces before words and at ends, contractions, several scripts, joined signs.
TEXTS = (
    "The people of these States, and it's 1790:\n\n  two  spaces, é 世界 — done. ",
    " leading, trailing \n \t\r\n ",
    "don't we'll I've you're he'd it's I'm 'S 1234567 3.14 ²½ Ⅻ",
    "👩‍👩‍👧‍👦 é e\u0301 \u00a0\u3000 \ufffd עברית ไทย",
    "a\n\n\nb\t\tc   d    ",
    "x = {'key': [1, 2.5e-3]}  # <|endoftext|> is thirteen characters\n",
)
PROMPTS = ("The people of the United States", "In the year 1850,", "é", "\n")


def make_checkpoint(directory: Path, config: GPTConfig, tokenizer: Tokenizer, spread: float) -> Path:
    """A checkpoint with random weights, `spread` of noise on top of the initial ones so that choices are clear."""
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
        model.wte.weight[config.vocab_size :] = 0
    return write_checkpoint(directory, config, model.state_dict(), tokenizer, {}, TrainingState(step=1))


@torch.inference_mode()
def greedy(model: GPT, prompt: Sequence[int], n: int) -> tuple[list[int], list[float]]:
    """n tokens, and how far the likeliest logit lay above the second at each."""
    ids, gaps = list(prompt), []
    for _ in range(n):
        top = torch.topk(model(torch.tensor([ids]))[0][0, -1], 2)
        ids.append(int(top.indices[0]))
        gaps.append(float(top.values[0] - top.values[1]))
    return ids[len(prompt) :], gaps


def first_difference(a: Sequence[int], b: Sequence[int], end: int) -> int | None:
    """The place of the first token in which they differ before one of them ends; None where there is none."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
        if x == end:
            return None
    return None if len(a) == len(b) or end in (list(a) + list(b))[-2:] else min(len(a), len(b))


def transformers_greedy(directory: Path) -> Callable[[Sequence[int], int], list[int]]:
    """Hugging Face's own GPT-2 and its generate()."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory)

    def generate(prompt: Sequence[int], n: int) -> list[int]:
        start = torch.tensor([list(prompt)])
        tokens = model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=n, do_sample=False)
        return [int(i) for i in tokens[0, len(prompt) :]]

    return generate


def ctranslate2_greedy(
    directory: Path, converted: Path, tokenizer: Tokenizer
) -> Callable[[Sequence[int], int], list[int]]:
    """CTranslate2: its converter for transformers models, then its generator, both in float32."""
    import ctranslate2

    ctranslate2.converters.TransformersConverter(str(directory)).convert(str(converted))
    generator = ctranslate2.Generator(str(converted), device="cpu", compute_type="float32", intra_threads=1)
    spelled = tokenizer.spelled

    def generate(prompt: Sequence[int], n: int) -> list[int]:
        start = [[spelled[i] for i in prompt]]
        (result,) = generator.generate_batch(
            start, max_length=n, sampling_topk=1, include_prompt_in_result=False, end_token=[tokenizer.eot]
        )
        return list(result.sequences_ids[0])[:n]

    return generate


class LlamaCpp:
    """llama.cpp on a GGUF file."""

    def __init__(self, file: Path, n_ctx: int) -> None:
        from llama_cpp import Llama

        self.llama: Any = Llama(str(file), n_ctx=n_ctx, n_threads=1, logits_all=True, verbose=False)

    def tokenize(self, text: str) -> list[int]:
        """Without special tokens, nothing put before."""
        return list(self.llama.tokenize(text.encode(), add_bos=False, special=False))

    def greedy(self, prompt: Sequence[int], n: int) -> list[int]:
        """n tokens; end-of-text does not end it."""
        self.llama.reset()
        ids, new = [], list(prompt)
        for _ in range(n):
            self.llama.eval(new)
            new = [int(np.argmax(self.llama.scores[self.llama.n_tokens - 1]))]
            ids += new
        return ids

    def choices(self, ids: Sequence[int]) -> list[int]:
        """The likeliest next token at every position of a given text."""
        self.llama.reset()
        self.llama.eval(list(ids))
        return [int(i) for i in np.argmax(self.llama.scores[: len(ids)], axis=-1)]

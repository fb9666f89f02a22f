"""Real programs open what we write, and choose the same tokens: transformers, CTranslate2, llama.cpp."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2.checkpoint.gguf import write_gguf
from gpt2.config import GPTConfig
from gpt2.inference.engine import Engine, load
from gpt2.tokenizer import Tokenizer
from tests.interop.programs import (
    PROMPTS,
    TEXTS,
    LlamaCpp,
    ctranslate2_greedy,
    first_difference,
    greedy,
    make_checkpoint,
    transformers_greedy,
)

pytestmark = pytest.mark.interop
TOKENS = 64


@pytest.fixture(scope="module", params=["gpt2", "bpe:320", "untied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with OpenAI's tokenizer, with one trained here, and with a head of its own."""
    if request.param.startswith("bpe"):
        tokenizer = Tokenizer.train([" ".join(TEXTS) * 5 + "the state of the union of the people " * 9], 320)
    else:
        tokenizer = Tokenizer.from_name("gpt2")
    config = GPTConfig(
        vocab_size=tokenizer.vocab_size,
        n_ctx=128,
        n_layer=3,
        n_head=4,
        n_embd=64,
        tie_embeddings=request.param != "untied",
    )
    return make_checkpoint(tmp_path_factory.mktemp("interop"), config, tokenizer, spread=0.1)


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Engine:
    return load(checkpoint)


def prompts(engine: Engine) -> list[list[int]]:
    return [engine.tokenizer.encode(text) for text in PROMPTS]


def test_transformers_chooses_the_same_tokens(checkpoint: Path, engine: Engine) -> None:
    theirs = transformers_greedy(checkpoint)
    for prompt in prompts(engine):
        ours, _ = greedy(engine.model, prompt, TOKENS)
        assert first_difference(ours, theirs(prompt, TOKENS), engine.tokenizer.eot) is None


def test_ctranslate2_chooses_the_same_tokens(checkpoint: Path, engine: Engine, tmp_path: Path) -> None:
    pytest.importorskip("ctranslate2", reason="needs pip install ctranslate2")
    theirs = ctranslate2_greedy(checkpoint, tmp_path / "converted", engine.tokenizer)
    for prompt in prompts(engine):
        ours, _ = greedy(engine.model, prompt, TOKENS)
        assert first_difference(ours, theirs(prompt, TOKENS), engine.tokenizer.eot) is None


def opened(engine: Engine, file: Path, quant: Any) -> LlamaCpp:
    pytest.importorskip("gguf", reason="needs pip install 'build-gpt2[gguf]'")
    pytest.importorskip("llama_cpp", reason="needs pip install llama-cpp-python")
    config = engine.model.config
    write_gguf(file, config, engine.model.state_dict(), engine.tokenizer, "small", quant)
    return LlamaCpp(file, config.n_ctx)


def test_llama_cpp_has_the_same_tokenizer(engine: Engine, tmp_path: Path) -> None:
    program = opened(engine, tmp_path / "m.gguf", "f16")
    for text in TEXTS:
        ids = engine.tokenizer.encode(text)
        assert program.tokenize(text) == ids, text
        assert program.llama.detokenize(ids).decode() == text


def test_llama_cpp_chooses_the_same_tokens_from_f16(engine: Engine, tmp_path: Path) -> None:
    """A first difference only where float16 may decide: the two likeliest within 1e-2 of each other in float32."""
    program = opened(engine, tmp_path / "m.gguf", "f16")
    for prompt in prompts(engine):
        ours, gaps = greedy(engine.model, prompt, TOKENS)
        place = first_difference(ours, program.greedy(prompt, TOKENS), -1)
        assert place is None or gaps[place] < 1e-2, (place, gaps[place])


def test_llama_cpp_from_q8_0_mostly_chooses_the_same(engine: Engine, tmp_path: Path) -> None:
    program = opened(engine, tmp_path / "m.gguf", "q8_0")
    same = total = 0
    for text in TEXTS:
        ids = engine.tokenizer.encode(text)[: engine.model.config.n_ctx]
        with torch.inference_mode():
            ours = engine.model(torch.tensor([ids]))[0][0].argmax(-1).tolist()
        same += sum(a == b for a, b in zip(ours, program.choices(ids), strict=True))
        total += len(ids)
    assert same / total > 0.9

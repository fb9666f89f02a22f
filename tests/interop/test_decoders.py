"""The programs of `gpt2 bench decode`, as it feeds and opens them: the same network, the tokens asked for."""

from pathlib import Path

import pytest
import torch

from gpt2.bench import decoders, decoding
from gpt2.bench.decoders import OURS, Shape
from gpt2.bench.decoding import Case, DecodeWorker
from gpt2.config import GPTConfig
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer
from tests.interop.programs import make_checkpoint

pytestmark = pytest.mark.interop
CONFIG = GPTConfig(n_layer=2, n_head=4, n_embd=128, n_ctx=64)
CASE = Case(batch=3, prompt=12, tokens=16)
PROMPTS = decoding.make_prompts(CASE, CONFIG.vocab_size)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), CONFIG, Tokenizer.from_name("gpt2"), spread=0.2)


@pytest.mark.parametrize("name", [name for name in decoders.PROGRAMS if name != OURS])
def test_a_program_computes_our_network(name: str, model: Path, tmp_path: Path) -> None:
    """Each choice is, after what it chose before, the float network's too, or in int8 not far behind it (another
    network's would lie about four deviations of the logits behind). A second call gives what the first gave.
    """
    missing = decoders.program(name).missing()
    if missing:
        pytest.skip(missing)
    shape = Shape(CASE.batch, CASE.context, CONFIG.vocab_size, 1)
    worker: DecodeWorker
    (worker,) = decoding.prepare([name], model, tmp_path, shape, print)
    assert not worker.failure
    try:
        worker.start(PROMPTS)
        worker.generate(PROMPTS, CASE.tokens)
        first = worker.ids
        worker.generate(PROMPTS, CASE.tokens)
        assert worker.ids == first
    finally:
        worker.stop()
    network = GPT.from_pretrained(model)
    for prompt, ids in zip(PROMPTS, first, strict=True):
        with torch.inference_mode():
            logits = network(torch.tensor([prompt + ids]))[0][0, len(prompt) - 1 : -1]  # (tokens, V), each its choice
        behind = logits.amax(1) - logits[torch.arange(len(ids)), torch.tensor(ids)]
        assert (behind / logits.std(1)).max() < (1e-3 if worker.facts["setting"]["weights"] == "float32" else 1.0)

"""The compiled step: the logits of the plain one, and no graph beyond one for each number of slots."""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from gpt2.config import GPTConfig
from gpt2.distributed import can_compile
from gpt2.errors import RequestError
from gpt2.inference import engine
from gpt2.inference.compiled import CompiledDecoder
from gpt2.inference.decoder import TorchDecoder
from gpt2.inference.quantize import int8_network, quantize_model, write_quantized
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer

CONFIG = GPTConfig(vocab_size=257, n_ctx=24, n_layer=1, n_head=2, n_embd=32)


def network(device: str = "cpu") -> GPT:
    torch.manual_seed(0)
    model = GPT(CONFIG)
    for parameter in model.parameters():
        parameter.data.mul_(6)  # far from an even guess
    return model.eval().to(device)


def decode_both(model: GPT, plain: GPT, tolerance: float) -> None:
    """Tokens one by one for one and two slots; the second time round nothing may be compiled."""
    decoder, oracle = CompiledDecoder(model, 2), TorchDecoder(plain, 2)
    for stance in ("default", "fail_on_recompile"):
        for slots in ([0], [0, 1], [1]):
            for place in (5, 22, 23):
                ids = [place + slot for slot in slots]
                prompts = [[7] * place for _ in slots]
                for each in (decoder, oracle):
                    flat = [token for prompt in prompts for token in prompt]
                    owners = [slot for slot in slots for _ in range(place)]
                    each.step(flat, owners, [*range(place)] * len(slots), [])
                with torch.compiler.set_stance(stance):
                    found = decoder.step(ids, slots, [place] * len(slots), list(range(len(slots))))
                wanted = oracle.step(ids, slots, [place] * len(slots), list(range(len(slots))))
                torch.testing.assert_close(found, wanted, atol=tolerance * wanted.abs().max().item(), rtol=0)


@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="there is no C++ compiler")
def test_compiled_on_a_cpu() -> None:
    decode_both(network(), network(), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("int8", [False, True])
def test_one_cuda_graph(int8: bool) -> None:
    if int8:
        weights = quantize_model(network())
        decode_both(int8_network(weights).to("cuda", torch.bfloat16), int8_network(weights).to("cuda"), 5e-2)
    else:
        decode_both(network("cuda"), network("cuda"), 1e-3)


@pytest.mark.parametrize("int8", [False, True])
def test_load_takes_it(int8: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = network(), Tokenizer.from_name("bytes")
    plain = engine.Engine(int8_network(quantize_model(model)) if int8 else model, tokenizer)
    if int8:
        write_quantized(quantize_model(model), tmp_path / "model", tokenizer)
        monkeypatch.setattr(engine, "kernels_available", lambda: "not here")
    else:
        monkeypatch.setattr(engine.GPT, "from_pretrained", lambda directory: model)
        monkeypatch.setattr(engine, "_tokenizer", lambda directory, vocab_size: tokenizer)
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text("{}")
    with patch.object(torch, "compile", lambda step, **options: step):
        found = engine.load(tmp_path / "model", "cpu", compile=True)
    assert isinstance(found.decoder, CompiledDecoder)
    assert found.generate("ab", 40, temperature=0) == plain.generate("ab", 40, temperature=0)
    monkeypatch.setattr(engine, "can_compile", lambda device: False)
    with pytest.raises(RequestError, match="compiler"):
        engine.load(tmp_path / "model", "cpu", compile=True)

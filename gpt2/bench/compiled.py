"""GPT-2 in plain torch as gpt-fast writes such a loop: bfloat16, a static cache, each token one compiled graph.

With CUDA graphs (`mode="reduce-overhead"`) a step is one launch; the host waits only when all tokens are chosen.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2.bench.decoders import Ids, Shape
from gpt2.distributed import multiplies_bf16_fast
from gpt2.model import GPT


class StaticNetwork(nn.Module):
    """The network with a cache of fixed places. Buffers of a module keep their address, as CUDA graphs need."""

    visible: Tensor

    def __init__(self, network: GPT, batch: int, room: int) -> None:
        super().__init__()
        self.network = network
        config, weight = network.config, network.wte.weight
        shape = (batch, config.n_head, room, config.n_embd // config.n_head)
        for layer in range(config.n_layer):
            for name in ("keys", "values"):
                self.register_buffer(f"{name}_{layer}", torch.zeros(shape, device=weight.device, dtype=weight.dtype))
        visible = torch.ones(room, room, dtype=torch.bool, device=weight.device).tril()
        self.register_buffer("visible", visible)

    def forward(self, idx: Tensor, positions: Tensor) -> Tensor:
        """(B, T) ids at (T,) positions -> (B, 1) the likeliest next."""
        network, config = self.network, self.network.config
        B, T = idx.shape
        mask = self.visible[positions][None, None]  # (1, 1, T, room)
        x = network.wte(idx) + network.wpe(positions)  # (B, T, C)
        blocks: Any = network.h
        for layer, block in enumerate(blocks):
            q, k, v = (
                part.view(B, T, config.n_head, -1).transpose(1, 2)  # (B, nh, T, hs)
                for part in block.attn.c_attn(block.ln_1(x)).split(config.n_embd, dim=-1)
            )
            keys, values = getattr(self, f"keys_{layer}"), getattr(self, f"values_{layer}")
            keys[:, :, positions], values[:, :, positions] = k, v
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            x = x + block.attn.c_proj(y.transpose(1, 2).reshape(B, T, config.n_embd))
            x = x + block.mlp(block.ln_2(x))
        logits = network.lm_head(network.ln_f(x[:, -1:]))[..., : config.vocab_size]
        token: Tensor = logits.argmax(-1)
        return token


class Compiled:
    """The prompt eagerly, as gpt-fast does by default; every other token by one graph of fixed shapes."""

    def __init__(self, model: Path, shape: Shape) -> None:
        if not shape.device.startswith("cuda"):
            torch.set_num_threads(shape.threads)
        self.device = device = torch.device(shape.device)
        kind = torch.bfloat16 if multiplies_bf16_fast(device) else torch.float32
        network = GPT.from_pretrained(model).to(device, kind).eval()
        self.step = StaticNetwork(network, shape.batch, -(-shape.context // 8) * 8)
        # fullgraph: what breaks the graph in two would cost a launch each, so it is an error.
        self.decode: Any = torch.compile(self.step, mode="reduce-overhead", fullgraph=True, dynamic=False)
        self.setting = {"weights": str(kind).removeprefix("torch."), "compile": "reduce-overhead", "cache": "static"}

    @torch.no_grad()
    def generate(self, prompts: Ids, tokens: int) -> list[list[int]]:
        """See Contender."""
        idx = torch.tensor([list(prompt) for prompt in prompts], device=self.device)  # (B, T)
        positions = torch.arange(idx.size(1), device=self.device)
        token = self.step(idx, positions)  # (B, 1)
        chosen, position = [token], positions[-1:] + 1
        # The plain formula: the compiler fuses one query against the cache, but not a library's kernel.
        with sdpa_kernel(SDPBackend.MATH):
            for _ in range(tokens - 1):
                token = self.decode(token, position).clone()  # the graph writes its output to one place
                chosen.append(token)
                position = position + 1
        ids: list[list[int]] = torch.cat(chosen, dim=1).tolist()
        return ids

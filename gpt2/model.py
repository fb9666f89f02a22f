"""The network: GPT-2 (Radford et al. 2019), a decoder-only transformer with pre-norm blocks.

A batch's way through it, and the letters of the shape comments:

    idx (B, T) ── wte + wpe ── h.0 ── h.1 ── … ── ln_f ── lm_head ── logits (B, T, vocab_size)

    B   sequences in the batch           C   n_embd, width of the residual stream
    T   tokens in a sequence             nh  n_head, attention heads
    V   padded vocabulary                hs  C / nh, width of a head
"""

import math
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gpt2 import hf
from gpt2.config import GPTConfig
from gpt2.fused_loss import fused_cross_entropy


class KeyValueCache(Protocol):
    """What generation keeps of the tokens it has seen: keys and values of every block."""

    length: int
    """Tokens held, the same in every sequence."""

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends (B, nh, T, hs) keys and values; gives all (B, nh, length + T, hs) of the layer."""


class Packing(NamedTuple):
    """Several texts in one row, without a cache. Positions stay below n_ctx, a row may be longer."""

    positions: Tensor
    """(B, T) int64: each token's place in its own text."""
    mask: Tensor
    """(B, 1, T, T) of bool: whether query t sees key s. Every query sees at least one."""


class CausalSelfAttention(nn.Module):
    """Each position gathers from itself and the positions before it, in n_head independent ways."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.attention = config.attention
        self.layer = layer

    def forward(self, x: Tensor, cache: KeyValueCache | None = None, mask: Tensor | None = None) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, 3C) -> 3 x (B, T, C)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, nh, S, hs) with S = cache.length + T
        attend = explicit_attention if self._is_explicit(q) else flash_attention
        y = attend(q, k, v, self.dropout if self.training else 0.0, mask)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.resid_dropout(self.c_proj(y))  # type: ignore[no-any-return]

    def _is_explicit(self, q: Tensor) -> bool:
        # On a CPU torch's fused kernel in bfloat16 is the slower one, forward and backward (docs/LOG.md).
        slow_flash = q.device.type == "cpu" and q.dtype == torch.bfloat16
        return self.attention == "explicit" or (self.attention == "auto" and slow_flash)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √hs) v with the future masked (Vaswani et al. 2017, eq. 1), each matrix written out.

    q: (B, nh, T, hs); k, v: (B, nh, S, hs) with S >= T: the T queries are the last of the S positions.
    mask: of bool, to be spread over (B, nh, T, S): the keys that a query may see, in place of the causal ones.
    Returns (B, nh, T, hs). Holds the (B, nh, T, S) weights, which flash attention never does.
    """
    att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(q.size(-1)))  # (B, nh, T, S)
    if mask is None:
        mask = causal_mask(q.size(-2), k.size(-2), q.device)
    att = att.masked_fill(~mask, float("-inf"))
    att = F.softmax(att, dim=-1)
    att = F.dropout(att, dropout, training=dropout > 0)
    return att @ v  # (B, nh, T, S) @ (B, nh, S, hs) -> (B, nh, T, hs)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, mask: Tensor | None = None) -> Tensor:
    """The same by torch's fused kernels (FlashAttention, Dao et al. 2022), in O(T) memory."""
    T, S = q.size(-2), k.size(-2)
    if T == S and mask is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    # is_causal aligns the mask at the top left, which is wrong for queries that come after cached keys.
    if mask is None and T > 1:
        mask = causal_mask(T, S, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    """(T, S) of bool: whether query t, at position S - T + t, may see key s."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(diagonal=S - T)


class MLP(nn.Module):
    """Each position on its own: four times wider, GELU in its tanh form, and back."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, C) -> (B, T, 4C)
        return self.dropout(self.c_proj(x))  # type: ignore[no-any-return]  # (B, T, 4C) -> (B, T, C)


class Block(nn.Module):
    """Pre-norm: the residual stream x runs through untouched, attention and MLP add to it."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, mask)
        x = x + self.mlp(self.ln_2(x))
        return x  # (B, T, C)


class GPT(nn.Module):
    """GPT-2. `logits, loss = model(idx, targets)`; the weights start as `initialize` says."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):  # torch's own first draws, which `initialize` overwrites, do not count
            self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
            self.wpe = nn.Embedding(config.n_ctx, config.n_embd)
            self.drop = nn.Dropout(config.dropout)
            self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
            self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
            self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
            if config.tie_embeddings:
                self.lm_head.weight = self.wte.weight
        self.initialize()

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        cache: KeyValueCache | None = None,
        packing: Packing | None = None,
        at: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """One pass over (B, T) int64 token ids.

        targets: (B, T) int64, the next token of each position; -100 is ignored.
        cache: holds what came before idx and takes in idx's keys and values; its length is the caller's to advance.
        packing: where several texts share a row: each token's position and the tokens that it sees.
        at: (n,) int64, indices into the B·T positions: the head is computed for these alone, targets are (n,).
        Returns the logits (B, T, vocab_size), with `at` (n, vocab_size), without the padding, and the mean
        cross-entropy in nats (None without targets). Training with targets and model.fused_loss gives None for the
        logits. Raises ValueError where idx reaches beyond the context.
        """
        T = idx.size(1)
        past = 0 if cache is None else cache.length
        if packing is not None:
            positions, mask = packing  # (B, T), (B, 1, T, T)
        elif past + T > self.config.n_ctx:
            raise ValueError(f"{past + T} tokens do not fit into the context of {self.config.n_ctx}")
        else:
            positions, mask = torch.arange(past, past + T, device=idx.device), None  # (T,)
        x = self.drop(self.wte(idx) + self.wpe(positions))  # (B, T, C) + (T, C) or (B, T, C) -> (B, T, C)
        for block in self.h:
            if self.config.recompute and self.training:
                x = checkpoint(block, x, cache, mask, use_reentrant=False)
            else:
                x = block(x, cache, mask)
        x = self.ln_f(x)
        if at is not None:
            x = x.flatten(0, 1)[at]  # (B, T, C) -> (n, C)
        if targets is not None and self.config.fused_loss and self.training:
            weight = self.lm_head.weight  # (V, C)
            return None, fused_cross_entropy(x.flatten(0, -2), weight, targets.flatten(), self.config.vocab_size)
        logits = self.lm_head(x)  # (B, T, V)
        # The padded columns take no part in softmax: their probability and their gradient are exactly 0.
        logits = logits[..., : self.config.vocab_size]  # (B, T, vocab_size)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=-100)

    @torch.no_grad()
    def initialize(self) -> None:
        """Draws the initial weights from torch's global generator, in the order of this table.

        ==========================  =====================================================================
        wte (lm_head if untied)     N(0, 0.02); the padded rows 0
        wpe                         N(0, 0.01), as in OpenAI's code
        c_attn, c_fc                N(0, 0.02), bias 0
        c_proj (both)               N(0, 0.02 / sqrt(2 n_layer)), bias 0: 2 n_layer of them add to the
                                    residual stream, so its variance stays that of one (GPT-2, section 2.3)
        ln_1, ln_2, ln_f            scale 1, offset 0
        ==========================  =====================================================================
        """
        config = self.config
        residual_std = 0.02 / math.sqrt(2 * config.n_layer) if config.scale_residual_init else 0.02
        for weight in [self.wte.weight] if config.tie_embeddings else [self.wte.weight, self.lm_head.weight]:
            weight[: config.vocab_size].normal_(0.0, 0.02)
            weight[config.vocab_size :].zero_()
        self.wpe.weight.normal_(0.0, 0.01)
        for name, module in self.h.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0.0, residual_std if name.endswith("c_proj") else 0.02)
                module.bias.zero_()
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        self.ln_f.reset_parameters()

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path) -> "GPT":
        """The network of a Hugging Face GPT-2 directory or hub id, on the CPU in float32, in evaluation mode.

        Raises RequestError where it is no GPT-2, a tensor is missing or of another shape, or a file is damaged.
        """
        config, tensors = hf.read_pretrained(path_or_id)
        with torch.device("meta"):  # no random weights are drawn only to be overwritten
            model = cls(config)
        model.to_empty(device="cpu")
        if config.tie_embeddings:
            model.lm_head.weight = model.wte.weight
        model.load_state_dict(tensors)
        return model.eval()

    def num_parameters(self) -> int:
        """Parameters without the padding, tied ones counted once: 124,439,808 for GPT-2 small."""
        padding = (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        heads = 1 if self.config.tie_embeddings else 2
        return sum(p.numel() for p in self.parameters()) - heads * padding


def flops_per_token(config: GPTConfig) -> float:
    """Floating-point operations of forward and backward for one token of a full context.

    6 N + 12 n_layer n_embd T (PaLM, Chowdhery et al. 2022, appendix B), with N the weights that are
    multiplied: all but wpe; the tied wte counts once, as lm_head.
    """
    C, L = config.n_embd, config.n_layer
    block = 12 * C * C + 13 * C  # c_attn 3C² + 3C, c_proj C² + C, MLP 8C² + 5C, two layer norms 4C
    n = L * block + 2 * C + config.vocab_size * C
    return 6.0 * n + 12.0 * L * C * config.n_ctx

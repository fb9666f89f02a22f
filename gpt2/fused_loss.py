"""lm_head and cross-entropy in one, a chunk of tokens at a time.

The logits of a step are its largest tensor: 32 windows of 1,024 tokens times 50,304 columns times 4 bytes are 6.6 GB
in float32, and their gradient as much again. But a token's gradient needs nothing of other tokens: softmax minus
one-hot. So each chunk's logits are made, turned into their gradient in place, multiplied on into the gradients of the
hidden states and of the weights, and forgotten, all within the forward pass.
"""

from typing import Any

import torch
from torch import Tensor

IGNORED = -100


def fused_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Mean cross-entropy in nats of the logits `hidden @ weight.T`, which are never held whole.

    hidden: (N, C). weight: (V, C); the rows from vocab_size on are padding and take no part in softmax.
    targets: (N,) int64; -100 is ignored. Under autocast the matmuls run in its type, the rest in float32.
    The gradients are ready after the forward pass; only a first backward pass is supported.
    """
    dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
    loss: Tensor = _FusedCrossEntropy.apply(hidden, weight, targets, vocab_size, dtype)  # type: ignore[no-untyped-call]
    return loss


def chunk_size(tokens: int, columns: int, device: torch.device) -> int:
    """Tokens at once: on a CPU 16 MB of float32 logits, which caches hold, but no fewer than 256, as every chunk
    goes over the gradient of the weights once; on a GPU 2,048, which fill it."""
    at_once = 2048 if device.type == "cuda" else max(256, 2**22 // columns)
    chunks = -(-tokens // at_once)
    return -(-tokens // chunks)  # all of one size, or nearly


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, dtype: torch.dtype | None
    ) -> Tensor:
        N, V = hidden.size(0), weight.size(0)
        h = hidden.to(dtype) if dtype else hidden  # (N, C)
        w = weight.to(dtype) if dtype else weight  # (V, C)
        counted = targets != IGNORED  # (N,)
        scale = 1.0 / counted.sum().clamp(min=1)
        total = torch.zeros((), device=h.device)
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros_like(weight)
        size = chunk_size(N, V, h.device)
        for start in range(0, N, size):
            rows = slice(start, min(start + size, N))
            target = targets[rows].clamp(min=0)[:, None]  # (n, 1)
            logits = (h[rows] @ w.T).float()  # (n, V)
            if vocab_size < V:
                logits = logits.masked_fill(torch.arange(V, device=h.device) >= vocab_size, float("-inf"))
            lse = torch.logsumexp(logits, dim=1, keepdim=True)  # (n, 1)
            weights = (counted[rows] * scale)[:, None]  # (n, 1): 1 / targets that count, or 0
            total = total + ((lse - logits.gather(1, target)) * weights).sum()
            # d loss / d logits = softmax - one-hot; exactly 0 in the padded columns.
            one_hot = torch.arange(V, device=h.device) == target  # (n, V)
            grad = ((torch.exp(logits - lse) - one_hot.float()) * weights).to(h.dtype)  # (n, V)
            hidden_grad[rows] = (grad @ w).to(hidden_grad.dtype)
            if dtype:
                weight_grad += (grad.T @ h[rows]).to(weight_grad.dtype)  # (V, C); summed in float32
            else:
                weight_grad.addmm_(grad.T, h[rows])
        ctx.save_for_backward(hidden_grad, weight_grad)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * gradients[0], weight_grad * gradients[0], None, None, None

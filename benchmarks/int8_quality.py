"""What int8 costs in quality: perplexity and greedy tokens, of a trained model and with hard weights planted in it.

python benchmarks/int8_quality.py [--model MODEL --data DATA] [--minutes 2] [--tokens 65536]
    writes results/int8_quality.json

Without --model the demo preset is trained for --minutes on the embedded corpus (with it, --minutes says for how long it
was). Planted (tests/hard_weights.py) are a layer norm's channel x 64, value rows x 64, and an offset of 50 in a channel
of the residual stream: entering by wte, wpe or a bias; as it is, and with the layer norms set to give what they gave
before, as training would have. `int8` is computed by the kernels, whose activations, keys and values have 8 bits, a few
activations 16; `int8_torch` by torch on the same weights; `careless` is plain rounding, a scale a row, of the weights
as they stand.
kl: mean Kullback-Leibler divergence, nats a token.
"""

import argparse
import copy
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn as nn
import torch.nn.functional as F

from gpt2.data.shards import Dataset
from gpt2.evaluation.agreement import greedy_agreement
from gpt2.inference.engine import load
from gpt2.inference.native import NativeDecoder
from gpt2.inference.quantize import QuantizedWeights, int8_network, quantize_model
from gpt2.model import GPT

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from hard_weights import OFFSETS, SCALES, adapt, plant_column


@torch.no_grad()
def careless(model: GPT) -> GPT:
    """Every matrix rounded by max / 127 of its rows, nothing rewritten."""
    rounded = copy.deepcopy(model)
    matrices = [m.weight for m in rounded.modules() if isinstance(m, nn.Linear)]  # lm_head among them
    for weight in matrices if model.config.tie_embeddings else [*matrices, rounded.wte.weight]:
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        weight.copy_((weight / scale).round() * scale)
    return rounded


Network = Callable[[torch.Tensor], tuple[torch.Tensor, Any]]


def by_kernels(weights: QuantizedWeights) -> Network:
    """(B, T) ids -> (B, T, vocab_size) logits, as they are when text is generated."""
    decoder = NativeDecoder(weights, slots=1)

    def logits(idx: torch.Tensor) -> tuple[torch.Tensor, None]:
        T = idx.size(1)
        return torch.stack([decoder.step(row, [0] * T, range(T), range(T)) for row in idx.tolist()]), None

    return logits


@torch.no_grad()
def compare(model: GPT, others: dict[str, Network], windows: torch.Tensor) -> dict[str, Any]:
    """Perplexity of the model, and for each of the others its own, the rise and the divergence."""
    nats, sums, kl = 0.0, dict.fromkeys(others, 0.0), dict.fromkeys(others, 0.0)
    for part in windows.split(max(1, 4096 // windows.size(1))):
        targets = part[:, 1:].flatten()
        expected = model(part[:, :-1])[0].flatten(0, 1).log_softmax(-1)
        nats += F.nll_loss(expected, targets, reduction="sum").item()
        for name, other in others.items():
            found = other(part[:, :-1])[0].flatten(0, 1).log_softmax(-1)
            sums[name] += F.nll_loss(found, targets, reduction="sum").item()
            kl[name] += F.kl_div(found, expected, reduction="sum", log_target=True).item()
    count = windows[:, 1:].numel()
    result: dict[str, Any] = {"perplexity_float": math.exp(nats / count)}
    for name in others:
        result |= {
            f"perplexity_{name}": math.exp(sums[name] / count),
            f"rise_{name}": math.expm1((sums[name] - nats) / count),
            f"kl_{name}": kl[name] / count,
        }
    return result


def planted(model: GPT, idx: torch.Tensor) -> dict[str, Callable[[], GPT]]:
    """The networks to be measured, by name."""

    def make(
        *plants: Callable[[GPT], None], adapted: bool = False, then: tuple[Callable[[GPT], None], ...] = ()
    ) -> GPT:
        changed = copy.deepcopy(model)
        for plant in plants:
            plant(changed)
        if adapted:
            adapt(changed, model, idx)
        for plant in then:
            plant(changed)
        return changed

    scales = tuple(SCALES.values())
    networks: dict[str, Callable[[], GPT]] = {"trained": make}
    for name, plant in SCALES.items():
        networks[f"{name} x 64"] = lambda plant=plant: make(plant)
    for name, plant in OFFSETS.items():
        networks[f"offset 50 by {name}"] = lambda plant=plant: make(plant)
        networks[f"offset 50 by {name}, norms adapted"] = lambda plant=plant: make(plant, adapted=True)
    networks["all, norms adapted"] = lambda: make(plant_column, adapted=True, then=scales)
    return networks


def trained_here(minutes: float) -> tuple[Path, Path]:
    """Run and data of the demo preset after so many minutes."""
    from gpt2.demo import demo

    out = Path(tempfile.mkdtemp(prefix="int8-quality-"))
    demo(out, minutes, lambda text: print(text, flush=True))
    return out / "run", out / "data"


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--tokens", type=int, default=65536)
    args = parser.parse_args()
    if (args.model is None) != (args.data is None):
        parser.error("--model and --data go together")
    path, data = (args.model, args.data) if args.model else trained_here(args.minutes)
    model = load(path, "cpu").model
    split, n_ctx = Dataset.open(data).split("val"), model.config.n_ctx
    tokens = torch.from_numpy(split.read(0, min(args.tokens + 1, split.tokens)).astype("int64"))
    windows = tokens.unfold(0, n_ctx + 1, n_ctx)  # (n, n_ctx + 1)
    results = []
    for name, make in planted(model, windows[: max(1, 512 // n_ctx), :-1]).items():
        network = make()
        started = time.perf_counter()
        weights = quantize_model(network)
        seconds = time.perf_counter() - started
        quantized = int8_network(weights)
        agreement = greedy_agreement(network, quantized, split)
        others = {"int8": by_kernels(weights), "int8_torch": quantized, "careless": careless(network)}
        result = {
            "name": name,
            **compare(network, others, windows),
            "greedy_agreement": agreement.equal,
            "first_difference": agreement.first_difference,
            "quantize_seconds": seconds,
        }
        results.append(result)
        print(f"{name:34} perplexity {result['perplexity_float']:9.3f}, greedy {agreement.equal:.1%}", end="")
        for other in others:
            print(f"  {other} {result[f'rise_{other}']:+.4%} (kl {result[f'kl_{other}']:.1e})", end="")
        print(flush=True)
    config = {
        "parameters": model.num_parameters(),
        "n_layer": model.config.n_layer,
        "n_embd": model.config.n_embd,
        "n_ctx": n_ctx,
        "vocab_size": model.config.vocab_size,
        "tokens": windows[:, 1:].numel(),
        "greedy_tokens": 256,
        "minutes": args.minutes,
    }
    print(common.write("int8_quality", config, results))


if __name__ == "__main__":
    main()

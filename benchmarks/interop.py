"""What we write, opened by other programs: the same tokens?

python benchmarks/interop.py [--model MODEL ...]     writes results/interop.json

Without --model: a demo model trained for a minute on the embedded corpus, and one of GPT-2 small's size with random
weights. Programs that are not installed are listed as such.
"""

import argparse
import contextlib
import importlib.metadata
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from gpt2.checkpoint.directory import resolve_model
from gpt2.checkpoint.gguf import write_gguf
from gpt2.config import GPTConfig
from gpt2.inference.engine import Engine, load
from gpt2.tokenizer import Tokenizer
from tests.interop.programs import (
    PROMPTS,
    TEXTS,
    LlamaCpp,
    ctranslate2_greedy,
    first_difference,
    greedy,
    make_checkpoint,
    transformers_greedy,
)

TOKENS = 64
PROGRAMS = {"transformers": "transformers", "CTranslate2": "ctranslate2", "llama.cpp": "llama_cpp_python"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[])
    models: list[str] = parser.parse_args().model
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        named = {Path(model).name: Path(resolve_model(model)) for model in models} or default_models(work)
        results = [result for name, directory in named.items() for result in compare(name, directory, work / name)]
    versions = {}
    for program, package in {**PROGRAMS, "gguf": "gguf"}.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[program] = importlib.metadata.version(package)
    config = {"tokens": TOKENS, "prompts": PROMPTS, "programs": versions}
    print(common.write("interop", config, results))


def default_models(work: Path) -> dict[str, Path]:
    """A trained one with a tokenizer of its own, and one of GPT-2 small's size with OpenAI's."""
    from gpt2.demo import demo

    demo(work / "demo", 1.0, print)
    config = GPTConfig()
    small = make_checkpoint(work / "124m", config, Tokenizer.from_name("gpt2"), spread=0.02)
    return {"demo, trained 1 minute": Path(resolve_model(work / "demo" / "run")), "124M, random": small}


def compare(name: str, directory: Path, work: Path) -> list[dict[str, Any]]:
    """A result for each program and kind of file."""
    work.mkdir(parents=True)
    engine = load(directory)
    prompts = [engine.tokenizer.encode(text) for text in PROMPTS]
    oracle = [greedy(engine.model, prompt, TOKENS) for prompt in prompts]
    results = []

    def agreement(choose: Any, end: int) -> dict[str, Any]:
        places = [
            first_difference(ours, choose(prompt, TOKENS), end)
            for prompt, (ours, _) in zip(prompts, oracle, strict=True)
        ]
        gaps = [gaps[place] for place, (_, gaps) in zip(places, oracle, strict=True) if place is not None]
        return {
            "completions": len(prompts),
            "equal": places.count(None),
            "first_differences": [place for place in places if place is not None],
            "fp32_gap_there": gaps,
        }

    def note(program: str, work_of: Any) -> None:
        started = time.perf_counter()
        try:
            found = work_of()
        except ImportError as error:
            found = {"not_run": str(error)}
        results.append({"name": program, "model": name, **found, "seconds": time.perf_counter() - started})
        print(results[-1], flush=True)

    eot = engine.tokenizer.eot
    note("transformers", lambda: agreement(transformers_greedy(directory), eot))
    note("CTranslate2", lambda: agreement(ctranslate2_greedy(directory, work / "ct2", engine.tokenizer), eot))
    for quant in ("f16", "q8_0"):
        note(f"llama.cpp {quant}", lambda quant=quant: llama_cpp(engine, work / f"{quant}.gguf", quant, agreement))
    return results


def llama_cpp(engine: Engine, file: Path, quant: Any, agreement: Any) -> dict[str, Any]:
    """Greedy tokens, the likeliest token at every position of the given texts, and the tokenizer."""
    config, tokenizer = engine.model.config, engine.tokenizer
    size = write_gguf(file, config, engine.model.state_dict(), tokenizer, "model", quant)
    program = LlamaCpp(file, config.n_ctx)
    same = total = 0
    for text in TEXTS:
        ids = tokenizer.encode(text)[: config.n_ctx]
        with torch.inference_mode():
            ours = engine.model(torch.tensor([ids]))[0][0].argmax(-1).tolist()
        same += sum(a == b for a, b in zip(ours, program.choices(ids), strict=True))
        total += len(ids)
    return {
        "file_bytes": size,
        "tokenizer_equal": sum(program.tokenize(text) == tokenizer.encode(text) for text in TEXTS) == len(TEXTS),
        "top1_agreement": same / total,
        "positions": total,
        **agreement(program.greedy, -1),
    }


if __name__ == "__main__":
    main()

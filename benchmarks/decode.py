"""Generation beside other programs: GPT-2 124M, random weights, greedy, the same token ids into each.

python benchmarks/decode.py [--model MODEL] [--against NAME ...] [--cases NAME ...]
                                                             writes results/decode_cpu.json or decode_gpu.json

Without --against: all programs that are installed (`gpt2 bench decode --help` says how). `resident_bytes` of the case
`long` is that of a process with one sequence at full context; `start_beyond_torch_seconds` of the case `one` is from
the start of a process to its first token, beyond importing torch. GPT2_SMOKE=1: a tiny model on any device, to see
whether the script runs.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import common
import torch

from gpt2 import hf
from gpt2.bench import decoders
from gpt2.bench.decoding import Case, bench_decoding, print_table
from gpt2.checkpoint.directory import save_tensors
from gpt2.config import GPTConfig
from gpt2.distributed import find_device
from gpt2.files import write_json
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer

CASES = {
    "one": Case(batch=1, prompt=64, tokens=128, starts=3),
    "sixteen": Case(batch=16, prompt=64, tokens=64),
    "long": Case(batch=1, prompt=900, tokens=124),
    "prefill": Case(batch=1, prompt=512, tokens=1),
}
# A step takes under a millisecond there, and compiling most of the time that there is.
GPU_CASES = {"one": Case(batch=1, prompt=64, tokens=256), "sixteen": Case(batch=16, prompt=64, tokens=256)}
SMOKE_CASES = {"one": Case(batch=1, prompt=8, tokens=8), "sixteen": Case(batch=16, prompt=4, tokens=4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: GPT-2 124M's shape with random weights")
    parser.add_argument("--against", nargs="*", help="default: all that are installed")
    parser.add_argument(
        "--cases", nargs="*", help=f"default: all ({', '.join(CASES)}; on a GPU {', '.join(GPU_CASES)})"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=4.0, help="for each case")
    parser.add_argument("--work", type=Path, help="where other programs' forms of the weights are kept")
    given = parser.parse_args()
    smoke = os.environ.get("GPT2_SMOKE") == "1"
    device = find_device("auto")
    on_gpu = device.type == "cuda"
    cases = SMOKE_CASES if smoke else GPU_CASES if on_gpu else CASES
    unknown = [name for name in given.cases or () if name not in cases]
    if unknown:
        sys.exit(f"there is no case {unknown[0]!r}: known are {', '.join(cases)}")
    with tempfile.TemporaryDirectory() as temporary:
        model = given.model or random_model(Path(temporary, "model"), smoke)
        work = given.work or Path(temporary, "work")
        config, results = {}, []
        for name in given.cases or cases:
            report = bench_decoding(
                model,
                cases[name],
                installed(device.type) if given.against is None else given.against,
                rounds=given.rounds,
                minutes=given.minutes,
                work=work,
                say=lambda line: print(line, file=sys.stderr, flush=True),
            )
            print_table(report)
            config[name] = report["config"]
            results += [{"case": name, **result} for result in report["results"]]
            # After each case: what has been measured stays, should the time for all be up.
            path = common.write(f"decode_{'gpu' if on_gpu else 'cpu'}", {"cases": config}, results)
    print(path)


def installed(device: str) -> list[str]:
    """Those that can run there; `compiled`, which any machine has, only on a GPU, for which it is written."""
    return [
        name
        for name, program in decoders.PROGRAMS.items()
        if name != decoders.OURS
        and device in program.devices
        and not program.missing()
        and (name != "compiled" or device == "cuda")
    ]


def random_model(directory: Path, smoke: bool) -> Path:
    """A Hugging Face directory of untrained weights: the speed does not depend on them."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_name("gpt2")
    config = GPTConfig(n_layer=2, n_head=2, n_embd=64) if smoke else GPTConfig()
    directory.mkdir()
    save_tensors(hf.to_hf(GPT(config).state_dict(), config), directory / "model.safetensors", {"format": "pt"})
    write_json(directory / "config.json", hf.config_to_hf(config, tokenizer.eot))
    tokenizer.save(directory, max_length=config.n_ctx)
    return directory


if __name__ == "__main__":
    main()

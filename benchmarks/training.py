"""The training step: `gpt2 ladder`, or `gpt2 bench train`, with its report kept.

python benchmarks/training.py ladder [options of gpt2 ladder]         writes results/ladder_cpu.json or ladder_gpu.json
python benchmarks/training.py losses [options of gpt2 ladder]         the same as losses_cpu.json or losses_gpu.json
python benchmarks/training.py train  [options of gpt2 bench train]    writes results/train_cpu.json or train_gpu.json

The ladder's picture goes to docs/ladder_cpu.png or docs/ladder_gpu.png.
"""

import json
import subprocess
import sys
from pathlib import Path

import common

from gpt2.bench.ladder import plot

VERBS = {"ladder": ["ladder"], "losses": ["ladder"], "train": ["bench", "train"]}
DOCS = Path(__file__).parent.parent / "docs"


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in VERBS:
        sys.exit(__doc__)
    verb, options = sys.argv[1], sys.argv[2:]
    command = [sys.executable, "-m", "gpt2", *VERBS[verb], *options, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    print("\n".join(done.stdout.splitlines()[:-1]))
    if done.returncode != 0:
        sys.exit(done.returncode)
    report = json.loads(done.stdout.splitlines()[-1])
    name = f"{verb}_{'gpu' if report['config']['device'].startswith('cuda') else 'cpu'}"
    shown = " ".join(option for option in options if "/" not in option)  # whose folders they were is nobody's concern
    path = common.write(name, {"options": shown, **report["config"]}, report["results"])
    if verb == "ladder":
        plot({**report, "bench": name}, (DOCS if DOCS.is_dir() else common.RESULTS) / f"{name}.png")
    print(path)


if __name__ == "__main__":
    main()

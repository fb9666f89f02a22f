"""Start-up: `gpt2 --help` and `import gpt2` as whole processes, beside a bare interpreter, in turn.

python benchmarks/startup.py [--rounds 15]     writes results/startup.json
"""

import argparse
import subprocess
import sys
import time

import common

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "gpt2 --help": [sys.executable, "-m", "gpt2", "--help"],
    "gpt2 train --help": [sys.executable, "-m", "gpt2", "train", "--help"],
    "import gpt2": [sys.executable, "-c", "import gpt2"],
}


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    figures = common.in_turn(rounds, *(lambda c=command: seconds(c) for command in COMMANDS.values()))
    results = [{"name": name, "seconds": common.spread(f)} for name, f in zip(COMMANDS, figures, strict=True)]
    print(common.write("startup", {"rounds": rounds}, results))


if __name__ == "__main__":
    main()

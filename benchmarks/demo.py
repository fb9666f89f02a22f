"""The main job, measured: `gpt2 demo` in a new directory, whole.

python benchmarks/demo.py [--minutes 3]     writes results/demo.json and docs/loss.png
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

PICTURE = Path(__file__).parent.parent / "docs" / "loss.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0)
    minutes = parser.parse_args().minutes
    with tempfile.TemporaryDirectory() as directory:
        started = time.perf_counter()
        command = [
            sys.executable,
            "-m",
            "gpt2",
            "demo",
            "--minutes",
            str(minutes),
            "--out",
            f"{directory}/demo",
            "--json",
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        result = json.loads(done.stdout.splitlines()[-1])
        result["wall_seconds"] = time.perf_counter() - started
        shutil.copy(result.pop("loss_png"), PICTURE)
        config = (Path(result["run"]) / "config.toml").read_text(encoding="utf-8")
    for name in ("run", "data"):
        del result[name]
    print(common.write("demo", {"minutes": minutes, "config.toml": config}, [{"name": "build-gpt2", **result}]))


if __name__ == "__main__":
    main()

"""The reference curve of a preset, from finished runs of it: `python benchmarks/reference_curve.py demo RUN RUN`.

The runs were made by `gpt2 train --preset demo --train.seed N --eval.every 100`, one for each seed.
Writes gpt2/report/assets/reference_PRESET.json, which `gpt2 report` lays under the curves of such runs.
"""

import sys
from pathlib import Path

from gpt2.files import write_json
from gpt2.report.curves import read_runs
from gpt2.report.verdict import make_reference

TOLERANCE = 0.1  # nats; the two seeds of the demo preset lie within 0.03 of each other

if __name__ == "__main__":
    preset, *paths = sys.argv[1:]
    assets = Path(__file__).resolve().parents[1] / "gpt2" / "report" / "assets"
    write_json(
        assets / f"reference_{preset}.json", make_reference(preset, read_runs([Path(p) for p in paths]), TOLERANCE)
    )

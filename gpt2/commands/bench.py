"""gpt2 bench: this project beside others. A sub-verb a file: bench_WHAT.py here, what it measures in gpt2/bench/."""

import difflib
import importlib
from collections.abc import Sequence

from gpt2.commands.common import Outcome, say
from gpt2.errors import RequestError

BENCHES = {
    "train": "a training step beside those of nanogpt, build-nanogpt, transformers and litgpt",
}


def main(argv: Sequence[str]) -> Outcome:
    """gpt2 bench WHAT …"""
    if argv and argv[0] in ("-h", "--help"):
        say(help_text())
        raise SystemExit(0)
    if not argv:
        raise RequestError(f"say what to measure: gpt2 bench {' | '.join(BENCHES)}")
    what, rest = argv[0], argv[1:]
    if what not in BENCHES:
        close = difflib.get_close_matches(what, BENCHES, n=1)
        known = f"did you mean {close[0]}?" if close else f"known are {', '.join(BENCHES)}"
        raise RequestError(f"there is no benchmark {what!r}: {known}")
    outcome: Outcome = importlib.import_module(f"gpt2.commands.bench_{what}").main(rest)
    return outcome


def help_text() -> str:
    """The sub-verbs, a line each."""
    lines = [f"  {what:<10} {line}" for what, line in BENCHES.items()]
    return "\n".join(
        [
            "usage: gpt2 bench WHAT [options] [--json]      (gpt2 bench WHAT --help shows every option; default: none)",
            "",
            *lines,
        ]
    )

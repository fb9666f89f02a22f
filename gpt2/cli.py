"""The command line: finds the verb, turns what goes wrong into one line and an exit code.

The verbs' options and work are in commands/, a file each, imported only when one is called:
`gpt2 --help` loads nothing.
"""

import difflib
import importlib
import io
import json
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TextIO

from gpt2.errors import RequestError, WorkError

VERBS = {
    "demo": "prepare, train, evaluate and sample a small GPT-2 on the embedded corpus",
    "prepare": "text into token shards",
    "train": "train a GPT-2, or go on with a run",
    "eval": "what a model is worth: loss on prepared data, HellaSwag, lm-evaluation-harness",
    "sample": "continue a prompt",
    "export": "a model as a GGUF file for llama.cpp",
    "push": "a model with its card to the Hugging Face hub",
    "ladder": "what each optimisation of training gains on this machine",
    "bench": "this project against others: train",
    "plan": "memory, tokens a second, hours and dollars of a run before it is started",
    "report": "one HTML page of a run's curves, or of several runs compared",
    "doctor": "what this machine has, what is missing and how to mend it",
}
# Codes 128 + n are for what a signal ended, as shells have it.
DONE, FAILED, WRONG_REQUEST, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; gives its exit code (0 done, 1 failed, 2 wrong request, 128 + n stopped by signal n)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal's encoding may lack what a model says
            stream.reconfigure(errors="replace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            return _run(argv)
    except RequestError as error:
        return _complain(error, WRONG_REQUEST)
    except WorkError as error:
        return _complain(error, FAILED)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return _complain(
            WorkError("the memory does not suffice: take less at once (--batch, -n, train.micro_batch, eval.batch)"),
            FAILED,
        )
    except KeyboardInterrupt:
        print("gpt2: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left (`gpt2 sample … | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text())
        return DONE if argv else WRONG_REQUEST
    if argv[0] == "--version":
        from gpt2 import __version__

        print(f"gpt2 {__version__}")
        return DONE
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        raise RequestError(
            f"there is no command {verb!r}: {f'did you mean {close[0]}?' if close else 'see gpt2 --help'}"
        )
    outcome = importlib.import_module(f"gpt2.commands.{verb}").main(rest)
    if outcome.as_json:
        print(json.dumps(outcome.result, ensure_ascii=False))
    sys.stdout.flush()
    code: int = outcome.code
    return code


def help_text() -> str:
    """The verbs, a line each."""
    lines = [f"  {verb:<10} {line}" for verb, line in VERBS.items()]
    return "\n".join(
        [
            "usage: gpt2 VERB [options]      (gpt2 VERB --help shows every option)",
            "",
            "GPT-2 from raw text to a trained model.",
            "",
            *lines,
            "",
            "Exit codes: 0 done, 1 failed, 2 wrong request, 130 / 143 / 138 stopped by SIGINT / SIGTERM / SIGUSR1.",
        ]
    )


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"gpt2: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _is_out_of_memory(error: Exception) -> bool:
    """numpy raises MemoryError; torch, which is not imported here, a RuntimeError, on a CPU of no kind of its own."""
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def _complain(error: RequestError | WorkError, code: int) -> int:
    if os.environ.get("GPT2_DEBUG") == "1":
        raise error
    if not error.told:
        rank = os.environ.get("RANK", "0")
        print(f"gpt2: {f'rank {rank}: ' if rank != '0' else ''}{error}", file=sys.stderr)
    return code

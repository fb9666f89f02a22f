"""Processes of their own for what is measured, so that each program's memory and threads are its own.

Child (here) ── a line of JSON ──> python -m MODULE (there): serve(answer)
             <── a line of JSON ──
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import gpt2
from gpt2.errors import RequestError, WorkError


class Child:
    """A process that answers requests; it ends when its input does."""

    name: str
    _process: "subprocess.Popen[str] | None" = None
    _complaints: IO[str]

    @property
    def running(self) -> bool:
        """Whether its process is there."""
        return self._process is not None

    def launch(self, module: str, environment: Mapping[str, str] | None = None) -> None:
        """Starts `python -m module`, which calls `serve`, with this package and the given variables."""
        variables = {**os.environ, **(environment or {})}
        package = str(Path(gpt2.__file__).parents[1])
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [package, variables.get("PYTHONPATH")]))
        self._complaints = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            encoding="utf-8",
            env=variables,
        )

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request. Raises the child's RequestError or WorkError, and WorkError where it has ended."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        except BaseException:
            self.stop()
            raise
        if not line:
            code = process.wait()
            self._complaints.seek(0)
            said = [text.strip() for text in self._complaints.read().splitlines() if text.strip()]
            self.stop()
            why = "out of memory: killed by the system" if code == -9 else f"exit code {code}"
            raise WorkError(f"{self.name} ended ({why}){f': {said[-1][:200]}' if said else ''}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            self.stop()
            raise (RequestError if answer["wrong_request"] else WorkError)(answer["error"])
        return answer

    def stop(self) -> None:
        """Ends the process, if there is one."""
        if self._process is None:
            return
        process, self._process = self._process, None
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()  # the end of its input is its sign to leave
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._complaints.close()


# What runs in the process of its own.


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answers the requests on standard input until it ends. Whatever a program prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            given = answer(json.loads(line))
        except Exception as error:
            given = {"error": reason(error), "wrong_request": isinstance(error, RequestError)}
            if os.environ.get("GPT2_DEBUG") == "1":
                raise
        answers.write(json.dumps(given) + "\n")
        answers.flush()


def reason(error: Exception) -> str:
    """An error as one line."""
    torch = sys.modules.get("torch")  # where it was not imported it cannot have run out of memory
    if (torch is not None and isinstance(error, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return "out of memory: a smaller --batch fits"
    if isinstance(error, RequestError | WorkError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}{f': {lines[0][:200]}' if lines else ''}"


def process_status(name: str) -> int:
    """A figure of /proc/self/status in bytes; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)

"""Checkpoints written beside the training: the training thread stops only for a copy into kept buffers on the host.

    training thread   wait for the last write (usually over) ─ copy weights and optimizer state ─ go on
    writing thread    hash, write, flush, rename, remove what need not be kept

Fresh memory costs far more than the copy itself (the system zeroes every page at its first touch), so the buffers are
made and touched in the background as soon as the run has optimizer state, before the first save.
"""

import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType

import torch
from torch import Tensor

from gpt2.checkpoint.directory import TrainingState, keep_checkpoints, write_checkpoint
from gpt2.config import Config
from gpt2.errors import WorkError
from gpt2.tokenizer import Tokenizer
from gpt2.training.parallel import whole
from gpt2.training.run import Run

WEIGHTS, OPTIMIZER = "weights.", "optimizer."


class Saver:
    """Writes a run's checkpoints. Every process calls it; rank 0 writes. Use as a context manager."""

    def __init__(self, run: Run) -> None:
        self.path = run.path
        self.config: Config = run.config
        self.tokenizer: Tokenizer = run.dataset.tokenizer
        self.writes = run.distributed.is_main
        self.buffers: dict[str, Tensor] = {}
        self.thread: threading.Thread | None = None
        self.results: list[dict[str, object]] = []
        self.failure: BaseException | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # What is being written shall not be lost; a second Ctrl-C waits for nothing and leaves a .tmp-* behind.
        if self.thread is not None and kind is not KeyboardInterrupt:
            self.thread.join()

    def allocate(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Makes the buffers for these tensors, in the background. Sharded ones need room for the whole."""
        if not self.writes:
            return
        shapes = [(name, tensor.shape, tensor.dtype, tensor.device.type) for name, tensor in tensors]

        def work() -> None:
            for name, shape, dtype, device in shapes:
                # Pinned memory is what a GPU copies into at full speed.
                self.buffers[name] = torch.zeros(shape, dtype=dtype, pin_memory=device == "cuda")

        self._start(work)

    def save(self, state: TrainingState, tensors: Iterable[tuple[str, Tensor]]) -> float:
        """Copies the tensors, then writes them in the background; gives the seconds that this call took.

        Names begin with `weights.` or `optimizer.`. All processes must call it: sharded tensors are gathered.
        """
        started = time.perf_counter()
        self.wait()
        copied: dict[str, Tensor] = {}
        for name, tensor in tensors:
            full = whole(tensor.detach())
            if self.writes:
                buffer = self.buffers.get(name)
                if buffer is None:
                    buffer = self.buffers[name] = torch.empty(full.shape, dtype=full.dtype)
                copied[name] = buffer.copy_(full, non_blocking=True)
        if self.writes:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._start(lambda: self._write(state, copied))
        return time.perf_counter() - started

    def finished(self) -> list[dict[str, object]]:
        """What has been written since the last call, as events: {"step", "seconds"} or {"step", "error"}.

        Raises WorkError where a write failed and `checkpoint.must_succeed` is set.
        """
        results, self.results = self.results, []
        if self.failure is not None:
            failure, self.failure = self.failure, None
            if not isinstance(failure, WorkError) or self.config.checkpoint.must_succeed:
                raise failure
        return results

    def finish(self) -> list[dict[str, object]]:
        """`finished`, after waiting for the write under way. Raises WorkError where it failed."""
        self.wait()
        if self.failure is not None:
            raise self.failure
        return self.finished()

    def _start(self, work: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                work()
            except BaseException as error:  # it belongs to the training thread
                self.failure = error

        self.wait()
        self.thread = threading.Thread(target=guarded, name="checkpoint", daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Until nothing is being written."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def _write(self, state: TrainingState, tensors: dict[str, Tensor]) -> None:
        started = time.perf_counter()
        weights = {name.removeprefix(WEIGHTS): t for name, t in tensors.items() if name.startswith(WEIGHTS)}
        training = {name: t for name, t in tensors.items() if name.startswith(OPTIMIZER)}
        options = self.config.checkpoint
        try:
            write_checkpoint(self.path, self.config.model, weights, self.tokenizer, training, state)
        except WorkError as error:
            self.results.append({"step": state.step, "error": str(error)})
            raise
        self.results.append({"step": state.step, "seconds": time.perf_counter() - started})
        keep_checkpoints(self.path, options.keep_last, state.best_step if options.keep_best else None)

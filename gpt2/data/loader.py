"""Shards -> the batch at step s, a pure function of (data, seed, context, batch, s).

A split is one stream of N tokens. Window k is its tokens kT … kT + T: T inputs and, one further, T targets.
There are ⌊(N - 1) / T⌋ of them. Each epoch hands out every window once, in an order drawn from (seed, epoch);
the epochs follow one another without a gap, also within a batch.
"""

import queue
import threading
from collections.abc import Generator
from functools import lru_cache

import numpy as np

from gpt2.data.shards import Split
from gpt2.errors import RequestError


class BatchLoader:
    """The batches of a run. Ranks and micro-batches take rows of the same global batch."""

    def __init__(self, split: Split, context: int, batch_windows: int, seed: int) -> None:
        """Raises RequestError where the split is too small for one window."""
        self.split, self.context, self.batch_windows, self.seed = split, context, batch_windows, seed
        self.windows_per_epoch = (split.tokens - 1) // context
        if self.windows_per_epoch < 1:
            raise RequestError(
                f"the training text has {split.tokens} tokens, a window needs {context + 1}: "
                "give more text or a smaller model.n_ctx"
            )
        self.remainder = split.tokens - 1 - self.windows_per_epoch * context
        # 4 bytes a window: 40 MB for 10 B tokens in windows of 1,024. A batch may span two epochs.
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def _draw_order(self, epoch: int) -> np.ndarray:
        order = np.arange(self.windows_per_epoch, dtype=np.uint32)
        np.random.default_rng([self.seed, epoch]).shuffle(order)
        return order

    def window_ids(self, step: int) -> np.ndarray:
        """(batch_windows,) int64: the windows of the global batch at this step."""
        places = np.arange(step * self.batch_windows, (step + 1) * self.batch_windows)
        epochs, within = np.divmod(places, self.windows_per_epoch)
        ids = np.empty(self.batch_windows, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = self._order(int(epoch))[within[here]]
        return ids

    def batch(self, step: int, first: int = 0, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Rows first..first + count of the batch at `step`: x and y of shape (count, context), int64.

        Raises RequestError where a shard is damaged, before any of its tokens is given.
        """
        ids = self.window_ids(step)[first : None if count is None else first + count]
        tokens = np.empty((len(ids), self.context + 1), dtype=np.int64)
        for row, k in enumerate(ids):
            tokens[row] = self.split.read(int(k) * self.context, (int(k) + 1) * self.context + 1)
        # Contiguous: a compiled network is made for one memory layout.
        return np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])


def prefetch(
    loader: BatchLoader, start: int, first: int = 0, count: int | None = None, depth: int = 2
) -> Generator[tuple[int, np.ndarray, np.ndarray], None, None]:
    """(step, x, y) for step = start, start + 1, … without end, read ahead by a thread of its own.

    Raises in the caller what reading raised. Closing the iterator ends the thread.
    """
    ready: queue.Queue[tuple[int, np.ndarray, np.ndarray] | BaseException] = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def put(item: tuple[int, np.ndarray, np.ndarray] | BaseException) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def read_ahead() -> None:
        step = start
        try:
            while not closed.is_set():
                put((step, *loader.batch(step, first, count)))
                step += 1
        except BaseException as error:  # whatever it is, it belongs to the caller
            put(error)

    thread = threading.Thread(target=read_ahead, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        thread.join()

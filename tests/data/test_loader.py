"""The order of the data: every window once an epoch, a pure function of the step, however the batch is sliced."""

import hashlib
import itertools
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.data.loader import BatchLoader, prefetch
from gpt2.data.shards import Shard, Split, header
from gpt2.errors import RequestError
from gpt2.files import sha256_file

properties = settings(deadline=None, derandomize=True, max_examples=60)
TOKENS = 1_003
EPOCH_HASH = """
import hashlib, sys
from pathlib import Path
from gpt2.data.loader import BatchLoader
from gpt2.data.shards import Dataset
loader = BatchLoader(Dataset.open(Path(sys.argv[1])).split("train"), 16, 5, int(sys.argv[2]))
digest = hashlib.sha256()
for step in range(60):
    for part in loader.batch(step):
        digest.update(part.tobytes())
print(digest.hexdigest())
"""


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Split:
    """The tokens 0, 1, 2 … 1002, each once, over shards of 300: a token tells its own place."""
    directory = tmp_path_factory.mktemp("loader")
    shards = []
    for start in range(0, TOKENS, 300):
        tokens = np.arange(start, min(start + 300, TOKENS), dtype="<u2")
        path = directory / f"train_{start}.bin"
        path.write_bytes(header(len(tokens)) + tokens.tobytes())
        shards.append(Shard(path, len(tokens), sha256_file(path), TOKENS))
    return Split(tuple(shards), TOKENS, 1)


def windows(loader: BatchLoader, steps: range) -> list[int]:
    return [int(k) for step in steps for k in loader.window_ids(step)]


@properties
@given(context=st.integers(1, 1002), batch=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_every_window_once_an_epoch(split, context, batch, seed):
    loader = BatchLoader(split, context, batch, seed)
    n = loader.windows_per_epoch
    assert n == (TOKENS - 1) // context
    assert loader.remainder == TOKENS - 1 - n * context < context
    epochs = 3
    handed_out = windows(loader, range(-(-epochs * n // batch)))
    for epoch in range(epochs):
        assert sorted(handed_out[epoch * n : (epoch + 1) * n]) == list(range(n))


@properties
@given(context=st.integers(1, 400), batch=st.integers(1, 12), step=st.integers(0, 500))
def test_rows_are_the_windows_and_targets_are_one_further(split, context, batch, step):
    loader = BatchLoader(split, context, batch, seed=1)
    x, y = loader.batch(step)
    assert x.shape == y.shape == (batch, context)
    assert x.dtype == y.dtype == np.int64
    starts = loader.window_ids(step) * context
    np.testing.assert_array_equal(x, starts[:, None] + np.arange(context))
    np.testing.assert_array_equal(y, x + 1)


@properties
@given(
    batch=st.integers(1, 24),
    step=st.integers(0, 50),
    cuts=st.lists(st.integers(0, 24), max_size=5),
)
def test_slices_of_ranks_and_micro_batches_are_the_batch(split, batch, step, cuts):
    whole = BatchLoader(split, 17, batch, seed=3).batch(step)
    borders = [0, *sorted(min(cut, batch) for cut in cuts), batch]
    for part in range(2):
        slices = []
        for first, last in itertools.pairwise(borders):
            loader = BatchLoader(split, 17, batch, seed=3)  # as in another process
            slices.append(loader.batch(step, first, last - first)[part])
        np.testing.assert_array_equal(np.concatenate(slices), whole[part])


@properties
@given(steps=st.lists(st.integers(0, 300), min_size=1, max_size=10))
def test_a_batch_depends_on_its_step_alone(split, steps):
    """In any order of asking, also back and forth over epochs."""
    used = BatchLoader(split, 10, 7, seed=5)
    for step in steps:
        for ours, fresh in zip(used.batch(step), BatchLoader(split, 10, 7, seed=5).batch(step), strict=True):
            np.testing.assert_array_equal(ours, fresh)


def test_the_stream_of_windows_does_not_depend_on_the_batch(split):
    orders = [windows(BatchLoader(split, 10, batch, seed=5), range(400 // batch))[:390] for batch in (1, 7, 10, 130)]
    assert all(order == orders[0] for order in orders)


def test_a_batch_larger_than_an_epoch(split):
    loader = BatchLoader(split, 400, 9, seed=0)
    assert loader.windows_per_epoch == 2
    handed_out = windows(loader, range(4))
    assert len(handed_out) == 36
    assert all(sorted(handed_out[i : i + 2]) == [0, 1] for i in range(0, 36, 2))
    assert loader.batch(3)[0].shape == (9, 400)


def test_seeds_and_epochs_have_orders_of_their_own(split):
    def order(seed: int, epoch: int = 0) -> tuple[int, ...]:
        return tuple(windows(BatchLoader(split, 10, 100, seed), range(epoch, epoch + 1)))

    orders = {order(seed, epoch) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert order(0) == order(0)
    assert order(0) != tuple(range(100))


def test_two_processes_draw_one_order_and_another_seed_another(data: Path):
    def in_a_process(seed: int) -> str:
        command = [sys.executable, "-c", EPOCH_HASH, str(data), str(seed)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    from gpt2.data.shards import Dataset

    loader = BatchLoader(Dataset.open(data).split("train"), 16, 5, 1)
    digest = hashlib.sha256()
    for step in range(60):
        for part in loader.batch(step):
            digest.update(part.tobytes())
    first = in_a_process(1).strip()
    assert first == digest.hexdigest()
    assert in_a_process(2).strip() != first


@pytest.mark.parametrize("context", [TOKENS, TOKENS + 1, 10**6])
def test_too_little_text_for_one_window(split, context):
    with pytest.raises(RequestError, match=rf"has 1003 tokens, a window needs {context + 1}: give more text or"):
        BatchLoader(split, context, 1, seed=0)
    assert BatchLoader(split, TOKENS - 1, 1, seed=0).windows_per_epoch == 1


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_prefetched_batches_are_the_batches(split, depth):
    loader = BatchLoader(split, 10, 8, seed=2)
    ahead = prefetch(BatchLoader(split, 10, 8, seed=2), 7, first=2, count=3, depth=depth)
    for expected in range(7, 40):
        step, x, y = next(ahead)
        assert step == expected
        for ours, theirs in zip((x, y), loader.batch(step, 2, 3), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    ahead.close()


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


@pytest.mark.parametrize("taken", [1, 4])
def test_closing_ends_the_thread(split, taken):
    ahead = prefetch(BatchLoader(split, 10, 8, seed=2), 0)
    for _ in range(taken):
        next(ahead)
    assert len(reading_threads()) == 1
    ahead.close()
    assert reading_threads() == []


def test_an_exception_reaches_the_caller_at_its_step_and_ends_the_thread(split):
    class Broken(BatchLoader):
        def batch(self, step, first=0, count=None):
            if step == 3:
                raise RequestError("the shard is damaged")
            return super().batch(step, first, count)

    ahead = prefetch(Broken(split, 10, 8, seed=2), 0)
    assert [next(ahead)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RequestError, match="the shard is damaged"):
        next(ahead)
    assert reading_threads() == []


def test_damage_is_found_before_a_token_of_the_shard_is_given(tmp_path):
    path = tmp_path / "x.bin"
    tokens = np.arange(100, dtype="<u2")
    path.write_bytes(header(100) + tokens.tobytes())
    shard = Shard(path, 100, sha256_file(path), 100)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    ahead = prefetch(BatchLoader(Split((shard,), 100, 1), 5, 1, seed=0), 0)
    with pytest.raises(RequestError, match=r"x\.bin is damaged: SHA-256"):
        next(ahead)

"""The int8 kernels against exact integers and float64; their builds, their limits, their errors."""

import ctypes
import gc
import itertools
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpt2.config import GPTConfig
from gpt2.errors import RequestError, WorkError
from gpt2.inference import native
from gpt2.inference.native import NativeDecoder
from tests.inference.oracle import Layer, Matrix, Weights, reference

pytestmark = pytest.mark.skipif(native.kernels_available() is not None, reason=str(native.kernels_available()))


def make_weights(
    n_layer: int = 2, n_head: int = 2, head: int = 8, n_ctx: int = 40, vocab: int = 23, **more: Any
) -> Any:
    """Random weights of the form of QuantizedWeights; activations stay in the ones."""
    random = torch.Generator().manual_seed(more.get("seed", 0))
    tied = more.get("tied", True)
    C = n_head * head
    config = GPTConfig(
        vocab_size=vocab, n_ctx=n_ctx, n_layer=n_layer, n_head=n_head, n_embd=C, tie_embeddings=tied, pad_vocab_to=1
    )

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    def matrix(rows: int, columns: int, bias: bool = True) -> Matrix:
        weight = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=random)
        scale = (1 + torch.rand(rows, generator=random)) / (100 * columns**0.5)
        return Matrix(weight, scale, normal(rows) * 0.1 if bias else None)

    layers = tuple(
        Layer(matrix(3 * C, C), matrix(C, C), matrix(4 * C, C), matrix(C, 4 * C, bias=False)) for _ in range(n_layer)
    )
    return Weights(
        config,
        layers,
        wte=matrix(vocab, C, bias=False),
        lm_head=None if tied else matrix(vocab, C, bias=False),
        wpe=normal(n_ctx, C) * 0.3,
        ln_f_weight=1 + normal(C) * 0.1,
        ln_f_bias=normal(C) * 0.1,
        head_column=normal(C) * 0.1,
    )


def whole(decoder: NativeDecoder, ids: list[int], slot: int = 0, first: int = 0) -> Tensor:
    n = len(ids)
    return decoder.step(ids, [slot] * n, range(first, first + n), range(n))


def random_ids(n: int, vocab: int, seed: int = 0) -> list[int]:
    return torch.randint(0, vocab, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module", params=native.paths_here())
def kernels(request: pytest.FixtureRequest) -> ctypes.CDLL:
    return native.load_library(native.build(request.param))


def dot(kernels: ctypes.CDLL, weight: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, int]:
    sums = np.full((len(rows), len(weight)), 99, dtype=np.int32)
    out, inner = weight.shape
    limit = kernels.gpt2_dot(inner, out, len(rows), weight.ctypes.data, rows.ctypes.data, sums.ctypes.data)
    return sums, limit


@settings(max_examples=60, deadline=None)
@given(
    inner=st.one_of(st.integers(1, 70), st.sampled_from([767, 769, 1541])),
    out=st.integers(1, 50),
    n=st.integers(1, 64),
    most=st.sampled_from([3, 40, 70, 300, 32767]),
    seed=st.integers(0, 2**32 - 1),
)
def test_products_are_exact(kernels: ctypes.CDLL, inner: int, out: int, n: int, most: int, seed: int) -> None:
    """Whether all activations have their place in 8 bits, some of them or none."""
    random = np.random.default_rng(seed)
    weight = random.integers(-127, 128, (out, inner), dtype=np.int8)
    heaviest = int(np.abs(weight.astype(np.int64)).sum(1).max())
    limit = min(32767, (2**31 - 1) // max(heaviest, 1))
    most = min(most, limit)
    rows = random.integers(-most, most + 1, (n, inner), dtype=np.int16)
    sums, told = dot(kernels, weight, rows)
    np.testing.assert_array_equal(sums, rows.astype(np.int64) @ weight.astype(np.int64).T)
    assert told == limit


def test_fours_that_just_fit_are_exact(kernels: ctypes.CDLL) -> None:
    """The positive ones of four add up to 127, the negative ones too: the most that 16 bits hold. And one more."""
    random = np.random.default_rng(0)
    four = [0, 1, 4, 5]
    for parts in range(5):
        for too_much in (0, 1):
            row = np.zeros(8, dtype=np.int16)
            row[four[:parts]] = random.multinomial(127 + too_much, [1 / max(parts, 1)] * parts) if parts else 0
            row[four[parts:]] = -random.multinomial(127 + too_much, [1 / (4 - parts)] * (4 - parts)) if parts < 4 else 0
            rows = np.stack([np.tile(row, 13), np.tile(np.roll(row, 2), 13), np.tile(-row, 13)])  # (3, 104)
            weight = np.stack([sign * 127 * np.sign(of_row) for of_row in rows for sign in (-1, 1)]).astype(np.int8)
            sums, _ = dot(kernels, weight, rows)
            np.testing.assert_array_equal(sums, rows.astype(np.int64) @ weight.astype(np.int64).T)


@pytest.mark.parametrize("inner", [1, 516, 517, 3072])
@pytest.mark.parametrize("n", [1, 2, 13])
def test_no_sum_overflows_at_the_limit(kernels: ctypes.CDLL, inner: int, n: int) -> None:
    for sign in (-1, 1):
        weight = np.full((17, inner), 127, dtype=np.int8)
        limit = dot(kernels, weight, np.zeros((1, inner), dtype=np.int16))[1]
        sums, _ = dot(kernels, weight, np.full((n, inner), sign * limit, dtype=np.int16))
        assert (sums == sign * limit * 127 * inner).all()
        assert limit == 32767 or (limit + 1) * 127 * inner > 2**31 - 1


@pytest.fixture
def with_path(kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoders of the test use this instruction path."""
    monkeypatch.setattr(native, "_library", lambda: (kernels, None))


SHAPES = [
    {"n_layer": 1, "n_head": 1, "head": 1, "n_ctx": 3, "vocab": 2},
    {"n_layer": 2, "n_head": 3, "head": 5, "n_ctx": 37, "vocab": 17},
    {"n_layer": 1, "n_head": 2, "head": 64, "n_ctx": 140, "vocab": 65, "tied": False},
    {"n_layer": 2, "n_head": 5, "head": 13, "n_ctx": 70, "vocab": 33, "tied": False},
    {"n_layer": 1, "n_head": 1, "head": 97, "n_ctx": 33, "vocab": 16},
]


@pytest.mark.usefixtures("with_path")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_step_is_the_network_in_float64(shape: dict[str, int], threads: int) -> None:
    weights = make_weights(**shape)
    decoder = NativeDecoder(weights, slots=2, threads=threads)
    ids = random_ids(shape["n_ctx"], shape["vocab"])
    expected = reference(weights, ids)
    error = ((whole(decoder, ids).double() - expected) / expected.std()).abs().amax(1)  # (T,)
    # float32 beside float64: 1e-6, until it moves a number past the middle between two whole ones, one in a hundred
    # thousand. That one jumps by a step, the numbers after it are rounded elsewhere, and from then on the two differ by
    # what rounding costs: a step is 4e-2 of a row's spread, and the largest of a row's errors a few times that.
    assert error[: 1 + len(ids) // 8].max() < 1e-4
    assert error.max() < 0.15


@pytest.mark.usefixtures("with_path")
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_bits_in_any_company(shape: dict[str, int]) -> None:
    """Prefill at once, in chunks and token by token; alone and among others; 1 to 8 threads."""
    weights = make_weights(**shape)
    n, vocab = shape["n_ctx"], shape["vocab"]
    texts = [random_ids(length, vocab, seed) for seed, length in enumerate((n, n // 2 + 1, 1))]
    alone = [whole(NativeDecoder(weights, 1, threads=1), ids) for ids in texts]

    assert torch.equal(whole(NativeDecoder(weights, 1, threads=8), texts[0]), alone[0])
    decoder = NativeDecoder(weights, slots=5, threads=2)
    assert torch.equal(whole(decoder, texts[0], slot=4), alone[0])
    cuts = sorted({0, 1, n // 3, n // 2, n})
    pieces = [
        whole(decoder, texts[0][a:b], slot=1, first=a) for a, b in itertools.pairwise(cuts)
    ]  # each (b - a, vocab)
    assert torch.equal(torch.cat(pieces), alone[0])
    for position in range(n):  # one token of each sequence that has one left
        rows = [i for i, ids in enumerate(texts) if position < len(ids)][:: -1 if position % 2 else 1]
        logits = decoder.step(
            [texts[i][position] for i in rows], [(3, 0, 2)[i] for i in rows], [position] * len(rows), range(len(rows))
        )
        for i, of_row in zip(rows, logits, strict=True):
            assert torch.equal(of_row, alone[i][position])


@settings(max_examples=15, deadline=None)
@given(data=st.data(), heads=st.integers(1, 3), head=st.integers(1, 20), threads=st.integers(1, 4))
def test_sequences_that_come_and_go(data: st.DataObject, heads: int, head: int, threads: int) -> None:
    """Any mixture of prefill and decode, rows of a sequence apart, copies, returns to earlier positions."""
    weights = make_weights(n_layer=1, n_head=heads, head=head, n_ctx=20, vocab=11)
    decoder, slots = NativeDecoder(weights, slots=3, threads=threads), 3
    oracle = NativeDecoder(weights, slots=1, threads=1)
    held: list[list[int]] = [[] for _ in range(slots)]
    for _ in range(data.draw(st.integers(1, 5))):
        action = data.draw(st.sampled_from(["step", "step", "step", "copy", "free"]))
        a, b = data.draw(st.integers(0, slots - 1)), data.draw(st.integers(0, slots - 1))
        if action == "free":
            decoder.free_slot(a)
            held[a] = []
        elif action == "copy":
            decoder.copy_slot(a, b)
            held[b] = list(held[a])
        else:
            for slot in range(slots):  # the engine may take tokens back
                del held[slot][data.draw(st.integers(0, len(held[slot]))) :]
            rows = data.draw(st.lists(st.integers(0, slots - 1), min_size=1, max_size=12))
            ids, of, positions = [], [], []
            for slot in rows:
                if len(held[slot]) < 20:
                    ids.append(data.draw(st.integers(0, 10)))
                    of.append(slot)
                    positions.append(len(held[slot]))
                    held[slot].append(ids[-1])
            outputs = sorted(data.draw(st.sets(st.integers(0, len(ids) - 1)))) if ids else []
            logits = decoder.step(ids, of, positions, outputs)
            for i, of_row in zip(outputs, logits, strict=True):
                assert torch.equal(whole(oracle, held[of[i]][: positions[i] + 1])[-1], of_row)


def test_extreme_numbers_stay_numbers() -> None:
    """Keys and values of millions, weights of nothing but zeros."""
    weights = make_weights()
    weights.layers[0].c_attn.scale.mul_(1e7)
    assert torch.isfinite(whole(NativeDecoder(weights, 1), random_ids(9, 23))).all()
    for layer in weights.layers:
        for matrix in (layer.c_attn, layer.attn_c_proj, layer.c_fc, layer.mlp_c_proj):
            matrix.weight.zero_()
    logits = whole(NativeDecoder(weights, 1), random_ids(9, 23))
    assert torch.allclose(logits.double(), reference(weights, random_ids(9, 23)), atol=1e-3)


def test_a_sum_that_overflows_is_seen() -> None:
    weights = make_weights()
    weights.layers[0].mlp_c_proj.scale.fill_(3e38)
    assert not torch.isfinite(whole(NativeDecoder(weights, 1), [1, 2, 3])).any()


def test_a_sum_that_overflows_spoils_nobody_else() -> None:
    """Not by what stays beyond the end of a row, either: a width of 5 leaves eleven numbers there."""
    weights = make_weights(n_layer=1, n_head=1, head=5)
    expected = whole(NativeDecoder(weights, 1), [1, 2, 3])
    weights.wpe[5] = 3e38
    decoder = NativeDecoder(weights, 2)
    assert not torch.isfinite(whole(decoder, [1, 2, 3, 4, 5, 6])[-1]).all()
    assert torch.equal(whole(decoder, [1, 2, 3], slot=1), expected)


@pytest.mark.parametrize(
    ("ids", "slots", "positions", "outputs", "word"),
    [
        ([23], [0], [0], [0], "token ids"),
        ([-1], [0], [0], [0], "token ids"),
        ([1], [2], [0], [0], "slot 2"),
        ([1], [-1], [0], [0], "slot -1"),
        ([1], [0], [40], [0], "context"),
        ([1], [0], [-1], [0], "context"),
        ([1], [0], [5], [0], "holds 4"),
        ([1, 1], [0, 0], [3, 5], [0], "order"),
        ([1, 1], [0, 0], [3, 3], [0], "order"),
        ([1, 1], [0], [3, 3], [0], "one of each"),
        ([1], [0], [3], [1], "logits"),
        ([1], [0], [3], [-1], "logits"),
        ([1, 2], [0, 0], [3, 4], [1, 0], "ascend"),
        ([1, 2], [0, 0], [3, 4], [1, 1], "ascend"),
        ([2**40], [0], [0], [0], "token ids"),
    ],
)
def test_a_wrong_step_is_refused_and_changes_nothing(
    ids: list[int], slots: list[int], positions: list[int], outputs: list[int], word: str
) -> None:
    decoder = NativeDecoder(make_weights(), slots=2, threads=2)
    whole(decoder, [1, 2, 3])
    expected = whole(decoder, [4], first=3)
    with pytest.raises(RequestError, match=word):
        decoder.step(ids, slots, positions, outputs)
    assert torch.equal(whole(decoder, [4], first=3), expected)
    for slot in (-1, 2):
        with pytest.raises(RequestError, match=f"slot {slot}"):
            decoder.free_slot(slot)
        with pytest.raises(RequestError, match=f"slot {slot}"):
            decoder.copy_slot(0, slot)


def test_no_tokens_no_logits() -> None:
    assert NativeDecoder(make_weights(), slots=1).step([], [], [], []).shape == (0, 23)


def _spoil(change: Callable[[Any], None]) -> Any:
    weights = make_weights()
    change(weights)
    return weights


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda w: setattr(w.wte, "weight", w.wte.weight.float()), "wte is float32"),
        (lambda w: setattr(w.layers[1].c_fc, "weight", w.layers[1].c_fc.weight[1:]), "layer 1 c_fc"),
        (lambda w: setattr(w.layers[0].c_fc, "scale", torch.full((64,), torch.nan)), "layer 0 c_fc scale holds NaN"),
        (lambda w: setattr(w.layers[0].c_fc, "bias", torch.zeros(3)), "layer 0 c_fc bias"),
        (lambda w: setattr(w, "wpe", w.wpe[1:]), "wpe"),
        (lambda w: setattr(w, "layers", w.layers[1:]), "1 int8 layers"),
        (lambda w: setattr(w, "ln_f_bias", torch.full((16,), torch.inf)), "ln_f.bias"),
    ],
)
def test_wrong_weights_are_refused_by_name(change: Callable[[Any], None], word: str) -> None:
    with pytest.raises(RequestError, match=word):
        NativeDecoder(_spoil(change), slots=1)


def test_numbers_of_slots_and_threads() -> None:
    for wrong in ({"slots": 0}, {"slots": 1, "threads": 0}, {"slots": 1, "threads": 5000}):
        with pytest.raises(RequestError, match=r"at least 1|take 1"):
            NativeDecoder(make_weights(), **wrong)
    assert NativeDecoder(make_weights(), slots=1).threads == min(native.physical_cores(), torch.get_num_threads())
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert NativeDecoder(make_weights(), slots=1).threads == 1
    finally:
        torch.set_num_threads(before)


def test_weights_that_do_not_lie_side_by_side() -> None:
    weights, strided = make_weights(), make_weights()
    strided.wpe = strided.wpe.T.contiguous().T
    strided.wte.weight = strided.wte.weight.T.contiguous().T
    strided.layers[0].c_fc.bias = torch.stack([strided.layers[0].c_fc.bias] * 2, dim=1)[:, 0]
    ids = random_ids(9, 23)
    assert torch.equal(whole(NativeDecoder(strided, 1), ids), whole(NativeDecoder(weights, 1), ids))


def test_threads_that_call_at_once_wait_for_each_other() -> None:
    decoder = NativeDecoder(make_weights(), slots=4, threads=2)
    texts = [random_ids(30, 23, seed) for seed in range(4)]
    expected = [whole(NativeDecoder(make_weights(), 1, threads=1), ids) for ids in texts]
    got: dict[int, list[Tensor]] = {slot: [] for slot in range(4)}

    def run(slot: int) -> None:
        got[slot] = [whole(decoder, [token], slot, position) for position, token in enumerate(texts[slot])]

    callers = [threading.Thread(target=run, args=(slot,)) for slot in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(torch.equal(torch.cat(got[slot]), expected[slot]) for slot in range(4))


def test_a_forked_child_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = NativeDecoder(make_weights(), slots=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        with pytest.raises(WorkError, match="fork"):
            whole(decoder, [1])
    whole(decoder, [1])


COMPILER = """#!/bin/sh
# Stands for a compiler: takes a while, then writes what it is told to.
case "$*" in *--version) echo stand-in 1; exit;; esac
for last; do :; done
sleep 0.3
printf library > "$last"
"""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "a compiler"
    path.write_text(COMPILER)
    path.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{path}' -pipe")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return path


def test_two_that_build_at_once_do_no_harm(compiler: Path, tmp_path: Path) -> None:
    built: list[Path] = []
    builders = [threading.Thread(target=lambda: built.append(native.build())) for _ in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert built[0] == built[1]
    assert built[0].read_text() == "library"
    assert os.listdir(tmp_path / "cache" / "build-gpt2") == [built[0].name]
    compiler.write_text(COMPILER.replace("sleep 0.3", "exit 1"))
    assert native.build() == built[0]  # nothing is compiled twice
    compiler.write_text(COMPILER.replace("stand-in 1", "stand-in 2"))
    assert native.build() != built[0]
    assert native.build("portable") != native.build()


def test_why_there_are_no_kernels(compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler.write_text(COMPILER.replace("sleep 0.3", "echo network.cpp:1: error: no such thing >&2; exit 1"))
    with pytest.raises(WorkError, match="no such thing"):
        native.build()
    assert os.listdir(tmp_path / "cache" / "build-gpt2") == []
    compiler.write_text("#!/bin/sh\nexit 1")
    with pytest.raises(WorkError, match="does not run"):
        native.build()
    monkeypatch.setenv("CXX", str(tmp_path / "nothing"))
    with pytest.raises(WorkError, match="does not run"):
        native.build()
    monkeypatch.setenv("CXX", "'g++")
    with pytest.raises(WorkError, match="CXX cannot be read"):
        native.build()
    monkeypatch.setenv("CXX", "")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(WorkError, match="no C\\+\\+ compiler"):
        native.build()
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    compiler.write_text(COMPILER)
    monkeypatch.setenv("CXX", f"'{compiler}'")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(WorkError, match="XDG_CACHE_HOME"):
        native.build()
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(native.Path, "home", homeless)
    with pytest.raises(WorkError, match=r"no home.*XDG_CACHE_HOME"):
        native.build()


def test_a_damaged_library_is_built_again(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = native._library.__wrapped__  # not the answer that is kept
    assert "invalid ELF header" in good()[1] or "file too short" in good()[1]  # the stand-in builds no library
    damaged = native.build()
    damaged.write_bytes(b"")
    monkeypatch.setattr(native, "load_library", lambda file: file.read_text() or native.ctypes.CDLL(str(file)))
    assert good() == ("library", None)
    assert damaged.read_text() == "library"


PROGRAM = """
import sys
from tests.inference.test_native import make_weights
from gpt2.inference.engine import Engine
from gpt2.inference.native import NativeDecoder
from gpt2.tokenizer import Tokenizer
engine = Engine(lambda: None, Tokenizer.from_name("bytes"), decoder=NativeDecoder(make_weights(vocab=257), 2))
half = engine.stream("ab", 20)
next(half)
print(engine.generate("a", 5, temperature=0) is not None)
"""


def test_a_program_ends_without_a_word() -> None:
    """Engine and a stream that was read half-way are alive when it does."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_without_kernels_the_decoder_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_library", lambda: (None, "there is no C++ compiler"))
    assert native.kernels_available() == "there is no C++ compiler"
    with pytest.raises(WorkError, match="no C\\+\\+ compiler"):
        NativeDecoder(make_weights(), slots=1)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def generate(decoder: NativeDecoder, tokens: int) -> None:
    """Sequences of the whole context, one after the other, in slots that are freed now and then."""
    n = decoder.config.n_ctx
    for i in range(tokens):
        slot = i // n % decoder.slots
        decoder.step([i % 5], [slot], [i % n], [0])
        if i % n == n - 1 and i // n % 3 == 0:
            decoder.free_slot(slot)


@pytest.mark.interop
def test_memory_does_not_grow_over_100_000_tokens() -> None:
    decoder = NativeDecoder(make_weights(n_layer=1, n_ctx=64), slots=3, threads=1)
    generate(decoder, 2000)
    gc.collect()
    before = resident()
    generate(decoder, 100_000)
    for _ in range(200):
        NativeDecoder(make_weights(n_layer=1, n_ctx=64), slots=3, threads=3).step([1], [0], [0], [0])
    gc.collect()
    assert resident() - before < 4 << 20


@pytest.mark.interop
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
@pytest.mark.parametrize("path", native.paths_here())
def test_sanitizers_report_nothing(sanitizers: str, path: native.InstructionPath, tmp_path: Path) -> None:
    driver = tmp_path / "driver"
    flags = ["-std=c++20", "-O1", "-g", "-pthread", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    source = Path(__file__).with_name("kernels_driver.cpp")
    subprocess.run([*native._compiler(), *flags, *native.PATHS[path], str(source), "-o", str(driver)], check=True)
    done = subprocess.run([str(driver), "1", "40"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "done\n"
    assert done.stderr == ""


def test_kernel_sources_are_package_data() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["gpt2"]
    package = native.SOURCES.parents[1]
    shipped = {file for pattern in patterns for file in package.glob(pattern)}
    assert set(native.SOURCES.iterdir()) <= shipped

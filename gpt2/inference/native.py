"""The int8 kernels: built at first use, kept, loaded by ctypes.

    kernels/*.cpp, *.h ── g++ or clang++ ── ~/.cache/build-gpt2/kernels-HASH.so ── NativeDecoder

The library knows nothing of torch or Python, so one build serves every version of either. C looks at no argument:
all are looked at here, and a wrong one is a RequestError.
"""

import ctypes
import functools
import hashlib
import itertools
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from gpt2.errors import RequestError, WorkError
from gpt2.files import flush_to_disk

if TYPE_CHECKING:
    from gpt2.inference.quantize import Int8Matrix, QuantizedWeights

SOURCES = Path(__file__).parent / "kernels"
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-fno-math-errno")

InstructionPath = Literal["native", "avx512vnni", "avx2", "portable"]
"""native: what this CPU has. The others are for tests."""
PATHS: dict[InstructionPath, tuple[str, ...]] = {
    "native": ("-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native",),
    "avx512vnni": ("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "portable": (),
}
NEEDS = {"avx512vnni": {"avx512f", "avx512bw", "avx512vl", "avx512_vnni"}, "avx2": {"avx2", "fma", "f16c"}}


class _NoKernels(Exception):
    """Why there are none, in one line."""


def kernels_available() -> str | None:
    """None if the kernels can be used, built now if need be; else why not, in one line. The same answer ever after."""
    return _library()[1]


def build(path: InstructionPath = "native") -> Path:
    """The compiled library, from the cache where it stands already.

    The name holds a hash of all that the machine code depends on. It is written beside its place and renamed, so two
    processes that build at once do no harm. Raises WorkError where there is no compiler, it fails, or the cache
    cannot be written.
    """
    try:
        return _build(path)
    except _NoKernels as error:
        raise WorkError(f"the int8 kernels cannot be used: {error}") from None


def paths_here() -> list[InstructionPath]:
    """The instruction paths that differ and that this CPU can run, native first."""
    words = set(_cpu().split())
    able = [path for path in PATHS if NEEDS.get(path, set()) <= words]
    return [path for path in able if path != able[1]] if len(able) > 2 else able  # native is the best of the others


def physical_cores() -> int:
    """Cores that this process may use: two hardware threads of one core count once, a container's quota bounds them."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text())
        except OSError:
            cores.add(str(cpu))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(len(cores), max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or "max"
        return len(cores)


class NativeDecoder:
    """A GPT-2 of int8 weights on the CPU; implements `decoder.Decoder`.

    The weights are copied in the kernels' own order; the decoder keeps no hold of what it was given. A slot takes
    2 · n_layer · (n_embd + 4 · n_head) bytes for each token that it holds, for GPT-2 small 20 KB. One step at a time:
    threads of a program that call at once wait for each other.
    """

    def __init__(self, weights: "QuantizedWeights", slots: int, threads: int | None = None) -> None:
        """slots: sequences in flight at most; threads: those of torch (torch.set_num_threads, OMP_NUM_THREADS) unless
        given, but no more than there are cores.

        Raises RequestError for weights that are not of their shape or kind, WorkError where the kernels cannot be used
        or memory does not suffice.
        """
        self._library, reason = _library()
        if self._library is None:
            raise WorkError(f"the int8 kernels cannot be used: {reason}")
        if slots < 1:
            raise RequestError(f"{slots} sequences in flight: at least 1 is needed")
        if threads is not None and not 1 <= threads <= 1024:
            raise RequestError(f"{threads} threads: take 1 to 1024")
        self.config, self.slots = weights.config, slots
        self.threads = min(physical_cores(), torch.get_num_threads()) if threads is None else threads
        _check_weights(weights)
        self._lock, self._process = threading.Lock(), os.getpid()
        self._lengths = [0] * slots
        c, tied = weights.config, weights.lm_head is None
        self._network: int | None = self._library.gpt2_new(
            c.vocab_size, c.n_ctx, c.n_layer, c.n_head, c.n_embd, c.layer_norm_epsilon, tied, slots, self.threads
        )
        if not self._network:
            raise WorkError(f"not enough memory for the int8 weights, or not {self.threads} threads to be had")
        self._end = weakref.finalize(self, _free, self._library, self._network, self._process)
        for i, layer in enumerate(weights.layers):
            for kind, matrix in enumerate((layer.c_attn, layer.attn_c_proj, layer.c_fc, layer.mlp_c_proj)):
                self._set_matrix(i, kind, matrix)
        self._set_matrix(c.n_layer, 0, weights.wte if weights.lm_head is None else weights.lm_head)
        if weights.lm_head is not None:
            self._set_matrix(c.n_layer, 1, weights.wte)
        vectors = (weights.wpe, weights.ln_f_weight, weights.ln_f_bias, weights.head_column)
        for kind, vector in enumerate(vectors):
            vector = vector.detach().contiguous()
            self._library.gpt2_set_vector(self._network, kind, vector.data_ptr())

    def step(
        self, ids: Sequence[int], slots: Sequence[int], positions: Sequence[int], outputs: Sequence[int]
    ) -> Tensor:
        """n tokens, those of one slot in order; gives the logits of those numbered in outputs.

        ids, slots, positions: n each. The keys and values go into the slot at the position, at most one past its last;
        what stood beyond is forgotten. outputs: ascending numbers below n. Gives (len(outputs), vocab_size) float32.
        Raises RequestError for a number out of range, before anything is changed.
        """
        n, out = len(ids), len(outputs)
        lengths = self._check_step(ids, slots, positions, outputs)
        logits = torch.empty((out, self.config.vocab_size), dtype=torch.float32)
        if n == 0:
            return logits
        order: list[int] | None = None
        if 1 + sum(a != b for a, b in itertools.pairwise(slots)) > len(lengths):  # tokens of a slot are apart
            order = sorted(range(n), key=lambda i: slots[i])
            place = {row: i for i, row in enumerate(order)}
            ids, slots, positions = ([numbers[i] for i in order] for numbers in (ids, slots, positions))
            wanted = sorted(range(out), key=lambda i: place[outputs[i]])
            outputs = [place[outputs[i]] for i in wanted]
        with self._lock:
            done = self._c().gpt2_step(
                self._network, n, _int32(ids), _int32(slots), _int32(positions), out, _int32(outputs), logits.data_ptr()
            )
            if done != 0:
                raise WorkError("not enough memory for the keys and values of the sequences in flight: take fewer")
            for slot, length in lengths.items():
                self._lengths[slot] = length
        if order is not None:
            logits = torch.empty_like(logits).index_copy_(0, torch.tensor(wanted, dtype=torch.int64), logits)
        return logits

    def copy_slot(self, source: int, to: int) -> None:
        """`to` holds what `source` holds. Raises RequestError for a slot that does not exist."""
        self._check_slots((source, to))
        with self._lock:
            if self._c().gpt2_copy_slot(self._network, source, to, self._lengths[source]) != 0:
                raise WorkError("not enough memory for the keys and values of the sequences in flight: take fewer")
            self._lengths[to] = self._lengths[source]

    def free_slot(self, slot: int) -> None:
        """The slot holds nothing, and its memory goes back to the system."""
        if not self._end.alive:  # the program ends, and the network did before
            return
        self._check_slots((slot,))
        with self._lock:
            self._c().gpt2_free_slot(self._network, slot)
            self._lengths[slot] = 0

    def _c(self) -> ctypes.CDLL:
        if self._process != os.getpid():
            raise WorkError("the int8 decoder does not outlive a fork: make it in the process that uses it")
        assert self._library is not None
        return self._library

    def _set_matrix(self, layer: int, kind: int, matrix: "Int8Matrix") -> None:
        weight, scale = matrix.weight.contiguous(), matrix.scale.contiguous()
        bias = None if matrix.bias is None else matrix.bias.contiguous()
        if self._c().gpt2_set_matrix(
            self._network, layer, kind, weight.data_ptr(), scale.data_ptr(), None if bias is None else bias.data_ptr()
        ):
            raise WorkError("not enough memory for the int8 weights")

    def _check_slots(self, slots: Sequence[int]) -> None:
        for slot in slots:
            if not 0 <= slot < self.slots:
                raise RequestError(f"slot {slot} does not exist: there are {self.slots}, from 0")

    def _check_step(
        self, ids: Sequence[int], slots: Sequence[int], positions: Sequence[int], outputs: Sequence[int]
    ) -> dict[int, int]:
        """The length of each slot after the step."""
        n = len(ids)
        if len(slots) != n or len(positions) != n:
            raise RequestError(f"{n} token ids, {len(slots)} slots, {len(positions)} positions: one of each a token")
        if n and not 0 <= min(ids) <= max(ids) < self.config.vocab_size:
            raise RequestError(f"token ids {min(ids)} to {max(ids)}: the model has {self.config.vocab_size}, from 0")
        self._check_slots(slots)
        if any(b <= a for a, b in itertools.pairwise(outputs)):
            raise RequestError("the numbers of the tokens whose logits are wanted must ascend")
        if outputs and not (outputs[0] >= 0 and outputs[-1] < n):
            raise RequestError(f"logits of the tokens {outputs[0]} to {outputs[-1]}: the step has {n}, from 0")
        lengths: dict[int, int] = {}
        for slot, position in zip(slots, positions, strict=True):
            if not 0 <= position < self.config.n_ctx:
                raise RequestError(f"position {position}: the model's context is {self.config.n_ctx} tokens")
            if slot in lengths and position != lengths[slot]:
                raise RequestError(
                    f"position {position} after {lengths[slot] - 1} in slot {slot}: they must be in order"
                )
            if position > self._lengths[slot] and slot not in lengths:
                raise RequestError(f"position {position} of slot {slot}, which holds {self._lengths[slot]} tokens")
            lengths[slot] = position + 1
        return lengths


def _free(library: ctypes.CDLL, network: int, process: int) -> None:
    if process == os.getpid():  # in a forked child the team's threads do not exist and nobody could end them
        library.gpt2_free(network)


def _check_weights(weights: "QuantizedWeights") -> None:
    """Raises RequestError, naming the tensor, for one that is not of the shape, kind or range that C counts on."""
    c = weights.config
    C, V = c.n_embd, c.vocab_size
    if len(weights.layers) != c.n_layer:
        raise RequestError(f"{len(weights.layers)} int8 layers where the model has {c.n_layer}")
    matrices = {"wte": (weights.wte, V, C)}
    if weights.lm_head is not None:
        matrices["lm_head"] = (weights.lm_head, V, C)
    for i, layer in enumerate(weights.layers):
        matrices |= {
            f"layer {i} c_attn": (layer.c_attn, 3 * C, C),
            f"layer {i} attn.c_proj": (layer.attn_c_proj, C, C),
            f"layer {i} c_fc": (layer.c_fc, 4 * C, C),
            f"layer {i} mlp.c_proj": (layer.mlp_c_proj, C, 4 * C),
        }
    vectors = {
        "wpe": (weights.wpe, (c.n_ctx, C)),
        "ln_f.weight": (weights.ln_f_weight, (C,)),
        "ln_f.bias": (weights.ln_f_bias, (C,)),
        "head_column": (weights.head_column, (C,)),
    }
    for name, (matrix, rows, columns) in matrices.items():
        weight = matrix.weight
        if weight.dtype != torch.int8 or weight.shape != (rows, columns) or weight.device.type != "cpu":
            raise RequestError(f"{name} is {_kind(weight)}, not int8 ({rows}, {columns}) in memory")
        vectors[f"{name} scale"] = (matrix.scale, (rows,))
        if matrix.bias is not None:
            vectors[f"{name} bias"] = (matrix.bias, (rows,))
    for name, (vector, shape) in vectors.items():
        if vector.dtype != torch.float32 or vector.shape != shape or vector.device.type != "cpu":
            raise RequestError(f"{name} is {_kind(vector)}, not float32 {shape} in memory")
        if not torch.isfinite(vector).all():
            raise RequestError(f"{name} holds NaN or infinity: the int8 weights are spoilt")


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} on {tensor.device.type}"


def _int32(numbers: Sequence[int]) -> ctypes.Array[ctypes.c_int32]:
    return (ctypes.c_int32 * len(numbers))(*numbers)


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or None and why there is none."""
    try:
        file = _build("native")
        try:
            return load_library(file), None
        except (OSError, AttributeError):  # what lies there is damaged: once more
            file.unlink()
            return load_library(_build("native")), None
    except _NoKernels as error:
        return None, str(error)
    except (OSError, AttributeError) as error:  # the cache lies on a disk from which nothing may be executed, say
        return None, f"{error}: set XDG_CACHE_HOME to another place"


def load_library(path: Path) -> ctypes.CDLL:
    """The library with the types of its functions, which network.cpp describes. Raises OSError."""
    library = ctypes.CDLL(str(path))
    integer, pointer, floating = ctypes.c_int, ctypes.c_void_p, ctypes.c_float
    functions: dict[str, tuple[type | None, tuple[type, ...]]] = {
        "gpt2_new": (pointer, (integer,) * 5 + (floating,) + (integer,) * 3),
        "gpt2_free": (None, (pointer,)),
        "gpt2_set_matrix": (integer, (pointer, integer, integer, pointer, pointer, pointer)),
        "gpt2_set_vector": (None, (pointer, integer, pointer)),
        "gpt2_step": (integer, (pointer, integer, pointer, pointer, pointer, integer, pointer, pointer)),
        "gpt2_copy_slot": (integer, (pointer, integer, integer, integer)),
        "gpt2_free_slot": (None, (pointer, integer)),
        "gpt2_dot": (integer, (integer, integer, integer, pointer, pointer, pointer)),
        "gpt2_read": (ctypes.c_int64, (pointer,)),
        "gpt2_multiply": (ctypes.c_int64, (pointer, integer)),
    }
    for name, (result, arguments) in functions.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _build(path: InstructionPath) -> Path:
    compiler = _compiler()
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise _NoKernels(f"the compiler {compiler[0]} does not run ({error})") from None
    flags = [*FLAGS, *PATHS[path]]
    sources = sorted(file for file in SOURCES.iterdir() if file.suffix in (".cpp", ".h"))
    digest = hashlib.sha256("\0".join([*compiler, version, *flags, _cpu()]).encode())
    for source in sources:
        digest.update(source.read_bytes())
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "build-gpt2"
    except RuntimeError as error:
        raise _NoKernels(f"there is no place to keep them ({error}): set XDG_CACHE_HOME") from None
    library = cache / f"kernels-{digest.hexdigest()[:16]}.so"
    try:
        if library.is_file():
            return library
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".building-") as temporary:
            result = Path(temporary) / library.name
            command = [*compiler, *flags, str(SOURCES / "network.cpp"), "-o", str(result)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise _NoKernels(f"{compiler[0]} could not build them ({_reason(done.stderr) or done.returncode})")
            flush_to_disk(result)
            result.replace(library)
    except OSError as error:
        raise _NoKernels(f"they cannot be kept in {cache} ({error.strerror}): set XDG_CACHE_HOME") from None
    return library


def _reason(printed: str) -> str:
    """The line of a compiler's output that says most: no room, else its first error."""
    lines = printed.splitlines()
    said = [line for word in ("No space left", "error") for line in lines if word in line]
    return (said or lines or [""])[0]


def _compiler() -> list[str]:
    """The words that start the compiler: those of the variable CXX, else the first one there is."""
    try:
        given = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise _NoKernels(f"the variable CXX cannot be read ({error}): correct it") from None
    if given:
        return given
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise _NoKernels("there is no C++ compiler: install g++ or clang++, or name one in CXX")


@functools.cache
def _cpu() -> str:
    """What the machine code may depend on: the CPU's name and features, as one line of words."""
    words = [platform.machine()]
    try:
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU part"):
                words.append(value.strip())
    except OSError:
        words.append(platform.processor())
    return " ".join(words)

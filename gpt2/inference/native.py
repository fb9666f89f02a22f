"""The int8 kernels (kernels/*.cpp): compiled at first use, kept, and loaded by ctypes.

    QuantizedWeights ── pack ── NativeDecoder.step: ids, slots, positions ─ C++ ─ logits

The compiler is called directly, without torch's headers: it takes seconds, and the library knows nothing of torch.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gpt2.errors import RequestError, WorkError
from gpt2.inference.decoder import check_step
from gpt2.inference.quantize import Int8Matrix, QuantizedWeights

SOURCES = Path(__file__).parent / "kernels"
# -fno-math-errno and -fno-trapping-math: a vector of square roots or comparisons is one instruction.
FLAGS = ("-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-pthread")
# What each path of the kernels needs of the processor; "native" takes the best that this one has.
PATHS = {
    "native": ("-mcpu=native",) if platform.machine() in ("arm64", "aarch64") else ("-march=native",),
    "avx512vnni": ("-march=x86-64-v4", "-mavx512vnni"),
    "avx2": ("-march=x86-64-v3",),
    "portable": (),
}
SECONDS = 300  # a compiler that takes longer hangs


def kernels_available() -> str | None:
    """None where the kernels can be used here (they are built now, if need be), else why not."""
    try:
        _library("native")
    except WorkError as error:
        return str(error)
    return None


def cache_directory() -> Path:
    """Where compiled kernels are kept: $XDG_CACHE_HOME/build-gpt2, else ~/.cache/build-gpt2."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "build-gpt2"


def build(path: str, directory: Path | None = None) -> Path:
    """The library of one of PATHS, compiled if it is not there yet. Raises WorkError.

    Its name holds a hash of all that decides what comes out, so that it is never stale; it appears in one rename, so
    that any number of processes may build at once.
    """
    compiler = _compiler()
    flags = [*FLAGS, *PATHS[path]]
    sources = sorted(SOURCES.iterdir())
    facts = [shlex.join(compiler), _output([*compiler, "--version"]), shlex.join(flags), _processor()]
    digest = hashlib.sha256("\n".join(facts).encode())
    for source in sources:
        digest.update(source.read_bytes())
    directory = directory or cache_directory()
    target = directory / f"kernels-{path}-{digest.hexdigest()[:16]}.so"
    if target.is_file():
        return target
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=directory, prefix=".tmp-", suffix=".so")
    except OSError as error:
        raise WorkError(f"the compiled kernels cannot be kept in {directory}: {error}; set XDG_CACHE_HOME") from error
    os.close(descriptor)
    try:
        _output([*compiler, *flags, "-o", temporary, *(str(s) for s in sources if s.suffix == ".cpp")])
        os.chmod(temporary, 0o755)
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target


def _compiler() -> list[str]:
    """The command: $CXX, else g++ or clang++."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise WorkError("there is no C++ compiler: install g++ or clang++, or name one in CXX")


def _output(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise WorkError(f"the C++ compiler cannot be run: {error}") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or [""]
        raise WorkError(f"the C++ compiler fails: {lines[0].strip()}")
    return done.stdout


def _processor() -> str:
    """What tells processors apart for -march=native: a home directory may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


@functools.cache
def _library(path: str) -> ctypes.CDLL:
    """The loaded library with its signatures. Raises WorkError."""
    file = build(path)
    try:
        library = ctypes.CDLL(str(file))
    except OSError as error:
        raise WorkError(f"{file} cannot be loaded: {error}; delete it, it is built again") from error
    number, pointer = ctypes.c_int, ctypes.c_void_p
    library.gpt2_new.restype = pointer
    library.gpt2_new.argtypes = [number] * 5 + [ctypes.c_float] + [number] * 2
    library.gpt2_free.argtypes = [pointer]
    library.gpt2_free.restype = None
    library.gpt2_set_matrix.argtypes = [pointer, number, number, pointer, pointer, pointer]
    library.gpt2_set_vector.argtypes = [pointer, number, pointer]
    library.gpt2_set_vector.restype = None
    library.gpt2_step.argtypes = [pointer, number, pointer, pointer, pointer, number, pointer, pointer]
    library.gpt2_copy_slot.argtypes = [pointer, number, number]
    library.gpt2_free_slot.argtypes = [pointer, number]
    library.gpt2_free_slot.restype = None
    library.gpt2_dot.argtypes = [number] * 3 + [pointer] * 3
    return library


def integer_products(weights: Tensor, rows: Tensor, path: str = "native") -> tuple[Tensor, int]:
    """The kernels' matmul alone: (n, out) int32 sums of (out, in) int8 weights and (n, in) int16 rows, exact.

    Also gives the limit up to which these weights allow rows: beyond it a sum might not fit into 32 bits.
    """
    sums = torch.empty(len(rows), len(weights), dtype=torch.int32)
    limit = _library(path).gpt2_dot(
        weights.size(1), len(weights), len(rows), weights.data_ptr(), rows.data_ptr(), sums.data_ptr()
    )
    return sums, _checked(limit)


class NativeDecoder:
    """A Decoder on int8 weights for a CPU: 16-bit activations, exact integer sums, 16-bit keys and values.

    A row's logits do not depend on the rows beside it, to the bit. One thread at a time may call it.
    """

    def __init__(self, weights: QuantizedWeights, slots: int, threads: int | None = None, path: str = "native") -> None:
        """Copies the weights, packed for reading in order; they may be dropped. threads: torch's number by default.

        Raises WorkError where the kernels cannot be built or memory lacks.
        """
        config = weights.config
        self.config, self.slots, self._c = config, slots, _library(path)
        threads = threads or torch.get_num_threads()
        network = self._c.gpt2_new(
            config.vocab_size,
            config.n_ctx,
            config.n_layer,
            config.n_head,
            config.n_embd,
            config.layer_norm_epsilon,
            slots,
            threads,
        )
        if not network:
            raise WorkError("the memory does not suffice for the model")
        self._network = network
        weakref.finalize(self, self._c.gpt2_free, network)
        for number, layer in enumerate(weights.layers):
            for kind, matrix in enumerate((layer.c_attn, layer.attn_c_proj, layer.c_fc, layer.mlp_c_proj)):
                self._set_matrix(number, kind, matrix)
        self._set_matrix(config.n_layer, 0, weights.lm_head or weights.wte)
        if weights.lm_head is not None:
            self._set_matrix(config.n_layer, 1, weights.wte)
        vectors = (weights.wpe, weights.ln_f_weight, weights.ln_f_bias, weights.head_column)
        for kind, vector in enumerate(vectors):
            self._c.gpt2_set_vector(self._network, kind, vector.contiguous().data_ptr())

    def step(
        self, ids: Sequence[int], slots: Sequence[int], positions: Sequence[int], outputs: Sequence[int]
    ) -> Tensor:
        """(len(outputs), vocab_size) float32 logits; see Decoder.step. Raises RequestError for what is out of range."""
        check_step(self, ids, slots, positions, outputs)
        n = len(ids)
        rows = torch.tensor([ids, slots, positions], dtype=torch.int32)  # (3, n)
        wanted = torch.tensor(list(outputs), dtype=torch.int32)
        logits = torch.empty(len(wanted), self.config.vocab_size)
        if n:
            done = self._c.gpt2_step(
                self._network,
                n,
                rows[0].data_ptr(),
                rows[1].data_ptr(),
                rows[2].data_ptr(),
                len(wanted),
                wanted.data_ptr(),
                logits.data_ptr(),
            )
            _checked(done)
        return logits

    def copy_slot(self, source: int, to: int) -> None:
        """`to` holds what `source` holds."""
        _checked(self._c.gpt2_copy_slot(self._network, self._slot(source), self._slot(to)))

    def free_slot(self, slot: int) -> None:
        """Gives the slot's memory back."""
        self._c.gpt2_free_slot(self._network, self._slot(slot))

    def _slot(self, slot: int) -> int:
        if not 0 <= slot < self.slots:
            raise RequestError(f"slot {slot} is not one of the {self.slots}")
        return slot

    def _set_matrix(self, layer: int, kind: int, matrix: Int8Matrix) -> None:
        bias = None if matrix.bias is None else matrix.bias.contiguous()
        done = self._c.gpt2_set_matrix(
            self._network,
            layer,
            kind,
            matrix.weight.contiguous().data_ptr(),
            matrix.scale.contiguous().data_ptr(),
            None if bias is None else bias.data_ptr(),
        )
        _checked(done)


def _checked(result: int) -> int:
    if result < 0:
        raise WorkError("the memory does not suffice: fewer sequences at once, or a shorter context")
    return result

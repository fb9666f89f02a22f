"""What a user installs: metadata, pinned versions, the bundled asset, and imports that cost nothing."""

import hashlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import gpt2

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDED = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()}


def pins() -> dict[str, Requirement]:
    """constraints.txt by normalised name."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    parsed = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def pinned_version(requirement: Requirement) -> Version:
    (specifier,) = requirement.specifier
    assert specifier.operator == "=="
    return Version(specifier.version)


def run_python(code: str, directory: Path = ROOT) -> str:
    """The last line that a fresh interpreter prints."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=directory)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_every_constraint_is_one_exact_public_version():
    for name, requirement in pins().items():
        assert len(requirement.specifier) == 1, name
        assert pinned_version(requirement).local is None, f"{name}: a local version fits no other build"


SET_UP = [*NEEDED, *EXTRAS["hub"], *EXTRAS["gguf"], *EXTRAS["interop"], *EXTRAS["dev"]]


@pytest.mark.parametrize("requirement", SET_UP, ids=str)
def test_what_is_installed_by_setup_is_pinned_within_its_range(requirement):
    if canonicalize_name(requirement.name) == "build-gpt2":
        assert requirement.extras <= EXTRAS.keys()
        return
    pin = pins()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pinned_version(pin))


def test_what_those_need_is_pinned_too():
    """Walks the installed distributions. CUDA's own libraries are left to torch, which pins them itself."""
    pinned, seen = pins(), set()
    waiting = [*NEEDED, *EXTRAS["hub"], *EXTRAS["dev"]]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras))
        if key in seen or name == "build-gpt2" or re.match(r"nvidia-|cuda-|triton", name):
            continue
        seen.add(key)
        assert name in pinned, f"{name} is missing in constraints.txt"
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            if applies(needed.marker, requirement.extras):
                waiting.append(needed)


def applies(marker: Marker | None, extras: set[str]) -> bool:
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in extras or {""})


def test_torch_is_the_tested_version():
    assert str(pins()["torch"]) == "torch==2.13.0"


def test_doctor_asks_for_what_the_package_needs():
    from gpt2 import doctor

    wanted = {canonicalize_name(requirement.name): requirement for requirement in NEEDED}
    torch = wanted.pop("torch")
    assert {canonicalize_name(name) for name in doctor.REQUIRED} == wanted.keys()
    since, before = doctor._dotted(doctor.TORCH_SINCE), doctor._dotted(doctor.TORCH_BEFORE)
    assert torch.specifier == Requirement(f"torch>={since},<{before}").specifier
    optional = {canonicalize_name(r.name) for extra in EXTRAS.values() for r in extra}
    assert {canonicalize_name(name) for name in doctor.OPTIONAL} <= optional


def test_the_command_is_there_and_callable():
    assert PROJECT["scripts"] == {"gpt2": "gpt2.cli:main"}
    (entry,) = [
        entry
        for entry in importlib.metadata.entry_points(group="console_scripts", name="gpt2")
        if entry.dist is not None and entry.dist.name == "build-gpt2"
    ]
    assert callable(entry.load())


def test_the_installed_version_is_the_packages_own():
    assert importlib.metadata.version("build-gpt2") == gpt2.__version__


def test_bundled_merge_table_is_gpt2s():
    content = (files("gpt2") / "assets" / "vocab.bpe").read_bytes()
    wanted = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    assert hashlib.sha256(content).hexdigest() == wanted


def test_import_gpt2_is_lazy():
    loaded = run_python("import sys, gpt2; print(sorted({'torch', 'numpy', 'rich', 'matplotlib'} & set(sys.modules)))")
    assert loaded == "[]"


@pytest.mark.parametrize("module", ["config", "tokenizer", "files", "errors", "data", "cli"])
def test_starts_without_torch(module):
    code = f"""
import sys, importlib, pkgutil
module = importlib.import_module("gpt2.{module}")
for found in pkgutil.iter_modules(getattr(module, "__path__", []), module.__name__ + "."):
    importlib.import_module(found.name)
print("torch" in sys.modules)
"""
    assert run_python(code) == "False"


def test_importing_every_module_starts_nothing_and_leaves_no_trace(tmp_path):
    """No thread, no CUDA, no process group, no setting of torch, no random state, no file."""
    code = """
import importlib, pkgutil, random, threading
import numpy, torch
import rich.console  # draws a random number when it is imported
import gpt2
torch_state, numpy_state, random_state = torch.get_rng_state(), numpy.random.get_state()[1], random.getstate()
settings = lambda: (torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision(),
                    torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled())
before = settings()
names = [m.name for m in pkgutil.walk_packages(gpt2.__path__, "gpt2.") if not m.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
assert len(names) > 10, names
assert threading.enumerate() == [threading.main_thread()], threading.enumerate()
assert not torch.cuda.is_initialized()
assert not (torch.distributed.is_available() and torch.distributed.is_initialized())
assert settings() == before
assert torch.equal(torch.get_rng_state(), torch_state)
assert (numpy.random.get_state()[1] == numpy_state).all() and random.getstate() == random_state
print("quiet")
"""
    assert run_python(code, tmp_path) == "quiet"
    assert list(tmp_path.iterdir()) == []

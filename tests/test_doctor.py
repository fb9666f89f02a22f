"""The doctor finds what is here and names the mend of what is not."""

import io
import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from rich.console import Console

from gpt2 import doctor
from gpt2.doctor import GIB, Check, diagnose, exit_code, print_report, to_dict


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def printed(checks: list[Check], width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_report(checks, console)
    return console.file.getvalue()


def test_names_everything_once(tmp_path):
    checks = diagnose(tmp_path)
    names = [check.name for check in checks]
    assert len(set(names)) == len(names)
    wanted = {"python", "torch", "packages", "device", "cores", "memory", "c++ compiler", "bfloat16"}
    wanted |= {"flash attention", "processes", "disk", "GPT-2 merge table", *doctor.OPTIONAL}
    assert set(names) == wanted
    assert all(check.found for check in checks)


def test_this_environment_lacks_nothing_required(tmp_path):
    checks = by_name(diagnose(tmp_path))
    for name in ("python", "torch", "packages", "GPT-2 merge table"):
        assert checks[name].ok is True
        assert checks[name].mend == ""


def test_only_a_false_check_fails():
    assert exit_code([]) == 0
    assert exit_code([Check("a", "b", True), Check("c", "d", None, "mend")]) == 0
    assert exit_code([Check("a", "b", True), Check("c", "d", False, "mend")]) == 1


def test_to_dict_is_json(tmp_path):
    checks = diagnose(tmp_path)
    read = json.loads(json.dumps(to_dict(checks)))
    assert read["ok"] is (exit_code(checks) == 0)
    assert read["checks"][0].keys() == {"name", "found", "ok", "mend"}
    assert [check["name"] for check in read["checks"]] == [check.name for check in checks]


def test_report_shows_found_and_mend_as_plain_text():
    text = printed([Check("disk", "1 GiB in /home/[red]x", False, "free [bold]space"), Check("cores", "2", None)])
    assert "/home/[red]x" in text
    assert "→ free [bold]space" in text
    assert "Missing: disk." in text
    assert "Nothing required is missing." in printed([Check("cores", "2", None)])


def test_report_folds_instead_of_cutting():
    long = "x" * 300
    assert printed([Check("device", long, True)], width=60).count("x") == 300


@pytest.mark.parametrize("version", ["2.10.1", "2.14.0", "3.0.0", "1.13.1+cu117"])
def test_torch_outside_the_range_fails(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    check = doctor._check_torch(torch)
    assert check.ok is False
    assert version in check.found
    assert check.mend == "pip install 'torch>=2.11,<2.14'"


@pytest.mark.parametrize("version", ["2.11.0", "2.12.1+cu128", "2.13.0+cpu", "2.13.0a0+git1234567"])
def test_torch_within_the_range_is_ok(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    assert doctor._check_torch(torch).ok is True


def test_without_torch_the_rest_is_still_told(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_import_torch", lambda: None)
    checks = by_name(diagnose(tmp_path, deep=True))
    assert checks["torch"].ok is False
    assert "pip install" in checks["torch"].mend
    assert {"memory", "c++ compiler", "disk"} <= checks.keys()


def test_missing_packages_are_named_with_their_pip_line(monkeypatch):
    absent = {"no-such-thing": "no_such_thing", "nor-this": "nor_this"}
    monkeypatch.setattr(doctor, "REQUIRED", {"numpy": "numpy", **absent})
    check = doctor._check_packages()
    assert check.ok is False
    assert check.mend == "pip install no-such-thing nor-this"


def test_missing_optional_package_is_no_failure(monkeypatch):
    monkeypatch.setattr(doctor, "OPTIONAL", {"no-such-thing": "a sink", "numpy": "arrays"})
    missing, present = doctor._check_optional()
    assert missing.ok is None
    assert missing.mend == "if wanted: pip install no-such-thing"
    assert present.mend == ""


def test_missing_compiler_names_the_mend(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    check = doctor._check_compiler(torch, deep=False)
    assert check.ok is None
    assert check.mend


def test_compiler_named_by_cxx_is_the_one_that_counts(monkeypatch, tmp_path):
    for name in ("g++", "clang++"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "clang++")
    assert doctor._check_compiler(torch, deep=False) == Check("c++ compiler", str(tmp_path / "clang++"), True)
    monkeypatch.setenv("CXX", "icpx")
    check = doctor._check_compiler(torch, deep=False)
    assert check.found == "icpx is not here"
    assert check.mend == "torch.compile looks for it: export CXX=g++"


def test_a_compiler_that_fails_is_found_out_by_deep(monkeypatch):
    def broken(torch):
        raise RuntimeError("Python.h: no such file\nlong log")

    monkeypatch.setattr(doctor, "compiles", broken)
    monkeypatch.setenv("CXX", shutil.which("true"))
    check = doctor._check_compiler(torch, deep=True)
    assert check.ok is None
    assert "Python.h: no such file)" in check.mend


@pytest.mark.parametrize(("content", "what"), [(b"#version: 0.2\n", "altered"), (None, "cannot be read")])
def test_damaged_or_missing_merge_table_fails(monkeypatch, tmp_path, content, what):
    (tmp_path / "assets").mkdir()
    if content is not None:
        (tmp_path / "assets" / "vocab.bpe").write_bytes(content)
    monkeypatch.setattr(doctor, "files", lambda package: tmp_path)
    check = doctor._check_merges()
    assert check.ok is False
    assert what in check.found
    assert "pip install" in check.mend


def test_full_disk_fails(monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10 * GIB, 10 * GIB - 5, 5))
    check = doctor._check_disk(tmp_path)
    assert check.ok is False
    assert check.mend
    assert str(tmp_path) in check.found


def test_little_memory_is_told(monkeypatch):
    monkeypatch.setattr(doctor, "memory", lambda: (4 * GIB, GIB // 2))
    check = doctor._check_memory()
    assert check.found == "4.0 GiB, 0.5 GiB available"
    assert check.mend
    monkeypatch.setattr(doctor, "memory", lambda: (None, None))
    assert doctor._check_memory() == Check("memory", "unknown", None)


def test_reads_available_memory_and_container_limits(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  10 kB\nMemAvailable:    7 kB\n")
    assert doctor._available_of(meminfo) == 7 * 1024
    assert doctor._available_of(tmp_path / "absent") is None
    (tmp_path / "memory.max").write_text("max\n")
    assert doctor._number_in(tmp_path / "memory.max") is None
    (tmp_path / "memory.max").write_text("2048\n")
    assert doctor._number_in(tmp_path / "memory.max") == 2048


def test_a_driver_without_a_cuda_build_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    check = doctor._check_device(torch)
    assert check.ok is None
    assert "install a CUDA build of torch" in check.mend


def test_cuda_cards_are_named_with_memory(monkeypatch):
    card = namedtuple("card", "name total_memory major minor")("H100", 80 * GIB, 9, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert doctor._check_device(torch).found == "cuda: H100, 80.0 GiB, compute capability 9.0"
    assert doctor._check_bf16(torch).ok is True
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert doctor._check_bf16(torch).found == "emulated and slow on this GPU: fp32 is used"


@pytest.mark.parametrize(("supported", "ok"), [(True, True), (False, None)])
def test_bf16_of_the_cpu(monkeypatch, supported, ok):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert doctor._check_bf16(torch).ok is ok


def test_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    diagnose()
    assert list(Path.cwd().iterdir()) == []

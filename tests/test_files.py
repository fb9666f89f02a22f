"""Directories are whole or absent, and what cannot be written is said in one line."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2 import files
from gpt2.errors import RequestError, WorkError
from gpt2.files import TEMPORARY_PREFIX, new_directory, new_file, sha256_file, write_json


def everything(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_appears_whole(tmp_path):
    target = tmp_path / "a" / "b"
    with new_directory(target) as temporary:
        assert temporary.parent == target.parent
        assert temporary.name.startswith(TEMPORARY_PREFIX)
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_bytes(b"1")
        assert not target.exists()
    assert everything(tmp_path) == ["a", "a/b", "a/b/inner", "a/b/inner/file"]


def test_an_empty_directory_may_be_there_already(tmp_path):
    (tmp_path / "out").mkdir()
    with new_directory(tmp_path / "out") as temporary:
        (temporary / "file").write_bytes(b"1")
    assert everything(tmp_path) == ["out", "out/file"]


def test_has_the_rights_of_any_other_directory(tmp_path):
    (tmp_path / "ordinary").mkdir()
    with new_directory(tmp_path / "new"):
        pass
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_works_relative_to_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with new_directory(Path("out")):
        os.chdir("/")
    assert everything(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [ValueError("x"), RequestError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_an_exception_leaves_nothing_and_passes_through(tmp_path, error):
    def fill() -> None:
        with new_directory(tmp_path / "a" / "b" / "out") as temporary:
            (temporary / "file").write_bytes(b"1")
            raise error

    with pytest.raises(type(error)) as caught:
        fill()
    assert caught.value is error
    assert everything(tmp_path) == []  # the parents it made are gone too


def test_parents_that_were_there_or_are_used_stay(tmp_path):
    (tmp_path / "old").mkdir()

    def fill() -> None:
        with new_directory(tmp_path / "old" / "new" / "out"):
            (tmp_path / "old" / "new" / "by_another_hand").write_bytes(b"1")
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fill()
    assert everything(tmp_path) == ["old", "old/new", "old/new/by_another_hand"]


def test_a_full_disk(tmp_path):
    with (
        pytest.raises(WorkError, match=r"cannot write .*out: No space left on device; free space") as caught,
        new_directory(tmp_path / "out"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "\n" not in str(caught.value)
    assert everything(tmp_path) == []


@pytest.mark.parametrize("function", ["fsync", "rename"])
def test_a_disk_that_fails_at_the_end(tmp_path, monkeypatch, function):
    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files.os, function, fail)
    with pytest.raises(WorkError, match="cannot write"), new_directory(tmp_path / "out") as temporary:
        (temporary / "file").write_bytes(b"1")
    assert everything(tmp_path) == []


def test_every_file_and_directory_is_flushed_before_the_rename(tmp_path, monkeypatch):
    log: list[str] = []
    fsync, rename = os.fsync, os.rename

    def logged_fsync(descriptor: int) -> None:
        log.append(os.readlink(f"/proc/self/fd/{descriptor}") if sys.platform == "linux" else str(descriptor))
        fsync(descriptor)

    def logged_rename(source: object, target: object) -> None:
        log.append("rename")
        rename(source, target)

    monkeypatch.setattr(files.os, "fsync", logged_fsync)
    monkeypatch.setattr(files.os, "rename", logged_rename)
    with new_directory(tmp_path / "out") as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_bytes(b"1")
    before, after = log[: log.index("rename")], log[log.index("rename") + 1 :]
    assert len(before) == 3  # the file, its directory, the whole
    if sys.platform == "linux":
        assert set(before) == {str(temporary), str(temporary / "inner"), str(temporary / "inner" / "file")}
        assert after == [str(tmp_path)]


def test_what_is_there_is_never_touched(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_bytes(b"1")
    (tmp_path / "plain").write_bytes(b"2")
    for name in ("full", "plain"):
        with pytest.raises(RequestError, match=f"{name} exists already"), new_directory(tmp_path / name):
            pytest.fail("entered")
    with pytest.raises(RequestError, match="cannot write in"), new_directory(tmp_path / "plain" / "out"):
        pytest.fail("entered")
    with pytest.raises(RequestError, match="cannot write in"), new_directory(tmp_path / ("x" * 300)):
        pytest.fail("entered")
    with pytest.raises(RequestError, match="cannot write in"), new_directory(tmp_path / "a" / ("x" * 300) / "out"):
        pytest.fail("entered")
    assert everything(tmp_path) == ["full", "full/file", "plain"]


def test_killed_in_the_middle(tmp_path):
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom gpt2.files import new_directory\n"
        "with new_directory(Path(sys.argv[1])) as temporary:\n"
        "    (temporary / 'file').write_bytes(b'1')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert all(name.startswith(TEMPORARY_PREFIX) for name in everything(tmp_path))
    with new_directory(tmp_path / "out") as temporary:
        (temporary / "file").write_bytes(b"2")
    assert (tmp_path / "out" / "file").read_bytes() == b"2"


def test_sha256_of_a_file(tmp_path):
    for size in (0, 1, 2**18 + 1):
        (tmp_path / "file").write_bytes(b"\xa5" * size)
        assert sha256_file(tmp_path / "file") == hashlib.sha256(b"\xa5" * size).hexdigest()


def test_json(tmp_path):
    value = {"a": 0.1 + 0.2, "é世": [1, None, True], "big": 2**60}
    write_json(tmp_path / "file.json", value)
    text = (tmp_path / "file.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert "é世" in text
    assert text.endswith("}\n")
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json(tmp_path / "bad.json", number)
    assert not (tmp_path / "bad.json").exists()


def test_a_file_appears_whole_with_the_rights_of_any_other(tmp_path):
    (tmp_path / "ordinary").touch()
    target = tmp_path / "a" / "b.bin"
    with new_file(target) as temporary:
        assert temporary.parent == target.parent
        assert temporary.name.startswith(TEMPORARY_PREFIX)
        temporary.write_bytes(b"1")
        assert not target.exists()
    assert everything(tmp_path) == ["a", "a/b.bin", "ordinary"]
    assert target.read_bytes() == b"1"
    assert target.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize("error", [ValueError("x"), RequestError("x"), KeyboardInterrupt()])
def test_an_exception_leaves_no_file(tmp_path, error):
    def write() -> None:
        with new_file(tmp_path / "a" / "b.bin") as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert everything(tmp_path) == []


def test_a_full_disk_leaves_no_file_and_is_a_failure(tmp_path):
    with pytest.raises(WorkError, match="No space left"), new_file(tmp_path / "b.bin"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert everything(tmp_path) == []


def test_a_file_never_takes_the_place_of_another(tmp_path):
    (tmp_path / "there").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("there", "link", "there/below"):
        with pytest.raises(RequestError), new_file(tmp_path / name):
            pass
    assert everything(tmp_path) == ["link", "there"]
    assert (tmp_path / "there").read_text() == "mine"

"""Files that are either whole or absent: files and directories that appear in one rename, hashes, JSON."""

import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gpt2.errors import RequestError, WorkError

TEMPORARY_PREFIX = ".tmp-"


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex, read in blocks so that memory stays flat."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Writes indented UTF-8 JSON; numbers keep their full precision, NaN is refused (ValueError)."""
    path.write_text(json_text(value), encoding="utf-8")


def json_text(value: Any) -> str:
    """What `write_json` writes."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def flush_to_disk(path: Path) -> None:
    """fsync of one file or directory. A directory's own entry must be flushed too for a rename to last."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Gives a temporary directory beside `path`; on success flushes it and renames it to `path`.

    Killed at any moment, either `path` is whole or it does not exist (a `.tmp-*` directory may stay,
    which no reader looks at). On an exception the temporary directory and the parents made for it are removed.

    Raises RequestError where `path` exists and is not empty or its parent cannot be written,
    WorkError where the disk is full.
    """
    path = Path(os.path.abspath(path))
    made: list[Path] = []
    try:
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise RequestError(f"{path} exists already: remove it or name another directory")
        made = [parent for parent in path.parents if not parent.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY_PREFIX}{path.name}-", dir=path.parent))
    except OSError as error:
        _remove_empty(made)
        raise RequestError(f"cannot write in {path.parent}: {error.strerror}; name another directory") from error
    try:
        temporary.chmod(0o777 & ~umask())
        yield temporary
        for directory, _, names in os.walk(temporary):
            for name in names:
                flush_to_disk(Path(directory, name))
            flush_to_disk(Path(directory))
        os.rename(temporary, path)
        flush_to_disk(path.parent)
    except OSError as error:
        raise WorkError(f"cannot write {path}: {error.strerror}; free space or name another directory") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not path.exists():
            _remove_empty(made)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """`new_directory` for one file: gives a temporary, empty file beside `path` to write to.

    Raises RequestError where `path` exists or its directory cannot be written, WorkError where the disk is full.
    """
    path = Path(os.path.abspath(path))
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}")
    made: list[Path] = []
    try:
        if os.path.lexists(path):
            raise RequestError(f"{path} exists already: remove it or name another file")
        made = [parent for parent in path.parents if not parent.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
    except OSError as error:
        _remove_empty(made)
        raise RequestError(f"cannot write in {path.parent}: {error.strerror}; name another file") from error
    try:
        yield temporary
        flush_to_disk(temporary)
        os.rename(temporary, path)
        flush_to_disk(path.parent)
    except OSError as error:
        raise WorkError(f"cannot write {path}: {error.strerror}; free space or name another file") from error
    finally:
        temporary.unlink(missing_ok=True)
        if not path.exists():
            _remove_empty(made)


def _remove_empty(directories: list[Path]) -> None:
    """Removes them, innermost first, as far as they are empty."""
    for directory in directories:
        with suppress(OSError):
            directory.rmdir()


def umask() -> int:
    """The process's umask (mkdtemp makes 0700, a result directory should be as any other)."""
    mask = os.umask(0)
    os.umask(mask)
    return mask

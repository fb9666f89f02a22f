"""The shard format and its reader: whatever is damaged is named before one of its tokens is used."""

import copy
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt2.data.prepare import prepare
from gpt2.data.shards import FACTS, HEADER_BYTES, Dataset, Shard, Split, facts_of, header
from gpt2.errors import RequestError
from gpt2.files import sha256_file, write_json
from gpt2.tokenizer import Tokenizer

TEXTS = [f"document {i}: é 世 and some words, {'again ' * (i % 5)}\n" for i in range(25)]
properties = settings(deadline=None, derandomize=True, max_examples=80)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """25 documents as bytes in shards of 100 tokens; the validation split has one document."""
    directory = tmp_path_factory.mktemp("shards")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (directory / "text.jsonl").write_text(lines, encoding="utf-8")
    prepare(str(directory / "text.jsonl"), directory / "data", "bytes", shard_tokens=100)
    return directory / "data"


def stream_of(texts: list[str]) -> list[int]:
    return [token for text in texts for token in (256, *text.encode())]


def read_all(dataset: Dataset) -> None:
    for split in dataset.splits.values():
        for shard in split.shards:
            _ = shard.data


def make_shard(path: Path, tokens: list[int], vocab_size: int) -> Shard:
    path.write_bytes(header(len(tokens)) + np.array(tokens, dtype="<u2").tobytes())
    return Shard(path, len(tokens), sha256_file(path), vocab_size)


def test_layout_is_llm_cs(prepared):
    data = (prepared / "train_000000.bin").read_bytes()
    assert struct.unpack_from("<256i", data) == (20240520, 1, 100, *[0] * 253)
    assert list(struct.unpack_from("<100H", data, 1024)) == stream_of(TEXTS)[:100]
    assert len(data) == 1024 + 2 * 100


def test_facts(prepared):
    facts = json.loads((prepared / FACTS).read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_name("bytes")
    assert facts["tokenizer"] == {"name": "bytes", "vocab_size": 257, "hash": tokenizer.hash}
    assert facts["source"].endswith("text.jsonl")
    train, val = facts["splits"]["train"], facts["splits"]["val"]
    held_out = [TEXTS[19]]  # the 20th of 25, with a fraction of 0.05
    assert (val["documents"], val["bytes"], val["tokens"]) == (1, len(held_out[0].encode()), len(stream_of(held_out)))
    kept = TEXTS[:19] + TEXTS[20:]
    assert (train["documents"], train["bytes"]) == (24, sum(len(text.encode()) for text in kept))
    assert train["tokens"] == sum(shard["tokens"] for shard in train["shards"]) == len(stream_of(kept))
    for shard in (*train["shards"], *val["shards"]):
        assert shard["sha256"] == sha256_file(prepared / shard["file"])


@properties
@given(data=st.data())
def test_reading_across_borders_equals_the_whole(prepared, data):
    split = Dataset.open(prepared).split("train")
    whole = np.concatenate([shard.data for shard in split.shards])
    assert len(split.shards) > 5
    assert whole.tolist() == stream_of(TEXTS[:19] + TEXTS[20:])
    start = data.draw(st.integers(0, split.tokens))
    stop = data.draw(st.integers(start, split.tokens))
    part = split.read(start, stop)
    assert part.dtype == np.uint16
    np.testing.assert_array_equal(part, whole[start:stop])


def test_reading_between_empty_shards(tmp_path):
    parts: list[list[int]] = [[], [1, 2], [], [3], []]
    shards = tuple(make_shard(tmp_path / f"{i}.bin", part, 257) for i, part in enumerate(parts))
    split = Split(shards, 3, 1)
    assert split.tokens == 3
    for start in range(4):
        for stop in range(start, 4):
            assert split.read(start, stop).tolist() == [1, 2, 3][start:stop]


@properties
@given(data=st.data())
def test_any_damage_of_a_shard_is_found_and_named(prepared, tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("damaged")
    shutil.copytree(prepared, directory, dirs_exist_ok=True)
    path = directory / data.draw(st.sampled_from(["train_000000.bin", "train_000003.bin", "val_000000.bin"]))
    content = bytearray(path.read_bytes())
    match data.draw(st.sampled_from(["flip", "cut", "extend", "swap", "replace"])):
        case "flip":
            content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        case "cut":
            del content[data.draw(st.integers(0, len(content) - 1)) :]
        case "extend":
            content += data.draw(st.binary(min_size=1, max_size=8))
        case "swap":
            other = path.with_name("train_000001.bin").read_bytes()
            content = bytearray(other)
        case "replace":
            content = bytearray(data.draw(st.binary(max_size=2000)))
    path.write_bytes(content)
    with pytest.raises(RequestError, match="prepare the data again") as caught:
        read_all(Dataset.open(directory))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    shutil.rmtree(directory)


def test_damage_says_what_was_expected_and_found(tmp_path):
    path = tmp_path / "x.bin"
    make_shard(path, [1, 2, 3], 257)
    good, sha256 = path.read_bytes(), sha256_file(path)
    for content, message in (
        (struct.pack("<i", 7) + good[4:], "magic number 7, expected 20240520"),
        (good[:4] + struct.pack("<i", 2) + good[8:], "version 2, expected 1"),
        (good[:8] + struct.pack("<i", 4) + good[12:], "number of tokens 4, expected 3"),
        (good[:-1], "size in bytes 1029, expected 1030"),
        (b"", "magic number 0, expected 20240520"),
    ):
        path.write_bytes(content)
        with pytest.raises(RequestError, match=message):
            Shard(path, 3, sha256, 257)
    path.write_bytes(good[:-1] + b"\x01")
    shard = Shard(path, 3, sha256, 257)  # header and size are right
    with pytest.raises(RequestError, match=f"SHA-256 {sha256_file(path)}, expected {sha256}"):
        _ = shard.data


def test_an_id_outside_the_vocabulary(tmp_path):
    assert make_shard(tmp_path / "good.bin", [0, 256], 257).data.tolist() == [0, 256]
    shard = make_shard(tmp_path / "bad.bin", [0, 257], 257)
    with pytest.raises(RequestError, match=r"bad\.bin is damaged: largest token id 257, expected at most 256"):
        _ = shard.data


def test_every_id_of_the_largest_vocabulary(tmp_path):
    shard = make_shard(tmp_path / "x.bin", [0, 65_535], 65_536)
    assert shard.data.tolist() == [0, 65_535]


def test_the_shards_are_mapped_and_not_loaded_and_read_only(prepared):
    shard = Dataset.open(prepared).split("train").shards[0]
    assert isinstance(shard.data, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        shard.data[0] = 1


@pytest.mark.parametrize("name", ["train_000002.bin", "val_000000.bin", "tokenizer.json", FACTS])
def test_a_file_that_is_missing(prepared, tmp_path, name):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink()
    if name == "tokenizer.json":  # vocab.json and merges.txt say the same
        assert Dataset.open(tmp_path).tokenizer.name == "bytes"
        (tmp_path / "vocab.json").unlink()
    with pytest.raises(RequestError) as caught:
        Dataset.open(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_no_directory_at_all(tmp_path):
    with pytest.raises(RequestError, match=r"holds no dataset\.json: make it with `gpt2 prepare SOURCE --out"):
        Dataset.open(tmp_path / "nothing")


def test_another_tokenizer(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    Tokenizer.train(["some other text " * 9], 260).save(tmp_path)
    with pytest.raises(RequestError, match=r"tokenizer\.json is not the tokenizer of this data"):
        Dataset.open(tmp_path)


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The path of every value within a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, item in inner for found in places(item, (*path, key)))]


def assert_refused_or_harmless(prepared: Path, directory: Path, facts: bytes) -> None:
    """With these bytes as dataset.json: a RequestError of one line, or no other tokens than before."""
    for file in prepared.iterdir():
        if file.name != FACTS:
            (directory / file.name).symlink_to(file)
    (directory / FACTS).write_bytes(facts)
    message, dataset = "", None
    try:
        dataset = Dataset.open(directory)
        read_all(dataset)
    except RequestError as error:
        message = str(error)
    if message:
        assert str(directory) in message
        assert "\n" not in message
    else:
        held = Dataset.open(prepared).splits
        for name in dataset.splits.keys() & held.keys():
            found, expected = (splits[name].read(0, splits[name].tokens) for splits in (dataset.splits, held))
            np.testing.assert_array_equal(found, expected)
    shutil.rmtree(directory)


ODD = [
    None,
    True,
    -1,
    0,
    1.5,
    2**80,
    float("inf"),
    float("nan"),
    "",
    "x",
    "..",
    "\0",
    "../train_000000.bin",
    [],
    {},
    [[]],
]


@settings(properties, max_examples=150)
@given(data=st.data())
def test_any_damage_of_the_facts_is_refused_or_harmless(prepared, tmp_path_factory, data):
    original = json.loads((prepared / FACTS).read_text(encoding="utf-8"))
    facts = copy.deepcopy(original)
    path = data.draw(st.sampled_from(places(facts)[1:]))
    inner = facts
    for key in path[:-1]:
        inner = inner[key]
    if data.draw(st.booleans()):
        del inner[path[-1]]
    else:
        inner[path[-1]] = data.draw(st.sampled_from(ODD))
    assert_refused_or_harmless(prepared, tmp_path_factory.mktemp("facts"), json.dumps(facts).encode())


@properties
@given(content=st.one_of(st.binary(max_size=50), st.text(max_size=50).map(str.encode)))
@example(content=b"[" * 100_000)
@example(content=b'{"splits": {"train": {"shards": [{}]}}}')
@example(content=b"{}")
def test_facts_that_are_something_else(tmp_path_factory, content):
    directory = tmp_path_factory.mktemp("facts")
    (directory / FACTS).write_bytes(content)
    with pytest.raises(RequestError, match=r"dataset\.json is damaged"):
        Dataset.open(directory)


@properties
@given(data=st.data())
def test_facts_cut_short_or_with_a_bit_flipped(prepared, tmp_path_factory, data):
    content = bytearray((prepared / FACTS).read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 3)) :]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert_refused_or_harmless(prepared, tmp_path_factory.mktemp("facts"), bytes(content))


def test_a_format_of_the_future(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    facts = json.loads((prepared / FACTS).read_text(encoding="utf-8"))
    write_json(tmp_path / FACTS, facts | {"format": 2})
    with pytest.raises(RequestError, match="its format is 2"):
        Dataset.open(tmp_path)


def test_the_fingerprint_is_of_the_data_and_not_of_its_place(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "copy")
    first, second = Dataset.open(prepared), Dataset.open(tmp_path / "copy")
    assert first.fingerprint == second.fingerprint
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[::-1]))
    prepare(str(tmp_path / "text.jsonl"), tmp_path / "other", "bytes", shard_tokens=100)
    assert Dataset.open(tmp_path / "other").fingerprint != first.fingerprint


def test_the_split_that_is_not_there(prepared, tmp_path):
    with pytest.raises(RequestError, match=r"has no split 'test' \(it has train, val\)"):
        Dataset.open(prepared).split("test")
    (tmp_path / "text.txt").write_text("one line\n" * 50)
    prepare(str(tmp_path / "text.txt"), tmp_path / "data", "bytes", val_fraction=0)
    dataset = Dataset.open(tmp_path / "data")
    assert not dataset.has_split("val")
    with pytest.raises(
        RequestError, match=r"no split 'val' \(it has train\): prepare it with a --val-fraction above 0"
    ):
        dataset.split("val")


def test_the_header_is_a_kibibyte():
    assert len(header(5)) == HEADER_BYTES == 1024
    assert facts_of(Tokenizer.from_name("bytes"), "s", {})["format"] == 1

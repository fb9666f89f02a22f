"""Text <-> token ids. All three tokenizers are byte-level BPE with one control token, end-of-text, as the last id.

    gpt2     OpenAI's merges (Radford et al. 2019, section 2.2): 256 bytes + 50,000 merges + end-of-text = 50,257
    bytes    no merges: ids 0-255 are the bytes, 256 is end-of-text
    bpe:N    ids 0-255 are the bytes, then merges learned from the user's text, in order; N - 1 is end-of-text

tiktoken encodes and decodes. On the disk a tokenizer is Hugging Face's tokenizer.json and its companions.
"""

import codecs
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from gpt2.errors import RequestError, WorkError
from gpt2.files import write_json

END_OF_TEXT = "<|endoftext|>"
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
# GPT-2's split into words, numbers, punctuation and spaces; merges never cross its borders.
# The possessive quantifiers (++) change no match and spare the backtracking.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# White space as PATTERN has it; Python's own \s also takes the four separators \x1c-\x1f.
# PATTERN's engine gives up on a million of it before a word.
LONG_TEXT = 500_000
LONG_WHITE_SPACE = re.compile(r"[^\S\x1c-\x1f]{65536,}")
MAX_VOCABULARY = 65_536  # token ids are stored in 16 bits


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte: itself where printable, else a letter from 256 upwards."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A byte-level BPE. `name` is its name on the command line: gpt2, bytes or bpe:N."""

    name: str
    ranks: Mapping[bytes, int]
    """The bytes of each token but end-of-text -> its id, which is also the order of merging."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, end-of-text included."""
        return len(self.ranks) + 1

    @property
    def eot(self) -> int:
        """Id of end-of-text, always the last."""
        return len(self.ranks)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the tokens' bytes in the order of their ids: equal for equal tokenizers, whatever their name."""
        digest = hashlib.sha256()
        for token in self.token_bytes:
            digest.update(len(token).to_bytes(4, "little") + token)
        return digest.hexdigest()

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each id; end-of-text has none."""
        return [*sorted(self.ranks, key=self.ranks.__getitem__), b""]

    @cached_property
    def _encoding(self) -> tiktoken.Encoding:
        return tiktoken.Encoding(self.name, pat_str=PATTERN, mergeable_ranks=dict(self.ranks), special_tokens={})

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Nothing in a text is special: "<|endoftext|>" is thirteen ordinary characters.

        A lone surrogate, which UTF-8 cannot hold, becomes U+FFFD.
        """
        if self.is_bytes:
            return list(utf8(text))
        if len(text) < LONG_TEXT:
            return self._encoding.encode_ordinary(text)
        return [i for part in _short_of_words(text) for i in self._encoding.encode_ordinary(part)]

    def encode_numpy(self, text: str) -> np.ndarray:
        """The ids of a text as a (n,) array of uint16."""
        if self.is_bytes:
            return np.frombuffer(utf8(text), dtype=np.uint8).astype(np.uint16)
        return np.array(self.encode(text), dtype=np.uint16)  # tiktoken's own encode_to_numpy takes 1.7 times as long

    @cached_property
    def is_bytes(self) -> bool:
        """Whether ids 0-255 are the bytes themselves and there is no merge."""
        return self.token_bytes[:-1] == [bytes([i]) for i in range(256)]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the ids; end-of-text adds none. Raises ValueError for an id that does not exist."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} is not in 0..{self.vocab_size - 1}")
        return b"".join([self.token_bytes[i] for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, directory: Path, max_length: int | None = None) -> None:
        """Writes tokenizer.json, tokenizer_config.json, vocab.json and merges.txt, which transformers opens."""
        vocabulary = {token: i for i, token in enumerate(self.spelled)}
        merges = self.spelled_merges
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        special = {"id": self.eot, "content": END_OF_TEXT, "special": True}
        special |= {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        write_json(
            directory / "tokenizer.json",
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": [special],
                "normalizer": None,
                "pre_tokenizer": byte_level,
                "post_processor": None,
                "decoder": byte_level,
                "model": {
                    "type": "BPE",
                    "dropout": None,
                    "unk_token": None,
                    "continuing_subword_prefix": None,
                    "end_of_word_suffix": None,
                    "fuse_unk": False,
                    "byte_fallback": False,
                    "ignore_merges": False,
                    "vocab": vocabulary,
                    "merges": merges,
                },
            },
        )
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "unk_token": END_OF_TEXT,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
        }
        if max_length is not None:
            config["model_max_length"] = max_length
        write_json(directory / "tokenizer_config.json", config)
        write_json(directory / "vocab.json", vocabulary)
        text = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
        (directory / "merges.txt").write_text(text, encoding="utf-8")

    @property
    def spelled(self) -> list[str]:
        """Each id's token as Hugging Face and llama.cpp spell it: a printable letter a byte; end-of-text last."""
        stand_in = bytes_to_unicode()
        return ["".join(stand_in[b] for b in token) for token in self.token_bytes[:-1]] + [END_OF_TEXT]

    @property
    def spelled_merges(self) -> list[list[str]]:
        """The pairs that are merged, in order, in the same spelling."""
        stand_in = bytes_to_unicode()
        return [["".join(stand_in[b] for b in part) for part in pair] for pair in self._merges]

    @cached_property
    def _merges(self) -> list[tuple[bytes, bytes]]:
        """The pair that each longer token is merged from: what its bytes become under the merges before it."""
        pairs = []
        for token in self.token_bytes[:-1]:
            if len(token) > 1:
                a, b = _merge_until(self.ranks, token, self.ranks[token])
                pairs.append((a, b))
        return pairs

    @classmethod
    def from_name(cls, name: str) -> "Tokenizer":
        """gpt2 or bytes. Raises RequestError for another name."""
        kind = parse_tokenizer_name(name)
        if kind == "gpt2":
            return _gpt2()
        if kind == "bytes":
            return cls("bytes", {bytes([i]): i for i in range(256)})
        raise RequestError(f"the tokenizer {name} must be trained on text: gpt2 prepare SOURCE --tokenizer {name}")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A byte-level BPE of `vocab_size` ids, learned by the `tokenizers` library; the same for the same texts.

        Raises RequestError where the size is out of range or the texts do not yield enough merges.
        """
        from tokenizers import Tokenizer as Trainable
        from tokenizers import models, pre_tokenizers, trainers

        name = f"bpe:{vocab_size}"
        parse_tokenizer_name(name)
        trainable = Trainable(models.BPE())
        trainable.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        trainable.train_from_iterator((utf8(text).decode() for text in texts), trainer)
        merges = json.loads(trainable.to_str())["model"]["merges"]
        ranks = {bytes([i]): i for i in range(256)}
        ranks |= {token: 256 + i for i, token in enumerate(_merged_tokens(merges))}
        if len(ranks) + 1 < vocab_size:
            raise RequestError(
                f"the text yields {len(ranks) + 1} tokens, fewer than {name}: use bpe:{len(ranks) + 1} or more text"
            )
        return cls(name, ranks)

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """From tokenizer.json, else vocab.json with merges.txt. Raises RequestError where it is no byte-level BPE."""
        path = directory / "tokenizer.json"
        try:
            if path.is_file():
                facts = json.loads(path.read_text(encoding="utf-8"))
                model, split = facts["model"], facts.get("pre_tokenizer") or {}
                if model.get("type", "BPE") != "BPE":
                    raise RequestError(
                        f"{path} is a {model['type']} tokenizer: only GPT-2's byte-level BPE can be read"
                    )
                whole_words = split.get("use_regex", True) and not split.get("add_prefix_space", False)
                if facts.get("normalizer") is not None or split.get("type") != "ByteLevel" or not whole_words:
                    raise RequestError(
                        f"{path} normalizes or splits text in its own way: only GPT-2's byte-level BPE can be read"
                    )
                vocabulary, merges = dict(model["vocab"]), list(model["merges"])
                for token in facts.get("added_tokens", []):
                    vocabulary.setdefault(token["content"], token["id"])
            else:
                path = directory / "merges.txt"
                merges = path.read_text(encoding="utf-8").rstrip("\n").split("\n")[1:]
                path = directory / "vocab.json"
                vocabulary = json.loads(path.read_text(encoding="utf-8"))
            pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
            order = list(dict.fromkeys(vocabulary[a + b] for a, b in pairs))
            if order != sorted(order):
                raise ValueError("the ids are not in the order of merging")
            return cls._from_vocabulary(vocabulary)
        except RequestError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise RequestError(
                f"{path} is not a byte-level BPE with {END_OF_TEXT} as its last token ({type(error).__name__}): "
                "only GPT-2's kind of tokenizer can be read"
            ) from error

    @classmethod
    def _from_vocabulary(cls, vocabulary: Mapping[str, int]) -> "Tokenizer":
        byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
        ids = {token: int(i) for token, i in vocabulary.items()}
        if sorted(ids.values()) != list(range(len(ids))) or ids[END_OF_TEXT] != len(ids) - 1:
            raise ValueError("ids are not 0..n-1 with end-of-text last")
        del ids[END_OF_TEXT]
        ranks = {bytes([byte_of[letter] for letter in token]): i for token, i in ids.items()}
        if len(ranks) != len(ids) or any(bytes([i]) not in ranks for i in range(256)):
            raise ValueError("not all bytes have an id")
        tokenizer = cls(f"bpe:{len(ranks) + 1}", ranks)
        for known in (_gpt2() if len(ranks) == 50_256 else None, cls.from_name("bytes")):
            if known is not None and known.hash == tokenizer.hash:
                return known
        return tokenizer


class StreamDecoder:
    """Text from tokens as they come: a character is given when its last byte is there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """The characters that these ids complete."""
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def flush(self) -> str:
        """What is left: U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)


def parse_tokenizer_name(name: str) -> str:
    """gpt2, bytes or bpe. Raises RequestError for another word or a size out of range."""
    if name in ("gpt2", "bytes"):
        return name
    match = re.fullmatch(r"bpe:(\d{1,9})", name)
    if match is None:
        raise RequestError(f"there is no tokenizer {name!r}: use gpt2, bytes or bpe:N")
    if not 257 <= int(match[1]) <= MAX_VOCABULARY:
        raise RequestError(
            f"the tokenizer {name} is out of range: N counts bytes, end-of-text and merges, 257 to {MAX_VOCABULARY}"
        )
    return "bpe"


@lru_cache(maxsize=1)
def _gpt2() -> Tokenizer:
    """From the bundled merge table, whose hash is checked. Raises WorkError where the package is damaged."""
    data = resources.files("gpt2").joinpath("assets/vocab.bpe").read_bytes()
    if hashlib.sha256(data).hexdigest() != MERGES_SHA256:
        raise WorkError("the bundled merge table gpt2/assets/vocab.bpe is altered: install build-gpt2 again")
    pairs = [line.split(" ") for line in data.decode("utf-8").split("\n")[1:-1]]
    # OpenAI numbered the bytes in the order of their stand-ins: the printable ones first.
    ranks = {bytes([byte]): i for i, byte in enumerate(bytes_to_unicode())}
    ranks |= {token: 256 + i for i, token in enumerate(_merged_tokens(pairs))}
    tokenizer = Tokenizer("gpt2", ranks)
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    merges = [(bytes(byte_of[c] for c in a), bytes(byte_of[c] for c in b)) for a, b in pairs]
    vars(tokenizer)["_merges"] = merges  # the cached property, which would take a second to find them again
    return tokenizer


def _merged_tokens(pairs: Iterable[Sequence[str]]) -> list[bytes]:
    """The bytes of each merge's result, in order, each once."""
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    return list(dict.fromkeys(bytes([byte_of[letter] for letter in a + b]) for a, b in pairs))


def _merge_until(ranks: Mapping[bytes, int], token: bytes, rank: int) -> list[bytes]:
    """The parts of `token` after all merges below `rank`."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while True:
        found = [(ranks.get(a + b, rank), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
        lowest, i = min(found, default=(rank, 0))
        if lowest >= rank:
            return parts
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def _short_of_words(text: str) -> Iterator[str]:
    """The text, cut before the last character of each long run of white space: PATTERN has a border there anyway."""
    start = 0
    for run in LONG_WHITE_SPACE.finditer(text):
        if run.end() < len(text):
            yield text[start : run.end() - 1]
            start = run.end() - 1
    yield text[start:]


def utf8(text: str) -> bytes:
    """UTF-8; lone surrogates as U+FFFD."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")

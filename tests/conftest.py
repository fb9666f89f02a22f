"""What several tests share: small prepared data, a small run, and the rule for tests that need a GPU."""

import dataclasses
from pathlib import Path

import pytest

from gpt2.config import Config, preset
from gpt2.data.prepare import prepare

TEXT = (
    "the people of these states have met and the congress will hear what the year has brought to them "
    "in peace and in labor on land and at sea"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a CUDA GPU the tests marked gpu are reported as skipped."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def make_documents(n: int, seed: int = 0) -> list[str]:
    """n short documents of English-looking words, some with characters of several bytes."""
    import random

    random_ = random.Random(seed)
    return [
        " ".join(random_.choices(TEXT.split(), k=random_.randint(20, 60)))
        + random_.choice([".\n", " – é 世.\n", "\n\n"])
        for _ in range(n)
    ]


@pytest.fixture(scope="session")
def text_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 documents, one a file."""
    directory = tmp_path_factory.mktemp("text")
    for i, text in enumerate(make_documents(40)):
        (directory / f"{i:03d}.txt").write_text(text, encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def data(text_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documents prepared with the bytes tokenizer: 38 to train on, 2 held out."""
    out = tmp_path_factory.mktemp("data") / "bytes"
    prepare(str(text_directory), out, "bytes")
    return out


@pytest.fixture
def tiny(data: Path) -> Config:
    """The tiny preset on that data."""
    config = preset("tiny")
    return dataclasses.replace(config, train=dataclasses.replace(config.train, data=str(data)))

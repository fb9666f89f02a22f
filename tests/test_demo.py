"""The main job, whole, with a budget of seconds."""

import json
from pathlib import Path

import pytest

from gpt2 import demo as demo_module
from gpt2.config import preset
from gpt2.errors import RequestError


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch, text_directory: Path) -> None:
    """The demo on 40 small documents with the tiny network, so that it takes seconds."""
    from dataclasses import replace

    tiny, whole = preset("tiny"), preset("demo")
    config = replace(
        whole,
        model=replace(tiny.model, vocab_size=300, n_ctx=64),
        train=replace(tiny.train, steps=0, minutes=0.05),
        eval=replace(tiny.eval, windows=0),
    )
    monkeypatch.setattr(demo_module, "preset", lambda name: config)
    monkeypatch.setattr(demo_module, "CORPUS", str(text_directory))


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf")])
def test_minutes_that_are_none_are_refused_before_anything_is_written(tmp_path: Path, minutes: float) -> None:
    with pytest.raises(RequestError, match=r"--minutes .* must be above 0 and finite"):
        demo_module.demo(tmp_path / "demo", minutes, print)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_demo")
def test_from_text_to_picture_and_samples(tmp_path: Path) -> None:
    said: list[str] = []
    result = demo_module.demo(tmp_path / "demo", 0.05, said.append)
    json.dumps(result)
    assert 0 < result["bits_per_byte"] < 8
    assert result["train_seconds"] >= 3
    assert Path(result["loss_png"]).read_bytes().startswith(b"\x89PNG")
    assert len(result["samples"]) == 3
    assert str(tmp_path / "demo" / "run") in "\n".join(said)
    again = demo_module.demo(tmp_path / "demo", 0.05, said.append)
    assert again["bits_per_byte"] == result["bits_per_byte"]
    with pytest.raises(RequestError, match=r"train\.minutes"):
        demo_module.demo(tmp_path / "demo", 0.06, said.append)


def test_the_preset_is_a_plain_gpt2_on_the_embedded_corpus() -> None:
    config = preset("demo")
    assert demo_module.CORPUS == "sotu"
    assert config.train.minutes == 3
    assert config.eval.windows == 0
    assert config.model.tie_embeddings
    assert config.model.dropout == 0

"""The checkpoint directory: whole or absent, every damage found, the last good one never removed."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from gpt2 import files
from gpt2.checkpoint import directory
from gpt2.checkpoint.directory import (
    TrainingState,
    keep_checkpoints,
    list_checkpoints,
    newest_good_checkpoint,
    read_checkpoint,
    resolve_model,
    step_of,
    verify_checkpoint,
    write_checkpoint,
)
from gpt2.config import GPTConfig
from gpt2.errors import WorkError
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer

CONFIG = GPTConfig(vocab_size=257, n_ctx=8, n_layer=1, n_head=2, n_embd=8)


def write(run: Path, step: int) -> Path:
    torch.manual_seed(step)
    weights = GPT(CONFIG).state_dict()
    training = {"optimizer.wte.weight.exp_avg": torch.randn(384, 8), "random.cpu": torch.get_rng_state()}
    state = TrainingState(step=step, train_seconds=1.5, val_loss=2.0, skipped_steps=(3,))
    return write_checkpoint(run, CONFIG, weights, Tokenizer.from_name("bytes"), training, state)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("run"), 7)


def test_what_is_written_is_read_bit_for_bit(checkpoint: Path) -> None:
    weights, training, state = read_checkpoint(checkpoint, CONFIG)
    torch.manual_seed(7)
    expected = GPT(CONFIG).state_dict()
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name
    assert training["optimizer.wte.weight.exp_avg"].shape == (384, 8)
    assert state == TrainingState(step=7, train_seconds=1.5, val_loss=2.0, skipped_steps=(3,))
    assert checkpoint.name == "step_000007"


def test_padded_rows_are_dropped_on_the_disk(checkpoint: Path) -> None:
    from safetensors.torch import load_file

    assert load_file(checkpoint / "model.safetensors")["transformer.wte.weight"].shape == (257, 8)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_every_damage_is_found_and_names_its_file(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damaged") / checkpoint.name
    shutil.copytree(checkpoint, path)
    names = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())
    file = path / data.draw(st.sampled_from(names))
    content = file.read_bytes()
    kind = data.draw(st.sampled_from(["flip", "truncate", "extend", "delete", "empty"]))
    if kind == "flip":
        place = data.draw(st.integers(0, len(content) - 1))
        file.write_bytes(
            content[:place] + bytes([content[place] ^ (1 << data.draw(st.integers(0, 7)))]) + content[place + 1 :]
        )
    elif kind == "truncate":
        file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    elif kind == "extend":
        file.write_bytes(content + b"x")
    elif kind == "delete":
        file.unlink()
    else:
        file.write_bytes(b"")
    if file.name == "checksums.json":
        # The list itself: what still reads as the same list is no damage.
        try:
            verify_checkpoint(path)
        except WorkError:
            return
        verify_checkpoint(path)
    else:
        with pytest.raises(WorkError, match=file.name.replace(".", r"\.")):
            verify_checkpoint(path)
    shutil.rmtree(path)


def damage(path: Path, random_: random.Random) -> str:
    """One random damage to a checkpoint; the name of a file that it concerns."""
    files_ = sorted(p for p in path.rglob("*") if p.is_file())
    file = random_.choice(files_)
    content = file.read_bytes()
    kind = random_.choice(["flip", "truncate", "delete", "swap", "half-written"])
    if kind == "flip":
        place = random_.randrange(len(content))
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << random_.randrange(8)]) + content[place + 1 :])
    elif kind == "truncate":
        file.write_bytes(content[: random_.randrange(len(content))])
    elif kind == "delete":
        file.unlink()
    elif kind == "swap":
        other = random_.choice([p for p in files_ if p.read_bytes() != content])
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
        return f"{file.name}|{other.name}|checksums.json"
    else:  # files are written in some order: those after a point are missing or empty
        for later in random_.sample(files_, random_.randint(1, len(files_))):
            later.unlink() if random_.random() < 0.5 else later.write_bytes(b"")
        return "|".join(p.name for p in files_)
    return file.name


def test_a_thousand_damages_are_all_found_and_the_one_before_is_used(tmp_path: Path) -> None:
    older, newer = write(tmp_path, 1), write(tmp_path, 2)
    whole = {p: p.read_bytes() for p in newer.rglob("*") if p.is_file()}
    random_ = random.Random(0)
    for _ in range(1000):
        names = damage(newer, random_)
        found, complaints = newest_good_checkpoint(tmp_path)
        assert found == older, names
        if (newer / "checksums.json").exists():  # without it the directory is no checkpoint at all
            assert any(name in complaints[0] for name in names.split("|")), (names, complaints)
        for path, content in whole.items():
            if not path.exists() or path.read_bytes() != content:
                path.write_bytes(content)
        assert newest_good_checkpoint(tmp_path) == (newer, [])


def test_a_checkpoint_under_another_ones_name_is_found(tmp_path: Path) -> None:
    write(tmp_path, 1).rename(tmp_path / "checkpoints" / "step_000005")
    found, complaints = newest_good_checkpoint(tmp_path)
    assert found is None
    assert "is of step 1" in complaints[0]


def test_the_last_good_one_is_never_removed(tmp_path: Path) -> None:
    good = write(tmp_path, 1)
    for step in (2, 3):
        (write(tmp_path, step) / "model.safetensors").write_bytes(b"")
    keep_checkpoints(tmp_path, last=1, best_step=None)
    assert newest_good_checkpoint(tmp_path)[0] == good
    write(tmp_path, 4)
    keep_checkpoints(tmp_path, last=1, best_step=None)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [4]


def test_newest_good_skips_damaged_ones_and_leftovers(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    (tmp_path / "checkpoints" / "step_000003" / "config.json").write_text("{}")
    (tmp_path / "checkpoints" / ".tmp-step_000004-x").mkdir()
    (tmp_path / "checkpoints" / "step_000005").mkdir()
    path, complaints = newest_good_checkpoint(tmp_path)
    assert path is not None
    assert step_of(path) == 2
    assert len(complaints) == 1
    assert "config.json" in complaints[0]


def test_keeps_last_and_best_and_sweeps_leftovers(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    (tmp_path / "checkpoints" / ".tmp-step_000009-x").mkdir()
    keep_checkpoints(tmp_path, last=2, best_step=1)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [1, 3, 4]
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))


def test_a_full_disk_leaves_the_older_ones_and_no_half_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "flush_to_disk", full)
    with pytest.raises(WorkError, match="No space left on device"):
        write(tmp_path, 2)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]
    verify_checkpoint(tmp_path / "checkpoints" / "step_000001")


def test_a_disk_that_fills_while_tensors_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors says it by an error of its own."""
    write(tmp_path, 1)

    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(directory, "save_file", full)
    with pytest.raises(WorkError, match=r"step_000002: No space left on device"):
        write(tmp_path, 2)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]


def test_writing_a_step_again_replaces_it(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    (path / "config.json").write_text("{}")
    verify_checkpoint(write(tmp_path, 1))


def test_a_run_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(WorkError, match="has not reached its first one"):
        resolve_model(tmp_path)
    assert resolve_model("openai-community/gpt2") == "openai-community/gpt2"

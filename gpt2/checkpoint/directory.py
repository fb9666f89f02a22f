"""A checkpoint: a Hugging Face GPT-2 directory with the training state in a subfolder.

    RUN/checkpoints/step_000500/
      config.json  generation_config.json  model.safetensors      opens in transformers as it stands
      tokenizer.json  tokenizer_config.json  vocab.json  merges.txt
      training/state.safetensors  training/state.json             what `--resume` needs besides the weights
      checksums.json                                              written last: size and SHA-256 of each file

It is written under a temporary name, flushed, and renamed: under its own name it is whole, or it was damaged
later, which the checksums show.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt2 import hf
from gpt2.config import GPTConfig
from gpt2.errors import RequestError, WorkError
from gpt2.files import TEMPORARY_PREFIX, json_text, new_directory, sha256_file, write_json
from gpt2.tokenizer import Tokenizer

CHECKSUMS = "checksums.json"
STATE = "training/state.json"


@dataclass(frozen=True)
class TrainingState:
    """What a run must know besides its weights to go on as if it had never stopped."""

    step: int = 0
    """Steps done: the next one has this number."""
    train_seconds: float = 0.0
    """Time spent in steps."""
    val_loss: float | None = None
    """Validation loss of these weights, in nats a token."""
    best_step: int | None = None
    """The step with the lowest validation loss so far, this one included."""
    best_val_loss: float | None = None
    """That loss."""
    lowest_val_loss: float | None = None
    """The lowest of all validations, also of those that were not saved."""
    stale_validations: int = 0
    """Validations since that one."""
    skipped_steps: tuple[int, ...] = ()
    """Steps that made no update."""
    bad_in_row: int = 0
    """How many of the last steps were skipped, one after the other."""
    rolled_back_to: tuple[int, ...] = ()
    """Checkpoints that the run has gone back to."""
    loss_mean: float = 0.0
    """Running mean of the training loss, for telling spikes."""
    loss_variance: float = 0.0
    """Its running variance."""
    loss_count: int = 0
    """How many losses are in them."""
    finished: bool = False
    """Whether the run has reached its end."""


def write_checkpoint(
    run: Path,
    config: GPTConfig,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    training: Mapping[str, Tensor],
    state: TrainingState,
) -> Path:
    """Writes RUN/checkpoints/step_…; gives its path. `weights` is the model's state_dict.

    `training` are the other tensors of the run (optimizer, random generators). Raises WorkError for a full disk;
    then no checkpoint of that step exists and the older ones are untouched.
    """
    path = run / "checkpoints" / f"step_{state.step:06d}"
    if not run.is_dir():
        raise WorkError(f"{run} is gone: no checkpoint can be written")
    try:
        if path.exists():
            try:
                verify_checkpoint(path)
                return path  # a run that was stopped before its next step: nothing new
            except WorkError:
                remove_checkpoint(path)
        with new_directory(path) as directory:
            _write_files(directory, config, weights, tokenizer, training, state)
    except RequestError as error:  # what was right when the run began has changed
        raise WorkError(str(error)) from error
    except OSError as error:
        raise WorkError(
            f"cannot write {path}: {error.strerror}; free space, older checkpoints are untouched"
        ) from error
    return path


def _write_files(
    directory: Path,
    config: GPTConfig,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    training: Mapping[str, Tensor],
    state: TrainingState,
) -> None:
    write_json(directory / "config.json", hf.config_to_hf(config, tokenizer.eot))
    write_json(
        directory / "generation_config.json",
        {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot, "pad_token_id": tokenizer.eot},
    )
    save_tensors(hf.to_hf(weights, config), directory / "model.safetensors", {"format": "pt"})
    tokenizer.save(directory, max_length=config.n_ctx)
    (directory / "training").mkdir()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in training.items()}
    save_tensors(tensors, directory / "training" / "state.safetensors")
    write_json(directory / STATE, asdict(state))
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    sums = {
        str(file.relative_to(directory)): {"bytes": file.stat().st_size, "sha256": sha256_file(file)} for file in files
    }
    (directory / CHECKSUMS).write_text(_listing(sums), encoding="utf-8")


def _listing(sums: Mapping[str, Any]) -> str:
    """The text of checksums.json: the files', and that of the list itself."""
    return json_text({"files": sums, "sha256": hashlib.sha256(json_text(sums).encode()).hexdigest()})


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file. Raises OSError for a full disk, where the library raises an error of its own."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def verify_checkpoint(path: Path) -> None:
    """Raises WorkError that names the file which is missing, altered or not of this checkpoint."""
    try:
        listing = json.loads((path / CHECKSUMS).read_text(encoding="utf-8"))
        if (path / CHECKSUMS).read_text(encoding="utf-8") != _listing(listing["files"]):
            raise ValueError("not as it was written")
        listed = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in listing["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise WorkError(f"{path / CHECKSUMS} is missing or damaged: the checkpoint is not whole") from error
    for name, (size, digest) in listed.items():
        file = path / name
        try:
            found = file.stat().st_size
            if found != size:
                raise WorkError(f"{file} is altered: {size} bytes expected, {found} found")
            if sha256_file(file) != digest:
                raise WorkError(f"{file} is altered: its SHA-256 is not the one in {CHECKSUMS}")
        except OSError as error:
            raise WorkError(f"{file} cannot be read: {error.strerror}") from error
    step = json.loads((path / STATE).read_text(encoding="utf-8"))["step"]
    if re.fullmatch(r"step_\d+", path.name) and step != step_of(path):
        raise WorkError(f"{path / STATE} is of step {step}: the directory was renamed or mixed with another")


def read_checkpoint(path: Path, config: GPTConfig) -> tuple[dict[str, Tensor], dict[str, Tensor], TrainingState]:
    """The weights (our state_dict), the other tensors and the state. Raises WorkError where it is damaged."""
    verify_checkpoint(path)
    weights = hf.from_hf(load_file(path / "model.safetensors"), config)
    training = load_file(path / "training" / "state.safetensors")
    state = state_from_dict(json.loads((path / STATE).read_text(encoding="utf-8")))
    return weights, training, state


def state_from_dict(values: Mapping[str, Any]) -> TrainingState:
    """The inverse of dataclasses.asdict, after a way through JSON. Unknown names are left out."""
    known: dict[str, Any] = {}
    for name in {field.name for field in fields(TrainingState)} & values.keys():
        value = values[name]
        known[name] = tuple(value) if isinstance(value, list) else value
    return TrainingState(**known)


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run that were completed, oldest first."""
    found = (run / "checkpoints").glob("step_*")
    named = [path for path in found if re.fullmatch(r"step_\d+", path.name) and (path / CHECKSUMS).is_file()]
    return sorted(named, key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step_"))


def newest_good_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one that does not."""
    complaints = []
    for path in reversed(list_checkpoints(run)):
        try:
            verify_checkpoint(path)
        except WorkError as error:
            complaints.append(str(error))
        else:
            return path, complaints
    return None, complaints


def keep_checkpoints(run: Path, last: int, best_step: int | None) -> None:
    """Removes all but the newest `last` and the best, and what killed writers left behind.

    Nothing older than the newest checkpoint that verifies is removed before that one is found: the last good
    checkpoint stays, whatever happened to those after it.
    """
    good: Path | None = None
    old = [path for path in list_checkpoints(run)[:-last] if step_of(path) != best_step]
    if old:
        good, _ = newest_good_checkpoint(run)
    for path in old:
        if good is not None and step_of(path) < step_of(good):
            remove_checkpoint(path)
    for leftover in (run / "checkpoints").glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def remove_checkpoint(path: Path) -> None:
    """Renames it away first, so that a kill in the middle leaves nothing that looks like a checkpoint."""
    doomed = path.with_name(f"{TEMPORARY_PREFIX}removed-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def is_run(path: Path) -> bool:
    """Whether the directory is a run: it has a config.toml, which appears with the directory itself."""
    return os.path.isfile(path / "config.toml")  # False, not an error, where a folder is closed to us


def resolve_model(path_or_id: str | Path) -> str | Path:
    """MODEL of the command line: a run stands for its newest good checkpoint, all else for itself.

    Warns where a newer one is damaged. Raises WorkError where the run has no good checkpoint.
    """
    path = Path(path_or_id)
    if not is_run(path):
        return path_or_id
    newest, complaints = newest_good_checkpoint(path)
    if newest is None:
        reason = complaints[0] if complaints else "it has not reached its first one"
        raise WorkError(f"the run {path} has no good checkpoint: {reason}; train on with `gpt2 train --resume {path}`")
    for complaint in complaints:
        warnings.warn(f"{complaint}; {newest.name} is taken instead", stacklevel=2)
    return newest

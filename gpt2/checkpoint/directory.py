"""A checkpoint: a Hugging Face GPT-2 directory with the training state in a subfolder.

    RUN/checkpoints/step_000500/
      config.json  generation_config.json  model.safetensors      opens in transformers as it stands
      tokenizer.json  tokenizer_config.json  vocab.json  merges.txt
      training/state.safetensors  training/state.json             what `--resume` needs besides the weights
      checksums.json                                              written last: size and SHA-256 of each file

It is written under a temporary name, flushed, and renamed: under its own name it is whole, or it was damaged
later, which the checksums show.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt2 import hf
from gpt2.config import GPTConfig
from gpt2.errors import WorkError
from gpt2.files import TEMPORARY_PREFIX, new_directory, sha256_file, write_json
from gpt2.tokenizer import Tokenizer

CHECKSUMS = "checksums.json"


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
    if path.exists():  # of a run that was sent back, or damaged: the new one takes its place
        remove_checkpoint(path)
    with new_directory(path) as directory:
        write_json(directory / "config.json", hf.config_to_hf(config, tokenizer.eot))
        write_json(
            directory / "generation_config.json",
            {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot, "pad_token_id": tokenizer.eot},
        )
        save_file(hf.to_hf(weights, config), directory / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save(directory, max_length=config.n_ctx)
        (directory / "training").mkdir()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in training.items()}
        save_file(tensors, directory / "training" / "state.safetensors")
        write_json(directory / "training" / "state.json", state.__dict__)
        files = sorted(file for file in directory.rglob("*") if file.is_file())
        sums = {
            str(file.relative_to(directory)): {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
            for file in files
        }
        write_json(directory / CHECKSUMS, sums)
    return path


def verify_checkpoint(path: Path) -> None:
    """Raises WorkError that names the file which is missing or altered."""
    try:
        sums = json.loads((path / CHECKSUMS).read_text(encoding="utf-8"))
        listed = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in sums.items()}
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


def read_checkpoint(path: Path, config: GPTConfig) -> tuple[dict[str, Tensor], dict[str, Tensor], TrainingState]:
    """The weights (our state_dict), the other tensors and the state. Raises WorkError where it is damaged."""
    verify_checkpoint(path)
    weights = hf.from_hf(load_file(path / "model.safetensors"), config)
    training = load_file(path / "training" / "state.safetensors")
    values = json.loads((path / "training" / "state.json").read_text(encoding="utf-8"))
    values["skipped_steps"] = tuple(values["skipped_steps"])
    return weights, training, TrainingState(**values)


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
    """Removes all but the newest `last` and the best, and what killed writers left behind."""
    for path in list_checkpoints(run)[:-last]:
        if step_of(path) != best_step:
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

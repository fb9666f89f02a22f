"""A run's directory: made in one rename with its config, continued where it stopped."""

import dataclasses
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt2 import hf
from gpt2.checkpoint.directory import is_run, newest_good_checkpoint, resolve_model
from gpt2.config import Config, GPTConfig, TrainConfig, flatten, free_on_resume, read_run_config, to_toml
from gpt2.data.shards import Dataset
from gpt2.distributed import Distributed, multiplies_bf16_fast
from gpt2.errors import RequestError
from gpt2.files import new_directory
from gpt2.tokenizer import Tokenizer


@dataclass(frozen=True)
class Run:
    """What the training loop starts from."""

    path: Path
    config: Config
    """Everything resolved: no `auto` that changes numbers is left."""
    dataset: Dataset
    distributed: Distributed
    checkpoint: Path | None
    """Where to go on; None for step 0."""
    notes: tuple[str, ...] = ()
    """Lines for the user."""

    def initial_weights(self) -> str | Path:
        """The directory or hub id that the weights start from, a run standing for its newest checkpoint."""
        return resolve_model(self.config.train.init_from)


def start_run(config: Config, out: Path) -> Run:
    """Makes OUT, or continues it where it is a run of an equal config (the same command given again).

    Raises RequestError for what is wrong with the request; then OUT is as it was.
    """
    distributed = Distributed.from_environment(config.train.device)
    dataset = Dataset.open(Path(config.train.data))
    config, notes = resolve(config, dataset, distributed)
    if is_run(out):
        saved = read_run_config(out)
        different = _differences(config, saved)
        if different:
            raise RequestError(
                f"{out} is a run of another config ({', '.join(different)}): name another --out, "
                f"or go on with it by --resume {out}"
            )
        return _continue(out, config, dataset, distributed, notes)
    if distributed.is_main:
        if config.train.init_from:
            hf.read_pretrained(resolve_model(config.train.init_from))  # damage is told before anything is written
        with new_directory(out) as directory:
            (directory / "config.toml").write_text(to_toml(config), encoding="utf-8")
            (directory / "checkpoints").mkdir()
    return Run(out, config, dataset, distributed, None, notes)


def resume_run(path: Path, config: Config) -> Run:
    """Continues a run under `config`: its saved one, in which the caller may have changed fields.

    Raises RequestError that names each changed field which changes more than speed or intervals.
    """
    saved = read_run_config(path)
    different = [name for name in _differences(config, saved) if not free_on_resume(name)]
    if different:
        raise RequestError(f"{', '.join(different)} cannot change when a run is resumed: start a new run for that")
    distributed = Distributed.from_environment(config.train.device)
    dataset = Dataset.open(Path(config.train.data))
    if dataset.fingerprint != saved.train.data_hash:
        raise RequestError(
            f"the data in {config.train.data} is not what {path} was trained on: give its own with --data"
        )
    config, notes = resolve(config, dataset, distributed, resumed=True)
    return _continue(path, config, dataset, distributed, notes)


def resolve(
    config: Config, dataset: Dataset, distributed: Distributed, resumed: bool = False
) -> tuple[Config, tuple[str, ...]]:
    """Fills in what depends on the data, the device and the weights to start from; checks that they fit together.

    A resumed run has its model's shape already and does not look at the weights that it once started from: they may
    be gone. Raises RequestError.
    """
    notes = []
    model, train = config.model, config.train
    if train.init_from and not resumed:
        model, tokenizer = _pretrained_shape(train.init_from, config)
        if tokenizer is not None and tokenizer.hash != dataset.tokenizer.hash:
            raise RequestError(
                f"the data's tokenizer ({dataset.tokenizer.name}) differs from that of {train.init_from} "
                f"({tokenizer.name}): prepare the data with --tokenizer {tokenizer.name}"
            )
        if tokenizer is None and model.vocab_size != dataset.tokenizer.vocab_size:
            raise RequestError(
                f"the data's tokenizer has {dataset.tokenizer.vocab_size} tokens, {train.init_from} has "
                f"{model.vocab_size}: prepare the data with the model's tokenizer"
            )
    model = dataclasses.replace(model, vocab_size=dataset.tokenizer.vocab_size)
    notes += check_text(dataset, model, train)
    precision = train.precision
    if precision == "auto":
        precision = "bf16" if multiplies_bf16_fast(distributed.device) else "fp32"
    compiles = train.compile
    if compiles and not can_compile(distributed.device):
        compiles = False
        notes.append("compile is off: torch.compile needs a C++ compiler here (install g++); training goes on without")
    train = dataclasses.replace(train, precision=precision, compile=compiles, data_hash=dataset.fingerprint)
    config = dataclasses.replace(config, model=model, train=train)
    config.accumulation(distributed.world_size)  # raises where the windows do not divide
    return config, tuple(notes)


def check_text(dataset: Dataset, model: GPTConfig, train: TrainConfig) -> list[str]:
    """Whether there is enough text; a line where a step takes more than all of it. Raises RequestError."""
    tokens = dataset.split("train").tokens
    windows = (tokens - 1) // model.n_ctx
    if windows < 1:
        mend = "start from a model of a shorter context" if train.init_from else "set a smaller model.n_ctx"
        raise RequestError(
            f"the text is too small: {dataset.path} has {tokens} tokens to train on, one window of the model needs "
            f"{model.n_ctx + 1}; give more text, or {mend}"
        )
    if train.patience and not dataset.has_split("val"):
        raise RequestError(
            f"train.patience needs a validation loss, and {dataset.path} has no validation text: prepare it with a "
            "larger --val-fraction, or set train.patience to 0"
        )
    at_once = train.batch_tokens // model.n_ctx
    if windows >= at_once:
        return []
    return [
        f"the text is small: a step takes {at_once} windows of {model.n_ctx} tokens, all of the text is {windows}; "
        f"every step goes through it {at_once / windows:.1f} times (--train.batch-tokens {windows * model.n_ctx}: once)"
    ]


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has its tools: Triton on a GPU, a C++ compiler on a CPU."""
    if device.type == "cpu":  # the compiler that torch itself looks for
        usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        return shutil.which(os.environ.get("CXX", usual)) is not None
    return device.type == "cuda"


def _pretrained_shape(model: str, config: Config) -> tuple[GPTConfig, Tokenizer | None]:
    directory = hf.local_directory(resolve_model(model))
    shape = hf.read_config(directory)
    shape = dataclasses.replace(
        shape,
        dropout=config.model.dropout,
        attention=config.model.attention,
        pad_vocab_to=config.model.pad_vocab_to,
    )
    has_tokenizer = any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    return shape, Tokenizer.load(directory) if has_tokenizer else None


def _continue(path: Path, config: Config, dataset: Dataset, distributed: Distributed, notes: tuple[str, ...]) -> Run:
    checkpoint, complaints = newest_good_checkpoint(path)
    return Run(path, config, dataset, distributed, checkpoint, (*notes, *complaints))


def _differences(config: Config, saved: Config) -> list[str]:
    old = flatten(saved)
    return [name for name, value in flatten(config).items() if value != old[name]]

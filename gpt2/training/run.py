"""A run's directory: made in one rename with its config, continued where it stopped."""

import dataclasses
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2 import hf
from gpt2.checkpoint.directory import is_run, newest_good_checkpoint, resolve_model
from gpt2.config import (
    Config,
    GPTConfig,
    TrainConfig,
    flatten,
    free_on_resume,
    from_dict,
    read_run_config,
    to_dict,
    to_toml,
)
from gpt2.data.shards import Dataset
from gpt2.distributed import Distributed, can_compile, multiplies_bf16_fast
from gpt2.errors import RequestError, WorkError
from gpt2.evaluation.hellaswag import Items, read_items, tokenize
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
    """Where to go on, on rank 0's disk; None for step 0."""
    notes: tuple[str, ...] = ()
    """Lines for the user."""

    def initial_weights(self) -> str | Path:
        """The directory or hub id that the weights start from, a run standing for its newest checkpoint."""
        return resolve_model(self.config.train.init_from)


def start_run(config: Config, out: Path, distributed: Distributed | None = None) -> Run:
    """Makes OUT, or continues it where it is a run of an equal config (the same command given again).

    Rank 0 alone looks at OUT; the others need the data only. Raises RequestError for what is wrong with the
    request; then OUT is as it was.
    """
    distributed = distributed or _join(config)
    dataset = Dataset.open(Path(config.train.data))

    def prepare() -> dict[str, Any]:
        saved = read_run_config(out) if is_run(out) else None
        resolved, notes = resolve(config, dataset, distributed, saved)
        if saved is not None:
            different = _differences(resolved, saved)
            if different:
                raise RequestError(
                    f"{out} is a run of another config ({', '.join(different)}): name another --out, "
                    f"or go on with it by --resume {out}"
                )
            return _found(out, resolved, distributed, notes)
        resolved.check_micro_batch(distributed.world_size)
        if resolved.train.init_from:
            hf.read_pretrained(resolve_model(resolved.train.init_from))  # damage is told before anything is written
        with new_directory(out) as directory:
            (directory / "config.toml").write_text(to_toml(resolved), encoding="utf-8")
            (directory / "checkpoints").mkdir()
        return {"config": to_dict(resolved), "checkpoint": None, "notes": notes}

    return _opened(out, dataset, distributed, distributed.on_main(prepare))


def resume_run(path: Path, config: Config, distributed: Distributed | None = None) -> Run:
    """Continues a run under `config`: its saved one, in which the caller may have changed fields.

    Raises RequestError that names each changed field which changes more than speed or intervals.
    """
    distributed = distributed or _join(config)
    try:
        dataset = Dataset.open(Path(config.train.data))
    except RequestError as error:  # a relative path that was given in another directory, or data that was moved
        raise RequestError(f"{error}; or say by --data where the run's data lies now") from error

    def prepare() -> dict[str, Any]:
        saved = read_run_config(path)
        different = [name for name in _differences(config, saved) if not free_on_resume(name)]
        if different:
            raise RequestError(f"{', '.join(different)} cannot change when a run is resumed: start a new run for that")
        if dataset.fingerprint != saved.train.data_hash:
            raise RequestError(
                f"the data in {config.train.data} is not what {path} was trained on: give its own with --data"
            )
        resolved, notes = resolve(config, dataset, distributed, saved)
        return _found(path, resolved, distributed, notes)

    return _opened(path, dataset, distributed, distributed.on_main(prepare))


def _join(config: Config) -> Distributed:
    return Distributed.from_environment(config.train.device, config.train.collective_timeout)


def _found(path: Path, config: Config, distributed: Distributed, notes: list[str]) -> dict[str, Any]:
    """A run that is there: its newest checkpoint. Its windows must go into the number of processes of today."""
    config.windows_per_process(distributed.world_size)
    checkpoint, complaints = newest_good_checkpoint(path)
    if checkpoint is None and complaints:  # step 0 would cost the user all that was trained, and the metrics
        raise WorkError(
            f"{path} has no good checkpoint to go on from: {complaints[0]}; restore it from a copy, or start a new run"
        )
    if complaints and checkpoint is not None:
        complaints.append(f"the run goes on from {checkpoint.name}")
    return {"config": to_dict(config), "checkpoint": checkpoint and str(checkpoint), "notes": [*notes, *complaints]}


def _opened(path: Path, dataset: Dataset, distributed: Distributed, found: dict[str, Any]) -> Run:
    config = from_dict(found["config"])
    if dataset.fingerprint != config.train.data_hash:
        raise WorkError(
            f"the data in {config.train.data} differs from that of rank 0: copy the same directory to every machine"
        )
    checkpoint = Path(found["checkpoint"]) if found["checkpoint"] else None
    return Run(path, config, dataset, distributed, checkpoint, tuple(found["notes"]))


def resolve(
    config: Config, dataset: Dataset, distributed: Distributed, saved: Config | None = None
) -> tuple[Config, list[str]]:
    """Fills in what depends on the data, the device and the weights to start from; checks that they fit together.

    saved: the config of a run that goes on, whose checkpoints no longer need the weights it started from.
    Raises RequestError.
    """
    notes = []
    model, train = config.model, config.train
    if saved is not None and train.init_from == saved.train.init_from != "":
        model = _shape_of_weights(saved.model, config)
    elif train.init_from:
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
    if config.eval.hellaswag_every:
        hellaswag_items(config, dataset)  # raises where the file is not there or is another
    if config.log.sink != "none" and importlib.util.find_spec(config.log.sink) is None:
        raise RequestError(f"log.sink = {config.log.sink!r} needs a package: pip install 'build-gpt2[logging]'")
    notes += check_text(dataset, model, train)
    prompt = len(dataset.tokenizer.encode(config.eval.sample_prompt)) if config.eval.sample_every else 0
    if prompt > model.n_ctx:
        raise RequestError(
            f"eval.sample_prompt has {prompt} tokens, the model's context {model.n_ctx}: shorten it, "
            "or set eval.sample_every to 0"
        )
    precision = train.precision
    if precision == "auto":
        precision = "bf16" if multiplies_bf16_fast(distributed.device) else "fp32"
    compiles = train.compile
    if compiles and not can_compile(distributed.device):
        compiles = False
        notes.append("compile is off: torch.compile needs a C++ compiler here (install g++); training goes on without")
    train = dataclasses.replace(train, precision=precision, compile=compiles, data_hash=dataset.fingerprint)
    if train.parallel == "fsdp" and config.optim.optimizer == "muon":
        raise RequestError("optim.optimizer = 'muon' needs whole matrices: use --train.parallel ddp, or adamw")
    return dataclasses.replace(config, model=model, train=train), notes


def hellaswag_items(config: Config, dataset: Dataset) -> Items | None:
    """What HellaSwag is scored on while training; None where it is not asked for. Raises RequestError, WorkError."""
    if not config.eval.hellaswag_every:
        return None
    file = Path(config.eval.hellaswag_file) if config.eval.hellaswag_file else None
    return tokenize(read_items(file, config.eval.hellaswag_items), dataset.tokenizer, config.model.n_ctx)


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


def _pretrained_shape(model: str, config: Config) -> tuple[GPTConfig, Tokenizer | None]:
    directory = hf.local_directory(resolve_model(model))
    shape = _shape_of_weights(hf.read_config(directory), config)
    has_tokenizer = any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    return shape, Tokenizer.load(directory) if has_tokenizer else None


def _shape_of_weights(shape: GPTConfig, config: Config) -> GPTConfig:
    """The weights decide all but what a run may choose anew."""
    return dataclasses.replace(
        shape,
        dropout=config.model.dropout,
        attention=config.model.attention,
        fused_loss=config.model.fused_loss,
        recompute=config.model.recompute,
        pad_vocab_to=config.model.pad_vocab_to,
    )


def _differences(config: Config, saved: Config) -> list[str]:
    old = flatten(saved)
    return [name for name, value in flatten(config).items() if value != old[name]]

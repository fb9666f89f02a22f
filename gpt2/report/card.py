"""A model card made from a run: what the model is, what it was trained on and how, its curve and its scores.

Everything in it is read from the checkpoint, the run's config and metrics, and the data's dataset.json; what is not
there is left out. Paths of this machine are cut to their last name.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gpt2 import hf
from gpt2.checkpoint.directory import CHECKSUMS, is_run, verify_checkpoint
from gpt2.config import Config, read_run_config, to_dict
from gpt2.data.shards import FACTS, Dataset
from gpt2.errors import RequestError
from gpt2.model import GPT
from gpt2.report.plots import plot_loss
from gpt2.training.metrics import read_metrics

CURVE_ROWS = 12
CARD, PICTURE = "README.md", "loss.png"


@dataclass(frozen=True)
class Training:
    """What is known of the run that a checkpoint belongs to, up to the checkpoint's step."""

    config: Config
    step: int
    events: Sequence[Mapping[str, Any]]
    """Of metrics.jsonl."""
    data: Mapping[str, Any] | None
    """dataset.json of the data, where it is still there and the same."""

    def of_kind(self, kind: str) -> list[Mapping[str, Any]]:
        """The events of one kind, in order."""
        return [event for event in self.events if event["event"] == kind]


def publishable(directory: Path, repo: str, license_id: str | None = None) -> dict[str, Path | bytes]:
    """Name in the repository -> file or contents: weights, config, tokenizer, card, picture of the loss.

    What is not there for readers (the optimizer's state) stays here. Raises RequestError where the directory is
    no GPT-2 that opens, WorkError where a checkpoint of ours is damaged.
    """
    if (directory / CHECKSUMS).is_file():
        verify_checkpoint(directory)
    model = GPT.from_pretrained(directory)
    training = training_of(directory)
    files: dict[str, Path | bytes] = {}
    for pattern in hf.HUB_FILES:
        files |= {path.name: path for path in sorted(directory.glob(pattern))}
    picture = training is not None and bool(training.of_kind("step"))
    if training is not None and picture:
        with TemporaryDirectory() as temporary:
            plot_loss(training.events, Path(temporary, PICTURE), repo.split("/")[-1])
            files[PICTURE] = Path(temporary, PICTURE).read_bytes()
    tokenizer = "tokenizer.json" in files or "vocab.json" in files
    files[CARD] = model_card(model, repo, training, license_id, picture, tokenizer).encode()
    return dict(sorted(files.items()))


def training_of(checkpoint: Path) -> Training | None:
    """What the run around a checkpoint says; None where the directory is not in a run. Raises RequestError."""
    checkpoint = checkpoint.absolute()
    run = checkpoint.parent.parent
    if checkpoint.parent.name != "checkpoints" or not is_run(run):
        return None
    step = int(json.loads((checkpoint / "training" / "state.json").read_text(encoding="utf-8"))["step"])
    config = read_run_config(run)
    events = [event for event in read_metrics(run) if event["step"] <= step]
    data = None
    try:
        if Dataset.open(Path(config.train.data)).fingerprint == config.train.data_hash:
            data = json.loads((Path(config.train.data) / FACTS).read_text(encoding="utf-8"))
    except (RequestError, OSError):
        pass  # the data is elsewhere by now: the card does without
    return Training(config, step, events, data)


def model_card(
    model: GPT, repo: str, training: Training | None, license_id: str | None, picture: bool, tokenizer: bool
) -> str:
    """README.md for the hub: YAML for its index, then Markdown."""
    config = model.config
    parts = [
        _metadata(repo, training, license_id),
        f"# {repo.split('/')[-1]}",
        f"A GPT-2 of {model.num_parameters():,} parameters: it continues text. Trained with build-gpt2.",
        _table(
            ["layers", "heads", "width", "context (tokens)", "vocabulary"],
            [[config.n_layer, config.n_head, config.n_embd, config.n_ctx, config.vocab_size]],
        ),
        "## Use",
        _usage(repo, tokenizer),
    ]
    if training is not None:
        parts += _training(training, picture)
    parts += [
        "## Limits",
        "A base model: it continues a text as its training data would, and answers or obeys nobody. "
        "What it says is not checked for truth or decency.",
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(repo: str, training: Training | None, license_id: str | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    values: dict[str, Any] = {}
    if license_id:
        values["license"] = license_id
    if training is not None:
        source, start = training.data and training.data["source"], training.config.train.init_from
        if source and source.startswith("hf:") and _shown(source) == source:
            values["datasets"] = [source.split(":")[1]]
        if start and _shown(start) == start and "/" in start:
            values["base_model"] = start
        scores = training.of_kind("hellaswag")
        if scores:
            values["model_name"] = repo.split("/")[-1]
            values["eval_results"] = [
                EvalResult(
                    task_type="text-generation",
                    dataset_type="Rowan/hellaswag",
                    dataset_name="HellaSwag",
                    metric_type=metric,
                    metric_value=round(float(scores[-1][metric]), 4),
                )
                for metric in ("acc", "acc_norm")
            ]
    card = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["gpt2", "build-gpt2"], **values
    )
    return f"---\n{card.to_yaml()}\n---"


def _usage(repo: str, tokenizer: bool) -> str:
    lines = [
        "```python",
        "from transformers import pipeline",
        "",
        f'print(pipeline("text-generation", model="{repo}")("TEXT")[0]["generated_text"])',
        "```",
        "",
        f"or, with `pip install build-gpt2`: `gpt2 sample {repo} --prompt TEXT`",
    ]
    return "\n".join(lines if tokenizer else ["The repository holds no tokenizer: GPT-2's own belongs to it."])


def _training(training: Training, picture: bool) -> list[str]:
    config, train = training.config, training.config.train
    validations = training.of_kind("val")
    last = {event["event"]: event for event in training.events}
    facts: list[list[object]] = [
        ["steps", f"{training.step:,}"],
        ["tokens", f"{training.step * train.batch_tokens:,} ({config.batch_windows} windows x {config.model.n_ctx})"],
        ["optimizer", f"{config.optim.optimizer}, peak learning rate {config.optim.lr:g}, {config.optim.schedule}"],
        ["precision", train.precision],
    ]
    if train.init_from:
        facts.insert(0, ["started from", _shown(train.init_from)])
    if "start" in last:
        facts.append(["device", last["start"]["device"]])
    if "step" in last:
        facts.append(["training time", f"{last['step']['train_seconds'] / 60:.1f} minutes"])
        facts.append(["training loss", f"{last['step']['loss']:.4f} nats a token"])
    parts = ["## Training", _table(["", ""], facts), *_data(training)]
    if validations:
        parts += [
            "### Validation",
            _table(
                ["step", "loss (nats a token)", "bits per byte"],
                [
                    [f"{e['step']:,}", f"{e['loss']:.4f}", f"{e['bits_per_byte']:.4f}"]
                    for e in spaced(validations, CURVE_ROWS)
                ],
            ),
        ]
    if picture:
        parts.append(f"![training and validation loss]({PICTURE})")
    scores = training.of_kind("hellaswag")
    if scores:
        score = scores[-1]
        rows: list[list[object]] = [[f"{score['acc']:.4f}", f"{score['acc_norm']:.4f}", score.get("items", "")]]
        parts += ["### HellaSwag", _table(["acc", "acc_norm", "items"], rows)]
    parts += ["<details><summary>The whole config</summary>", f"```toml\n{_toml(config)}```", "</details>"]
    return parts


def _data(training: Training) -> list[str]:
    if training.data is None:
        return [f"Data: `{_shown(training.config.train.data)}`, SHA-256 `{training.config.train.data_hash}`."]
    facts = training.data
    rows: list[list[object]] = [
        [name, f"{split['documents']:,}", f"{split['bytes']:,}", f"{split['tokens']:,}"]
        for name, split in facts["splits"].items()
    ]
    return [
        "### Data",
        f"`{_shown(facts['source'])}`, tokenizer `{facts['tokenizer']['name']}`, "
        f"SHA-256 `{training.config.train.data_hash}`.",
        _table(["split", "documents", "bytes", "tokens"], rows),
    ]


def spaced(events: Sequence[Mapping[str, Any]], n: int) -> list[Mapping[str, Any]]:
    """At most n of them, evenly spaced, the first and the last among them."""
    if len(events) <= n:
        return list(events)
    return [events[round(i * (len(events) - 1) / (n - 1))] for i in range(n)]


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _toml(config: Config) -> str:
    import tomli_w

    sections = {
        section: {name: _shown(value) if isinstance(value, str) else value for name, value in fields.items()}
        for section, fields in to_dict(config).items()
    }
    return tomli_w.dumps(sections)


def _shown(value: str) -> str:
    """A path of this machine cut to its last name; a hub id, a word or hf:NAME as it is."""
    path = Path(value.removeprefix("hf:"))
    local = path.is_absolute() or value.startswith((".", "~")) or (len(path.parts) > 0 and path.exists())
    return path.name if local else value

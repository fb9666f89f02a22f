"""Every knob of the project: frozen dataclasses, presets, TOML in and out.

A name is the same everywhere: the field `lr` of the section `optim` is `optim.lr` in errors,
`[optim] lr = …` in a TOML file and `--optim.lr …` on the command line. A `Config` that exists is valid:
each section checks itself when it is made and raises RequestError with one line.
"""

import dataclasses
import difflib
import math
import os
import sys
import tomllib
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gpt2.errors import RequestError


@dataclass(frozen=True)
class GPTConfig:
    """The network, in GPT-2's own names. The defaults are GPT-2 small: 124,439,808 parameters."""

    vocab_size: int = 50257
    """Number of token ids. Training takes it from the data's tokenizer."""
    n_ctx: int = 1024
    """Context: the longest sequence, in tokens (n_positions in Hugging Face's config.json)."""
    n_layer: int = 12
    """Transformer blocks."""
    n_head: int = 12
    """Attention heads a block; n_embd / n_head is the width of a head."""
    n_embd: int = 768
    """Width of the residual stream."""
    dropout: float = 0.0
    """Probability of dropping an activation, at GPT-2's three places. 0 for pre-training."""
    layer_norm_epsilon: float = 1e-5
    """Added to the variance in layer norm."""
    tie_embeddings: bool = True
    """lm_head.weight is wte.weight: one matrix reads tokens and predicts them."""
    scale_residual_init: bool = True
    """Start the projections into the residual stream at 0.02 / sqrt(2 n_layer) instead of 0.02."""
    pad_vocab_to: int = 128
    """Nice numbers: round the embedding's rows up to a multiple of this (50257 -> 50304); 1 for none."""
    attention: Literal["auto", "flash", "explicit"] = "auto"
    """flash: scaled_dot_product_attention; explicit: the softmax formula; auto: the faster on the device."""
    fused_loss: bool = False
    """Training: lm_head and cross-entropy a chunk of tokens at a time, so that the logits are never held whole."""
    recompute: bool = False
    """Activation checkpointing: the backward pass computes each block again instead of keeping its activations."""

    def __post_init__(self) -> None:
        _check_values(self, "model")
        for name in ("vocab_size", "n_ctx", "n_layer", "n_head", "n_embd", "pad_vocab_to"):
            _require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "at least 1")
        _require(0 <= self.dropout < 1, "model.dropout", self.dropout, "in [0, 1)")
        _require(0 < self.layer_norm_epsilon < 1, "model.layer_norm_epsilon", self.layer_norm_epsilon, "in (0, 1)")
        divides = self.n_embd % self.n_head == 0
        _require(divides, "model.n_head", self.n_head, f"a divisor of model.n_embd = {self.n_embd}")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding matrix: vocab_size rounded up to a multiple of pad_vocab_to."""
        return -(-self.vocab_size // self.pad_vocab_to) * self.pad_vocab_to


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule. The defaults are the GPT-2 124M recipe."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw for all; or muon for the blocks' matrices and adamw for the rest."""
    lr: float = 6e-4
    """Peak learning rate of AdamW."""
    muon_lr: float = 0.02
    """Peak learning rate of Muon."""
    muon_momentum: float = 0.95
    """Momentum of Muon (Nesterov)."""
    beta1: float = 0.9
    """AdamW: decay of the gradient's running mean."""
    beta2: float = 0.95
    """AdamW: decay of the squared gradient's running mean."""
    eps: float = 1e-8
    """AdamW: added to the root of the squared gradient's mean."""
    weight_decay: float = 0.1
    """Decay of matmul and embedding weights (dim >= 2), as a factor of the learning rate."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient; 0 for no clipping."""
    fused: bool = True
    """AdamW as one kernel over all parameters instead of one after the other."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """After warm-up: cosine or linear decay, or wsd: stable, then linear decay over the last decay_fraction."""
    warmup_steps: int = 715
    """Steps of linear warm-up, counted within train.steps."""
    min_lr_ratio: float = 0.1
    """Learning rate at the end, as a part of the peak."""
    decay_fraction: float = 0.2
    """wsd: the part of the run, at its end, in which the rate decays."""

    def __post_init__(self) -> None:
        _check_values(self, "optim")
        for name in ("lr", "muon_lr", "eps"):
            _require(getattr(self, name) > 0, f"optim.{name}", getattr(self, name), "above 0")
        for name in ("beta1", "beta2", "muon_momentum"):
            _require(0 <= getattr(self, name) < 1, f"optim.{name}", getattr(self, name), "in [0, 1)")
        for name in ("weight_decay", "grad_clip", "warmup_steps"):
            _require(getattr(self, name) >= 0, f"optim.{name}", getattr(self, name), "at least 0")
        _require(0 <= self.min_lr_ratio <= 1, "optim.min_lr_ratio", self.min_lr_ratio, "in [0, 1]")
        _require(0 < self.decay_fraction <= 1, "optim.decay_fraction", self.decay_fraction, "in (0, 1]")


@dataclass(frozen=True)
class TrainConfig:
    """On what, how long, how much at once, and in which precision."""

    data: str = ""
    """Directory of token shards, as `gpt2 prepare` writes it."""
    data_hash: str = ""
    """The data's identity, filled in when the run starts: other data under the same path is refused."""
    init_from: str = ""
    """Start from these weights (run, checkpoint, Hugging Face directory or id), which also decide the model's shape."""
    steps: int = 19_073
    """Optimizer steps; 0: no limit by steps (then train.minutes must be set)."""
    minutes: float = 0.0
    """Minutes of training, evaluation and compile not counted; when set, the schedule runs by time. 0: by steps."""
    patience: int = 0
    """Early stop: validations in a row without a lower loss after which the run ends; 0: it goes its whole way."""
    batch_tokens: int = 524_288
    """Tokens in a step: windows x n_ctx. 524,288 = 512 windows of 1,024."""
    micro_batch: int | Literal["auto"] = 32
    """Windows in one forward and backward pass; accumulation = batch_tokens / (n_ctx x micro_batch x processes).
    auto: on a GPU the largest that fits into its memory, found at the start."""
    seed: int = 1337
    """Seed of the initial weights, the data's order, dropout and samples."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu) or a torch device."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16: autocast to bfloat16; auto: bf16 where the device multiplies it fast, else fp32."""
    matmul_precision: Literal["highest", "high"] = "high"
    """float32 matmuls: high allows TF32 (10 bits of mantissa) on GPUs that have it."""
    compile: bool = True
    """torch.compile the network."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Several processes: ddp holds the whole model in each, fsdp a share of it (parameters, gradients, moments)."""
    gradient_type: Literal["fp32", "bf16"] = "fp32"
    """Number type in which processes add their gradients; bf16 halves what goes over the wire."""
    collective_timeout: float = 600.0
    """Seconds after which a process that does not answer the others is given up."""

    def __post_init__(self) -> None:
        _check_values(self, "train")
        for name in ("steps", "minutes", "patience", "seed"):
            _require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "at least 0")
        _require(self.batch_tokens >= 1, "train.batch_tokens", self.batch_tokens, "at least 1")
        fits = self.micro_batch == "auto" if isinstance(self.micro_batch, str) else self.micro_batch >= 1
        _require(fits, "train.micro_batch", self.micro_batch, "at least 1, or auto")
        _require(self.collective_timeout > 0, "train.collective_timeout", self.collective_timeout, "above 0")
        _require(self.steps > 0 or self.minutes > 0, "train.steps", self.steps, "above 0, or train.minutes must be")


@dataclass(frozen=True)
class EvalConfig:
    """What is looked at while training."""

    every: int = 250
    """Steps between validation losses; 0: only at the end."""
    windows: int = 0
    """Validation windows, taken from the start of the split; 0: the whole split."""
    batch: int = 16
    """Windows in one forward pass of evaluation."""
    hellaswag_every: int = 0
    """Steps between HellaSwag scores, which then come at the end too; 0: none."""
    hellaswag_items: int = 0
    """Items of HellaSwag, evenly spaced over the file; 0: all 10,042."""
    hellaswag_file: str = ""
    """HellaSwag's validation file; downloaded once and kept if not given."""
    sample_every: int = 0
    """Steps between samples of text; 0: none."""
    sample_prompt: str = "\n"
    """The samples' prompt."""
    sample_tokens: int = 64
    """Tokens a sample."""

    def __post_init__(self) -> None:
        _check_values(self, "eval")
        for name in ("every", "windows", "hellaswag_every", "hellaswag_items", "sample_every", "sample_tokens"):
            _require(getattr(self, name) >= 0, f"eval.{name}", getattr(self, name), "at least 0")
        _require(self.batch >= 1, "eval.batch", self.batch, "at least 1")


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written (one always is at the end) and which are kept."""

    every: int = 1000
    """Steps between checkpoints; 0: none by steps."""
    minutes: float = 0.0
    """Minutes of training between checkpoints; 0: none by time."""
    keep_last: int = 2
    """How many of the newest stay."""
    keep_best: bool = True
    """The one with the lowest validation loss stays too."""
    must_succeed: bool = False
    """Stop where a checkpoint cannot be written (disk full); else training goes on until the next."""

    def __post_init__(self) -> None:
        _check_values(self, "checkpoint")
        _require(self.every >= 0, "checkpoint.every", self.every, "at least 0")
        _require(self.minutes >= 0, "checkpoint.minutes", self.minutes, "at least 0")
        _require(self.keep_last >= 1, "checkpoint.keep_last", self.keep_last, "at least 1")


@dataclass(frozen=True)
class GuardConfig:
    """Bad steps: those whose loss or gradient is not finite, or whose loss is a spike. They make no update."""

    spike_zscore: float = 0.0
    """A loss this many standard deviations above the running mean is a spike; 0: spikes are not looked for."""
    window: int = 100
    """Steps that the running mean looks back; a spike can be told only after as many."""
    skips: int = 8
    """Bad steps in a row that are only skipped."""
    then: Literal["stop", "rollback"] = "stop"
    """After one more: stop, or go back to the weights of the last checkpoint and pass over the steps since."""
    rollbacks: int = 3
    """How often a run may go back."""

    def __post_init__(self) -> None:
        _check_values(self, "guard")
        for name in ("spike_zscore", "skips", "rollbacks"):
            _require(getattr(self, name) >= 0, f"guard.{name}", getattr(self, name), "at least 0")
        _require(self.window >= 2, "guard.window", self.window, "at least 2")


@dataclass(frozen=True)
class LogConfig:
    """Where the figures go besides metrics.jsonl."""

    every: int = 10
    """Steps between lines of metrics."""
    sink: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """A metrics service to write to as well (pip install 'build-gpt2[logging]')."""

    def __post_init__(self) -> None:
        _check_values(self, "log")
        _require(self.every >= 1, "log.every", self.every, "at least 1")


@dataclass(frozen=True)
class Config:
    """A training run, whole."""

    model: GPTConfig = field(default_factory=GPTConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        if self.train.patience and not (self.eval.every or self.checkpoint.every):
            raise RequestError("train.patience counts validations: set eval.every, the steps between them, above 0")
        if not self.train.init_from:  # else the context is that of the weights, which are not read here
            self.check_batch()

    def check_batch(self) -> None:
        """Raises RequestError with the nearest that will do where a step is not a whole number of windows."""
        batch, n_ctx = self.train.batch_tokens, self.model.n_ctx
        if batch % n_ctx != 0:
            raise RequestError(
                f"train.batch_tokens = {batch} is no multiple of model.n_ctx = {n_ctx}: use {_multiples(batch, n_ctx)}"
            )

    @property
    def batch_windows(self) -> int:
        """Windows of n_ctx tokens in one step, over all processes."""
        return self.train.batch_tokens // self.model.n_ctx

    def windows_per_process(self, world_size: int = 1) -> int:
        """Windows of a step that each process takes. Raises RequestError where they cannot be shared evenly."""
        self.check_batch()
        if self.batch_windows % world_size == 0:
            return self.batch_windows // world_size
        tokens = _multiples(self.train.batch_tokens, self.model.n_ctx * world_size)
        raise RequestError(
            f"{self.batch_windows} windows a step cannot be shared by {world_size} processes: "
            f"use train.batch_tokens {tokens}"
        )

    def check_micro_batch(self, world_size: int = 1) -> None:
        """Raises RequestError with the nearest that divide where train.micro_batch does not.

        One above all of a process's windows is no fault: they are taken at once.
        """
        windows, micro_batch = self.windows_per_process(world_size), self.train.micro_batch
        if micro_batch == "auto" or micro_batch >= windows or windows % micro_batch == 0:
            return
        nearest = sorted(sorted(_divisors(windows), key=lambda m: abs(m - micro_batch))[:2])
        raise RequestError(
            f"train.micro_batch = {micro_batch} does not divide the {windows} windows that each of {world_size} "
            f"process(es) takes in a step: use {' or '.join(map(str, nearest))}"
        )

    def micro_batches(self, world_size: int = 1) -> list[int]:
        """All that divide a process's windows, the smallest first."""
        return _divisors(self.windows_per_process(world_size))

    def largest_micro_batch(self, at_most: int, world_size: int = 1) -> int:
        """The largest that divides a process's windows and is at most `at_most`."""
        return max(m for m in self.micro_batches(world_size) if m <= max(1, at_most))


# Fields that change how fast or how often, never which numbers come out: a resumed run may change them.
_FREE_ON_RESUME = frozenset(
    {
        "model.attention",
        "model.fused_loss",
        "model.recompute",
        "train.data",
        "train.micro_batch",
        "train.device",
        "train.compile",
        "train.parallel",
        "train.collective_timeout",
        "optim.fused",
    }
)
_FREE_SECTIONS = frozenset({"eval", "checkpoint", "guard", "log"})


def free_on_resume(name: str) -> bool:
    """Whether the field `section.name` changes only speed or intervals."""
    return name in _FREE_ON_RESUME or name.split(".")[0] in _FREE_SECTIONS


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Section -> field -> value."""
    return dataclasses.asdict(config)


def flatten(config: Config) -> dict[str, Any]:
    """`section.field` -> value."""
    return {f"{section}.{name}": value for section, fields in to_dict(config).items() for name, value in fields.items()}


def from_dict(values: Mapping[str, Any], base: Config | None = None) -> Config:
    """A config with the given sections' fields changed. Raises RequestError for what is unknown or of a wrong type."""
    base = base or Config()
    sections = {}
    for section, fields in values.items():
        if not hasattr(base, section) or section not in {f.name for f in dataclasses.fields(base)}:
            raise RequestError(f"there is no section [{section}]{_closest(section, to_dict(base))}")
        if not isinstance(fields, Mapping):
            raise RequestError(f"[{section}] must be a table of fields, not {_shown(fields)}")
        old = getattr(base, section)
        hints = get_type_hints(type(old))
        for name, _value in fields.items():
            if name not in hints:
                raise RequestError(f"there is no field {section}.{name}{_closest(name, hints, section + '.')}")
        changed = {name: _typed(f"{section}.{name}", value, hints[name]) for name, value in fields.items()}
        sections[section] = dataclasses.replace(old, **changed)
    return dataclasses.replace(base, **sections)


def from_toml(text: str, base: Config | None = None, name: str = "the config") -> Config:
    """A config from TOML. Raises RequestError that names `name` and the line or the field."""
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # tomllib's own, numbers too long for Python, brackets too deep
        raise RequestError(f"{name} is not TOML: {error}") from error
    try:
        return from_dict(values, base)
    except RequestError as error:
        raise RequestError(f"{name}: {error}") from error


def read_toml(path: Path, base: Config | None = None) -> Config:
    """A config from a TOML file. Raises RequestError that names the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 at byte {error.start}") from error
    return from_toml(text, base, str(path))


def read_run_config(run: Path) -> Config:
    """The resolved config of a run's directory. Raises RequestError where it is no run."""
    if not os.path.isfile(run / "config.toml"):  # False, not an error, for a name too long or a closed folder
        raise RequestError(
            f"{run} is no run (it has no config.toml): start one with gpt2 train --data DATA --out {run}"
        )
    return read_toml(run / "config.toml")


def to_toml(config: Config) -> str:
    """The whole config as TOML; `from_toml` gives back an equal one."""
    import tomli_w

    return tomli_w.dumps(to_dict(config))


def _divisors(number: int) -> list[int]:
    return [m for m in range(1, number + 1) if number % m == 0]


def _multiples(number: int, of: int) -> str:
    """The two multiples that enclose the number."""
    below = number // of * of
    return f"{below} or {below + of}" if below else str(of)


def _require(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise RequestError(f"{name} = {value} must be {wanted}")


def _check_values(section: Any, prefix: str) -> None:
    """What no field of a type may be: a word that is not among the choices, not finite, beyond 64 bits."""
    for name, hint in get_type_hints(type(section)).items():
        value = getattr(section, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise RequestError(f"{prefix}.{name} = {value!r} must be one of {', '.join(get_args(hint))}")
        if isinstance(value, float) and not math.isfinite(value):
            raise RequestError(f"{prefix}.{name} = {value} must be a finite number")
        if isinstance(value, int) and value.bit_length() > 63:
            raise RequestError(f"{prefix}.{name} = {_shown(value)} must be a whole number of 64 bits")


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value if it is of the field's type (a whole number will do for a float)."""
    if get_origin(hint) in (Union, types.UnionType):
        allowed: tuple[Any, ...] = get_args(hint)
    else:
        allowed = (hint,)
    for kind in allowed:
        if get_origin(kind) is Literal and isinstance(value, str):
            return value  # which words are allowed the section checks itself
        if kind is float:
            if type(value) in (int, float) and abs(value) <= sys.float_info.max:  # neither infinite nor NaN
                return float(value)
        elif type(value) is kind:
            return value
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
    wanted = " or ".join(names.get(kind, "a word") for kind in allowed)
    raise RequestError(f"{name} = {_shown(value)} must be {wanted}")


def _shown(value: object) -> str:
    """The value for a message, cut short. Python refuses to write a whole number of thousands of digits."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:79]}…"


def _closest(name: str, known: Mapping[str, Any], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f": did you mean {prefix}{close[0]}?" if close else f": known are {', '.join(known)}"


def _preset(
    model: GPTConfig, optim: dict[str, Any], train: dict[str, Any], every: dict[str, Any] | None = None
) -> Config:
    return Config(model, OptimConfig(**optim), TrainConfig(**train), **(every or {}))


# 19,073 steps x 524,288 tokens = 10.0 B tokens, one epoch of FineWeb-Edu's 10BT sample.
# 6 x 124M x 10 B = 7.7e18 FLOP + attention: about 45 minutes on 8 H100 at 40 % of their peak, 2.5 hours on 8 A100.
# Learning rates and batch sizes of the four: GPT-3 (Brown et al. 2020, table 2.1), whose sizes are nearest.
PRESETS: Mapping[str, Config] = types.MappingProxyType(
    {
        "gpt2-124m": Config(),
        "gpt2-350m": _preset(GPTConfig(n_layer=24, n_head=16, n_embd=1024), {"lr": 3e-4}, {"micro_batch": 16}),
        "gpt2-774m": _preset(GPTConfig(n_layer=36, n_head=20, n_embd=1280), {"lr": 2.5e-4}, {"micro_batch": 8}),
        # 1,048,576 tokens = 1,024 windows of 1,024; 9,537 steps = 10.0 B tokens.
        "gpt2-1558m": _preset(
            GPTConfig(n_layer=48, n_head=25, n_embd=1600, recompute=True),
            {"lr": 2e-4, "warmup_steps": 358},
            {"micro_batch": 4, "batch_tokens": 1_048_576, "steps": 9_537, "parallel": "fsdp"},
        ),
        # From trained weights (--init-from) on one's own text, which may be small: 8 windows of 1,024 a step, at most
        # 400 steps = 3.3 M tokens. A text of 1 MB is about 250,000 tokens = 30 steps, so that it is gone through 13
        # times at most; dropout and the early stop are against learning it by heart. Each validation is a checkpoint,
        # so that the best weights are on the disk when three validations have brought nothing lower.
        "finetune": _preset(
            GPTConfig(dropout=0.1),
            {"lr": 3e-5, "warmup_steps": 10, "schedule": "linear", "min_lr_ratio": 0.0, "weight_decay": 0.01},
            {"batch_tokens": 8_192, "micro_batch": 4, "steps": 400, "patience": 3},
            {"eval": EvalConfig(every=20), "checkpoint": CheckpointConfig(every=20, keep_last=1)},
        ),
        # Seconds on a CPU: for tests and for a first look.
        "tiny": _preset(
            GPTConfig(n_ctx=32, n_layer=2, n_head=2, n_embd=32),
            {"lr": 1e-2, "warmup_steps": 2},
            {"batch_tokens": 256, "micro_batch": 4, "steps": 20, "precision": "fp32", "compile": False},
            {"eval": EvalConfig(every=10, windows=8), "log": LogConfig(every=1)},
        ),
        # Chosen for the lowest held-out bits per byte after three minutes on two CPU cores (docs/LOG.md).
        "demo": _preset(
            GPTConfig(vocab_size=8192, n_ctx=64, n_layer=2, n_head=4, n_embd=128, fused_loss=True),
            {
                "optimizer": "muon",
                "lr": 1.6e-2,
                "muon_lr": 0.04,
                "weight_decay": 0.0,
                "schedule": "linear",
                "warmup_steps": 20,
                "min_lr_ratio": 0.0,
            },
            {"batch_tokens": 1_024, "micro_batch": 16, "steps": 0, "minutes": 3.0},
            {
                "eval": EvalConfig(every=300, batch=64),
                "checkpoint": CheckpointConfig(every=0),
            },
        ),
    }
)


def preset(name: str) -> Config:
    """The preset of that name. Raises RequestError with the closest name."""
    if name not in PRESETS:
        raise RequestError(f"there is no preset {name!r}{_closest(name, PRESETS)}")
    return PRESETS[name]

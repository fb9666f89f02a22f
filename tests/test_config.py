"""The config: arbitrary input is a valid Config or one line; TOML round trips; errors name field and mend."""

import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.config import (
    PRESETS,
    CheckpointConfig,
    Config,
    EvalConfig,
    GPTConfig,
    LogConfig,
    OptimConfig,
    TrainConfig,
    flatten,
    free_on_resume,
    from_dict,
    from_toml,
    preset,
    read_run_config,
    read_toml,
    to_dict,
    to_toml,
)
from gpt2.errors import RequestError

FIELDS = sorted(flatten(Config()))
SECTIONS = sorted(to_dict(Config()))
SCALARS = st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.datetimes()
VALUES = st.none() | SCALARS | st.lists(st.integers(), max_size=2)
NAMES = st.sampled_from([*SECTIONS, *(name.partition(".")[2] for name in FIELDS)]) | st.text(max_size=8)
NESTED = st.recursive(SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(NAMES, x, max_size=3), max_leaves=6)


def one_line_or_valid(make: Callable[..., Config], *args: object) -> Config | None:
    try:
        config = make(*args)
    except RequestError as error:
        said = str(error)
    else:
        assert isinstance(config, Config)
        return config
    assert said
    assert len(said.splitlines()) == 1
    return None


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(max_size=60))
def test_any_text_is_a_config_or_one_line(text: str) -> None:
    one_line_or_valid(from_toml, text)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.dictionaries(NAMES, NESTED, max_size=3))
def test_any_toml_is_a_config_or_one_line(values: dict[str, Any]) -> None:
    config = one_line_or_valid(from_toml, tomli_w.dumps(values))
    assert config == one_line_or_valid(from_dict, values)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_a_damaged_file_is_a_config_or_one_line(data: st.DataObject) -> None:
    text = to_toml(preset("demo"))
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, min(len(text), start + 30)))
    one_line_or_valid(from_toml, text[:start] + data.draw(st.text(max_size=10)) + text[stop:])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=12), VALUES, max_size=4))
def test_any_fields_are_a_config_or_one_line(fields: dict[str, object]) -> None:
    sections: dict[str, dict[str, object]] = {}
    for name, value in fields.items():
        section, _, field = name.partition(".")
        sections.setdefault(section, {})[field] = value
    config = one_line_or_valid(from_dict, sections)
    if config is not None:
        assert from_toml(to_toml(config)) == config


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(SECTIONS), VALUES, max_size=2))
def test_sections_must_be_tables(values: dict[str, object]) -> None:
    one_line_or_valid(from_dict, values)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(), st.floats(1e-300, 1e300), st.integers(0, 2**63 - 1))
def test_any_value_comes_back_from_toml(text: str, number: float, seed: int) -> None:
    config = from_dict({"eval": {"sample_prompt": text}, "optim": {"lr": number}, "train": {"seed": seed}})
    assert from_toml(to_toml(config)) == config


def test_base_is_changed_only_where_asked() -> None:
    base = preset("demo")
    assert from_dict({}, base) == base
    changed = from_toml("[optim]\nlr = 0.5", base)
    assert changed == dataclasses.replace(base, optim=dataclasses.replace(base.optim, lr=0.5))
    different = [name for name, value in flatten(changed).items() if flatten(base)[name] != value]
    assert different == ["optim.lr"]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip_and_divide(name: str) -> None:
    config = preset(name)
    assert from_toml(to_toml(config)) == config
    config.check_micro_batch()
    assert config.batch_windows * config.model.n_ctx == config.train.batch_tokens


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[model]\nn_embed = 3", "there is no field model.n_embed: did you mean model.n_embd?"),
        ("[optim]\nlearning_rate = 3", "there is no field optim.learning_rate: "),
        ("[train]\nmicrobatch = 3", "did you mean train.micro_batch?"),
        ("[zzz]\n", "there is no section [zzz]: known are model, optim, train, eval, checkpoint, guard, log"),
        ("[log]\nzzz = 1", "there is no field log.zzz: known are every, sink"),
        ("model = [1]", "[model] must be a table of fields, not [1]"),
        ("[model]\nn_layre = 3", "did you mean model.n_layer?"),
        ("[modle]\n", "did you mean model?"),
        ("model = 3", "must be a table"),
        ("[train]\nsteps = true", "train.steps = True must be a whole number"),
        ("[train]\nsteps = 1.5", "must be a whole number"),
        ("[optim]\nlr = 'fast'", "must be a finite number"),
        ("[optim]\nlr = nan", "must be a finite number"),
        ("[optim]\nlr = inf", "must be a finite number"),
        ("[optim]\nlr = 0x" + "f" * 5000, "optim.lr = a number of thousands of digits must be a finite number"),
        ("[train]\nseed = 0x" + "f" * 5000, "train.seed = a number of thousands of digits must be a whole number"),
        ("[train]\nseed = 9223372036854775808", "must be a whole number of 64 bits"),
        ("[train]\nseed = " + "9" * 5000, "is not TOML"),
        ("x = " + "[" * 5000, "is not TOML"),
        ("[train]\nsteps = " + "[" * 99 + "]" * 99, "…"),
        ("[optim]\nlr = 0", "must be above 0"),
        ("[optim]\nschedule = 'cosin'", "must be one of cosine, linear, wsd, constant"),
        ("[model]\nn_embd = 30\nn_head = 4", "a divisor of model.n_embd = 30"),
        ("[model]\ndropout = 1.0", "must be in [0, 1)"),
        ("[train]\nbatch_tokens = 100000", "use 99328 or 100352"),
        ("[train]\nbatch_tokens = 10", "use 1024"),
        ("[train]\nsteps = 0", "train.minutes must be"),
        ("[log]\nevery = 0", "at least 1"),
        ("[model", "is not TOML"),
    ],
)
def test_errors_name_the_field_and_the_mend(text: str, expected: str) -> None:
    with pytest.raises(RequestError) as error:
        from_toml(text)
    assert expected in str(error.value)


def test_whole_numbers_will_do_for_floats() -> None:
    assert from_toml("[optim]\nlr = 1").optim.lr == 1.0


@pytest.mark.parametrize(
    ("section", "fields", "expected"),
    [
        (GPTConfig, {"vocab_size": 0}, "model.vocab_size = 0 must be at least 1"),
        (GPTConfig, {"n_ctx": 0}, "model.n_ctx = 0 must be at least 1"),
        (GPTConfig, {"n_layer": -1}, "model.n_layer = -1 must be at least 1"),
        (GPTConfig, {"n_head": 0}, "model.n_head = 0 must be at least 1"),
        (GPTConfig, {"n_embd": 0}, "model.n_embd = 0 must be at least 1"),
        (GPTConfig, {"pad_vocab_to": 0}, "model.pad_vocab_to = 0 must be at least 1"),
        (GPTConfig, {"dropout": -0.1}, "model.dropout = -0.1 must be in [0, 1)"),
        (GPTConfig, {"dropout": float("nan")}, "model.dropout = nan must be a finite number"),
        (GPTConfig, {"layer_norm_epsilon": 0.0}, "model.layer_norm_epsilon = 0.0 must be in (0, 1)"),
        (GPTConfig, {"n_head": 5}, "model.n_head = 5 must be a divisor of model.n_embd = 768"),
        (GPTConfig, {"attention": "slow"}, "model.attention = 'slow' must be one of auto, flash, explicit"),
        (OptimConfig, {"optimizer": "sgd"}, "optim.optimizer = 'sgd' must be one of adamw, muon"),
        (OptimConfig, {"muon_lr": 0.0}, "optim.muon_lr = 0.0 must be above 0"),
        (OptimConfig, {"eps": 0.0}, "optim.eps = 0.0 must be above 0"),
        (OptimConfig, {"beta1": 1.0}, "optim.beta1 = 1.0 must be in [0, 1)"),
        (OptimConfig, {"beta2": -0.1}, "optim.beta2 = -0.1 must be in [0, 1)"),
        (OptimConfig, {"muon_momentum": 1.0}, "optim.muon_momentum = 1.0 must be in [0, 1)"),
        (OptimConfig, {"weight_decay": -1.0}, "optim.weight_decay = -1.0 must be at least 0"),
        (OptimConfig, {"grad_clip": -1.0}, "optim.grad_clip = -1.0 must be at least 0"),
        (OptimConfig, {"grad_clip": float("inf")}, "optim.grad_clip = inf must be a finite number"),
        (OptimConfig, {"warmup_steps": -1}, "optim.warmup_steps = -1 must be at least 0"),
        (OptimConfig, {"min_lr_ratio": 1.1}, "optim.min_lr_ratio = 1.1 must be in [0, 1]"),
        (OptimConfig, {"decay_fraction": 0.0}, "optim.decay_fraction = 0.0 must be in (0, 1]"),
        (TrainConfig, {"steps": -1}, "train.steps = -1 must be at least 0"),
        (TrainConfig, {"minutes": -1.0}, "train.minutes = -1.0 must be at least 0"),
        (TrainConfig, {"seed": -1}, "train.seed = -1 must be at least 0"),
        (TrainConfig, {"seed": 2**63}, "train.seed = 9223372036854775808 must be a whole number of 64 bits"),
        (TrainConfig, {"batch_tokens": 0}, "train.batch_tokens = 0 must be at least 1"),
        (TrainConfig, {"micro_batch": 0}, "train.micro_batch = 0 must be at least 1, or auto"),
        (TrainConfig, {"steps": 0}, "train.steps = 0 must be above 0, or train.minutes must be"),
        (TrainConfig, {"precision": "fp16"}, "train.precision = 'fp16' must be one of auto, fp32, bf16"),
        (TrainConfig, {"matmul_precision": "low"}, "train.matmul_precision = 'low' must be one of highest, high"),
        (EvalConfig, {"every": -1}, "eval.every = -1 must be at least 0"),
        (EvalConfig, {"windows": -1}, "eval.windows = -1 must be at least 0"),
        (EvalConfig, {"hellaswag_every": -1}, "eval.hellaswag_every = -1 must be at least 0"),
        (EvalConfig, {"hellaswag_items": -1}, "eval.hellaswag_items = -1 must be at least 0"),
        (EvalConfig, {"sample_every": -1}, "eval.sample_every = -1 must be at least 0"),
        (EvalConfig, {"sample_tokens": -1}, "eval.sample_tokens = -1 must be at least 0"),
        (EvalConfig, {"batch": 0}, "eval.batch = 0 must be at least 1"),
        (CheckpointConfig, {"every": -1}, "checkpoint.every = -1 must be at least 0"),
        (CheckpointConfig, {"keep_last": 0}, "checkpoint.keep_last = 0 must be at least 1"),
        (LogConfig, {"every": 0}, "log.every = 0 must be at least 1"),
        (LogConfig, {"sink": "mlflow"}, "log.sink = 'mlflow' must be one of none, tensorboard, wandb, trackio"),
    ],
)
def test_a_config_that_exists_is_valid(section: type, fields: dict[str, Any], expected: str) -> None:
    """Also where it is made in Python or by the command line, past the TOML parser."""
    with pytest.raises(RequestError) as error:
        section(**fields)
    assert str(error.value) == expected


def test_what_stands_at_the_border_is_valid() -> None:
    GPTConfig(1, 1, 1, 1, 1, dropout=0.0, pad_vocab_to=1)
    OptimConfig(beta1=0.0, weight_decay=0.0, grad_clip=0.0, warmup_steps=0, min_lr_ratio=1.0, decay_fraction=1.0)
    TrainConfig(steps=0, minutes=0.5, seed=2**63 - 1, batch_tokens=1, micro_batch=1)
    EvalConfig(every=0, windows=0, batch=1, sample_every=0, sample_tokens=0)
    CheckpointConfig(every=0, keep_last=1)
    LogConfig(every=1)


@pytest.mark.parametrize(
    ("vocab_size", "pad", "rows"), [(50257, 128, 50304), (257, 128, 384), (256, 128, 256), (300, 1, 300), (5, 8, 8)]
)
def test_the_vocabulary_is_rounded_up(vocab_size: int, pad: int, rows: int) -> None:
    assert GPTConfig(vocab_size=vocab_size, pad_vocab_to=pad).padded_vocab_size == rows


def test_unknown_presets_name_the_closest() -> None:
    with pytest.raises(RequestError, match=r"did you mean gpt2-124m\?"):
        preset("gpt2-124M")


def test_accumulation_names_the_nearest_micro_batches() -> None:
    config = from_dict({"model": {"n_ctx": 8}, "train": {"batch_tokens": 96, "micro_batch": 5}})
    with pytest.raises(RequestError, match="use 4 or 6"):
        config.check_micro_batch()
    with pytest.raises(RequestError, match=r"cannot be shared by 5 processes: use train\.batch_tokens 80 or 120"):
        config.check_micro_batch(5)
    with pytest.raises(RequestError, match=r"use train\.batch_tokens 800"):
        config.check_micro_batch(100)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(1, 70), st.integers(1, 6))
def test_accumulation_is_exact_or_what_is_proposed_will_do(windows: int, micro_batch: int, world_size: int) -> None:
    def config(tokens: int, micro: int) -> Config:
        return from_dict({"model": {"n_ctx": 8}, "train": {"batch_tokens": tokens, "micro_batch": micro}})

    try:
        config(8 * windows, micro_batch).check_micro_batch(world_size)
    except RequestError as error:
        proposed = [int(number) for number in re.findall(r"\d+", str(error).rpartition(": use")[2])]
        if "micro_batch" in str(error):
            for micro in proposed:
                config(8 * windows, micro).check_micro_batch(world_size)
            # No fitting number lies nearer than the nearest proposed.
            nearest = min(abs(micro - micro_batch) for micro in proposed)
            for micro in range(max(1, micro_batch - nearest + 1), micro_batch + nearest):
                assert windows % (micro * world_size)
        else:
            assert all(tokens % (8 * world_size) == 0 for tokens in proposed)
            assert min(abs(tokens - 8 * windows) for tokens in proposed) < 8 * world_size
    else:
        taken = min(micro_batch, windows // world_size)
        assert windows % (taken * world_size) == 0
        assert config(8 * windows, micro_batch).largest_micro_batch(micro_batch, world_size) == taken


def test_files_that_are_not_there_or_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot read"):
        read_toml(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b"# caf\xe9")
    with pytest.raises(RequestError, match="not UTF-8 at byte 5"):
        read_toml(tmp_path / "latin.toml")
    with pytest.raises(RequestError, match="is no run"):
        read_run_config(tmp_path)


def test_what_changes_results_is_not_free_on_resume() -> None:
    free = {name for name in FIELDS if free_on_resume(name)}
    assert "train.micro_batch" in free
    assert "checkpoint.every" in free
    for name in ("optim.lr", "train.seed", "train.batch_tokens", "train.precision", "model.n_layer", "train.steps"):
        assert name not in free


def test_every_field_has_a_docstring() -> None:
    for section in dataclasses.fields(Config):
        kind = type(getattr(Config(), section.name))
        source = inspect.getsource(kind)
        for field in dataclasses.fields(kind):
            after = source.split(f"    {field.name}:", 1)[1].split("\n", 1)[1].lstrip()
            assert after.startswith('"""'), f"{section.name}.{field.name}"

"""The config: arbitrary input is a valid Config or one line; TOML round trips; errors name field and mend."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.config import (
    PRESETS,
    Config,
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
VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.lists(st.integers(), max_size=2)
)


def one_line_or_valid(make: object, *args: object) -> Config | None:
    try:
        config = make(*args)  # type: ignore[operator]
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


@settings(max_examples=400, deadline=None, derandomize=True)
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
@given(st.dictionaries(st.sampled_from(sorted(to_dict(Config()))), VALUES, max_size=2))
def test_sections_must_be_tables(values: dict[str, object]) -> None:
    one_line_or_valid(from_dict, values)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip_and_divide(name: str) -> None:
    config = preset(name)
    assert from_toml(to_toml(config)) == config
    assert config.accumulation() * config.train.micro_batch * config.model.n_ctx == config.train.batch_tokens


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[model]\nn_layre = 3", "did you mean model.n_layer?"),
        ("[modle]\n", "did you mean model?"),
        ("model = 3", "must be a table"),
        ("[train]\nsteps = true", "train.steps = True must be a whole number"),
        ("[train]\nsteps = 1.5", "must be a whole number"),
        ("[optim]\nlr = 'fast'", "must be a finite number"),
        ("[optim]\nlr = nan", "must be a finite number"),
        ("[optim]\nlr = inf", "must be a finite number"),
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


def test_unknown_presets_name_the_closest() -> None:
    with pytest.raises(RequestError, match=r"did you mean gpt2-124m\?"):
        preset("gpt2-124M")


def test_accumulation_names_the_nearest_micro_batches() -> None:
    config = from_dict({"model": {"n_ctx": 8}, "train": {"batch_tokens": 96, "micro_batch": 5}})
    with pytest.raises(RequestError, match="use 4 or 6"):
        config.accumulation()
    with pytest.raises(RequestError, match="cannot be shared by 5 processes"):
        config.accumulation(5)


def test_files_that_are_not_there_or_not_utf8(tmp_path) -> None:  # type: ignore[no-untyped-def]
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
    import inspect

    for section in dataclasses.fields(Config):
        kind = type(getattr(Config(), section.name))
        source = inspect.getsource(kind)
        for field in dataclasses.fields(kind):
            after = source.split(f"    {field.name}:", 1)[1].split("\n", 1)[1].lstrip()
            assert after.startswith('"""'), f"{section.name}.{field.name}"

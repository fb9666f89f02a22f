"""Our adapter for lm-evaluation-harness: against plain formulas, and against the harness's own for transformers."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gpt2.checkpoint.directory import list_checkpoints
from gpt2.cli import main
from gpt2.config import Config
from gpt2.errors import RequestError
from gpt2.inference.engine import Engine, load
from gpt2.training.loop import train
from gpt2.training.run import start_run

CHOICES = (
    ("the people of", ["these states", "the sea", "labor and peace here"], 1),
    ("congress will", ["hear", "what the year has brought", "go", "meet"], 0),
    ("what the year", ["has brought to them in peace and in labor on land", "is"], 0),
    ("on land and at", ["sea", "sea", "the sea"], 0),
)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from gpt2.config import from_dict, preset

    config: Config = from_dict(
        {"model": {"n_ctx": 64}, "train": {"data": str(data), "steps": 8, "micro_batch": 1}}, preset("tiny")
    )
    path = tmp_path_factory.mktemp("harness") / "run"
    train(start_run(config, path), quiet=True)
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks whose data lie beside them: multiple choice, perplexity, generation."""
    directory = tmp_path_factory.mktemp("tasks")
    lines = [json.dumps({"question": q, "choices": c, "label": i, "answer": c[i]}) for q, c, i in CHOICES]
    (directory / "items.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    head = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {directory / 'items.jsonl'}\ntest_split: test\n"
    )
    kinds = {
        "small_choice": 'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\n'
        "doc_to_target: label\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n",
        "small_text": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\n'
        "doc_to_target: \"{{question}} {{choices | join(' ')}}\"\n"
        "metric_list:\n  - metric: word_perplexity\n  - metric: bits_per_byte\n",
        "small_generation": 'output_type: generate_until\ndoc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
        'generation_kwargs:\n  until: ["e "]\n  max_gen_toks: 12\nmetric_list:\n  - metric: exact_match\n',
    }
    for name, rest in kinds.items():
        (directory / f"{name}.yaml").write_text(f"task: {name}\n{head}{rest}", encoding="utf-8")
    return directory


def adapter(run: Path | Engine) -> Any:
    pytest.importorskip("lm_eval")
    from gpt2.evaluation.harness import harness_model

    return harness_model()(run, precision="fp32")


def instances(*arguments: tuple[Any, ...]) -> list[Any]:
    from types import SimpleNamespace

    return [SimpleNamespace(args=a) for a in arguments]


def test_without_the_package_one_line_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from gpt2.evaluation.harness import harness_model

    harness_model.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    assert main(["eval", str(tmp_path), "--task", "lm:piqa"]) == 2
    said = capsys.readouterr().err
    assert "pip install 'build-gpt2[lm-eval]'" in said
    assert said.count("\n") == 1


def test_log_likelihoods_equal_the_plain_formula(run: Path) -> None:
    model = adapter(run)
    engine = load(run)
    pairs = [(q, f" {c}") for q, choices, _ in CHOICES for c in choices]
    pairs += [
        ("", "an empty context"),
        ("a context that is far longer than the sixty-four bytes that the model sees", " end"),
        ("a ", "space"),
    ]
    answers = model.loglikelihood(instances(*pairs))
    for (context, continuation), (value, greedy) in zip(pairs, answers, strict=True):
        if context.endswith(" "):  # the harness moves the space to the continuation
            context, continuation = context[:-1], " " + continuation
        ids = engine.tokenizer.encode(context) or [engine.tokenizer.eot]
        ending = engine.tokenizer.encode(continuation)
        row = torch.tensor([[*ids, *ending][-65:]])
        logits = engine.model(row[:, :-1])[0][0, -len(ending) :]
        target = torch.tensor(ending)
        assert value == pytest.approx(-F.cross_entropy(logits, target, reduction="sum").item(), abs=1e-4)
        assert greedy == bool((logits.argmax(-1) == target).all())


def test_rolling_predicts_each_token_once_behind_end_of_text(run: Path) -> None:
    model, engine = adapter(run), load(run)
    texts = [
        "short",
        "longer than two whole windows, and then some: " * 4,
        "",
    ]
    for text, value in zip(texts, model.loglikelihood_rolling(instances(*((t,) for t in texts))), strict=True):
        ids = [engine.tokenizer.eot, *engine.tokenizer.encode(text)]
        expected = 0.0
        for start in range(0, len(ids) - 1, 64):
            stop = min(start + 64, len(ids) - 1)
            first = max(0, stop - 64)  # the last window has a whole context too
            logits = engine.model(torch.tensor([ids[first:stop]]))[0][0, start - first :]
            expected -= F.cross_entropy(logits, torch.tensor(ids[start + 1 : stop + 1]), reduction="sum").item()
        assert value == pytest.approx(expected, abs=1e-4)


def test_generation_is_the_engines(run: Path) -> None:
    model, engine = adapter(run), load(run)
    plain = engine.generate("the people", max_tokens=10, temperature=0)
    stop = plain[4:6]
    found = model.generate_until(
        instances(
            ("the people", {"max_gen_toks": 10, "until": []}),
            ("the people", {"max_gen_toks": 10, "until": [stop]}),
            ("the people", {"max_gen_toks": 10, "do_sample": False, "temperature": 2.0}),
            ("x" * 100 + "the people", {"max_gen_toks": 54}),
            ("the people", {}),  # 256 tokens, far beyond the context
        )
    )
    assert found[0] == found[2] == plain
    assert found[1] == plain[: plain.index(stop)]
    assert found[3].startswith(plain)
    assert found[4].startswith(plain)


def test_refuses_a_continuation_that_does_not_fit(run: Path) -> None:
    with pytest.raises(RequestError, match="continuation of 65 tokens"):
        adapter(run).loglikelihood(instances(("a", "b" * 65)))


@pytest.mark.interop
def test_the_command_runs_tasks_from_the_disk(run: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    argv = ["eval", str(run), "--task", "lm:small_choice,small_generation", "--task-path", str(tasks), "--json"]
    assert main(argv) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["task"] == "lm:small_choice,small_generation"
    assert result["items"] == 8
    assert {"acc", "acc_norm"} <= result["results"]["small_choice"].keys()
    assert "exact_match" in result["results"]["small_generation"]
    assert main(["eval", str(run), "--task", "lm:small_choise", "--task-path", str(tasks)]) == 2
    assert "did you mean small_choice?" in capsys.readouterr().err


@pytest.mark.interop
def test_equals_the_harnesses_own_model_of_transformers(run: Path, tasks: Path) -> None:
    """Same checkpoint, same tasks: scores to 1e-4, each item's log-likelihoods to 1e-3."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    theirs = HFLM(pretrained=str(list_checkpoints(run)[-1]), device="cpu", dtype="float32", batch_size=2)
    results = [
        lm_eval.simple_evaluate(
            model=model,
            tasks=["small_choice", "small_text", "small_generation"],
            task_manager=TaskManager(include_path=str(tasks)),
            bootstrap_iters=0,
        )
        for model in (adapter(run), theirs)
    ]
    ours, expected = (r["results"] for r in results)
    for task, metrics in expected.items():
        for name, value in metrics.items():
            if isinstance(value, float) and "stderr" not in name:
                assert ours[task][name] == pytest.approx(value, rel=1e-4, abs=1e-4), (task, name)
    for task, items in results[1]["samples"].items():
        for one, other in zip(results[0]["samples"][task], items, strict=True):
            for a, b in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
                if isinstance(b, str):
                    assert a == b
                elif isinstance(b, float):
                    assert a == pytest.approx(b, abs=1e-3)
                else:
                    assert float(a[0]) == pytest.approx(float(b[0]), abs=1e-3)
                    assert a[1] == b[1]

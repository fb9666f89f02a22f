"""The model card, and push with a hub that is only pretended."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from gpt2 import hf
from gpt2.checkpoint.directory import list_checkpoints
from gpt2.cli import main
from gpt2.config import Config, from_dict
from gpt2.files import sha256_file
from gpt2.report.card import spaced
from gpt2.training.loop import train
from gpt2.training.run import start_run


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps with two checkpoints."""
    from gpt2.config import preset

    config: Config = from_dict(
        {"train": {"data": str(data)}, "checkpoint": {"every": 10}, "log": {"every": 5}}, preset("tiny")
    )
    path = tmp_path_factory.mktemp("card") / "run"
    train(start_run(config, path), quiet=True)
    with open(path / "metrics.jsonl", "a", encoding="utf-8") as file:
        event = {"event": "hellaswag", "step": 20, "time": 0, "acc": 0.25, "acc_norm": 0.2612, "items": 100}
        file.write(json.dumps(event) + "\n")
    return path


class Hub:
    """Notes what it is asked; `failure` is raised where files are sent."""

    failure: Exception | None = None

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> Any:
        self.asked.append(("create", (repo_id, private, exist_ok)))

        class Url(str):
            repo_id = "me/small"

        return Url("https://huggingface.co/me/small")

    def create_commit(self, repo_id: str, operations: list[Any], commit_message: str) -> None:
        if self.failure is not None:
            raise self.failure
        contents = {
            o.path_in_repo: o.path_or_fileobj
            if isinstance(o.path_or_fileobj, bytes)
            else Path(o.path_or_fileobj).read_bytes()
            for o in operations
        }
        self.asked.append(("commit", (repo_id, contents, commit_message)))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    pretended = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pretended)
    return pretended


def test_the_card_says_what_the_run_was(run: Path, data: Path, tmp_path: Path, hub: Hub) -> None:
    assert main(["push", str(run), "me/small", "--dry-run", str(tmp_path / "dry"), "--license", "mit"]) == 0
    assert hub.asked == []
    text = (tmp_path / "dry" / "README.md").read_text(encoding="utf-8")
    head, body = text.removeprefix("---\n").split("\n---\n", 1)
    facts = yaml.safe_load(head)
    assert facts["library_name"] == "transformers"
    assert facts["license"] == "mit"
    assert {m["type"]: m["value"] for m in facts["model-index"][0]["results"][0]["metrics"]} == {
        "acc": 0.25,
        "acc_norm": 0.2612,
    }
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for event in events:
        if event["event"] == "val":
            row = f"| {event['step']} | {event['loss']:.4f} | {event['bits_per_byte']:.4f} |"
            assert row in body
    splits = json.loads((data / "dataset.json").read_text())["splits"]
    assert f"| train | {splits['train']['documents']} | {splits['train']['bytes']:,} |" in body
    assert "tokenizer `bytes`" in body
    assert "| 0.2500 | 0.2612 | 100 |" in body
    assert "n_embd = 32" in body
    assert "(loss.png)" in body
    assert str(data.parent) not in text  # no path of this machine
    assert str(run.parent) not in text
    assert not re.search(r"\bNone\b|\bnan\b", text)


def test_the_list_of_files_is_what_would_be_sent(run: Path, tmp_path: Path, hub: Hub) -> None:
    assert main(["push", str(run), "me/small", "--dry-run", str(tmp_path / "dry")]) == 0
    listed = {entry["path"]: entry for entry in json.loads((tmp_path / "dry" / "files.json").read_text())}
    assert sorted(path.name for path in (tmp_path / "dry").iterdir()) == ["README.md", "files.json", "loss.png"]
    step = list_checkpoints(run)[-1]
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert listed.keys() == names | {"vocab.json", "merges.txt", "README.md", "loss.png"}
    for name in names:
        assert listed[name]["sha256"] == sha256_file(step / name)
        assert listed[name]["bytes"] == (step / name).stat().st_size
    assert listed["README.md"]["sha256"] == sha256_file(tmp_path / "dry" / "README.md")


def test_push_sends_all_in_one_commit(run: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(run), "small", "--private", "--message", "First", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["url"] == "https://huggingface.co/me/small"
    (_, created), (_, (repo, contents, message)) = hub.asked
    assert created == ("small", True, True)
    assert (repo, message) == ("me/small", "First")
    for name, content in contents.items():  # what arrives opens as it is
        (tmp_path / name).write_bytes(content)
    config, _ = hf.read_pretrained(tmp_path)
    assert config.n_embd == 32
    assert contents.keys() == {entry["path"] for entry in result["files"]}


def test_an_older_checkpoint_has_the_card_of_its_step(run: Path, tmp_path: Path, hub: Hub) -> None:
    first = list_checkpoints(run)[0]
    assert main(["push", str(first), "small", "--dry-run", str(tmp_path / "dry")]) == 0
    text = (tmp_path / "dry" / "README.md").read_text(encoding="utf-8")
    assert "| steps | 10 |" in text
    assert "| 20 |" not in text
    assert "HellaSwag" not in text


def test_a_directory_without_a_run_has_a_card_too(run: Path, tmp_path: Path, hub: Hub) -> None:
    import shutil

    shutil.copytree(list_checkpoints(run)[-1], tmp_path / "m", ignore=shutil.ignore_patterns("training", "checksums*"))
    (tmp_path / "m" / "pytorch_model.bin").write_text("pickle")
    assert main(["push", str(tmp_path / "m"), "small", "--dry-run", str(tmp_path / "dry")]) == 0
    text = (tmp_path / "dry" / "README.md").read_text(encoding="utf-8")
    assert "## Training" not in text
    assert "| 2 | 2 | 32 | 32 | 257 |" in text
    assert "pytorch_model.bin" not in (tmp_path / "dry" / "files.json").read_text()


def test_data_that_is_gone_leaves_its_hash(run: Path, tmp_path: Path, hub: Hub) -> None:
    import shutil

    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "config.toml"
    text = path.read_text()
    path.write_text(re.sub(r'^data = ".*"$', 'data = "/nowhere/at/all"', text, flags=re.MULTILINE))
    assert main(["push", str(tmp_path / "run"), "small", "--dry-run", str(tmp_path / "dry")]) == 0
    card = (tmp_path / "dry" / "README.md").read_text(encoding="utf-8")
    assert re.search(r"Data: `all`, SHA-256 `[0-9a-f]{64}`", card)
    assert "/nowhere" not in card


def answer(status: int) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError("refused\nin many lines", response=response)


@pytest.mark.parametrize(
    ("failure", "code", "said"),
    [
        (lambda: answer(401), 2, "hf auth login"),
        (lambda: answer(403), 2, "hf auth login"),
        (lambda: LocalTokenNotFoundError("no token"), 2, "hf auth login"),
        (lambda: answer(500), 1, "give the same command again"),
        (lambda: ConnectionError("no network"), 1, "ConnectionError: no network"),
    ],
)
def test_a_hub_that_refuses_is_one_line(
    run: Path, hub: Hub, capsys: pytest.CaptureFixture[str], failure: Callable[[], Exception], code: int, said: str
) -> None:
    hub.failure = failure()
    assert main(["push", str(run), "small"]) == code
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_wrong_requests_send_nothing(run: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    cases = [
        ([str(run), "a/b/c"], "no name of a repository"),
        ([str(run), "-bad-"], "no name of a repository"),
        (["someone/else", "small"], "there is no directory"),
        ([str(tmp_path), "small"], "no config.json"),
        ([str(run), "small", "--dry-run", str(tmp_path / "there")], "exists already"),
    ]
    for argv, said in cases:
        assert main(["push", *argv]) == 2, argv
        err = capsys.readouterr().err
        assert said in err, argv
        assert err.count("\n") == 1
    assert hub.asked == []


def test_a_long_curve_is_thinned_evenly_with_both_ends() -> None:
    events = [{"step": i} for i in range(100)]
    kept = [event["step"] for event in spaced(events, 12)]
    assert len(kept) == 12
    assert (kept[0], kept[-1]) == (0, 99)
    assert kept == sorted(set(kept))
    assert spaced(events[:5], 12) == events[:5]


def test_hub_names_stay_and_paths_are_cut(tmp_path: Path) -> None:
    from gpt2.report.card import _shown

    assert _shown("openai-community/gpt2") == "openai-community/gpt2"
    assert _shown("hf:HuggingFaceFW/fineweb-edu:sample-10BT") == "hf:HuggingFaceFW/fineweb-edu:sample-10BT"
    assert _shown("sotu") == "sotu"
    assert _shown("") == ""
    assert _shown(str(tmp_path / "mine")) == "mine"
    assert _shown("~/secret/mine") == "mine"
    assert _shown("../secret/mine") == "mine"
    assert _shown(f"hf:{tmp_path}") == tmp_path.name

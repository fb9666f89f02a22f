"""The command line as a user meets it: verbs, wrong requests in one line, JSON last, lazy imports."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2.cli import VERBS, main
from gpt2.commands.bench import BENCHES


def run(*argv: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    try:
        code = main(argv)
    except SystemExit as stopped:  # --help
        code = int(stopped.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_help_names_every_verb_and_loads_nothing_heavy() -> None:
    code = "import sys; from gpt2.cli import main; main(['--help']); print([m for m in sys.modules if m in {heavy}])"
    heavy = {"torch", "numpy", "tyro", "rich", "tiktoken", "matplotlib", "gpt2.config"}
    done = subprocess.run([sys.executable, "-c", code.format(heavy=heavy)], capture_output=True, text=True, check=True)
    for verb in VERBS:
        assert f"\n  {verb} " in done.stdout
    assert done.stdout.strip().endswith("[]")


@pytest.mark.parametrize("verb", [*VERBS, *(f"bench {what}" for what in BENCHES)])
def test_each_verb_has_help_with_defaults(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(*verb.split(), "--help", capsys=capsys)
    assert code == 0
    assert "default:" in out
    assert "--json" in out


def test_train_help_shows_the_presets_values(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("train", "--preset", "tiny", "--help", capsys=capsys)
    assert code == 0
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", out).split())
    assert "--model.n-embd INT Width of the residual stream. (default: 32)" in text
    assert "--optim.lr FLOAT Peak learning rate of AdamW. (default: 0.01)" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from gpt2 import __version__

    assert run("--version", capsys=capsys) == (0, f"gpt2 {__version__}\n", "")


def wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path, *argv: str) -> str:
    """Runs a wrong request; gives its one line. Nothing may have been written."""
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(*argv, capsys=capsys)
    assert code == 2, (code, out, err)
    assert err.count("\n") == 1, err
    assert err.startswith("gpt2: ")
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before
    return err


def test_wrong_requests_are_one_line_and_write_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: Path
) -> None:
    out, here = str(tmp_path / "out"), str(tmp_path)
    base = ("train", "--data", str(data), "--out", out)
    (tmp_path / "bad.toml").write_text("[optim]\nlearning_rate = 1\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 and more")
    (tmp_path / "empty.txt").write_text("")
    cases: list[tuple[tuple[str, ...], str]] = [
        (("tarin",), "did you mean train?"),
        (("train", "--out", out), "--data is missing"),
        (("train", "--data", str(data)), "--out is missing"),
        (("train", "--data", here, "--out", out), "holds no dataset.json"),
        ((*base, "--preset", "gpt2-125m"), "did you mean gpt2-124m?"),
        ((*base, "--optim.lrr", "1"), "--optim.lr"),
        ((*base, "--optim.lr", "fast"), "--optim.lr"),
        ((*base, "--optim.lr", "-1"), "optim.lr = -1.0 must be above 0"),
        ((*base, "--model.n-head", "5"), "a divisor of model.n_embd"),
        ((*base, "--train.batch-tokens", "1000"), "use "),
        ((*base, "--train.micro-batch", "3"), "use 2 or 4"),
        ((*base, "--train.device", "cuda:77"), "is not here"),
        ((*base, "--config", str(tmp_path / "bad.toml")), "there is no field optim.learning_rate"),
        ((*base, "--config", str(tmp_path / "none.toml")), "cannot read"),
        ((*base, "--resume", out), "--out and --resume"),
        (("train", "--resume", here), "is no run"),
        (("train", "--resume", "x" * 5000), "is no run"),
        (("train", "--data", "x" * 5000, "--out", out), "cannot read"),
        (("prepare", "", "--out", out), "SOURCE is empty"),
        ((*base, "--init-from", str(tmp_path / "empty")), "no config.json"),
        (("prepare", str(tmp_path / "nothing"), "--out", out), "there is no file or directory"),
        (("prepare", str(tmp_path / "empty"), "--out", out), "holds no .txt"),
        (("prepare", str(tmp_path / "empty.txt"), "--out", out), "no text"),
        (("prepare", str(tmp_path / "latin.txt"), "--out", out, "--tokenizer", "bytes"), "not UTF-8 at byte 3"),
        (("prepare", "sotu", "--out", out, "--tokenizer", "gpt3"), "there is no tokenizer"),
        (("prepare", "sotu", "--out", out, "--tokenizer", "bpe:70000"), "65536"),
        (("prepare", "sotu", "--out", out, "--val-fraction", "0.7"), "must be in [0, 0.5]"),
        (("prepare", "sotu", "--out", here), "exists already"),
        (("sample", str(tmp_path / "empty")), "no config.json"),
        (("sample", "./nowhere"), "there is no directory"),
        (("eval", str(tmp_path / "empty"), "--data", str(data)), "no config.json"),
        (("eval", str(tmp_path / "empty"), "--data", str(data), "--task", "chess"), "there is no task"),
        (("eval", here), "--data is missing"),
        (("eval", here, "--task", "hellaswag", "--items", "-1"), "--items must be at least 0"),
        (("eval", here, "--task", "hellaswag", "--precision", "fp8"), "fp8 must be one of"),
        (("eval", here, "--task", "lm:"), "there is no task"),
        (("demo", "--minutes", "0", "--out", out), "must be above 0"),
        (("doctor", "--jsn"), "--json"),
        (("ladder", "--only", "flush"), "known are fp32"),
        (("ladder", "--batch", "-1"), "--batch -1 must be"),
        (("ladder", "--preset", "gpt2-125m", "--data", str(data)), "did you mean gpt2-124m?"),
        (("ladder", "--data", here), "holds no dataset.json"),
        (("ladder", "--out", str(tmp_path / "latin.txt" / "out")), "is a file"),
        (("bench",), "gpt2 bench train"),
        (("bench", "trian"), "did you mean train?"),
        (("bench", "train", "--against", "nanogtp"), "known are nanogpt"),
        (("bench", "train", "--against", "nanogpt"), "--against nanogpt=PATH"),
    ]
    for argv, expected in cases:
        assert expected in wrong(capsys, tmp_path, *argv), argv


def test_a_vocabulary_may_not_be_set_against_the_data(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: Path
) -> None:
    """The data's tokenizer decides: the run's config shows it."""
    argv = ("train", "--data", str(data), "--out", str(tmp_path / "run"), "--preset", "tiny", "--train.steps", "1")
    assert run(*argv, capsys=capsys)[0] == 0
    assert "vocab_size = 257" in (tmp_path / "run" / "config.toml").read_text()


def test_prepare_train_eval_and_sample_say_json_last(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text_directory: Path
) -> None:
    data, out = str(tmp_path / "data"), str(tmp_path / "run")

    def as_json(*argv: str) -> dict[str, object]:
        code, said, _ = run(*argv, "--json", capsys=capsys)
        assert code == 0
        result = json.loads(said.splitlines()[-1])
        assert isinstance(result, dict)
        return result

    prepared = as_json("prepare", str(text_directory), "--out", data, "--tokenizer", "bpe:300")
    assert prepared["documents"] == 40
    assert prepared["bytes"] == sum(p.stat().st_size for p in text_directory.glob("*.txt"))
    trained = as_json("train", "--data", data, "--out", out, "--preset", "tiny", "--train.steps", "3")
    assert trained["steps"] == 3
    assert {"train_loss", "val_loss", "bits_per_byte", "tokens_per_second", "train_seconds"} <= trained.keys()
    resumed = as_json("train", "--resume", out)
    assert resumed == trained
    evaluated = as_json("eval", out, "--data", data)
    assert evaluated["task"] == "loss"
    assert {"loss", "perplexity", "bits_per_byte"} <= evaluated.keys()
    strided = as_json("eval", out, "--data", data, "--stride", "8")
    assert strided["tokens"] == evaluated["tokens"]
    assert strided["loss"] != evaluated["loss"]
    item = {"ctx": "the people", "endings": ["will meet", "are", "have a sea", "go on land"], "label": 2}
    (tmp_path / "items.jsonl").write_text(f"{json.dumps(item)}\n" * 3, encoding="utf-8")
    scored = as_json("eval", out, "--task", "hellaswag", "--file", str(tmp_path / "items.jsonl"), "--items", "2")
    assert (scored["task"], scored["items"]) == ("hellaswag", 2)
    assert {"acc", "acc_norm", "contexts_cut"} <= scored.keys()
    sampled = as_json("sample", out, "--prompt", "the people", "-n", "2", "--max-tokens", "5", "--seed", "1")
    assert isinstance(sampled["completions"], list)
    assert len(sampled["completions"]) == 2
    single = as_json("sample", out, "--prompt", "the people", "--max-tokens", "5", "--seed", "1")
    assert single["completions"] == sampled["completions"][:1]


def test_eval_refuses_data_of_another_tokenizer(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: Path, text_directory: Path
) -> None:
    out, other = str(tmp_path / "run"), str(tmp_path / "other")
    argv = ("train", "--data", str(data), "--out", out, "--preset", "tiny", "--train.steps", "1")
    assert run(*argv, capsys=capsys)[0] == 0
    assert run("prepare", str(text_directory), "--out", other, "--tokenizer", "bpe:300", capsys=capsys)[0] == 0
    code, _, err = run("eval", out, "--data", other, capsys=capsys)
    assert code == 2
    assert "tokenizer (bpe:300) differs from the model's (bytes)" in err


def test_an_altered_checkpoint_is_a_failure_not_a_traceback(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: Path
) -> None:
    out = tmp_path / "run"
    argv = ("train", "--data", str(data), "--out", str(out), "--preset", "tiny", "--train.steps", "1")
    assert run(*argv, capsys=capsys)[0] == 0
    file = next(out.rglob("model.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    code, _, err = run("sample", str(out), capsys=capsys)
    assert code == 1
    assert "model.safetensors is altered" in err
    assert err.count("\n") == 1


def test_a_run_that_goes_on_from_an_older_checkpoint_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: Path
) -> None:
    out = tmp_path / "run"
    argv = ("train", "--data", str(data), "--out", str(out), "--preset", "tiny", "--train.steps", "2")
    assert run(*argv, "--checkpoint.every", "1", capsys=capsys)[0] == 0
    (out / "checkpoints" / "step_000002" / "vocab.json").write_text("{}")
    code, _, err = run("train", "--resume", str(out), capsys=capsys)
    assert code == 0
    assert "warning: " + str(out / "checkpoints" / "step_000002" / "vocab.json") + " is altered" in err
    assert "warning: the run goes on from step_000001\n" in err


def test_weights_that_are_no_numbers_have_no_loss(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: Path
) -> None:
    from safetensors.torch import load_file, save_file

    argv = ("train", "--data", str(data), "--out", str(tmp_path / "run"), "--preset", "tiny", "--train.steps", "1")
    assert run(*argv, capsys=capsys)[0] == 0
    model = next((tmp_path / "run" / "checkpoints").iterdir())
    tensors = load_file(model / "model.safetensors")
    tensors["transformer.ln_f.weight"][0] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    code, out, err = run("eval", str(model), "--data", str(data), "--json", capsys=capsys)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "is nan: its weights are spoilt" in err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    ],
)
def test_out_of_memory_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(argv: list[str]) -> int:
        raise error

    monkeypatch.setattr("gpt2.cli._run", fail)
    code, _, err = run("eval", capsys=capsys)
    assert (code, err.count("\n")) == (1, 1)
    assert "the memory does not suffice: take less at once (--batch" in err


def test_another_runtime_error_is_a_bug_and_shows_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(argv: list[str]) -> int:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("gpt2.cli._run", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        main(["eval"])


@pytest.mark.parametrize("prompt", ["é 世", b"\xff"])
def test_a_terminal_without_the_characters_is_no_failure(tmp_path: Path, data: Path, prompt: str | bytes) -> None:
    out = str(tmp_path / "run")
    assert main(("train", "--data", str(data), "--out", out, "--preset", "tiny", "--train.steps", "1")) == 0
    environment = {**os.environ, "PYTHONIOENCODING": "ascii" if isinstance(prompt, str) else "utf-8"}
    command = [sys.executable, "-m", "gpt2", "sample", out, "--max-tokens", "2", "--json", "--prompt", prompt]
    done = subprocess.run(command, capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"?" in done.stdout.splitlines()[0]


def test_a_folder_that_is_closed_to_us_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Path
) -> None:
    """As the system tells it to a user who is not root."""

    def closed(path: Path, *args: object, **named: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", closed)
    monkeypatch.setattr(Path, "read_bytes", closed)
    argv = ("train", "--data", str(data), "--out", str(tmp_path / "run"), "--preset", "tiny")
    code, _, err = run(*argv, capsys=capsys)
    assert (code, err) == (2, f"gpt2: cannot read {data / 'dataset.json'}: Permission denied\n")


def test_debug_shows_the_traceback() -> None:
    environment = {**os.environ, "GPT2_DEBUG": "1"}
    command = [sys.executable, "-m", "gpt2", "prepare", "./nowhere", "--out", "./neither"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_no_permission_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, data: Path) -> None:
    """A file where a directory is needed: refused for root as well, whom permissions do not stop."""
    (tmp_path / "file").write_text("")
    argv = ("train", "--data", str(data), "--out", str(tmp_path / "file" / "run"), "--preset", "tiny")
    assert "cannot write in" in wrong(capsys, tmp_path, *argv)


def test_directories_that_are_no_gpt2_are_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: Path
) -> None:
    """Every verb that takes a MODEL says the same of each; nothing is written."""
    import torch
    from safetensors.torch import load_file, save_file

    from gpt2 import hf
    from gpt2.config import GPTConfig
    from gpt2.model import GPT
    from gpt2.tokenizer import Tokenizer

    config = GPTConfig(vocab_size=257, n_ctx=16, n_layer=1, n_head=2, n_embd=16)
    good = tmp_path / "good"
    good.mkdir()
    (good / "config.json").write_text(json.dumps(hf.config_to_hf(config, 256)))
    save_file(hf.to_hf(GPT(config).state_dict(), config), good / "model.safetensors")
    Tokenizer.from_name("bytes").save(good)
    assert run("sample", str(good), "--max-tokens", "1", capsys=capsys)[0] == 0

    def spoiled(name: str) -> Path:
        return Path(shutil.copytree(good, tmp_path / name))

    tensors = load_file(good / "model.safetensors")
    cases = []
    del tensors["transformer.h.0.ln_1.weight"]
    save_file(tensors, spoiled("missing") / "model.safetensors")
    cases.append(("missing", "h.0.ln_1.weight is missing"))
    tensors["transformer.h.0.ln_1.weight"] = torch.zeros(17)
    save_file(tensors, spoiled("shape") / "model.safetensors")
    cases.append(("shape", "h.0.ln_1.weight has shape (17,)"))
    values = {
        "model_type": "llama",
        "n_inner": 17,
        "activation_function": "relu",
        "scale_attn_weights": False,
        "scale_attn_by_inverse_layer_idx": True,
        "reorder_and_upcast_attn": True,
        "n_layer": 2.5,
        "tie_word_embeddings": "false",
    }
    for field, value in values.items():
        changed = hf.config_to_hf(config, 256) | {field: value}
        (spoiled(field) / "config.json").write_text(json.dumps(changed))
        cases.append((field, f"{field} is {value!r}"))
    pickled = spoiled("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    cases.append(("pickled", "pickle only, which is never opened"))
    content = (good / "model.safetensors").read_bytes()
    for name, damaged in {
        "long header": b"\xff" * 8 + content[8:],
        "no json": content[:8] + b"[" * 20 + content[28:],
        "cut": content[:200],
        "empty": b"",
    }.items():
        (spoiled(name) / "model.safetensors").write_bytes(damaged)
        cases.append((name, "model.safetensors cannot be read"))

    out = str(tmp_path / "out")
    for name, said in cases:
        directory = str(tmp_path / name)
        verbs: list[tuple[str, ...]] = [
            ("sample", directory),
            ("eval", directory, "--data", str(data)),
            ("export", directory, "--out", out),
            ("push", directory, "me/small", "--dry-run", out),
            ("train", "--data", str(data), "--out", out, "--preset", "tiny", "--init-from", directory),
        ]
        for argv in verbs:
            err = wrong(capsys, tmp_path, *argv)
            assert said in err, (name, argv)
            assert directory in err, (name, argv)

"""The recipes: every command line in them parses, the arithmetic in their comments holds, and they do what they say."""

import importlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpt2.commands import plan, train
from gpt2.commands.common import parse
from gpt2.config import Config, preset
from gpt2.model import flops_per_token
from gpt2.report.plan import find_gpu, make_plan

RUNS = Path(__file__).parent.parent / "runs"
RECIPES = sorted(path for path in RUNS.iterdir() if path.suffix in (".sh", ".sbatch", ".yaml"))
SCRIPTS = [path for path in RECIPES if path.suffix != ".yaml"]
TORCHRUN = re.compile(r"\btorchrun (?P<launch>.*?) -m gpt2 (?P<train>train .*)")


def code_of(path: Path) -> str:
    """The shell code: of a YAML recipe its `run`."""
    text = path.read_text(encoding="utf-8")
    return str(yaml.safe_load(text)["run"]) if path.suffix == ".yaml" else text


def commands(path: Path) -> list[str]:
    """The lines of shell code without comments, continued lines joined, variables given their defaults."""
    code = code_of(path)
    defaults = dict(re.findall(r"^(\w+)=\$\{\1:-([^}]*)\}", code, re.M))
    defaults |= {"HEAD": "machine0:29400", "head": "machine0", "SLURM_NNODES": "2", "SLURM_JOB_ID": "1"}
    defaults |= {"SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    if path.suffix == ".yaml":
        defaults |= yaml.safe_load(path.read_text(encoding="utf-8"))["envs"]
    lines = [re.sub(r"(^|\s)#.*", "", line) for line in re.sub(r"\\\n\s*", "", code).splitlines()]
    filled = [re.sub(r"\$\{?(\w+)\}?", lambda match: str(defaults.get(match[1], match[0])), line) for line in lines]
    return [line.strip() for line in filled if line.strip()]


def training_config(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> Config:
    """The config that `gpt2 train` would start with: nothing is read or written."""

    class Parsed(Exception):
        pass

    def stop(config: Config, out: Path) -> Any:
        raise Parsed(config)

    monkeypatch.setattr("gpt2.training.run.start_run", stop)
    with pytest.raises(Parsed) as parsed:
        train.main(argv)
    config = parsed.value.args[0]
    assert isinstance(config, Config)
    return config


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_command_line_parses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = 0
    for line in commands(path):
        launched = TORCHRUN.search(line)
        words = shlex.split(launched["train"] if launched else line, comments=True)
        if launched:
            words = words[: words.index("&")] if "&" in words else words
        elif words[0] == "gpt2":
            words = words[1:]
        else:
            continue
        found += 1
        if words[0] == "train":
            training_config(words[1:], monkeypatch)
        else:
            kind = getattr(importlib.import_module(f"gpt2.commands.{words[0]}"), words[0].capitalize())
            parse(kind, words[1:], words[0])
    assert found


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_torchrun_takes_its_options_and_the_batch_divides(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.run import get_args_parser

    (launched,) = [match for line in commands(path) if (match := TORCHRUN.search(line))]
    options = get_args_parser().parse_args([*shlex.split(launched["launch"]), "-m", "gpt2"])
    assert "SIGUSR1" in options.signals_to_handle
    assert options.shutdown_timeout > 30
    assert options.max_restarts > 0
    argv = shlex.split(launched["train"].removesuffix("&"))[1:]
    config = training_config(argv, monkeypatch)
    gpus = int(options.nproc_per_node) * int(options.nnodes.split(":")[-1])
    stated = re.search(r"# A step\s+(\d+) windows? x (\d+) GPUs x (\d+) micro-steps?", path.read_text("utf-8"))
    assert stated
    micro_batch, stated_gpus, accumulation = map(int, stated.groups())
    assert (micro_batch, stated_gpus) == (config.train.micro_batch, gpus)
    assert micro_batch * gpus * accumulation == config.batch_windows


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_the_arithmetic_in_the_comments(path: Path) -> None:
    """Batch, tokens, FLOPs; and time and cost as `gpt2 plan` gives them today."""
    text = path.read_text(encoding="utf-8")
    name = re.search(r"--preset (\S+)", code_of(path))
    assert name
    config = preset(name[1])
    batch, tokens = config.train.batch_tokens, config.train.batch_tokens * config.train.steps
    windows = f"= {config.batch_windows:,} windows x {config.model.n_ctx:,} tokens = {batch:,} tokens"
    for fact in (
        windows,
        f"{config.train.steps:,} steps x {batch:,} tokens = {tokens / 1e9:.1f} B tokens",
        f"x {flops_per_token(config.model) / 1e6:,.0f} MFLOP",
        f"{tokens * flops_per_token(config.model):.2e}".replace("e+", "e"),
    ):
        assert fact in text, fact
    plans = re.findall(r"^# +gpt2 (plan .*?) +-> ([\d.]+ (?:h|min)), \$([\d.]+)$", text, re.M)
    assert len(plans) >= 2
    for line, duration, dollars in plans:
        args = plan.read_options(line.split()[1:])
        gpu = find_gpu(args.gpu)
        gpu = type(gpu)(**{**gpu.__dict__, "dollars": args.price or gpu.dollars})
        if args.network:
            gpu = type(gpu)(**{**gpu.__dict__, "network": args.network * 1e9 / 8})
        made = make_plan(preset(args.preset), gpu, args.gpus, args.sharding, args.micro_batch, 4, args.recompute)
        assert (plan.hours(made.hours), f"{made.dollars:.2f}") == (duration, dollars), line


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_the_scripts(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(path)], check=True)


def test_slurms_headers() -> None:
    """Before the first command, each once, and the warning early enough for a save."""
    lines = (RUNS / "slurm.sbatch").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("#!")
    headers = [line for line in lines if line.startswith("#SBATCH")]
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(lines.index(header) < first_command for header in headers)
    options: dict[str, str] = {}
    for header in headers:
        match = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", header)
        assert match, header
        assert match[1] not in options
        options[match[1]] = match[2] or ""
    assert options["requeue"] == ""
    assert options["ntasks-per-node"] == "1"
    warning = re.fullmatch(r"B:USR1@(\d+)", options["signal"])
    assert warning
    timeout = re.search(r"--shutdown-timeout (\d+)", "\n".join(lines))
    assert timeout
    assert int(warning[1]) > int(timeout[1])


def test_the_sky_yaml() -> None:
    recipe = yaml.safe_load((RUNS / "sky.yaml").read_text(encoding="utf-8"))
    known = {"name", "resources", "envs", "workdir", "file_mounts", "setup", "run"}
    assert set(recipe) == known
    assert recipe["resources"]["use_spot"] is True
    assert set(recipe["resources"]["accelerators"].values()) == {8}
    assert {mount["mode"] for mount in recipe["file_mounts"].values()} == {"MOUNT_CACHED"}
    for script in (recipe["setup"], recipe["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A PATH on which gpt2, torchrun, srun and scontrol only write down how they were called."""
    directory = tmp_path / "bin"
    directory.mkdir()
    note = f'echo "$(basename "$0") $*" >> {tmp_path}/called\n'
    for name in ("gpt2", "torchrun", "scontrol"):
        body = "[ $1 != show ] || echo machine0\n" if name == "scontrol" else ""
        (directory / name).write_text(f"#!/bin/bash\n{note}{body}")
    # As torchrun under srun: saves on SIGUSR1, then ends with 1; ends by itself with the code that CODE names.
    (directory / "srun").write_text(
        f"#!/bin/bash\n{note}trap 'sleep 0.2; echo saved >> {tmp_path}/called; exit 1' USR1\n"
        "for _ in $(seq ${TICKS:-600}); do sleep 0.05; done\nexit ${CODE:-0}\n"
    )
    for file in directory.iterdir():
        file.chmod(0o755)
    return directory


def start(recipe: str, programs: Path, **variables: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", **variables}
    return subprocess.Popen(
        ["bash", str(RUNS / recipe)], cwd=programs.parent, env=environment, stdout=subprocess.PIPE, text=True
    )


def called(programs: Path) -> list[str]:
    path = programs.parent / "called"
    return path.read_text().splitlines() if path.exists() else []


def test_the_single_machine_prepares_once_trains_and_evaluates(programs: Path) -> None:
    for prepared in (False, True):
        if prepared:
            (programs.parent / "data" / "edu").mkdir(parents=True)
            (programs.parent / "data" / "edu" / "dataset.json").write_text("{}")
            (programs.parent / "called").unlink()
        process = start("gpt2_124m.sh", programs, GPUS="4")
        process.communicate(timeout=30)
        assert process.returncode == 0
        programs_called = [line.split()[0] + " " + line.split()[1] for line in called(programs)]
        expected = ["torchrun --standalone", "gpt2 eval", "gpt2 sample"]
        assert programs_called == ([] if prepared else ["gpt2 prepare"]) + expected
        assert "--nproc-per-node 4" in "\n".join(called(programs))


def test_several_machines_want_their_head_and_data(programs: Path) -> None:
    process = start("multi_node.sh", programs)
    process.communicate(timeout=30)
    assert process.returncode != 0
    process = start("multi_node.sh", programs, HEAD="machine0:29400")
    process.communicate(timeout=30)
    assert process.returncode == 2  # no data
    assert called(programs) == []


@pytest.mark.parametrize("code", [0, 1])
def test_slurm_without_a_warning_ends_as_training_does(code: int, programs: Path) -> None:
    variables = {"SLURM_JOB_NODELIST": "m[0-1]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "TICKS": "1"}
    process = start("slurm.sbatch", programs, CODE=str(code), **variables)
    process.communicate(timeout=30)
    assert process.returncode == code
    assert "scontrol requeue 7" not in called(programs)


def test_slurm_warned_saves_and_requeues(programs: Path) -> None:
    variables = {"SLURM_JOB_NODELIST": "m[0-1]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    process = start("slurm.sbatch", programs, **variables)
    until = time.monotonic() + 20
    while not any(line.startswith("srun") for line in called(programs)) and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.2)  # the script has set its trap
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert called(programs)[-2:] == ["saved", "scontrol requeue 7"]

"""docs/optimisations/: links, names, config fields and arithmetic are those of the code."""

import importlib.util
import json
import math
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from gpt2.config import PRESETS, GPTConfig, OptimConfig, flatten
from gpt2.model import GPT, flops_per_token
from gpt2.training.optim import build_optimizers
from gpt2.training.schedule import learning_rate_factor, progress_by_steps

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs" / "optimisations").glob("*.md"))
NUMBERED = [page for page in PAGES if page.name[0].isdigit()]
RECIPE = PRESETS["gpt2-124m"]
# Drawn by `gpt2 ladder` on the machine that measured.
DRAWN_LATER = {ROOT / "docs" / "ladder.png"}


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def spans(page: Path) -> list[str]:
    """What stands between single backticks, code blocks left out."""
    return [
        span.replace("\n", " ")
        for span in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text(page), flags=re.DOTALL))
    ]


def section(page: Path, title: str) -> str:
    """What stands under a heading."""
    match = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text(page), flags=re.DOTALL | re.MULTILINE)
    assert match, f"{page.name} has no section {title!r}"
    return match[1]


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def benchmark(name: str) -> ModuleType:
    """A script of benchmarks/, which stand beside one another on the path."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def docs() -> ModuleType:
    return benchmark("docs")


def test_there_is_a_page_for_each_of_the_fifteen_and_the_index_names_them_in_order():
    assert [int(page.name[:2]) for page in NUMBERED] == list(range(1, 16))
    listed = re.findall(r"\]\((\d\d-[\w-]+\.md)\)", text(ROOT / "docs" / "optimisations" / "README.md"))
    assert listed == [page.name for page in NUMBERED]


@pytest.mark.parametrize("page", NUMBERED, ids=lambda page: page.name)
def test_every_page_answers_the_same_questions(page):
    for title in ("What it is", "Why it works", "The arithmetic", "Where it stands", "Measured", "Sources"):
        assert section(page, title).strip()
    assert section(page, "What it costs, and when not to use it").strip()
    assert 40 <= len(re.sub(r"<!-- (\w+):.*?<!-- /\1 -->", "", text(page), flags=re.DOTALL).splitlines()) <= 90
    assert re.search(r"<!-- (ladder|measured):", section(page, "Measured"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text(page)):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve()
        assert path.is_file() or path in DRAWN_LATER, f"{page.name}: {target}"
        assert not anchor or anchor in anchors(path), f"{page.name}: {target}"


@pytest.mark.parametrize("page", NUMBERED, ids=lambda page: page.name)
def test_files_and_symbols_exist(page):
    """A line of "Where it stands" names a file, then what is in it."""
    lines = re.findall(r"^- (`[\w/]+\.py`:.*(?:\n  .*)*)", section(page, "Where it stands"), flags=re.MULTILINE)
    assert lines
    for line in lines:
        file, *names = re.findall(r"`([^`]+)`", line)
        source = (ROOT / file).read_text(encoding="utf-8")
        for name in names:
            if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)?", name) and not is_foreign(name):
                assert is_defined(source, name), f"{page.name}: {file} has no {name}"


def is_foreign(name: str) -> bool:
    """Names of torch's and of tensors in a sentence about a symbol of ours."""
    return name in {"clip_grad_norm_", "named_parameters", "wte", "lm_head"} or name.endswith(".json")


def is_defined(source: str, name: str) -> bool:
    """Whether the module defines the function, class or constant, or the class the method."""
    if "." in name:
        owner, member = name.split(".")
        match = re.search(rf"^class {owner}\b.*?(?=^\S|\Z)", source, flags=re.DOTALL | re.MULTILINE)
        return bool(match and re.search(rf"^    (def {member}\b|{member}:)", match[0], flags=re.MULTILINE))
    return bool(re.search(rf"^(def|class) {name}\b|^{name}\b.*=", source, flags=re.MULTILINE))


def test_a_missing_symbol_is_noticed():
    source = "class A:\n    def f(self): ...\n\nX: int = 1\n\ndef g(): ...\n"
    assert all(is_defined(source, name) for name in ("A", "A.f", "X", "g"))
    assert not any(is_defined(source, name) for name in ("B", "A.g", "f", "Y", "B.f"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_config_fields_exist_and_have_the_recipe_s_value(page):
    known = flatten(RECIPE)
    sections = {name.split(".")[0] for name in known}
    for span in spans(page):
        match = re.fullmatch(r"(\w+\.\w+)(?: = (.+))?", span)
        if match and match[1].split(".")[0] in sections and not match[1].endswith(".py"):
            assert match[1] in known, f"{page.name}: there is no field {match[1]}"
    heading = text(page).split("## ")[0]
    for name, value in re.findall(r"`(\w+\.\w+) = ([^`]+)`", heading):
        assert tomllib.loads(f"value = {value}")["value"] == known[name], f"{page.name}: {name}"


UNITS = {"%": 1e-2, "ms": 1, "MB": 1, "GB": 1, "TFLOP": 1}  # but for %, the left side is already in that unit


def equations(page: Path) -> list[str]:
    """Every `left = right` and `left ≈ right` in backticks whose left side is nothing but numbers and operators."""
    return [span for span in spans(page) if re.search("[=≈]", span) and re.match(r"[\d(√]|ln \d", span)]


def value_of(expression: str) -> float:
    """An expression of + − × / ^ √ ln and parentheses, with commas in its numbers."""
    python = expression.replace(",", "").replace("×", "*").replace("−", "-").replace("^", "**").strip()
    python = re.sub(r"√(\d[\d.]*|\()", lambda m: f"sqrt({m[1]})" if m[1] != "(" else "sqrt(", python)
    python = re.sub(r"ln (\d+)", r"log(\1)", python)
    assert re.fullmatch(r"[\d\s.+\-*/()e]*(?:(?:sqrt|log)\([\d\s.+\-*/()e]*)*", python), expression
    return float(eval(python, {"__builtins__": {}}, {"sqrt": math.sqrt, "log": math.log}))


def holds(equation: str) -> bool:
    """`=` means equal to the last bit but rounding of floats, `≈` equal to all digits that are shown."""
    left, sign, right = re.split(r" ([=≈]) ", equation)
    number, _, unit = right.strip().partition(" ") if re.search(r" [A-Z%a-z]+$", right) else (right, "", "")
    found, factor = value_of(left), UNITS[unit] if unit else 1
    expected = value_of(number) * factor
    if sign == "=":
        return math.isclose(found, expected, rel_tol=1e-12)
    digits = number.replace(",", "")
    mantissa, _, exponent = digits.partition("e")
    last_place = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return abs(found - expected) <= 0.5000001 * last_place * factor


def test_the_checker_of_equations_knows_right_from_wrong():
    assert all(map(holds, ["2 × 3 = 6", "2^10 = 1024", "√2 ≈ 1.41", "1 / 3 ≈ 33 %", "2^-11 ≈ 4.88e-4", "ln 2 ≈ 0.69"]))
    assert not any(map(holds, ["2 × 3 = 7", "√2 ≈ 1.42", "1 / 3 ≈ 34 %", "2^-11 ≈ 4.89e-4", "1,000 × 2 = 2,001"]))


@pytest.mark.parametrize("page", NUMBERED, ids=lambda page: page.name)
def test_the_arithmetic_is_right(page):
    found = equations(page)
    assert found
    for equation in found:
        assert holds(equation), f"{page.name}: {equation}"


def test_counts_are_those_of_the_code():
    with torch.device("meta"):
        tied, untied = GPT(GPTConfig()), GPT(GPTConfig(tie_embeddings=False))
    padded = sum(p.numel() for p in tied.parameters())
    in_text = {
        "01-pre-norm.md": [tied.num_parameters(), flops_per_token(GPTConfig())],
        "03-tied-embeddings.md": [tied.num_parameters(), untied.num_parameters(), flops_per_token(GPTConfig())],
        "04-tf32.md": [flops_per_token(GPTConfig())],
        "09-adamw-fused.md": [padded],
        "10-gradient-clipping.md": [padded, tied.num_parameters()],
        "14-data-parallel.md": [padded],
        "15-int8.md": [tied.num_parameters()],
    }
    for name, numbers in in_text.items():
        for number in numbers:
            assert f"{number:,.0f}" in text(ROOT / "docs" / "optimisations" / name), f"{name}: {number:,.0f}"


def test_weight_decay_groups_are_those_of_the_code():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    (optimizer,) = build_optimizers(model, OptimConfig(fused=False))
    page = section(ROOT / "docs" / "optimisations" / "12-weight-decay.md", "The arithmetic")
    for group in optimizer.param_groups:
        tensors, numbers = len(group["params"]), sum(p.numel() for p in group["params"])
        assert re.search(rf"= {tensors}` \| {numbers:,} \|", page)


def test_the_schedule_s_figures_are_those_of_the_code():
    optim, steps = RECIPE.optim, RECIPE.train.steps
    rates = [optim.lr * learning_rate_factor(optim, s, progress_by_steps(optim, s, steps)) for s in range(steps)]
    page = section(ROOT / "docs" / "optimisations" / "11-learning-rate-schedule.md", "The arithmetic")
    assert f"The sum of all rates is {sum(rates):.3f}" in page
    assert f"{rates[0]:.2e}".replace("e-0", "e-") in page
    assert rates[-1] == pytest.approx(6e-5, rel=1e-6)


def test_the_ladder_s_figures_are_carried_into_the_pages(docs):
    report = {
        "machine": {"gpu": "H100"},
        "results": [
            {"name": "fp32", "tokens_per_second": 1000.0, "skipped": None},
            {"name": "TF32 matmuls", "tokens_per_second": 3000.4, "mfu": 0.123, "gain": 3.0, "loss_difference": -1e-4},
            {"name": "fused_loss", "gain": 1.1},
            {"name": "fused AdamW", "skipped": "no GPU"},
        ],
    }
    filled = docs.fill("a\n<!-- ladder:tf32 -->\nold\n<!-- /ladder -->\nb", [report], {}, {})
    assert "| H100 | 3,000 | – | 12.3 % | – | ×3.00 | – | -1.0e-04 | – |" in filled
    assert "old" not in filled
    assert filled.startswith("a\n<!-- ladder:tf32 -->\n")
    assert filled.endswith("\n<!-- /ladder -->\nb")
    assert "not measured: no GPU" in docs.ladder_block("fused", [report])
    assert docs.ladder_block("flash", [report]) == docs.NOT_MEASURED
    assert "| fp32 | 1,000 |" in docs.ladder_block("all", [report])


def test_every_block_is_known_and_filled_from_the_results(docs):
    """The tables of benchmarks/optimisations.py are those of its JSON: else run `python benchmarks/docs.py`."""
    ladders, facts, speed = docs.read_results()
    for page in PAGES:
        blocks = dict(re.findall(r"<!-- (ladder|measured):(\w+) -->", text(page)))
        assert blocks.get("ladder", "all") in {*docs.RUNGS, "all"}
        filled = docs.fill(text(page), ladders, facts, speed)
        assert docs.fill(filled, ladders, facts, speed) == filled
        for name in re.findall(r"<!-- measured:(\w+) -->", text(page)):
            assert f"<!-- measured:{name} -->\n{docs.MEASURED[name](facts, speed)}\n<!-- /measured -->" in text(page)


def test_results_name_machine_and_commit():
    for name in ("optimisations", "optimisations_speed"):
        report = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        assert report["machine"]["cpu"]
        assert re.fullmatch(r"[0-9a-f]{40}", report["commit"])


def test_rounding_to_a_shorter_mantissa_is_bfloat16_s():
    """The pages' emulation against torch's own cast; benchmarks/ is no package, so its function is read from there."""
    source = text(ROOT / "benchmarks" / "optimisations.py")
    (code,) = re.findall(r"^def round_mantissa.*?(?=^def )", source, flags=re.DOTALL | re.MULTILINE)
    scope: dict[str, object] = {"torch": torch, "Tensor": torch.Tensor}
    exec(code, scope)
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 100
    assert torch.equal(scope["round_mantissa"](x, 7), x.bfloat16().float())  # type: ignore[operator]


def test_the_pages_know_what_this_version_has():
    """Pages 14 and 15 say so where the code is not there yet; they change with it."""
    one_process = "training runs in one process" in text(ROOT / "gpt2" / "distributed.py")
    parallel, int8 = (text(page) for page in NUMBERED[13:])
    assert ("Training in this version runs in one process" in parallel) == one_process
    without_int8 = not (ROOT / "gpt2" / "inference" / "quantize.py").exists()
    assert ("is not part of this version" in int8) == without_int8

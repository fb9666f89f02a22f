"""The page: what it holds, that a run's text stays text, that it asks nothing of the network, and a real browser."""

import dataclasses
import html
import json
import math
import re
import stat
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from gpt2.config import Config
from gpt2.errors import RequestError, WorkError
from gpt2.report import page as page_module
from gpt2.report.page import duration, large, write_report
from gpt2.report.verdict import shipped_references
from tests.report.browser import CHROMIUM, look_at, visit
from tests.report.runs import Events, gpt2_config, make_events, write_run

CONFIG = gpt2_config()
IMAGE = "<img src=https://evil.example/x onerror=alert(1)>"
NASTY = f"</script><script>alert('x')</script>{IMAGE} & \u202e\u2028 \ud800 ]]> {{{{ 7*7 }}}}"
CHARTS = ["loss", "bits-per-byte", "hellaswag", "lr", "grad-norm", "throughput", "mfu", "skipped"]
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


class Page(HTMLParser):
    """The page's elements and what stands in them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def data(self) -> dict[str, Any]:
        found = re.search(r'<script type="application/json" id="data">(.*?)</script>', self.text, re.DOTALL)
        assert found
        return json.loads(found[1], parse_constant=lambda name: pytest.fail(name))

    @property
    def shown(self) -> str:
        return " ".join("".join(self.words).split())


def report(out: Path, *runs: Path) -> Page:
    write_report(runs, out)
    return Page(out.read_text(encoding="utf-8"))


def whole_run(path: Path, config: Config = CONFIG, **more: Any) -> Path:
    return write_run(path, config, make_events(config, 2_000, skips=(31, 700), **more))


def test_the_page_holds_the_runs_figures(tmp_path: Path) -> None:
    events = make_events(CONFIG, 2_000, skips=(31, 700))
    run = write_run(tmp_path / "run", CONFIG, events)
    page = report(tmp_path / "out" / "report.html", run)
    assert [chart["id"] for chart in page.data["charts"]] == CHARTS
    assert [a["id"] for tag, a in page.tags if tag == "figure"] == [f"chart-{name}" for name in CHARTS]
    by_id = {chart["id"]: chart for chart in page.data["charts"]}
    last = [event for event in events if event["event"] == "val"][-1]
    validation = next(s for s in by_id["loss"]["series"] if s["label"] == "validation")
    assert validation["y"][-1] == pytest.approx(last["loss"], abs=1e-4)
    x = page.data["runs"][0]["x"]
    assert x["val"]["step"][-1] == last["step"]
    assert x["val"]["minutes"][-1] == pytest.approx(last["train_seconds"] / 60, rel=1e-4)
    assert x["skip"]["step"] == [0, 31, 700, 2000]
    assert page.data["runs"][0]["batch_tokens"] == CONFIG.train.batch_tokens
    assert by_id["loss"]["lines"] == [{"y": 3.29, "label": "OpenAI GPT-2 124M"}]
    assert [line["y"] for line in by_id["hellaswag"]["lines"]] == [0.2955, 0.337]
    for text in (
        f"{last['loss']:.4f}",
        "Is my curve normal?",
        "Skipped steps 2 of 2,000",
        "NVIDIA H100 80GB HBM3",
        "989 TFLOP/s",
        "124 M",
        "Hello, I'm a language model, and 2000 it is.",
        "The nearest preset is gpt2-124m; none of the fields that make its recipe differ.",
    ):
        assert text in page.shown, text


def test_a_run_of_the_demo_preset_is_laid_over_its_reference(tmp_path: Path) -> None:
    from gpt2.config import preset

    (demo,) = shipped_references()
    config = preset("demo")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, data_hash=demo.data_hash))
    page = report(tmp_path / "report.html", write_run(tmp_path / "run", config, make_events(config, 700, end=4.9)))
    (band,) = page.data["charts"][0]["bands"]
    assert tuple(band["step"]) == demo.step
    assert page.data["charts"][0]["lines"] == []


def test_several_runs_are_laid_over_each_other(tmp_path: Path) -> None:
    faster = dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, lr=1.8e-3))
    other = gpt2_config(data_hash="b" * 64)
    runs = [
        whole_run(tmp_path / "base"),
        whole_run(tmp_path / "lr3x", faster, end=3.1, seed=1),
    ]
    page = report(tmp_path / "two.html", *runs)
    assert [run["name"] for run in page.data["runs"]] == ["base", "lr3x"]
    assert {s["run"] for s in page.data["charts"][0]["series"]} == {0, 1}
    assert "Lowest last validation: lr3x with" in page.shown
    differing = re.findall(r'<tr class="differs"><th scope="row">(.*?)</th>(.*?)</tr>', page.text)
    fields = {re.sub("<.*?>", "", name): re.findall("<td>(.*?)</td>", cells) for name, cells in differing}
    assert fields["optim.lr"] == ["0.0006", "0.0018"]
    assert "optim.beta1" not in fields
    assert ("button", "1") in [(tag, attrs.get("data-run")) for tag, attrs in page.tags]

    page = report(tmp_path / "three.html", *runs, whole_run(tmp_path / "third", other))
    assert "different data or tokenizers" in page.shown
    assert "bits per byte at step" in page.shown


def test_more_runs_than_colours(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run{i}", CONFIG, make_events(CONFIG, 100)) for i in range(10)]
    page = report(tmp_path / "report.html", *runs)
    assert {s["color"] for s in page.data["charts"][0]["series"]} == set(range(8))


def test_what_a_run_says_stays_text(tmp_path: Path) -> None:
    events = make_events(CONFIG, 2_000)
    for event in events:
        if event["event"] == "sample":
            event["prompt"] = event["text"] = NASTY
        if event["event"] == "start":
            event.update(device=NASTY, platform=NASTY, **{NASTY: NASTY})
    config = gpt2_config(data=NASTY.replace("\ud800", ""), init_from="<i>weights</i>")
    run = write_run(tmp_path / "<img src=x onerror=alert(1)> & 'run'", config, events)
    page = report(tmp_path / "report.html", run)
    allowed = {"data", None}
    scripts = [attrs for tag, attrs in page.tags if tag == "script"]
    assert len(scripts) == 2
    assert {attrs.get("id") for attrs in scripts} == allowed
    assert not any(tag in ("img", "i", "iframe") for tag, _ in page.tags)
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert html.escape(IMAGE) in page.text
    assert "{{ 7*7 }}" in page.shown
    assert page.data["runs"][0]["name"] == run.name


def test_the_page_names_no_address_and_forbids_itself_the_network(tmp_path: Path) -> None:
    page = report(tmp_path / "report.html", whole_run(tmp_path / "run"))
    assert not re.search(r"(https?|wss?):|//[\w.]+\.\w+/|@import|url\((?!#)", page.text)
    for tag, attrs in page.tags:
        assert not {"src", "srcset", "action", "data", "poster"} & attrs.keys(), tag
        assert attrs.get("href") in (None, "data:,")
    (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy


def test_figures_that_are_no_numbers_leave_gaps(tmp_path: Path) -> None:
    events = make_events(CONFIG, 1_000)
    for event in events:
        if event["event"] == "step" and event["step"] > 900:
            event.update(loss=math.nan, grad_norm=math.inf, tokens_per_second=10**15, mfu=-math.inf)
    page = report(tmp_path / "report.html", write_run(tmp_path / "run", CONFIG, events))
    assert None in next(s for s in page.data["charts"][0]["series"] if s["draw"] == "faint")["y"]
    assert "Infinite or NaN at steps 910" in page.shown


def test_a_run_that_logged_little_says_what_is_missing(tmp_path: Path) -> None:
    events: Events = [e for e in make_events(CONFIG, 20) if e["event"] == "step"]
    page = report(tmp_path / "report.html", write_run(tmp_path / "run", CONFIG, events))
    missing = [a["id"] for tag, a in page.tags if tag == "figure" and "missing" in str(a.get("class"))]
    assert missing == ["missing-validation", "missing-hellaswag", "missing-skipped"]
    for text in ("eval.hellaswag_every", "eval.sample_every", "20 so far"):
        assert text in page.shown


def test_a_long_run_is_thinned(tmp_path: Path) -> None:
    page = report(tmp_path / "report.html", write_run(tmp_path / "run", CONFIG, make_events(CONFIG, 19_000, every=1)))
    assert len(page.data["runs"][0]["x"]["step"]["step"]) <= 2_002
    assert len(page.text) < 400_000


def test_the_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = whole_run(tmp_path / "run"), tmp_path / "report.html"
    out.write_text("old")
    write_report([run], out)
    assert out.read_text().startswith("<!doctype html>")
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE((run / "config.toml").stat().st_mode)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    out.write_text("old")
    monkeypatch.setattr(page_module.os, "replace", full)
    with pytest.raises(WorkError, match="No space left"):
        write_report([run], out)
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run"]


def test_wrong_requests_write_nothing(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run")
    (tmp_path / "dir.html").mkdir()
    (tmp_path / "file").write_text("")
    cases = [
        ([run], tmp_path / "dir.html", "is a directory"),
        ([run], tmp_path / "file" / "report.html", "cannot write in"),
        ([tmp_path], tmp_path / "report.html", "is no run"),
        ([run, tmp_path / "none"], tmp_path / "report.html", "is no run"),
        ([run, run], tmp_path / "report.html", "named twice"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for runs, out, words in cases:
        with pytest.raises(RequestError, match=words):
            write_report(runs, out)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gpt2.cli import main

    a, b = whole_run(tmp_path / "a"), whole_run(tmp_path / "b", seed=1)
    out = tmp_path / "report.html"
    assert main(["report", str(a), str(b), "--out", str(out), "--json"]) == 0
    said = capsys.readouterr().out.splitlines()
    result = json.loads(said[-1])
    assert result["out"] == str(out)
    assert [run["run"] for run in result["runs"]] == [str(a), str(b)]
    assert {"val_loss", "bits_per_byte", "hellaswag_acc_norm", "skipped_steps", "verdict"} <= result["runs"][0].keys()
    assert said[0].startswith(f"{a}: ")
    assert out.is_file()
    for argv, words in ((["--out", str(out)], "no run is named"), ([str(a)], "--out")):
        assert main(["report", *argv]) == 2
        assert words in capsys.readouterr().err.lower()


def test_the_report_starts_without_torch(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run")
    code = (
        "import sys; from gpt2.cli import main; "
        f"main(['report', {str(run)!r}, '--out', {str(tmp_path / 'r.html')!r}]); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_numbers_are_written_for_people() -> None:
    numbers = (999, 12_345, 702_464, 999_949, 124_439_808, 9_999_998_976, 1e12)
    assert [large(n) for n in numbers] == ["999", "12.3 k", "702 k", "1.00 M", "124 M", "10.0 B", "1.00 T"]
    assert [duration(s) for s in (2.84, 180.0, 7500)] == ["2.8 s", "3 min 0 s", "2 h 5 min"]


@needs_chromium
def test_a_browser_draws_every_plot_without_complaint_or_request(tmp_path: Path) -> None:
    events = make_events(CONFIG, 2_000, skips=(31, 700))
    for event in events:
        if event["event"] == "sample":
            event["text"] = NASTY
    run = write_run(tmp_path / "<b>run</b>", CONFIG, events)
    _, page = report(tmp_path / "report.html", run), tmp_path / "report.html"
    seen = visit(page, tmp_path)
    assert seen.console == []
    assert seen.requests == []
    for width, found in seen.widths.items():
        assert "error" not in found, found
        assert found["overflow"] <= 0, width
        assert list(found["charts"]) == [f"chart-{name}" for name in CHARTS]
        for name, chart in found["charts"].items():
            assert chart["curves"] >= 1, (width, name)
            assert chart["ticks"] >= 5, (width, name)
            assert not chart["broken"], (width, name)
            assert chart["outside"] == [], (width, name)
        assert found["charts"]["chart-loss"]["references"] == ["OpenAI GPT-2 124M: 3.29"]
        assert len(found["charts"]["chart-hellaswag"]["references"]) == 2
        assert found["injected"] == 0
        assert found["requests"] == 0
        assert found["smallest"] >= 12
        place = re.match(r"step ([\d,]+\d0)", found["tip"])
        assert place, found["tip"]
        assert 800 <= int(place[1].replace(",", "")) <= 1_100  # the middle of the picture
        assert "validation" in found["tip"]
        assert "tokens" in found["tokens"]
        assert "minutes of training" in found["minutes"]
        assert found["whole"] != found["minutes"]


@needs_chromium
@pytest.mark.interop
def test_the_browser_test_notices_requests_and_complaints(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<!doctype html><img src='http://localhost:9/picture.png'><script>nothing.there()</script>")
    asked, said = look_at(page, tmp_path)
    assert asked == ["http://localhost:9/picture.png"]
    assert any("nothing is not defined" in line for line in said)


@needs_chromium
@pytest.mark.interop
def test_a_browser_draws_several_runs_a_reference_and_gaps(tmp_path: Path) -> None:
    from gpt2.config import preset

    (demo,) = shipped_references()
    config = preset("demo")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, data_hash=demo.data_hash))
    events = make_events(config, 700, end=4.9)
    for event in events[60:80]:
        if event["event"] == "step":
            event.update(loss=math.nan, grad_norm=math.inf)
    runs = [write_run(tmp_path / f"run{i}", config, made) for i, made in enumerate((events, make_events(config, 500)))]
    runs.append(write_run(tmp_path / "one", config, [e for e in make_events(config, 10) if e["event"] == "step"]))
    report(tmp_path / "report.html", *runs)
    seen = visit(tmp_path / "report.html", tmp_path)
    assert seen.console == []
    assert seen.requests == []
    for width, found in seen.widths.items():
        assert "error" not in found, found
        assert found["overflow"] <= 0, width
        assert found["charts"]["chart-loss"]["bands"] == 1
        assert not any(chart["broken"] for chart in found["charts"].values())
        assert found["missing"] == ["Skipped steps"]
        assert found["curves_without_first"] == 5

"""The report: one HTML page that holds everything it shows and asks nothing of the network.

The template is assets/page.html; page.js draws the plots from JSON in the page, so that they fit any width. Whatever
comes from a run is escaped, and the page's own security policy lets no other script run and no request leave.
"""

import base64
import hashlib
import math
import os
import re
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from gpt2 import __version__
from gpt2.config import PRESETS, flatten
from gpt2.errors import RequestError, WorkError
from gpt2.files import umask
from gpt2.report.curves import RunCurves, read_runs, smooth, thin
from gpt2.report.verdict import (
    NOT_RECIPE,
    OPENAI_HELLASWAG,
    OPENAI_LOSS,
    Reference,
    Verdict,
    judge,
    nearest_preset,
    openai_loss_is_comparable,
    recipe_differences,
    reference_for,
    shipped_references,
)

SAMPLES_SHOWN = 6
COLORS = 8  # in page.css
Columns = dict[str, list[float | None]]


def write_report(runs: Sequence[Path], out: Path) -> list[dict[str, Any]]:
    """Writes the page of one or several runs to `out`, whole or not at all; gives each run's last figures and verdict.

    A file that is there is replaced. Raises RequestError where a run or `out` is wrong, WorkError where the disk is
    full.
    """
    if out.is_dir():
        raise RequestError(f"{out} is a directory: name a file, such as {out / 'report.html'}")
    curves = read_runs(runs)
    references = shipped_references()
    matched = [reference_for(run, references) for run in curves]
    verdicts = [judge(run, reference) for run, reference in zip(curves, matched, strict=True)]
    html = render(curves, matched, verdicts)
    # A lone surrogate, which JSON can hold, is no character: it becomes a question mark.
    _write(out, html.encode("utf-8", errors="replace"))
    return [
        {"run": str(run.path), **figures(run), "verdict": verdict.level, "headline": verdict.headline}
        for run, verdict in zip(curves, verdicts, strict=True)
    ]


def figures(run: RunCurves) -> dict[str, Any]:
    """The run's last figures, by the names of the command line; None for what it has not."""
    step = run.of("step")[-1]
    val = run.of("val")[-1] if run.of("val") else {}
    hellaswag = run.of("hellaswag")[-1] if run.of("hellaswag") else {}
    best = min(filter(math.isfinite, run.column("val", "loss")), default=None)
    values = {
        "steps": run.last_step,
        "train_loss": smooth(run.column("step", "loss"))[-1],
        "val_loss": val.get("loss"),
        "best_val_loss": best,
        "bits_per_byte": val.get("bits_per_byte"),
        "hellaswag_acc": hellaswag.get("acc"),
        "hellaswag_acc_norm": hellaswag.get("acc_norm"),
        "tokens_per_second": _median(run.column("step", "tokens_per_second")),
        "mfu": _median(run.column("step", "mfu")),
        "train_seconds": step["train_seconds"],
        "skipped_steps": len(run.of("skip")),
        "finished": run.finished,
    }
    return {name: _finite(value) if isinstance(value, float) else value for name, value in values.items()}


def render(
    runs: Sequence[RunCurves],
    references: Sequence[Reference | None],
    verdicts: Sequence[Verdict],
    now: datetime | None = None,
) -> str:
    """The page."""
    assets = files("gpt2.report") / "assets"
    template, style, script = (
        (assets / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")
    )
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    charts = chart_data(runs, references)
    return environment.from_string(template).render(
        title="Training report: " + ", ".join(run.name for run in runs),
        made=f"{now or datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        version=__version__,
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        runs=[{"name": run.name, "path": run.path, "finished": run.finished} for run in runs],
        verdicts=verdicts,
        comparison=comparison(runs),
        summary=summary(runs),
        charts=charts["charts"],
        missing=missing_charts(runs),
        data=charts,
        samples=[_samples(run) for run in runs],
        config=config_table(runs),
        environment=environment_table(runs),
    )


def chart_data(runs: Sequence[RunCurves], references: Sequence[Reference | None]) -> dict[str, Any]:
    """What the page's script draws: for each run its columns of steps and minutes, for each chart its series.

    A series names the run, the event kind whose steps are its x, its values, and how it is drawn: `faint`, `line`,
    `dots` (a line with a dot a point) or `stairs`. Several runs have a colour each, one run has one for each series.
    """
    drawn = [_drawn_run(run) for run in runs]
    several = len(runs) > 1

    def series(kind: str, name: str, label: str, how: str) -> list[dict[str, Any]]:
        return [
            {
                "run": i,
                "color": i % COLORS if several else int(how == "dots"),
                "x": kind,
                "y": run["values"][kind][name],
                "label": label,
                "draw": how,
            }
            for i, run in enumerate(drawn)
            if run["x"][kind]["step"]
        ]

    references_here = {reference.preset: reference for reference in references if reference is not None}
    bands = [
        {
            "label": f"{name} preset, {reference.runs} runs ± {reference.tolerance:g}",
            "batch_tokens": reference.batch_tokens,
            **{column: list(getattr(reference, column)) for column in ("step", "low", "high")},
        }
        for name, reference in references_here.items()
    ]
    openai = [run for run in runs if openai_loss_is_comparable(run)]
    loss_lines = [{"y": value, "label": name} for name, value in OPENAI_LOSS] if openai else []
    score_lines = [{"y": value, "label": name} for name, value in OPENAI_HELLASWAG]
    raw = series("step", "loss", "each logged batch", "faint")
    charts: list[dict[str, Any]] = [
        {
            "id": "loss",
            "title": "Loss",
            "unit": "nats a token",
            "format": "figure",
            "fit": True,
            "wide": True,
            "lines": loss_lines,
            "bands": bands,
            "series": raw
            + series("step", "smooth", "training, smoothed", "line")
            + series("val", "loss", "validation", "dots"),
        },
        {
            "id": "bits-per-byte",
            "title": "Bits per byte",
            "unit": "validation",
            "format": "figure",
            "fit": True,
            "series": series("val", "bits_per_byte", "bits per byte", "dots"),
        },
        {
            "id": "hellaswag",
            "title": "HellaSwag",
            "unit": "part right; guessing: 0.25",
            "format": "figure",
            "lines": score_lines,
            "series": ([] if several else series("hellaswag", "acc", "acc", "line"))
            + series("hellaswag", "acc_norm", "acc_norm", "dots"),
        },
        {
            "id": "lr",
            "title": "Learning rate",
            "unit": "AdamW's",
            "format": "small",
            "zero": True,
            "series": series("step", "lr", "learning rate", "line"),
        },
        {
            "id": "grad-norm",
            "title": "Gradient norm",
            "unit": "before clipping",
            "format": "figure",
            "fit": True,
            "zero": True,
            "lines": [
                {"y": clip, "label": f"clipped at {clip:g}"}
                for clip in sorted({run.config.optim.grad_clip for run in runs} - {0.0})
            ],
            "series": series("step", "grad_norm", "gradient norm", "line"),
        },
        {
            "id": "throughput",
            "title": "Throughput",
            "unit": "tokens a second",
            "format": "large",
            "zero": True,
            "series": series("step", "tokens_per_second", "tokens a second", "line"),
        },
        {
            "id": "mfu",
            "title": "Model FLOPS utilisation",
            "unit": "MFU, part of the device's peak",
            "format": "percent",
            "zero": True,
            "series": series("step", "mfu", "MFU", "line"),
        },
        {
            "id": "skipped",
            "title": "Skipped steps",
            "unit": "so far",
            "format": "large",
            "zero": True,
            "series": series("skip", "count", "skipped so far", "stairs")
            if any(run.of("skip") for run in runs)
            else [],
        },
    ]
    return {
        "runs": [
            {"name": run.name, "batch_tokens": run.config.train.batch_tokens, "x": columns["x"]}
            for run, columns in zip(runs, drawn, strict=True)
        ],
        "charts": [chart for chart in charts if chart["series"]],
    }


def missing_charts(runs: Sequence[RunCurves]) -> list[dict[str, str]]:
    """What cannot be drawn, with the reason."""
    missing = []
    if not any(run.of("val") for run in runs):
        missing.append({"id": "validation", "title": "Validation", "text": "No validation loss was logged."})
    if not any(run.of("hellaswag") for run in runs):
        text = "It was not measured in training: eval.hellaswag_every sets its interval."
        missing.append({"id": "hellaswag", "title": "HellaSwag", "text": text})
    if not any(run.of("skip") for run in runs):
        missing.append({"id": "skipped", "title": "Skipped steps", "text": "None: every step made an update."})
    return missing


def comparison(runs: Sequence[RunCurves]) -> list[str]:
    """Which of several runs is ahead, in words."""
    if len(runs) < 2:
        return []
    said = []
    one_data = len({run.config.train.data_hash for run in runs}) == 1
    name, unit = ("loss", "nats a token") if one_data else ("bits_per_byte", "bits per byte")
    last = sorted((run.column("val", name)[-1], run.name, run.steps("val")[-1]) for run in runs if run.of("val"))
    if len(last) > 1:
        (best, first, step), (next_best, second, next_step) = last[:2]
        said.append(
            f"Lowest last validation: {first} with {best:.4f} {unit} at step {step:,}, {next_best - best:.4f} below "
            f"{second} at step {next_step:,}."
        )
    if not one_data:
        said.append(
            "The runs were trained on different data or tokenizers: their nats a token do not compare; bits per byte "
            "do where the held-out text is the same."
        )
    return said


def summary(runs: Sequence[RunCurves]) -> list[dict[str, Any]]:
    """Rows of the last figures: a label, a value for each run, and which is best (None where nothing says so)."""
    values = [figures(run) for run in runs]
    one_data = len({run.config.train.data_hash for run in runs}) == 1
    parameters = [run.of("start")[-1].get("parameters") if run.of("start") else None for run in runs]

    def row(label: str, cells: Iterable[str | None], best: int | None = None) -> dict[str, Any] | None:
        listed = list(cells)
        return {"label": label, "cells": listed, "best": best} if any(cell is not None for cell in listed) else None

    def measured(label: str, name: str, write: Callable[[float], str], pick: Any = None) -> dict[str, Any] | None:
        there = {i: v[name] for i, v in enumerate(values) if v[name] is not None}
        cells = [None if v[name] is None else write(v[name]) for v in values]
        best = pick(there, key=there.__getitem__) if pick and len(there) > 1 else None
        if best is not None and cells.count(cells[best]) > 1:  # what reads alike is no better
            best = None
        return row(label, cells, best)

    rows = [
        measured("Validation loss", "val_loss", "{:.4f}".format, min if one_data else None),
        measured("Bits per byte", "bits_per_byte", "{:.4f}".format, min if one_data else None),
        measured("Lowest validation loss", "best_val_loss", "{:.4f}".format, min if one_data else None)
        if any(v["best_val_loss"] != v["val_loss"] for v in values)
        else None,
        measured("Training loss", "train_loss", "{:.4f}".format),
        measured("HellaSwag acc_norm", "hellaswag_acc_norm", "{:.4f}".format, max),
        row(
            "Steps",
            (f"{run.last_step:,}{'' if run.finished else ' so far'}" for run in runs),
        ),
        row("Tokens", (large(run.last_step * run.config.train.batch_tokens) for run in runs)),
        measured("Training time", "train_seconds", duration, None),
        measured("Tokens a second", "tokens_per_second", large, max),
        measured("MFU", "mfu", "{:.1%}".format, max),
        row("Parameters", (large(p) if isinstance(p, int | float) else None for p in parameters)),
        measured("Skipped steps", "skipped_steps", "{:,}".format, min),
    ]
    return [r for r in rows if r is not None]


def config_table(runs: Sequence[RunCurves]) -> dict[str, Any]:
    """Field by field: the runs' values beside each other; a single run's beside those of the nearest preset."""
    columns = [(run.name, flatten(run.config)) for run in runs]
    note = ""
    preset = nearest_preset(runs[0].config) if len(runs) == 1 else None
    if preset is not None:
        columns.append((f"preset {preset}", flatten(PRESETS[preset])))
        differences = len(recipe_differences(runs[0].config, PRESETS[preset]))
        note = (
            f"The nearest preset is {preset}; {differences or 'none'} of the fields that make its recipe "
            f"{'differs' if differences == 1 else 'differ'}."
        )
    rows = []
    for name, value in columns[0][1].items():
        values = [column[name] for _, column in columns]
        differs = any(v != value for v in values)
        if preset is not None and (name in NOT_RECIPE or values[-1] == "auto"):
            differs = False
        # A narrow screen may break the name after a full stop or an underscore.
        parts = re.findall(r"[^._]+[._]?", name)
        rows.append({"parts": parts, "cells": [_value(v) for v in values], "differs": differs})
    return {"names": [name for name, _ in columns], "rows": rows, "note": note, "several": len(columns) > 1}


def environment_table(runs: Sequence[RunCurves]) -> dict[str, Any]:
    """What each run's last start event says of the machine and the programs."""
    starts = [dict(run.of("start")[-1]) if run.of("start") else {} for run in runs]
    names = list(dict.fromkeys(name for start in starts for name in start if name not in ("event", "step", "time")))
    rows: list[dict[str, Any]] = [
        {"name": name, "cells": [_environment(name, start.get(name)) for start in starts]} for name in names
    ]
    rows.append({"name": "started", "cells": [_moment(run.of("start")[0] if run.of("start") else {}) for run in runs]})
    rows.append({"name": "last event", "cells": [_moment(_last_event(run)) for run in runs]})
    went_on = [", ".join(f"{step:,}" for step in run.steps("start") if step) or "never" for run in runs]
    rows.append({"name": "went on at step", "cells": went_on})
    for done, label in (("evaluation_seconds", "evaluation"), ("compile_seconds", "compile")):
        cells = [_environment(done, run.of("done")[-1].get(done)) if run.of("done") else "" for run in runs]
        if any(cells) and done not in names:
            rows.append({"name": label, "cells": cells})
    passing = ("started", "last event", "went on at step", "compile_seconds", "evaluation", "compile", "peak_flops")
    for row in rows:
        row["differs"] = len(set(row["cells"])) > 1 and row["name"] not in passing
    return {"names": [run.name for run in runs], "rows": rows}


def duration(seconds: float) -> str:
    """3 min 0 s; 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def large(number: float) -> str:
    """1,234; 12.3 k; 124 M; 10.0 B."""
    if abs(number) < 10_000:
        return f"{number:,.0f}"
    for size, sign in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:#.3g}".rstrip(".") + f" {sign}"
    return f"{number / 1e3:#.3g}".rstrip(".") + " k"


def _drawn_run(run: RunCurves) -> dict[str, Any]:
    """Columns of a run for the page: for each kind of event its x (steps, minutes) and its figures."""
    kept = thin(run)
    columns = {name: run.column("step", name) for name in ("loss", "lr", "grad_norm", "tokens_per_second", "mfu")}
    columns["smooth"] = smooth(columns["loss"])
    steps: Columns = {name: _rounded(column[i] for i in kept) for name, column in columns.items()}
    values: dict[str, Columns] = {
        "step": steps,
        "val": {name: _rounded(run.column("val", name)) for name in ("loss", "bits_per_byte")},
        "hellaswag": {name: _rounded(run.column("hellaswag", name)) for name in ("acc", "acc_norm")},
        "skip": {"count": [0.0, *(float(i + 1) for i in range(len(run.of("skip")))), float(len(run.of("skip")))]},
    }
    x = {}
    for kind in values:
        at = run.steps(kind)
        if kind == "step":
            at = [at[i] for i in kept]
        if kind == "skip":
            at = [0, *at, run.last_step]
        x[kind] = {"step": at, "minutes": _rounded(run.seconds_at(step) / 60 for step in at)}
    return {"x": x, "values": values}


def _samples(run: RunCurves) -> dict[str, Any]:
    """A few samples spread over the run, the last among them, and how many there are."""
    events = run.of("sample")
    n = min(SAMPLES_SHOWN, len(events))
    picked = sorted(
        {round(i * (len(events) - 1) / max(1, n - 1)) for i in range(n)} | ({len(events) - 1} if n else set())
    )
    return {
        "name": run.name,
        "total": len(events),
        "shown": [
            {"step": events[i]["step"], "prompt": events[i]["prompt"], "text": events[i]["text"]} for i in picked
        ],
    }


def _last_event(run: RunCurves) -> dict[str, Any]:
    return max((event for events in run.events.values() for event in events), key=lambda event: event["step"])


def _moment(event: dict[str, Any]) -> str:
    try:
        return f"{datetime.fromtimestamp(event['time'], UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        return "not known"


def _environment(name: str, value: Any) -> str:
    if value is None:
        return ""
    if type(value) not in (int, float) or not math.isfinite(value):
        return _value(value)
    if name.endswith("_seconds"):
        return duration(value)
    if name == "peak_flops":
        return f"{value / 1e12:,.3g} TFLOP/s"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    return repr(value) if value == "" or (isinstance(value, str) and value != value.strip()) else str(value)


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(filter(math.isfinite, values)) if any(map(math.isfinite, values)) else None


def _rounded(values: Iterable[float]) -> list[float | None]:
    """Five figures are more than a screen shows; what is not finite leaves a gap."""
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _hash(text: str) -> str:
    """As a Content-Security-Policy names an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _write(out: Path, content: bytes) -> None:
    """The file, whole or as it was."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".tmp-{out.name}-", dir=out.parent)
    except OSError as error:
        raise RequestError(f"cannot write in {out.parent}: {error.strerror}; name another file") from error
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o666 & ~umask())
        os.replace(temporary, out)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise WorkError(f"cannot write {out}: {error.strerror}; free space or name another file") from error

"""Is my curve normal? What a run's figures say, in words: against shipped curves, and by what holds for any run."""

import bisect
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from gpt2.config import PRESETS, Config, flatten
from gpt2.report.curves import RunCurves, smooth

# OpenAI's models on the lecture's scale. GPT-3's weights are closed: of it only published scores can be drawn.
OPENAI_LOSS = (("OpenAI GPT-2 124M", 3.29),)  # FineWeb-Edu validation, nats a token
OPENAI_HELLASWAG = (("OpenAI GPT-2 124M", 0.2955), ("OpenAI GPT-3 124M", 0.337))  # acc_norm
GPT2_VOCABULARY = 50257

Level = Literal["good", "look", "bad"]
SHAPE = ("model.n_ctx", "model.n_layer", "model.n_head", "model.n_embd")
# What differs between two runs of one recipe, or is filled in when a run starts.
NOT_RECIPE = frozenset({"train.data", "train.data_hash", "train.device", "train.seed", "model.vocab_size"})


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    title: str
    text: str


@dataclass(frozen=True)
class Verdict:
    """What is to be said about a run: one sentence, and each thing that was looked at."""

    level: Level
    headline: str
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Reference:
    """The validation loss of a preset's own runs, with the band in which another run's should lie."""

    preset: str
    data_hash: str
    source: str
    runs: int
    tolerance: float
    """Nats a token by which the band is wider than the runs it was made from."""
    batch_tokens: int
    step: tuple[int, ...]
    low: tuple[float, ...]
    """Lowest loss of those runs at each step, less the tolerance."""
    high: tuple[float, ...]
    factor: tuple[float, ...]
    """The learning rate as a part of its peak: a schedule by time depends on the machine's speed."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Reference":
        """From the JSON that `make_reference` describes."""
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**fields)

    def at(self, step: int) -> tuple[float, float, float]:
        """Low, high and factor at a step, between its points by proportion, beyond its end as at its end."""
        low, high, factor = (interpolate(self.step, values, step) for values in (self.low, self.high, self.factor))
        return low, high, factor


def make_reference(preset: str, runs: Sequence[RunCurves], tolerance: float) -> dict[str, Any]:
    """The reference that runs of a preset on the same data give, at the steps where all of them were validated, and at
    the end of the shortest.

    Between the runs' own lowest and highest loss, and `tolerance` nats beyond on either side.
    """
    steps = sorted(
        {*set.intersection(*(set(run.steps("val")) for run in runs)), min(run.steps("val")[-1] for run in runs)}
    )
    losses = [[interpolate(run.steps("val"), run.column("val", "loss"), step) for step in steps] for run in runs]
    return {
        "preset": preset,
        "data_hash": runs[0].config.train.data_hash,
        "source": runs[0].source,
        "runs": len(runs),
        "tolerance": tolerance,
        "batch_tokens": runs[0].config.train.batch_tokens,
        "step": steps,
        "low": [round(min(at_step) - tolerance, 4) for at_step in zip(*losses, strict=True)],
        "high": [round(max(at_step) + tolerance, 4) for at_step in zip(*losses, strict=True)],
        "factor": [round(statistics.fmean(rate_factor(run, step) for run in runs), 4) for step in steps],
    }


def shipped_references() -> list[Reference]:
    """Those in the package."""
    found = sorted((files("gpt2.report") / "assets").iterdir(), key=lambda file: file.name)
    return [
        Reference.from_dict(json.loads(file.read_text(encoding="utf-8")))
        for file in found
        if file.name.startswith("reference_")
    ]


def reference_for(run: RunCurves, references: Sequence[Reference]) -> Reference | None:
    """The one that was made on the run's data with the run's shape and batch."""
    config = run.config
    for reference in references:
        preset = PRESETS[reference.preset]
        same_data = config.train.data_hash == reference.data_hash or (
            run.source == reference.source and config.model.vocab_size == preset.model.vocab_size
        )
        if same_data and _same(config, preset, SHAPE) and config.train.batch_tokens == reference.batch_tokens:
            return reference
    return None


def nearest_preset(config: Config) -> str | None:
    """The preset of the run's shape with the fewest other differences; None where no preset has the shape."""
    alike = [name for name, preset in PRESETS.items() if _same(config, preset, SHAPE)]
    return min(alike, key=lambda name: len(recipe_differences(config, PRESETS[name])), default=None)


def recipe_differences(config: Config, preset: Config) -> dict[str, tuple[Any, Any]]:
    """Field -> (the run's value, the preset's), of what makes the recipe. `auto` in the preset differs from nothing."""
    theirs = flatten(preset)
    return {
        name: (value, theirs[name])
        for name, value in flatten(config).items()
        if name.split(".")[0] in ("model", "optim", "train")
        and name not in NOT_RECIPE
        and value != theirs[name]
        and theirs[name] != "auto"
    }


def openai_loss_is_comparable(run: RunCurves) -> bool:
    """Whether OpenAI's loss can be drawn: nats a token compare only on the same text with the same tokenizer."""
    return run.config.model.vocab_size == GPT2_VOCABULARY and "fineweb" in run.source.lower()


def judge(run: RunCurves, reference: Reference | None) -> Verdict:
    """Everything that is looked at, the worst first."""
    findings = [
        found
        for found in (
            _against_reference(run, reference),
            _start(run),
            _descent(run),
            _validation(run),
            _against_openai(run),
            _spikes(run),
            _skipped(run),
            _not_finite(run),
            _speed(run),
            _file(run),
        )
        if found is not None
    ]
    order: dict[Level, int] = {"bad": 0, "look": 1, "good": 2}
    findings.sort(key=lambda found: order[found.level])
    worst = findings[0].level if findings else "good"
    named = ", ".join(found.title.lower() for found in findings if found.level == worst)
    compared = any(f.title == REFERENCE_TITLE for f in findings)
    headline = {
        "bad": f"No. Not normal: {named}.",
        "look": f"Mostly. Worth a look: {named}.",
        "good": f"Yes. It runs as the {reference.preset} preset's own runs do."
        if compared and reference is not None
        else "Nothing unusual, by general signs.",
    }[worst]
    return Verdict(worst, headline, tuple(findings))


REFERENCE_TITLE, NO_REFERENCE_TITLE = "Reference curve", "No reference curve"


def _against_reference(run: RunCurves, reference: Reference | None) -> Finding | None:
    if reference is None:
        text = (
            "None of those shipped was made on this data with this shape: the curve was judged by general signs alone."
        )
        return Finding("good", NO_REFERENCE_TITLE, text)
    compared, above, below = 0, [], 0
    for step, loss in zip(run.steps("val"), run.column("val", "loss"), strict=True):
        low, high, factor = reference.at(step)
        if step < reference.step[0]:
            continue
        # A rate that has yet to decay keeps the loss up: such a point says nothing against the run.
        if loss > high and rate_factor(run, step) > factor + 0.15:
            continue
        compared += 1
        if loss > high or math.isnan(loss):
            above.append((step, loss - high))
        below += loss < low
    made = f"{reference.runs} runs of the {reference.preset} preset, ± {reference.tolerance:g} nats"
    if not compared:
        text = (
            f"No validation loss can be compared with {made}: none was logged where both runs' rates had decayed alike."
        )
        return Finding("good", NO_REFERENCE_TITLE, text)
    if not above:
        text = f"All {compared} compared validation losses lie within the band of {made}, or below it."
        if below == compared:
            text = f"All {compared} compared validation losses lie below the band of {made}: better than the reference."
        elif compared == 1:
            text = f"The one validation loss that can be compared lies within the band of {made}, or below it."
        return Finding("good", REFERENCE_TITLE, text)
    differences = recipe_differences(run.config, PRESETS[reference.preset])
    changed = ", ".join(f"{name} = {value} ({theirs})" for name, (value, theirs) in differences.items())
    most = max(excess for _, excess in above)
    text = (
        f"{len(above)} of {compared} compared validation losses lie above the band of {made}, first at step "
        f"{above[0][0]:,}, by up to {most:.2f} nats. "
        + (f"The run differs from the preset in {changed}." if changed else "Its config is the preset's.")
    )
    return Finding("bad" if most > 0.5 or len(above) > compared / 2 else "look", REFERENCE_TITLE, text)


def _start(run: RunCurves) -> Finding | None:
    """A network that knows nothing guesses evenly: ln(vocabulary) nats."""
    if run.config.train.init_from:
        return None
    step, loss = run.steps("step")[0], run.column("step", "loss")[0]
    even = math.log(run.config.model.vocab_size)
    where = f"The first logged loss (step {step:,}) is {loss:.2f}; an even guess over the vocabulary costs {even:.2f}."
    if step > max(20, run.config.optim.warmup_steps):
        return None
    if loss > even + 0.5:
        return Finding("bad", "Start", f"{where} Above it, the first weights or the targets are wrong.")
    if step == 1 and loss < even - 0.5:
        return Finding("look", "Start", f"{where} A fresh network cannot know more: does a target leak into the input?")
    return Finding("good", "Start", where)


def _descent(run: RunCurves) -> Finding | None:
    losses = [loss for loss in run.column("step", "loss") if math.isfinite(loss)]
    if len(losses) < 10:
        return None
    curve = smooth(losses)
    first, lowest = curve[0], min(curve)
    last = statistics.median(losses[-max(5, len(losses) // 50) :])  # a spike at the very end is no divergence
    fell = f"The training loss went from {first:.2f} to {curve[-1]:.2f}"
    noise = _noise(losses, curve)
    if last > lowest + max(0.3, 4 * noise):
        step = run.steps("step")[min(range(len(curve)), key=curve.__getitem__)]
        text = (
            f"{fell}, but was {lowest:.2f} near step {step:,}: it diverges. A lower optim.lr or a longer warm-up helps."
        )
        return Finding("bad", "Descent", text)
    if not run.config.train.init_from and first - last < 0.1:
        text = f"{fell}: it learns nothing. Look at the learning rate and the data."
        return Finding("bad", "Descent", text)
    fifth = max(1, len(curve) // 5)
    before, after = statistics.fmean(losses[-2 * fifth : -fifth]), statistics.fmean(losses[-fifth:])
    if before - after > 2 * noise / math.sqrt(fifth):
        ending = f"still falling: {before - after:.3f} nats in the last fifth."
        if run.finished:
            ending += " More steps would help."
    else:
        ending = "level at the end: little is left to gain from more steps at this learning rate."
    return Finding("good", "Descent", f"{fell}, {ending}")


def _validation(run: RunCurves) -> Finding | None:
    losses = run.column("val", "loss")
    if not losses:
        return Finding("look", "Validation", "No validation loss was logged: nothing tells learning from memorising.")
    best = min(range(len(losses)), key=losses.__getitem__)
    step = run.steps("val")[best]
    if losses[-1] > losses[best] + 0.02:
        text = (
            f"Lowest at step {step:,} ({losses[best]:.4f}), {losses[-1]:.4f} at the end: since then the run learns its "
            "training text by heart. Stop earlier, or give it more text."
        )
        return Finding("look", "Validation", text)
    away = losses[-1] - smooth(run.column("step", "loss"))[-1]
    text = (
        f"Lowest where it should be, at the end: {losses[-1]:.4f}, "
        if best == len(losses) - 1
        else (f"{losses[-1]:.4f} at the end, as good as the lowest ({losses[best]:.4f} at step {step:,}), ")
    )
    return Finding(
        "good", "Validation", f"{text}{abs(away):.2f} nats {'above' if away > 0 else 'below'} the training loss."
    )


def _against_openai(run: RunCurves) -> Finding | None:
    said, ahead = [], []
    losses = run.column("val", "loss")
    if losses and openai_loss_is_comparable(run):
        for name, value in OPENAI_LOSS:
            ahead.append(losses[-1] <= value)
            said.append(f"validation loss {losses[-1]:.3f} against {value} of {name}")
    scores = run.column("hellaswag", "acc_norm")
    if scores:
        for name, value in OPENAI_HELLASWAG:
            ahead.append(scores[-1] >= value)
            said.append(f"HellaSwag {scores[-1]:.4f} against {value} of {name}")
    if not said:
        return None
    text = "; ".join(
        f"{what} ({'reached' if there else 'not reached'})" for what, there in zip(said, ahead, strict=True)
    )
    return Finding("good", "Against OpenAI", f"{text[0].upper()}{text[1:]}.")


def _spikes(run: RunCurves) -> Finding | None:
    losses = run.column("step", "loss")
    if len(losses) < 50:
        return None
    curve = smooth(losses)
    limit = max(0.5, 8 * _noise(losses, curve))
    settled = len(losses) // 20  # the first descent is steep by right
    found = [
        step
        for i, (step, loss) in enumerate(zip(run.steps("step"), losses, strict=True))
        if i >= settled and loss - curve[i] > limit
    ]
    if not found:
        return Finding("good", "Spikes", f"None: no logged loss stands {limit:.1f} nats or more above its neighbours.")
    text = f"{len(found)} logged losses stand {limit:.1f} nats or more above their neighbours, at {_listed(found)}."
    return Finding("look", "Spikes", f"{text} One that heals at once is harmless.")


def _skipped(run: RunCurves) -> Finding | None:
    steps = run.steps("skip")
    if not steps:
        return Finding("good", "Skipped steps", "None.")
    part = len(steps) / run.last_step if run.last_step else 1.0
    text = f"{len(steps):,} of {run.last_step:,} ({part:.2%}), at {_listed(steps)}."
    if part > 0.01:
        return Finding("bad", "Skipped steps", f"{text} So many point to a learning rate too high, or to bad data.")
    return Finding("look" if part > 0.001 else "good", "Skipped steps", text)


def _not_finite(run: RunCurves) -> Finding | None:
    kinds = (("step", "loss"), ("step", "grad_norm"), ("val", "loss"))
    found = sorted(
        {
            step
            for kind, name in kinds
            for step, value in zip(run.steps(kind), run.column(kind, name), strict=True)
            if not math.isfinite(value)
        }
    )
    if not found:
        return None
    return Finding("bad", "Figures not finite", f"Infinite or NaN at {_listed(found)}.")


def _speed(run: RunCurves) -> Finding | None:
    speeds = [speed for speed in run.column("step", "tokens_per_second") if math.isfinite(speed)]
    if len(speeds) < 20:
        return None
    speeds = speeds[1:]  # the first may hold what is done once
    quarter = len(speeds) // 4
    before, after = statistics.median(speeds[:quarter]), statistics.median(speeds[-quarter:])
    text = f"{before:,.0f} tokens a second in the first quarter, {after:,.0f} in the last"
    if before > 0 and after < 0.8 * before:
        return Finding("look", "Speed", f"{text}: something else takes the machine, or it is too hot.")
    return Finding("good", "Speed", f"{text}.")


def _file(run: RunCurves) -> Finding | None:
    said = []
    if run.damaged:
        said.append(f"{_listed(run.damaged, 'line')} of metrics.jsonl could not be read and was left out.")
    if run.torn:
        said.append("The last line of metrics.jsonl breaks off: the run was killed, or is still writing.")
    return Finding("look", "Damaged metrics" if run.damaged else "Torn last line", " ".join(said)) if said else None


def rate_factor(run: RunCurves, step: int) -> float:
    """The learning rate as a part of its peak at a step."""
    return interpolate(run.steps("step"), run.column("step", "lr"), step) / run.config.optim.lr


def interpolate(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """y at x on the line through the points; beyond them as at the nearest."""
    right = bisect.bisect_left(xs, x)
    if right == 0 or right == len(xs):
        return ys[min(right, len(xs) - 1)]
    part = (x - xs[right - 1]) / (xs[right] - xs[right - 1])
    return ys[right - 1] + part * (ys[right] - ys[right - 1])


def _noise(losses: Sequence[float], curve: Sequence[float]) -> float:
    """The usual distance of a logged loss from the curve, in nats: scaled median, which spikes do not move."""
    away = [abs(loss - mean) for loss, mean in zip(losses, curve, strict=True) if math.isfinite(loss - mean)]
    return 1.4826 * statistics.median(away) if away else 0.0


def _listed(numbers: Sequence[int], what: str = "step") -> str:
    shown = ", ".join(f"{n:,}" for n in numbers[:8])
    more = f" and {len(numbers) - 8:,} more" if len(numbers) > 8 else ""
    return f"{what}{'s' if len(numbers) > 1 else ''} {shown}{more}"


def _same(one: Config, other: Config, names: Sequence[str]) -> bool:
    a, b = flatten(one), flatten(other)
    return all(a[name] == b[name] for name in names)

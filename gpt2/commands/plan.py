"""gpt2 plan: what a run will take before it is started."""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gpt2.commands.common import Json, Outcome, parse, say
from gpt2.config import Config, EvalConfig, GPTConfig, OptimConfig, TrainConfig, preset, read_toml
from gpt2.errors import RequestError

if TYPE_CHECKING:
    from gpt2.report.plan import Gpu
    from gpt2.report.plan import Plan as PlanResult

COUNTS = tuple(2**k for k in range(11))


@dataclass(frozen=True)
class Plan:
    """What a run will take: memory a GPU, micro-batch, tokens a second, hours, dollars, communication.

    An estimate from a model (gpt2/report/plan.py states it), checked against figures that others published.
    """

    preset: str = "gpt2-124m"
    """gpt2-124m, gpt2-350m, gpt2-774m, gpt2-1558m, finetune, demo or tiny."""
    config: Path | None = None
    """TOML file with fields to change from the preset."""
    gpu: str = "A100-80"
    """A100-40, A100-80, H100, H200, B200, L40S, L4, 4090, A10G, V100 or T4."""
    gpus: int = 8
    """How many; hosts have eight each."""
    price: float | None = None
    """Dollars a GPU an hour; none: what is typical of the kind."""
    network: float | None = None
    """Gbit/s between hosts, a whole host's each way; none: what is typical of the kind."""
    sharding: Literal["auto", "ddp", "fsdp"] = "auto"
    """ddp: a whole model on each GPU; fsdp: weights and optimizer divided; auto: ddp unless fsdp is better."""
    micro_batch: int = 0
    """Windows at once on a GPU; 0: the most that fit and divide the step's."""
    gradients: Literal["fp32", "bf16"] = "fp32"
    """Precision in which gradients travel between GPUs."""
    recompute: bool = False
    """Activation checkpointing: keep only the blocks' inputs, and compute forward again."""
    out: Path | None = None
    """Also draw speed, hours and dollars for 1 to 1,024 GPUs into this PNG."""
    json: Json = False
    """Print one JSON object as the last line."""
    model: GPTConfig = field(default_factory=GPTConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def main(argv: Sequence[str]) -> Outcome:
    """gpt2 plan"""
    args = read_options(argv)
    if args.gpus < 1 or args.micro_batch < 0:
        raise RequestError("--gpus must be at least 1 and --micro-batch at least 0")
    for name, value in (("--price", args.price), ("--network", args.network)):
        if value is not None and not 0 < value < float("inf"):
            raise RequestError(f"{name} {value:g} must be above 0")
    if args.out is not None and args.out.suffix.lower() != ".png":
        raise RequestError(f"--out {args.out} must end in .png")
    config = Config(args.model, args.optim, args.train, EvalConfig())

    from gpt2.model import flops_per_token
    from gpt2.report.plan import GBIT, check_published, find_gpu, make_plan, parameters, plot_plans

    gpu = find_gpu(args.gpu)
    if args.price is not None:
        gpu = dataclasses.replace(gpu, dollars=args.price)
    if args.network is not None:
        gpu = dataclasses.replace(gpu, network=args.network * GBIT)

    def plan_for(gpus: int) -> "PlanResult":
        gradient_bytes = 2 if args.gradients == "bf16" else 4
        return make_plan(config, gpu, gpus, args.sharding, args.micro_batch, gradient_bytes, args.recompute)

    plan = plan_for(args.gpus)
    table = [plan_for(gpus) for gpus in sorted({*COUNTS, args.gpus})]
    checks = check_published()
    say(heading(args, config, gpu, parameters(config.model), flops_per_token(config.model)))
    say("\n" + details(plan, gpu))
    say("\n" + as_table(table))
    share = "fitted to published figures" if gpu.fitted else "an assumption: no published figure was fitted for it"
    say(f"\nthe part of its peak that matmuls reach on this kind of GPU, {gpu.share:.0%}, is {share}")
    say("the model against published figures, expected / published tokens a second:")
    for published, ratio in checks:
        say(f"  {ratio:.2f}  {published.preset} on {published.gpus} x {published.gpu}: {published.source}")
    if args.out is not None:
        if not any(row.fits for row in table):
            raise RequestError("nothing to draw: it fits on no number of GPUs from 1 to 1,024")
        draw(lambda path: plot_plans(table, path, f"{args.preset} on {args.gpu}, as expected"), args.out)
        say(f"drawn: {args.out}")
    result: dict[str, Any] = {
        "preset": args.preset,
        "gpu": args.gpu,
        "price": gpu.dollars,
        "parameters": parameters(config.model),
        "flops_per_token": flops_per_token(config.model),
        "steps": config.train.steps,
        "batch_tokens": config.train.batch_tokens,
        **plan.to_dict(),
        "table": [row.to_dict() for row in table],
        "checks": [{**dataclasses.asdict(published), "ratio": ratio} for published, ratio in checks],
    }
    return Outcome(result, args.json)


def read_options(argv: Sequence[str]) -> Plan:
    """The options; the sections' defaults are the preset's, changed by the TOML file."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--preset", "--config"):
        first.add_argument(name)
    try:
        chosen, _ = first.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise RequestError(f"{error}: see gpt2 plan --help") from error
    base = preset(chosen.preset or Plan.preset)
    if chosen.config:
        base = read_toml(Path(chosen.config), base)
    return parse(Plan, argv, "plan", Plan(model=base.model, optim=base.optim, train=base.train))


def heading(args: Plan, config: Config, gpu: "Gpu", parameters: int, flops: float) -> str:
    """What is planned, and the arithmetic of the batch."""
    train, model = config.train, config.model
    batch = f"{train.batch_tokens:,} tokens = {config.batch_windows:,} windows x {model.n_ctx:,}"
    if train.steps:
        tokens = train.steps * train.batch_tokens
        batch = f"{train.steps:,} steps of {batch}: {tokens / 1e9:.3g} B tokens, {tokens * flops:.2e} FLOP"
    return (
        f"{args.preset}: {parameters:,} parameters, {flops / 1e6:,.0f} MFLOP a token, on {args.gpus:,} x {args.gpu} "
        f"at ${gpu.dollars:.2f} an hour each\n{batch}"
    )


def details(plan: "PlanResult", gpu: "Gpu") -> str:
    """The chosen number of GPUs, at length."""
    from gpt2.report.plan import GB

    lines = []
    if plan.memory:
        lines.append(f"memory a GPU   {plan.memory_total / GB:8.2f} GB of {gpu.memory / GB:.0f}")
        lines += [f"  {name:<12} {size / GB:8.2f} GB" for name, size in plan.memory.items()]
    if not plan.fits:
        return "\n".join([*lines, f"cannot be trained on {plan.gpus:,} GPUs: {plan.why}"])
    lines += [
        f"sharding       {plan.sharding}",
        f"micro-batch    {plan.micro_batch} x {plan.accumulation} micro-steps x {plan.gpus:,} GPUs",
        f"a step         {duration(plan.step_seconds)}: computing {duration(plan.compute_seconds)}, waiting for "
        f"communication {duration(plan.exposed_seconds)} ({plan.exposed_seconds / plan.step_seconds:.1%})",
        f"communication  {plan.communication_bytes / GB:.2f} GB through each GPU's link a step, "
        f"{duration(plan.communication_seconds)}, the rest of it hidden",
        f"speed          {plan.tokens_per_second:,.0f} tokens a second, {plan.mfu:.1%} of the peak",
        f"the run        {hours(plan.hours)}, ${plan.dollars:,.2f}",
    ]
    return "\n".join(lines)


def as_table(plans: Sequence["PlanResult"]) -> str:
    """A line a number of GPUs."""
    lines = [" GPUs  sharding  micro x acc   GB a GPU      tokens/s    MFU  waiting        time      dollars"]
    for plan in plans:
        if not plan.fits:
            lines.append(f"{plan.gpus:>5}  {plan.why}")
            continue
        lines.append(
            f"{plan.gpus:>5}  {plan.sharding:<8}  {plan.micro_batch:>5} x {plan.accumulation:<4}"
            f"{plan.memory_total / 1e9:>11.1f}{plan.tokens_per_second:>14,.0f}{plan.mfu:>7.1%}"
            f"{plan.exposed_seconds / plan.step_seconds:>9.1%}{hours(plan.hours):>12}{plan.dollars:>13,.2f}"
        )
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """In the unit that fits."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def hours(value: float) -> str:
    """In the unit that fits."""
    return f"{value:.1f} h" if value >= 1 else f"{60 * value:.1f} min"


def draw(plot: Any, path: Path) -> None:
    """Draws under a temporary name and renames. Raises RequestError where it cannot be written."""
    temporary = path.with_name(f".tmp-{path.stem}.png")
    try:
        plot(temporary)
        temporary.replace(path)
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror}; name another file") from error
    finally:
        temporary.unlink(missing_ok=True)

"""The training loop: batches in, checkpoints out. `train` reads from top to bottom; its parts follow in order of use.

run ─ model, optimizers, state ─ for each step:
    learning rate ─ micro-batches: forward, backward ─ clip ─ update ─ log ─ validate ─ sample ─ save
"""

import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt2.checkpoint.directory import TrainingState, keep_checkpoints, read_checkpoint, write_checkpoint
from gpt2.config import Config, to_dict
from gpt2.data.loader import BatchLoader, prefetch
from gpt2.errors import WorkError
from gpt2.evaluation.loss import LossResult, MeanLoss, evaluate_loss
from gpt2.inference.engine import Engine
from gpt2.model import GPT, flops_per_token
from gpt2.training.metrics import Metrics, open_sink, read_metrics, start_at
from gpt2.training.optim import build_optimizers, load_optimizer_tensors, optimizer_tensors, set_learning_rate
from gpt2.training.peak import device_peak
from gpt2.training.run import Run
from gpt2.training.schedule import learning_rate_factor, progress_by_steps


class Stopped(Exception):
    """A signal stopped the run, which is saved. `signal` is its number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}: the run is saved")
        self.signal = number


def train(run: Run, quiet: bool = False) -> dict[str, Any]:
    """Trains to the end of the run; gives its last figures by the names of the command line.

    Raises Stopped after saving where a signal asks for it; WorkError where the loss is not finite,
    the memory does not suffice or the disk is full.
    """
    config, device = run.config, run.distributed.device
    set_numerics(config, device)
    model, optimizers, state = load(run)
    start_at(run.path, state.step)
    if state.finished:
        return summary(run)

    mean_loss = loss_function(model, config, device)
    accumulation = config.accumulation(run.distributed.world_size)
    loader = BatchLoader(run.dataset.split("train"), config.model.n_ctx, config.batch_windows, config.train.seed)
    flops, peak = flops_per_token(config.model), device_peak(device, config.train.precision)
    sink = open_sink(config.log.sink, run.path, to_dict(config))
    metrics = Metrics(run.path, sink, config.train.steps, config.train.minutes, quiet)
    evaluation_seconds = 0.0

    with metrics, stop_signals() as stop, closing(prefetch(loader, state.step)) as batches:
        compile_seconds = warm_up(mean_loss, model, config, device)
        metrics.event("start", state.step, compile_seconds=compile_seconds, **describe(run, model, peak))
        metrics.say(introduction(run, model, loader, compile_seconds))
        logged, clock = state, time.perf_counter()
        for step, x, y in batches:  # x, y: (batch_windows, n_ctx) int64
            factor = learning_rate_factor(config.optim, step, decay_progress(config, state))
            set_learning_rate(optimizers, factor)
            loss = accumulate_gradients(mean_loss, x, y, accumulation, device)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip or float("inf"))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            state = replace(state, step=step + 1, val_loss=None)
            logs = due(state.step, config.log.every)
            if logs:
                loss = loss.cpu()  # waits for the device, so that the clock tells the truth
            now = time.perf_counter()
            state = replace(state, train_seconds=state.train_seconds + now - clock)
            finished = part_done(config, state) >= 1.0

            if logs or finished:
                speed = (
                    config.train.batch_tokens
                    * (state.step - logged.step)
                    / (state.train_seconds - logged.train_seconds)
                )
                figures = {
                    "loss": check_finite(loss.item(), run, state.step),
                    "lr": config.optim.lr * factor,
                    "grad_norm": float(norm),
                    "tokens_per_second": speed,
                    "mfu": speed * flops / peak,
                    "train_seconds": state.train_seconds,
                }
                metrics.step(state.step, part_done(config, state), figures)
                logged = state

            saves = finished or bool(stop) or due(state.step, config.checkpoint.every)
            if run.dataset.has_split("val") and not stop and (finished or saves or due(state.step, config.eval.every)):
                result = validate(mean_loss, model, run)
                evaluation_seconds += result.seconds
                metrics.event("val", state.step, **result.to_dict(), train_seconds=state.train_seconds)
                metrics.say(
                    f"step {state.step}  validation: {result.loss:.4f} nats a token, "
                    f"{result.bits_per_byte:.4f} bits per byte"
                )
                state = note_validation(state, result.loss)
                if 0 < config.train.patience <= state.stale_validations and not finished:
                    metrics.say(f"step {state.step}  no lower validation loss in {state.stale_validations}: early stop")
                    finished = saves = True
            if due(state.step, config.eval.sample_every):
                text = sample(model, run, seed=state.step)
                metrics.event("sample", state.step, prompt=config.eval.sample_prompt, text=text)
                metrics.say(f"step {state.step}  sample: {config.eval.sample_prompt}{text}")
            if saves:
                state = replace(state, finished=finished)
                state = save(run, model, optimizers, state)
                metrics.event("checkpoint", state.step)
            if finished:
                metrics.event(
                    "done", state.step, compile_seconds=compile_seconds, evaluation_seconds=evaluation_seconds
                )
                return summary(run)
            if stop:
                raise Stopped(stop[0])
            clock = time.perf_counter()
    raise AssertionError("the batches never end")


def set_numerics(config: Config, device: torch.device) -> None:
    """Precision of float32 matmuls; on a CPU, algorithms that give the same bits in every run."""
    torch.set_float32_matmul_precision(config.train.matmul_precision)
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it only costs time


def load(run: Run) -> tuple[GPT, list[torch.optim.Optimizer], TrainingState]:
    """Model, optimizers and state as the run's checkpoint holds them, or as a new run starts."""
    config, device = run.config, run.distributed.device
    torch.manual_seed(config.train.seed)
    model = GPT(config.model)
    state = TrainingState()
    if run.checkpoint is not None:
        weights, training, state = read_checkpoint(run.checkpoint, config.model)
        model.load_state_dict(weights)
    elif config.train.init_from:
        model.load_state_dict(GPT.from_pretrained(run.initial_weights()).state_dict())
    model.to(device).train()
    optimizers = build_optimizers(model, config.optim)
    if run.checkpoint is not None:
        prefix = "optimizer."
        moments = {name.removeprefix(prefix): t for name, t in training.items() if name.startswith(prefix)}
        load_optimizer_tensors(model, optimizers, moments)
        torch.set_rng_state(training["random.cpu"])
        if device.type == "cuda" and "random.cuda" in training:
            torch.cuda.set_rng_state(training["random.cuda"], device)
    return model, optimizers, state


def loss_function(model: GPT, config: Config, device: torch.device) -> MeanLoss:
    """(B, T) ids and targets -> mean loss in nats, under autocast and compiled as the config says."""

    def loss_only(idx: Tensor, targets: Tensor) -> Tensor:
        # The logits are no output, so that the compiler need not keep their (B·T, vocabulary) for anyone.
        loss: Tensor = model(idx, targets)[1]
        return loss

    function: Callable[[Tensor, Tensor], Tensor] = loss_only
    if config.train.compile:
        function = torch.compile(loss_only, dynamic=False)

    def mean_loss(idx: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
            return function(idx, targets)

    return mean_loss


def warm_up(mean_loss: MeanLoss, model: GPT, config: Config, device: torch.device) -> float:
    """One pass of each shape that training and validation use, so that no step waits for the compiler; seconds.

    Leaves weights, gradients and random generators as they were. Raises WorkError where memory or compiler fail.
    """
    started = time.perf_counter()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            idx = torch.zeros(config.train.micro_batch, config.model.n_ctx, dtype=torch.int64, device=device)
            mean_loss(idx, idx.clone()).backward()  # type: ignore[no-untyped-call]
            model.zero_grad(set_to_none=True)
            if config.train.compile:
                model.eval()
                idx = torch.zeros(config.eval.batch, config.model.n_ctx, dtype=torch.int64, device=device)
                with torch.no_grad():
                    mean_loss(idx, idx.clone())  # not idx twice: the compiler would count on it
    except torch.OutOfMemoryError as error:
        raise WorkError(
            f"train.micro_batch = {config.train.micro_batch} does not fit into the memory of {device}: "
            f"try {max(1, config.train.micro_batch // 2)}; the batch and the results stay the same"
        ) from error
    except Exception as error:
        if not config.train.compile:
            raise
        reason = str(error).strip().split("\n")[0][:200]
        raise WorkError(
            f"torch.compile failed ({reason}): train with --train.no-compile, or see `gpt2 doctor`"
        ) from error
    finally:
        model.train()
    return time.perf_counter() - started


def accumulate_gradients(
    mean_loss: MeanLoss, x: np.ndarray, y: np.ndarray, accumulation: int, device: torch.device
) -> Tensor:
    """Adds the gradients of the whole batch's mean loss to the parameters; gives that loss, on the device.

    x, y: (windows, T) int64. Each of the `accumulation` micro-batches counts 1 / accumulation.
    """
    total = torch.zeros((), device=device)
    inputs, targets = torch.from_numpy(x).chunk(accumulation), torch.from_numpy(y).chunk(accumulation)
    for idx, target in zip(inputs, targets, strict=True):  # (micro_batch, T) each
        loss = mean_loss(to_device(idx, device), to_device(target, device)) / accumulation
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return total


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy that a GPU makes while the host goes on."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def decay_progress(config: Config, state: TrainingState) -> float:
    """The part of the learning rate's decay that lies behind: by time where the run has a time, else by steps."""
    if config.train.minutes:
        return state.train_seconds / (60 * config.train.minutes)
    return progress_by_steps(config.optim, state.step, config.train.steps)


def part_done(config: Config, state: TrainingState) -> float:
    """The part of the run that lies behind, 1 at its end: steps or minutes, whichever comes first."""
    by_steps = state.step / config.train.steps if config.train.steps else 0.0
    by_time = state.train_seconds / (60 * config.train.minutes) if config.train.minutes else 0.0
    return min(1.0, max(by_steps, by_time))


def due(step: int, every: int) -> bool:
    """Whether something that comes every `every` steps (0: never) comes after this many."""
    return every > 0 and step % every == 0


def check_finite(loss: float, run: Run, step: int) -> float:
    """The loss. Raises WorkError where it is infinite or NaN: going on would only spoil the weights."""
    if not np.isfinite(loss):
        raise WorkError(
            f"the loss is {loss} at step {step}: start again from the newest checkpoint in {run.path} "
            "with a lower optim.lr or a longer optim.warmup_steps in a new run"
        )
    return loss


def validate(mean_loss: MeanLoss, model: GPT, run: Run) -> LossResult:
    """The validation loss, without dropout."""
    config = run.config
    model.eval()
    result = evaluate_loss(
        mean_loss,
        run.dataset.split("val"),
        run.dataset.tokenizer,
        config.model.n_ctx,
        run.distributed.device,
        config.eval.batch,
        config.eval.windows,
    )
    model.train()
    return result


def note_validation(state: TrainingState, loss: float) -> TrainingState:
    """The state with this validation loss, and with how many validations have brought none lower."""
    if state.lowest_val_loss is None or loss < state.lowest_val_loss:
        return replace(state, val_loss=loss, lowest_val_loss=loss, stale_validations=0)
    return replace(state, val_loss=loss, stale_validations=state.stale_validations + 1)


def sample(model: GPT, run: Run, seed: int) -> str:
    """A continuation of the config's prompt. It has a generator of its own and leaves the run's alone."""
    model.eval()
    engine = Engine(model, run.dataset.tokenizer)
    text = engine.generate(run.config.eval.sample_prompt, max_tokens=run.config.eval.sample_tokens, seed=seed)
    model.train()
    return text


def save(run: Run, model: GPT, optimizers: list[torch.optim.Optimizer], state: TrainingState) -> TrainingState:
    """Writes a checkpoint and removes those that need not be kept; gives the state with the best step in it."""
    config = run.config
    if state.val_loss is not None and (state.best_val_loss is None or state.val_loss < state.best_val_loss):
        state = replace(state, best_step=state.step, best_val_loss=state.val_loss)
    training = {f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(model, optimizers).items()}
    training["random.cpu"] = torch.get_rng_state()
    if run.distributed.device.type == "cuda":
        training["random.cuda"] = torch.cuda.get_rng_state(run.distributed.device)
    write_checkpoint(run.path, config.model, model.state_dict(), run.dataset.tokenizer, training, state)
    keep_checkpoints(run.path, config.checkpoint.keep_last, state.best_step if config.checkpoint.keep_best else None)
    return state


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that receives the number of a SIGINT, SIGTERM or SIGUSR1; a second SIGINT leaves at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    names = [name for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]  # Windows has no SIGUSR1
    previous = {number: signal.signal(number, note) for number in (getattr(signal, name) for name in names)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def describe(run: Run, model: GPT, peak: float) -> dict[str, Any]:
    """Where the figures come from: for metrics.jsonl."""
    device = run.distributed.device
    return {
        "parameters": model.num_parameters(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "peak_flops": peak,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def introduction(run: Run, model: GPT, loader: BatchLoader, compile_seconds: float) -> str:
    """What is about to happen, in one paragraph."""
    config = run.config
    length = f"{config.train.steps:,} steps" if config.train.steps else f"{config.train.minutes:g} minutes"
    start = f"goes on from {run.checkpoint.name}" if run.checkpoint else "starts"
    return (
        f"{run.path} {start}: {model.num_parameters():,} parameters on {run.distributed.device}, "
        f"{config.train.precision}"
        f"{f', compiled in {compile_seconds:.0f} s' if config.train.compile else ''}\n"
        f"{length} of {config.train.batch_tokens:,} tokens = {config.batch_windows} windows x {config.model.n_ctx}, "
        f"micro-batch {config.train.micro_batch} x {config.accumulation()}; an epoch is "
        f"{loader.windows_per_epoch:,} windows, {loader.remainder} tokens are left out"
    )


def summary(run: Run) -> dict[str, Any]:
    """The last figures of a finished run, from its metrics."""
    last: dict[str, dict[str, Any]] = {event["event"]: event for event in read_metrics(run.path)}
    step, val, done = last.get("step", {}), last.get("val", {}), last.get("done", {})
    steps = done.get("step", step.get("step"))  # an early stop comes between two lines of metrics
    seconds = max((event["train_seconds"] for event in (step, val) if event), default=None)
    return {
        "run": str(run.path),
        "steps": steps,
        "train_loss": step.get("loss"),
        "val_loss": val.get("loss"),
        "bits_per_byte": val.get("bits_per_byte"),
        "tokens_per_second": run.config.train.batch_tokens * steps / seconds if steps and seconds else None,
        "train_seconds": seconds,
        "evaluation_seconds": done.get("evaluation_seconds"),
        "compile_seconds": done.get("compile_seconds"),
    }

"""The training loop: batches in, checkpoints out. `train` reads from top to bottom; its parts follow in order of use.

run ─ model, optimizers, state ─ for each step:
    learning rate ─ micro-batches: forward, backward ─ clip ─ update or skip ─ log ─ validate ─ sample ─ save
"""

import ctypes
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt2.checkpoint.directory import TrainingState, list_checkpoints, read_checkpoint, state_from_dict, step_of
from gpt2.config import Config
from gpt2.data.loader import BatchLoader, prefetch
from gpt2.distributed import Distributed, explained
from gpt2.errors import WorkError
from gpt2.evaluation.hellaswag import HellaSwagResult, Items, evaluate_hellaswag
from gpt2.evaluation.loss import LossResult, evaluate_loss
from gpt2.inference.engine import Engine
from gpt2.model import GPT, flops_per_token
from gpt2.training.guard import after_bad_step, after_good_step, after_rollback, bad_step
from gpt2.training.metrics import Metrics, read_metrics, start_at
from gpt2.training.optim import build_optimizers, load_optimizer_tensors, optimizer_tensors, set_learning_rate
from gpt2.training.parallel import TrainingNetwork, share_of, whole
from gpt2.training.peak import device_peak
from gpt2.training.run import Run, hellaswag_items
from gpt2.training.saver import OPTIMIZER, WEIGHTS, Saver
from gpt2.training.schedule import learning_rate_factor, progress_by_steps
from gpt2.training.settings import settings_kept

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


class Stopped(Exception):
    """A signal stopped the run, which is saved. `signal` is its number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}: the run is saved")
        self.signal = number


@settings_kept()
def train(run: Run, quiet: bool = False) -> dict[str, Any]:
    """Trains to the end of the run; gives its last figures by the names of the command line.

    Raises Stopped after saving where a signal asks for it; WorkError where the loss stays bad, the memory does not
    suffice, another process is gone or a checkpoint that must be written cannot be.
    """
    config, distributed = run.config, run.distributed
    device = distributed.device
    set_numerics(config, device)
    model, weights, state = load_weights(run)
    network = TrainingNetwork(model, config, distributed)
    optimizers = load_optimizers(run, model, weights)
    if distributed.is_main:
        start_at(run.path, state.step)
    if state.finished:
        return distributed.on_main(lambda: summary(run))

    loader = BatchLoader(run.dataset.split("train"), config.model.n_ctx, config.batch_windows, config.train.seed)
    windows = config.windows_per_process(distributed.world_size)
    micro_batch = choose_micro_batch(network, model, config, distributed)
    flops, peak = flops_per_token(config.model), device_peak(device, config.train.precision) * distributed.world_size
    metrics = Metrics(run, quiet)
    items = hellaswag_items(config, run.dataset)
    evaluation_seconds, first, saved_at = 0.0, state.step, state.train_seconds

    with (
        explained(config.train.collective_timeout),
        metrics,
        Saver(run) as saver,
        stop_signals() as stop,
        closing(prefetch(loader, state.step, first=distributed.rank * windows, count=windows)) as batches,
    ):
        compile_seconds = warm_up(network, model, config, distributed, micro_batch)
        metrics.event("start", state.step, compile_seconds=compile_seconds, **describe(run, model, peak, micro_batch))
        metrics.say(introduction(run, model, loader, compile_seconds, micro_batch))
        logged, clock = state, time.perf_counter()
        for step, x, y in batches:  # x, y: (windows of this process, n_ctx) int64
            factor = learning_rate_factor(config.optim, step, decay_progress(config, state))
            set_learning_rate(optimizers, factor)
            seed_dropout(config.train.seed, step, distributed.rank)
            loss = accumulate_gradients(network, x, y, windows // micro_batch, distributed, stop)
            if loss is None:  # stopped between two micro-batches: the weights are those of the step before
                save(saver, model, optimizers, state, metrics)
                metrics.events("checkpoint", saver.finish())
                raise Stopped(agreed_signal(stop, distributed))

            norm = clip_gradients(model, config.optim.grad_clip)
            loss = distributed.mean(loss)
            bad = bad_step(config.guard, state, loss.item(), norm)
            if bad is None:
                for optimizer in optimizers:
                    optimizer.step()
                state = after_good_step(config.guard, state, loss.item())
            else:
                state = after_bad_step(state, step)
                windows_of_step = loader.window_ids(step).tolist()
                metrics.event("skip", step + 1, reason=bad, windows=windows_of_step, loss=loss.item(), grad_norm=norm)
                metrics.say(f"step {step + 1} is skipped: {bad}")
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)

            state = replace(state, step=step + 1, val_loss=None)
            if step == first:
                saver.allocate(named_tensors(model, optimizers))  # this step has made the optimizer's state
            seconds = state.train_seconds + time.perf_counter() - clock
            state = replace(state, train_seconds=distributed.max([seconds])[0])  # one clock for all
            if state.bad_in_row > config.guard.skips:
                saver.wait()
                state = roll_back(run, model, optimizers, state, bad)
                metrics.event("rollback", state.step, checkpoint=state.rolled_back_to[-1])
                metrics.say(f"step {state.step}: back to the weights of step {state.rolled_back_to[-1]}")
            finished = part_done(config, state) >= 1.0

            if (due(state.step, config.log.every) or finished) and bad is None:
                tokens = config.train.batch_tokens * (state.step - logged.step)
                speed = tokens / (state.train_seconds - logged.train_seconds)
                figures = {
                    "loss": loss.item(),
                    "lr": config.optim.lr * factor,
                    "grad_norm": norm,
                    "tokens_per_second": speed,
                    "mfu": speed * flops / peak,
                    "train_seconds": state.train_seconds,
                }
                metrics.step(state.step, part_done(config, state), figures)
                logged = state

            saves = due(state.step, config.checkpoint.every)
            saves = saves or 0 < 60 * config.checkpoint.minutes <= state.train_seconds - saved_at
            saves = finished or (saves and bad is None)  # a skipped step has made nothing new
            if run.dataset.has_split("val") and (saves or due(state.step, config.eval.every)):
                result = validate(network, model, run)
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
            if items is not None and (finished or due(state.step, config.eval.hellaswag_every)):
                scores = hellaswag(network, model, run, items)
                evaluation_seconds += scores.seconds
                metrics.event("hellaswag", state.step, **scores.to_dict())
                metrics.say(f"step {state.step}  HellaSwag: acc {scores.acc:.4f}, acc_norm {scores.acc_norm:.4f}")
            if due(state.step, config.eval.sample_every) and (distributed.is_main or network.sharded):
                text = sample(model, run, seed=state.step)
                metrics.event("sample", state.step, prompt=config.eval.sample_prompt, text=text)
                metrics.say(f"step {state.step}  sample: {config.eval.sample_prompt}{text}")
            if saves:
                state = note_best(replace(state, finished=finished))
                save(saver, model, optimizers, state, metrics)
                saved_at = state.train_seconds
            metrics.events("checkpoint", saver.finish() if finished else saver.finished())
            if finished:
                metrics.event(
                    "done", state.step, compile_seconds=compile_seconds, evaluation_seconds=evaluation_seconds
                )
                break
            clock = time.perf_counter()
    return distributed.on_main(lambda: summary(run))


def set_numerics(config: Config, device: torch.device) -> None:
    """Precision of float32 matmuls; on a CPU, algorithms that give the same bits in every run."""
    torch.set_float32_matmul_precision(config.train.matmul_precision)
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it only costs time
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Tells glibc to keep large freed blocks for the next step instead of giving them back to the system.

    Otherwise every step's large tensors are fresh pages, each of which costs a fault and is zeroed first.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "gnu_get_libc_version"):
            library.mallopt(M_MMAP_MAX, 0)
            library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def load_weights(run: Run) -> tuple[GPT, dict[str, Tensor], TrainingState]:
    """The model on the host as the run's checkpoint holds it, or as a new run starts; what else is in the
    checkpoint (on rank 0); the state. Rank 0 reads, the others receive."""
    config, distributed = run.config, run.distributed
    torch.manual_seed(config.train.seed)
    model = GPT(config.model)
    weights: dict[str, Tensor] | None = None
    training: dict[str, Tensor] = {}
    state = TrainingState()
    if run.checkpoint is not None:
        if distributed.is_main:
            weights, training, state = read_checkpoint(run.checkpoint, config.model)
        state = state_from_dict(distributed.on_main(lambda: asdict(state)))
    elif config.train.init_from:
        if distributed.is_main:
            weights = GPT.from_pretrained(run.initial_weights()).state_dict()
    else:
        return model, training, state
    parameters = model.state_dict()
    for name, tensor in distributed.tensors_from_main(weights):
        parameters[name].copy_(tensor)
    return model, training, state


def load_optimizers(run: Run, model: GPT, training: dict[str, Tensor]) -> list[torch.optim.Optimizer]:
    """The optimizers, with the moments that rank 0 has read from the checkpoint."""
    optimizers = build_optimizers(model, run.config.optim)
    if run.checkpoint is not None:
        moments = {n.removeprefix(OPTIMIZER): t for n, t in training.items() if n.startswith(OPTIMIZER)}
        load_optimizer_tensors(model, optimizers, run.distributed.tensors_from_main(moments))
    return optimizers


def named_tensors(model: GPT, optimizers: list[torch.optim.Optimizer]) -> list[tuple[str, Tensor]]:
    """All that a checkpoint holds, by the names of the saver."""
    weights = [(WEIGHTS + name, parameter) for name, parameter in model.named_parameters()]
    return weights + [(OPTIMIZER + name, t) for name, t in optimizer_tensors(model, optimizers).items()]


def choose_micro_batch(network: TrainingNetwork, model: GPT, config: Config, distributed: Distributed) -> int:
    """Windows at once: the largest that divide this process's windows and are at most train.micro_batch.

    auto: on a GPU the largest that fit, tried from the smallest up; elsewhere 8,192 tokens, as more gains nothing.
    """
    if config.train.micro_batch != "auto":
        return config.largest_micro_batch(config.train.micro_batch, distributed.world_size)
    fits = config.largest_micro_batch(8192 // config.model.n_ctx, distributed.world_size)
    if distributed.device.type != "cuda":
        return fits
    fits = 0
    # The optimizer's state, which does not exist yet, must fit as well.
    held = [torch.zeros_like(p) for p in model.parameters() for _ in range(2)]
    for micro_batch in config.micro_batches(distributed.world_size):
        fitted = 1.0
        try:
            one_pass(network, model, config, distributed, micro_batch)
        except torch.OutOfMemoryError:
            fitted = 0.0
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        if distributed.sum([fitted])[0] < distributed.world_size:  # what one cannot, none shall
            break
        fits = micro_batch
    del held
    if not fits:
        raise WorkError(
            f"not one window of {config.model.n_ctx} tokens fits into the memory of {distributed.device}: "
            "try --model.recompute, or --train.parallel fsdp on more GPUs"
        )
    return fits


def one_pass(network: TrainingNetwork, model: GPT, config: Config, distributed: Distributed, micro_batch: int) -> None:
    """Forward and backward over zeros. Leaves gradients, which the caller drops."""
    idx = torch.zeros(micro_batch, config.model.n_ctx, dtype=torch.int64, device=distributed.device)
    model.train()
    with network.micro_step(last=True):
        network(idx, idx.clone()).backward()  # type: ignore[no-untyped-call]  # not idx twice: the compiler would count on it


def warm_up(network: TrainingNetwork, model: GPT, config: Config, distributed: Distributed, micro_batch: int) -> float:
    """One pass of each shape that training and validation use, so that no step waits for the compiler; seconds.

    Leaves weights and gradients as they were. Raises WorkError where memory or compiler fail.
    """
    started, device = time.perf_counter(), distributed.device
    try:
        one_pass(network, model, config, distributed, micro_batch)
        model.zero_grad(set_to_none=True)
        if config.train.compile:
            model.eval()
            idx = torch.zeros(config.eval.batch, config.model.n_ctx, dtype=torch.int64, device=device)
            with torch.no_grad():
                network(idx, idx.clone())
    except torch.OutOfMemoryError as error:
        raise WorkError(
            f"train.micro_batch = {micro_batch} does not fit into the memory of {device}: try "
            f"{config.largest_micro_batch(micro_batch // 2, distributed.world_size)}, or auto; "
            "the batch and the results stay the same"
        ) from error
    except Exception as error:
        if not config.train.compile or distributed.world_size > 1:
            raise
        reason = str(error).strip().split("\n")[0][:200]
        raise WorkError(
            f"torch.compile failed ({reason}): train with --train.no-compile, or see `gpt2 doctor`"
        ) from error
    finally:
        model.train()
    return time.perf_counter() - started


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Dropout's random numbers are a function of (seed, step, rank): a resumed run needs no state of a generator."""
    words = np.random.SeedSequence([seed, step, rank]).generate_state(2)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))


def accumulate_gradients(
    network: TrainingNetwork,
    x: np.ndarray,
    y: np.ndarray,
    accumulation: int,
    distributed: Distributed,
    stop: Sequence[int] = (),
) -> Tensor | None:
    """Adds the gradients of the batch's mean loss to the parameters; gives that loss over this process's windows.

    x, y: (windows, T) int64. Each of the `accumulation` micro-batches counts 1 / accumulation; the processes add
    their gradients in the last one. None where a signal came to any process: then the gradients are not whole.
    """
    total = torch.zeros((), device=distributed.device)
    inputs, targets = torch.from_numpy(x).chunk(accumulation), torch.from_numpy(y).chunk(accumulation)
    for i, (idx, target) in enumerate(zip(inputs, targets, strict=True)):  # (micro_batch, T) each
        if agreed_signal(stop, distributed):
            return None
        with network.micro_step(last=i == accumulation - 1):
            loss = network(to_device(idx, distributed.device), to_device(target, distributed.device)) / accumulation
            loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return total


def agreed_signal(stop: Sequence[int], distributed: Distributed) -> int:
    """The number of a signal that any process has received, in all of them; 0 for none."""
    return int(distributed.max([stop[0] if stop else 0])[0])


def clip_gradients(model: GPT, largest: float) -> float:
    """Scales the gradient down to the global norm `largest` (0: leaves it); gives the norm it had."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), largest or float("inf"))
    return whole(norm).item()


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


def roll_back(
    run: Run, model: GPT, optimizers: list[torch.optim.Optimizer], state: TrainingState, bad: str | None
) -> TrainingState:
    """Weights and optimizer state of the last checkpoint, at the present step. Never twice of the same checkpoint.

    Raises WorkError where the config or the checkpoints do not allow it.
    """
    guard, distributed = run.config.guard, run.distributed
    said = f"{bad} at step {state.step}, after {guard.skips} skipped steps in a row"
    mend = "start a new run with a lower optim.lr or a longer optim.warmup_steps"
    if guard.then == "stop":
        raise WorkError(f"{said}: {mend}, or see guard.then")
    if len(state.rolled_back_to) >= guard.rollbacks:
        raise WorkError(f"{said}, and the run has gone back {guard.rollbacks} times already: {mend}")
    weights: dict[str, Tensor] | None = None
    moments: dict[str, Tensor] | None = None
    checkpoint = TrainingState()

    def read() -> dict[str, Any]:
        nonlocal weights, moments, checkpoint
        older = [path for path in list_checkpoints(run.path) if step_of(path) not in state.rolled_back_to]
        for path in reversed(older):
            try:
                weights, training, checkpoint = read_checkpoint(path, run.config.model)
            except WorkError:
                continue
            moments = {n.removeprefix(OPTIMIZER): t for n, t in training.items() if n.startswith(OPTIMIZER)}
            return asdict(checkpoint)
        raise WorkError(f"{said}, and there is no checkpoint to go back to: {mend}")

    checkpoint = state_from_dict(distributed.on_main(read))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, tensor in distributed.tensors_from_main(weights):
            parameters[name].copy_(share_of(tensor, parameters[name]))
    load_optimizer_tensors(model, optimizers, distributed.tensors_from_main(moments))
    return after_rollback(state, checkpoint)


def validate(network: TrainingNetwork, model: GPT, run: Run) -> LossResult:
    """The validation loss, without dropout; the processes share the windows."""
    config = run.config
    model.eval()
    result = evaluate_loss(
        network,
        run.dataset.split("val"),
        run.dataset.tokenizer,
        config.model.n_ctx,
        run.distributed,
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


def note_best(state: TrainingState) -> TrainingState:
    """The state of a step that is saved, as the best where its validation loss is the lowest of the saved ones."""
    if state.val_loss is not None and (state.best_val_loss is None or state.val_loss < state.best_val_loss):
        state = replace(state, best_step=state.step, best_val_loss=state.val_loss)
    return state


def hellaswag(network: TrainingNetwork, model: GPT, run: Run, items: Items) -> HellaSwagResult:
    """The HellaSwag score, without dropout. The processes share the items, unless each needs the others to compute."""
    config, distributed = run.config, run.distributed
    shared = not network.sharded
    rank, world_size = (distributed.rank, distributed.world_size) if shared else (0, 1)
    scores = evaluate_hellaswag(
        model, items, config.model.n_ctx, distributed.device, rank, world_size, precision=config.train.precision
    )
    if not shared:
        return scores
    counts = distributed.sum(
        [scores.items, scores.correct, scores.correct_norm, scores.contexts_cut, scores.endings_cut]
    )
    number, correct, correct_norm, contexts_cut, endings_cut = map(int, counts)
    return HellaSwagResult(number, correct, correct_norm, contexts_cut, endings_cut, scores.seconds)


def sample(model: GPT, run: Run, seed: int) -> str:
    """A continuation of the config's prompt. It has a generator of its own and leaves the run's alone."""
    model.eval()
    engine = Engine(model, run.dataset.tokenizer)
    text = engine.generate(run.config.eval.sample_prompt, max_tokens=run.config.eval.sample_tokens, seed=seed)
    model.train()
    return text


def save(
    saver: Saver, model: GPT, optimizers: list[torch.optim.Optimizer], state: TrainingState, metrics: Metrics
) -> None:
    """Starts writing a checkpoint; notes how long training stood still for it."""
    seconds = saver.save(state, named_tensors(model, optimizers))
    metrics.event("save", state.step, stopped_seconds=seconds)


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


def describe(run: Run, model: GPT, peak: float, micro_batch: int) -> dict[str, Any]:
    """Where the figures come from: for metrics.jsonl."""
    device = run.distributed.device
    return {
        "parameters": model.num_parameters(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "peak_flops": peak,
        "processes": run.distributed.world_size,
        "micro_batch": micro_batch,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def introduction(run: Run, model: GPT, loader: BatchLoader, compile_seconds: float, micro_batch: int) -> str:
    """What is about to happen, in one paragraph."""
    config = run.config
    length = f"{config.train.steps:,} steps" if config.train.steps else f"{config.train.minutes:g} minutes"
    start = f"goes on from {run.checkpoint.name}" if run.checkpoint else "starts"
    processes = run.distributed.world_size
    accumulation = config.windows_per_process(processes) // micro_batch
    return (
        f"{run.path} {start}: {model.num_parameters():,} parameters on "
        f"{f'{processes} x ' if processes > 1 else ''}{run.distributed.device.type}, {config.train.precision}"
        f"{f', compiled in {compile_seconds:.0f} s' if config.train.compile else ''}\n"
        f"{length} of {config.train.batch_tokens:,} tokens = {config.batch_windows} windows x {config.model.n_ctx} = "
        f"micro-batch {micro_batch} x {accumulation}{f' x {processes} processes' if processes > 1 else ''}; "
        f"an epoch is {loader.windows_per_epoch:,} windows, {loader.remainder} tokens are left out"
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

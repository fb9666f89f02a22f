"""What a training run will take before it is started: memory, tokens a second, hours, dollars, communication.

The model, for n GPUs, N parameters, L layers of width C, a vocabulary of V, b windows of T tokens at once, and
a = 2 bytes a number in bfloat16 (4 in float32):

Memory of a GPU, in bytes
    weights 4 N, gradients 4 N, moments 8 N (AdamW; Muon keeps 4 for each weight of the blocks' matrices);
    copies of the weights in bfloat16 a N; FSDP divides weights, gradients and moments by n and holds instead of the
    copies two blocks' gathered weights, one block's gradients, and the embedding with its gradient;
    activations b T (4 C + L C (8 + 14 a) + 4 L nh): in each block the two inputs of the layer norms in float32, the
    outputs of the norms (2 C), q, k and v (3 C), attention's output (C), and the MLP's width before and after GELU
    (8 C); recomputed, only the blocks' inputs, 4 L C, and one block's activations; explicit attention holds two
    (T, T) matrices a head besides (Korthikanti et al. 2022, section 4, without dropout and with flash attention);
    logits b T V (2 a + 4): they, their gradient, and the loss's float32.
    USABLE of the card's memory is counted on, the rest is CUDA's and lost between blocks.

Time of a step
    A micro-step takes b T (F / (share x peak) + traffic / bandwidth) + 16 N / bandwidth.
    F is `gpt2.model.flops_per_token` (recomputing adds the blocks' forward pass), share the part of the peak that
    matmuls reach on that kind of card. Traffic is what goes through memory between the matmuls, fused as the compiler
    does it: a (48 L C + 5 V) bytes a token (in a block 16 C forward: norms and residuals 8, GELU 8; twice that
    backward). 16 N is each weight's cast and each gradient's addition. The update goes through 40 N (/ n when sharded).

Communication, in bytes through each GPU's link
    DDP: one ring all-reduce a step, 2 (n - 1) / n x gradient bytes, overlapped with the last micro-step's backward
    pass (two thirds of it), but for the last bucket of BUCKET bytes, which nothing is left to hide.
    FSDP: every micro-step gathers the weights for forward and again for backward and scatters the gradients,
    (n - 1) / n x (2 a + gradient bytes) N, overlapped with the micro-step but for one block's.
    Each collective waits log2(n) x LATENCY (all-reduce twice that). The bandwidth is NVLink's (or PCIe's) up to
    HOST_GPUS, beyond that at most the host's network: the ring leaves each host once. REACHED is what is reached of
    every bandwidth of a data sheet.

The batch is the config's whatever n is: windows that n does not divide cannot be trained on n GPUs. Evaluation, saving,
start-up and the launching of kernels (which counts for models as small as the demo's) are left out. `PUBLISHED` holds
the figures that the model is checked on; the shares of A100 and H100 are fitted to them (two numbers, six figures),
those of the other cards are assumed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from gpt2.config import Config, GPTConfig, preset
from gpt2.errors import RequestError
from gpt2.model import flops_per_token
from gpt2.training.peak import card_peak

GB, GBIT = 1e9, 1e9 / 8
HOST_GPUS = 8
USABLE = 0.9
REACHED = 0.8
LATENCY = 10e-6
SIMPLER = 1.05
BUCKET = 25 * 2**20  # DDP's bucket_cap_mb

Sharding = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class Gpu:
    """A kind of card in the host it usually comes in."""

    card: str
    """Its name in `gpt2.training.peak.CARDS`, which has the peaks."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Of that memory, bytes a second."""
    link: float
    """Between the GPUs of a host, bytes a second each way: NVLink, or else PCIe."""
    network: float
    """Between hosts of eight, bytes a second each way, the whole host's."""
    dollars: float
    """An hour, on demand: what is typical; `--price` changes it."""
    share: float
    """Of the peak, what matmuls reach in training."""
    fitted: bool = False
    """Whether the share was fitted to published figures; else it is assumed."""
    bf16: bool = True
    """Whether it multiplies bfloat16; else training is in float32."""


# Memory, its bandwidth and the link: NVIDIA's data sheets (A100, H100, H200, HGX B200, L4, L40S, A10, V100, T4, GeForce
# RTX 4090); 24 GB cards, L40S and T4 have PCIe alone (4.0 x16; T4 3.0). Network: DGX A100 8 x 200 Gbit/s, DGX H100,
# H200 and B200 8 x 400; AWS p4d (A100-40) 400, g6e 400, g5, g6, g4dn and p3dn 100; 25 for a server of RTX 4090s.
# Dollars: list prices of 2024 and 2025, rounded: llm.c's scripts (8 x A100 at 14 and 8 x H100 at 28 an hour), Lambda
# (A100-40, B200, V100), RunPod (H200, 4090), AWS's smallest instance with the card (L4 g6, L40S g6e, A10G g5, T4 g4dn).
GPUS: Mapping[str, Gpu] = {
    "A100-40": Gpu("A100", 40 * GB, 1555 * GB, 300 * GB, 400 * GBIT, 1.29, 0.66, fitted=True),
    "A100-80": Gpu("A100", 80 * GB, 2039 * GB, 300 * GB, 1600 * GBIT, 1.75, 0.66, fitted=True),
    "H100": Gpu("H100", 80 * GB, 3350 * GB, 450 * GB, 3200 * GBIT, 3.50, 0.54, fitted=True),
    "H200": Gpu("H200", 141 * GB, 4800 * GB, 450 * GB, 3200 * GBIT, 3.99, 0.54),
    "B200": Gpu("B200", 180 * GB, 8000 * GB, 900 * GB, 3200 * GBIT, 4.99, 0.50),
    "L40S": Gpu("L40S", 48 * GB, 864 * GB, 32 * GB, 400 * GBIT, 1.86, 0.50),
    "L4": Gpu("L4", 24 * GB, 300 * GB, 32 * GB, 100 * GBIT, 0.80, 0.45),
    "4090": Gpu("RTX 4090", 24 * GB, 1008 * GB, 32 * GB, 25 * GBIT, 0.69, 0.80),
    "A10G": Gpu("A10G", 24 * GB, 600 * GB, 32 * GB, 100 * GBIT, 1.01, 0.65),
    "V100": Gpu("V100", 16 * GB, 900 * GB, 150 * GB, 100 * GBIT, 0.55, 0.80, bf16=False),
    "T4": Gpu("T4", 16 * GB, 320 * GB, 16 * GB, 100 * GBIT, 0.53, 0.50, bf16=False),
}


@dataclass(frozen=True)
class Published:
    """A figure that others measured."""

    source: str
    preset: str
    gpu: str
    gpus: int
    tokens_per_second: float


# llm.c has seconds a step at the head of its scripts/run_gpt2_*.sh: of 524,288 tokens, for 1558M of 1,048,576.
PUBLISHED: Sequence[Published] = (
    Published("build-nanogpt, the lecture: ~185k tok/s", "gpt2-124m", "A100-80", 1, 185_000),
    Published("llm.c: 1.75M tok/s, 60 % MFU", "gpt2-124m", "A100-80", 8, 1_750_000),
    Published("llm.c: 10 B tokens in 45 minutes", "gpt2-124m", "H100", 8, 10e9 / (45 * 60)),
    Published("llm.c, run_gpt2_350M.sh: 820 ms a step", "gpt2-350m", "A100-80", 8, 524_288 / 0.82),
    Published("llm.c, run_gpt2_774M.sh: 1.7 s a step", "gpt2-774m", "A100-80", 8, 524_288 / 1.7),
    Published("llm.c, run_gpt2_1558M.sh: 2.80 s a step", "gpt2-1558m", "H100", 8, 1_048_576 / 2.80),
)


@dataclass(frozen=True)
class Plan:
    """What a number of GPUs will do with a config."""

    gpus: int
    fits: bool
    """Whether it can be trained; else `why` says what hinders, and the times are NaN (None in JSON)."""
    why: str = ""
    sharding: Sharding = "ddp"
    micro_batch: int = 0
    """Windows at once on a GPU."""
    accumulation: int = 0
    """Micro-steps a step."""
    memory: Mapping[str, float] = field(default_factory=dict)
    """Bytes on each GPU: weights, gradients, moments, copies, activations, logits."""
    step_seconds: float = math.nan
    compute_seconds: float = math.nan
    """Of a step: micro-steps and update."""
    communication_seconds: float = math.nan
    """Of a step: what the collectives take, hidden or not."""
    exposed_seconds: float = math.nan
    """Of a step: what of it nothing hides."""
    communication_bytes: float = math.nan
    """Of a step, through each GPU's link."""
    tokens_per_second: float = math.nan
    mfu: float = math.nan
    """Model FLOPS utilisation by the PaLM count."""
    hours: float = math.nan
    dollars: float = math.nan

    @property
    def memory_total(self) -> float:
        """Bytes on each GPU."""
        return sum(self.memory.values())

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = {**asdict(self), "memory": dict(self.memory), "memory_total": self.memory_total}
        return {name: None if value != value else value for name, value in values.items()}


def find_gpu(kind: str) -> Gpu:
    """The kind of that name, upper or lower case. Raises RequestError with the known ones."""
    for name, gpu in GPUS.items():
        if name.lower() == kind.lower():
            return gpu
    raise RequestError(f"there is no GPU kind {kind!r} in the table: known are {', '.join(GPUS)}")


def parameters(config: GPTConfig) -> int:
    """All that is held, the vocabulary's padding too."""
    C = config.n_embd
    heads = 1 if config.tie_embeddings else 2
    return heads * config.padded_vocab_size * C + config.n_ctx * C + config.n_layer * block_parameters(C) + 2 * C


def block_parameters(C: int) -> int:
    """c_attn 3C² + 3C, c_proj C² + C, MLP 8C² + 5C, two layer norms 4C."""
    return 12 * C * C + 13 * C


def number_bytes(config: Config, gpu: Gpu) -> int:
    """Of an activation: 2 in bfloat16, 4 in float32. Raises RequestError for bfloat16 on a card without it."""
    if config.train.precision == "bf16" and not gpu.bf16:
        raise RequestError(f"{gpu.card} does not multiply bfloat16: leave train.precision at auto or fp32")
    return 4 if config.train.precision == "fp32" or not gpu.bf16 else 2


def activation_bytes(config: GPTConfig, a: int, recompute: bool = False) -> float:
    """What one token leaves for the backward pass, without the logits."""
    L, C, nh, T = config.n_layer, config.n_embd, config.n_head, config.n_ctx
    block = C * (8 + 14 * a) + 4 * nh
    if config.attention == "explicit":
        block += 2 * a * nh * T
    return 4 * C + (4 * L * C + block if recompute else L * block)


def memory_parts(
    config: Config, gpu: Gpu, gpus: int, micro_batch: int, sharding: Sharding, recompute: bool = False
) -> dict[str, float]:
    """Bytes on each GPU, by what they hold."""
    model, a = config.model, number_bytes(config, gpu)
    N, C, V = parameters(model), model.n_embd, model.padded_vocab_size
    moments = 8 * N - (4 * 12 * model.n_layer * C * C if config.optim.optimizer == "muon" else 0)
    tokens, shards = micro_batch * model.n_ctx, gpus if sharding == "fsdp" else 1
    gathered = (2 * a + 4) * block_parameters(C) + (a + 4) * V * C
    return {
        "weights": 4 * N / shards,
        "gradients": 4 * N / shards,
        "moments": moments / shards,
        "copies": float(gathered if shards > 1 else a * N if a < 4 else 0),
        "activations": tokens * activation_bytes(model, a, recompute),
        "logits": float(tokens * V * (2 * a + 4)),
    }


def largest_micro_batch(config: Config, gpu: Gpu, gpus: int, sharding: Sharding, recompute: bool = False) -> int:
    """The largest divisor of a GPU's windows that fits into its memory; 0 where not even one window does."""
    windows, room = config.batch_windows // gpus, USABLE * gpu.memory
    fitting = (
        m
        for m in range(windows, 0, -1)
        if windows % m == 0 and sum(memory_parts(config, gpu, gpus, m, sharding, recompute).values()) <= room
    )
    return next(fitting, 0)


def make_plan(
    config: Config,
    gpu: Gpu,
    gpus: int,
    sharding: Sharding | Literal["auto"] = "auto",
    micro_batch: int = 0,
    gradient_bytes: int = 4,
    recompute: bool = False,
) -> Plan:
    """The plan for that many GPUs, by the model in the module's docstring.

    sharding: auto takes DDP unless FSDP fits alone or is faster by the factor SIMPLER. micro_batch: 0 takes the
    largest that fits. gradient_bytes: of one gradient as it travels, 4 or 2. Raises RequestError for what no number
    of GPUs could do.
    """
    if sharding == "auto":
        kinds: tuple[Sharding, ...] = ("ddp", "fsdp") if gpus > 1 else ("ddp",)
        plans = [make_plan(config, gpu, gpus, kind, micro_batch, gradient_bytes, recompute) for kind in kinds]
        handicap = {"ddp": 1.0, "fsdp": SIMPLER}
        return min(plans, key=lambda plan: handicap[plan.sharding] * plan.step_seconds if plan.fits else math.inf)

    windows = config.batch_windows
    if windows % gpus:
        return Plan(gpus, False, f"the {windows} windows of a step cannot be shared by {gpus} GPUs", sharding)
    largest = largest_micro_batch(config, gpu, gpus, sharding, recompute)
    b = micro_batch or largest or 1
    memory = memory_parts(config, gpu, gpus, b, sharding, recompute)
    if windows % (b * gpus):
        return Plan(gpus, False, f"micro-batch {b} does not divide the {windows // gpus} windows of a GPU", sharding)
    if b > largest:
        short = f"{sum(memory.values()) / GB:.1f} GB of {USABLE * gpu.memory / GB:.1f} at micro-batch {b}"
        return Plan(gpus, False, f"does not fit: {short}", sharding, b, windows // (b * gpus), memory)

    accumulation = windows // (b * gpus)
    micro, update = step_parts(config, gpu, gpus if sharding == "fsdp" else 1, b, recompute)
    traffic, communication, exposed = communication_parts(
        config, gpu, gpus, sharding, micro, accumulation, gradient_bytes
    )
    compute = accumulation * micro + update
    step = compute + exposed
    speed = config.train.batch_tokens / step
    seconds = step * config.train.steps if config.train.steps else math.inf
    if config.train.minutes:
        seconds = min(seconds, 60 * config.train.minutes)
    return Plan(
        gpus=gpus,
        fits=True,
        sharding=sharding,
        micro_batch=b,
        accumulation=accumulation,
        memory=memory,
        step_seconds=step,
        compute_seconds=compute,
        communication_seconds=communication,
        exposed_seconds=exposed,
        communication_bytes=traffic,
        tokens_per_second=speed,
        mfu=speed * flops_per_token(config.model) / (gpus * peak(config, gpu)),
        hours=seconds / 3600,
        dollars=seconds / 3600 * gpus * gpu.dollars,
    )


def peak(config: Config, gpu: Gpu) -> float:
    """The card's dense peak in FLOP/s, in the precision it will train in (float32 by TF32 where it has it)."""
    known = card_peak(gpu.card, "bf16" if number_bytes(config, gpu) == 2 else "fp32")
    assert known is not None, gpu.card
    return known


def step_parts(config: Config, gpu: Gpu, shards: int, micro_batch: int, recompute: bool) -> tuple[float, float]:
    """Seconds of one micro-step and of the update."""
    model, a = config.model, number_bytes(config, gpu)
    L, C, V, N = model.n_layer, model.n_embd, model.padded_vocab_size, parameters(model)
    tokens, bandwidth = micro_batch * model.n_ctx, REACHED * gpu.bandwidth
    flops = flops_per_token(model)
    if recompute:
        flops += (flops - 6 * model.vocab_size * C) / 3
    elementwise = a * (48 * L * C + 5 * V)
    if model.attention == "explicit":
        elementwise += 12 * a * L * model.n_head * model.n_ctx  # the (T, T) matrices, each read and written
    micro = tokens * (flops / (gpu.share * peak(config, gpu)) + elementwise / bandwidth) + 16 * N / bandwidth
    return micro, 40 * N / shards / bandwidth


def communication_parts(
    config: Config, gpu: Gpu, gpus: int, sharding: Sharding, micro: float, accumulation: int, gradient_bytes: int
) -> tuple[float, float, float]:
    """Of a step: bytes through each GPU's link, seconds that they take, and seconds of these that nothing hides.

    micro: seconds of a micro-step.
    """
    if gpus == 1:
        return 0.0, 0.0, 0.0
    N, hops, ring = parameters(config.model), math.log2(gpus), (gpus - 1) / gpus
    link = REACHED * (gpu.link if gpus <= HOST_GPUS else min(gpu.link, gpu.network))
    if sharding == "ddp":
        buckets = math.ceil(4 * N / BUCKET)
        traffic = 2 * ring * gradient_bytes * N
        seconds = traffic / link + 2 * buckets * hops * LATENCY
        return traffic, seconds, max(seconds - micro * 2 / 3, seconds / buckets)
    traffic = ring * (2 * number_bytes(config, gpu) + gradient_bytes) * N
    seconds = traffic / link + 3 * (config.model.n_layer + 1) * hops * LATENCY
    exposed = max(seconds - micro, seconds / (config.model.n_layer + 1))
    return traffic * accumulation, seconds * accumulation, exposed * accumulation


def check_published() -> list[tuple[Published, float]]:
    """Each published figure with predicted ÷ published."""
    result = []
    for figure in PUBLISHED:
        plan = make_plan(preset(figure.preset), find_gpu(figure.gpu), figure.gpus)
        result.append((figure, plan.tokens_per_second / figure.tokens_per_second))
    return result


def plot_plans(plans: Sequence[Plan], path: Path, title: str) -> None:
    """Draws tokens a second with the straight line of no loss (left), hours and dollars (right), against GPUs.

    plans: of several numbers of GPUs; those that do not fit are left out. Writes a PNG of 1,800 x 810 pixels.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullLocator

    fitting = [plan for plan in plans if plan.fits]
    counts = [plan.gpus for plan in fitting]
    speeds = [plan.tokens_per_second for plan in fitting]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.4), dpi=150)
    left.plot(counts, [speeds[0] * n / counts[0] for n in counts], color="#bbbbbb", linestyle="--", label="no loss")
    left.plot(counts, speeds, color="#1f5a94", marker="o", markersize=4, linewidth=2, label="expected")
    left.set_ylabel("tokens a second")
    right.plot(counts, [plan.hours for plan in fitting], color="#1f5a94", marker="o", markersize=4, linewidth=2)
    right.set_ylabel("hours", color="#1f5a94")
    cost = right.twinx()
    cost.plot(counts, [plan.dollars for plan in fitting], color="#c8102e", marker="s", markersize=4, linewidth=2)
    cost.set_ylabel("dollars", color="#c8102e")
    cost.set_ylim(bottom=0, top=1.15 * max(plan.dollars for plan in fitting))
    plain = FuncFormatter(lambda value, _: f"{value:,.12g}")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(counts, [f"{n:,}" for n in counts])
        axes.yaxis.set_major_formatter(plain)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("GPUs")
        axes.grid(alpha=0.25)
    for axes in (left, right, cost):
        axes.spines["top"].set_visible(False)
    left.spines["right"].set_visible(False)
    left.legend(frameon=False)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)

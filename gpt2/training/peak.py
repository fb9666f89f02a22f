"""The device's own peak, the denominator of model FLOPS utilisation (MFU)."""

import time

import torch

# Dense FLOP/s by the makers' data sheets, in the order in which a card's name is searched: (name, bf16, tf32).
CARDS: tuple[tuple[str, float, float], ...] = (
    ("B200", 2.25e15, 1.1e15),
    ("H200", 989e12, 494e12),
    ("H100 PCIe", 756e12, 378e12),
    ("H100 NVL", 835e12, 417e12),
    ("H100", 989e12, 494e12),
    ("H800", 989e12, 494e12),
    ("A100", 312e12, 156e12),
    ("A800", 312e12, 156e12),
    ("A10G", 70e12, 35e12),
    ("A10", 125e12, 62.5e12),
    ("A40", 149.7e12, 74.8e12),
    ("L40S", 362e12, 183e12),
    ("L40", 181e12, 90.5e12),
    ("L4", 121e12, 60e12),
    ("V100", 125e12, 15.7e12),
    ("T4", 65e12, 8.1e12),
    ("RTX 4090", 165e12, 82.6e12),
    ("RTX 3090", 71e12, 35.6e12),
)


def card_peak(name: str, precision: str) -> float | None:
    """A known card's dense peak in FLOP/s, for "bf16" or "fp32" (by TF32 where it has it); None for an unknown one."""
    for card, bf16, tf32 in CARDS:
        if card.lower() in name.lower():
            return bf16 if precision == "bf16" else tf32
    return None


def device_peak(device: torch.device, precision: str) -> float:
    """FLOP/s at which MFU is 100 %: the card's data sheet, or where it is unknown the best matmul measured here."""
    if device.type == "cuda":
        known = card_peak(torch.cuda.get_device_name(device), precision)
        if known is not None:
            return known
    return measured_matmul(device, torch.bfloat16 if precision == "bf16" else torch.float32)


def measured_matmul(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of the fastest of several square matmuls (2 n³ operations each), within about `seconds`."""
    n = 1024 if device.type == "cpu" else 8192
    a = torch.ones(n, n, dtype=dtype, device=device)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # reading a number waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best

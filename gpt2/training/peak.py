"""The device's own peak, the denominator of model FLOPS utilisation (MFU)."""

import re
import time

import torch

# Dense FLOP/s by the makers' data sheets: name -> (bf16 with float32 accumulation, float32 by TF32 where it has it).
# A longer name stands before its beginning: the first that the device's name contains, as whole words, counts.
CARDS: dict[str, tuple[float, float]] = {
    "GB200": (2.5e15, 1.25e15),
    "B300": (2.25e15, 1.1e15),
    "B200": (2.25e15, 1.1e15),
    "GH200": (989e12, 494e12),
    "H200 NVL": (835e12, 417e12),
    "H200": (989e12, 494e12),
    "H100 PCIe": (756e12, 378e12),
    "H100 NVL": (835e12, 417e12),
    "H100": (989e12, 494e12),
    "H800 PCIe": (756e12, 378e12),
    "H800": (989e12, 494e12),
    "H20": (148e12, 74e12),
    "A100": (312e12, 156e12),
    "A800": (312e12, 156e12),
    "A40": (149.7e12, 74.8e12),
    "A30": (165e12, 82e12),
    "A10G": (70e12, 35e12),
    "A10": (125e12, 62.5e12),
    "L40S": (362e12, 183e12),
    "L40": (181e12, 90.5e12),
    "L4": (121e12, 60e12),
    "RTX 6000 Ada": (364.2e12, 182.1e12),
    "RTX A6000": (154.8e12, 77.4e12),
    "RTX A5000": (111.1e12, 55.6e12),
    "RTX A4000": (76.7e12, 38.3e12),
    "RTX 5090": (209.5e12, 104.8e12),
    "RTX 4090": (165.2e12, 82.6e12),
    "RTX 3090 Ti": (80e12, 40e12),
    "RTX 3090": (71e12, 35.6e12),
    # These have no bf16: float16 stands in its place, and their float32 is plain.
    "V100": (125e12, 15.7e12),
    "T4": (65e12, 8.1e12),
}
# A part of a card, or a namesake with fewer units and less power: its data sheet is another.
NAMESAKES = re.compile(r"\b(laptop|mobile|max-q|mig|rtx \d+ d)\b", re.IGNORECASE)


def card_peak(name: str, precision: str) -> float | None:
    """A known card's dense peak in FLOP/s, for "bf16" or "fp32" (by TF32 where it has it); None for an unknown one."""
    if NAMESAKES.search(name):
        return None
    for card, (bf16, tf32) in CARDS.items():
        if re.search(rf"\b{card}\b", name, re.IGNORECASE):
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

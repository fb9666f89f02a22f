"""Rank, world size and device: the one object that knows how many processes there are."""

import os
from dataclasses import dataclass

import torch

from gpt2.errors import RequestError


@dataclass(frozen=True)
class Distributed:
    """This process among the others. With one process every collective is the identity."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    @classmethod
    def from_environment(cls, device: str = "auto") -> "Distributed":
        """Reads torchrun's variables. Raises RequestError for a device that is not here or several processes."""
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise RequestError("training runs in one process: start `gpt2 train` without torchrun")
        return cls(rank=0, world_size=1, device=find_device(device))


def find_device(name: str = "auto") -> torch.device:
    """The named device, or the best one here: cuda, else mps, else cpu. Raises RequestError with what is here."""
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if name == "auto":
        return torch.device(available[0])
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in available:
        raise RequestError(f"the device {name!r} is not here: use one of {', '.join(available)}, or auto")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if not 0 <= (device.index or 0) < count:
        raise RequestError(f"the device {name!r} is not here: this machine has {count} of type {device.type}")
    return device


def multiplies_bf16_fast(device: torch.device) -> bool:
    """Whether the device has bfloat16 matmul instructions. Without them bf16 is emulated, up to 100 times slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False

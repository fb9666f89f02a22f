"""torch's settings that hold for the whole process, which training must leave to its caller as they were."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def settings_kept() -> Iterator[None]:
    """Gives float32's matmul precision and the deterministic algorithms back at the end. Serves as a decorator too."""
    precision = torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]

"""The machine that a figure was measured on."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from gpt2.doctor import cpu_name, memory

PACKAGES = ("build-gpt2", "torch", "triton", "numpy", "tiktoken", "tokenizers", "transformers", "litgpt")


def machine() -> dict[str, Any]:
    """Processor, GPU where there is one, cores, memory, and the versions that the figures depend on."""
    import torch

    total, _ = memory()
    facts: dict[str, Any] = {"cpu": cpu_name(), "cores": os.cpu_count(), "memory_bytes": total}
    if torch.cuda.is_available():
        facts |= {"gpu": torch.cuda.get_device_name(), "gpu_memory_bytes": torch.cuda.mem_get_info()[1]}
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    versions["torch"] = torch.__version__
    return {**facts, "platform": platform.platform(), "python": platform.python_version(), "versions": versions}

"""This project's training step beside other programs', on the same shapes and the same data, in turn A B A B.

Each runs in a process of its own (worker.py), its own network, attention and optimizer, at its best setting on the
device: compiled, and under bfloat16 autocast where the device multiplies bfloat16 fast, else in float32.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2.bench.contenders import NEEDS_PATH, OURS, PEERS
from gpt2.bench.ladder import Options as LadderOptions
from gpt2.bench.ladder import base_config, free_memory
from gpt2.bench.machine import machine
from gpt2.bench.worker import Worker, run_in_turn
from gpt2.config import Config, from_dict
from gpt2.distributed import find_device, multiplies_bf16_fast
from gpt2.errors import RequestError, WorkError
from gpt2.model import flops_per_token
from gpt2.training.peak import device_peak
from gpt2.training.run import can_compile

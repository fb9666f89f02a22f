"""Rank, world size and device: the one object that knows how many processes there are."""

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gpt2.errors import RequestError, WorkError

T = TypeVar("T")


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
    def from_environment(cls, device: str = "auto", timeout_seconds: float = 600.0) -> "Distributed":
        """Joins the group that torchrun's variables describe; without them this process is alone.

        On GPUs each process takes the one of its local rank and talks by NCCL, on CPUs by gloo. A collective that
        a rank does not join within `timeout_seconds` fails. Raises RequestError for a device that is not here,
        WorkError where the processes do not find each other.
        """
        try:
            rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
            local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        except ValueError as error:
            raise RequestError("RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: start with torchrun") from error
        found = find_device(device)
        if world_size == 1:
            return cls(rank=0, world_size=1, device=found)
        if "MASTER_ADDR" not in os.environ:
            raise RequestError(f"WORLD_SIZE is {world_size}, but nothing says where the others are: use torchrun")
        if found.type == "cuda":
            found = find_device(f"cuda:{local_rank}")
            torch.cuda.set_device(found)
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if found.type == "cuda" else "gloo"
            timeout = timedelta(seconds=timeout_seconds)
            with explained(timeout_seconds):
                store = _fresh_store(rank, world_size, timeout)
                dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        return cls(rank=rank, world_size=world_size, device=found)

    def close(self) -> None:
        """Leaves the group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the ranks, in float64 on the host."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over the ranks, in float64 on the host."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def _reduced(self, values: Sequence[float], operation: Any) -> list[float]:
        if self.world_size == 1:
            return [float(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, operation)
        return [float(value) for value in tensor]

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over the ranks, on its device."""
        if self.world_size == 1:
            return tensor
        tensor = tensor / self.world_size
        dist.all_reduce(tensor)
        return tensor

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0, in every process: anything that JSON can say.

        Where it raises RequestError or WorkError, every process does; only rank 0's is for printing.
        """
        if self.world_size == 1:
            return work()
        answer: dict[str, Any] = {}
        raised: Exception | None = None
        if self.is_main:
            try:
                answer = {"value": work()}
            except (RequestError, WorkError) as error:
                answer, raised = {type(error).__name__: str(error)}, error
        answer = self._from_main(answer)
        if raised is not None:
            raise raised
        for kind in (RequestError, WorkError):
            if kind.__name__ in answer:
                copy = kind(answer[kind.__name__])
                copy.told = True
                raise copy
        value: T = answer["value"]
        return value

    def _from_main(self, value: Any) -> Any:
        # As JSON and not by broadcast_object_list, which unpickles what it receives.
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8) if self.is_main else None
        size = torch.tensor([0 if content is None else content.numel()])
        dist.broadcast(size, src=0)
        if content is None:
            content = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(content, src=0)
        return json.loads(bytes(content.tolist()))

    def tensors_from_main(self, tensors: dict[str, Tensor] | None) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of rank 0's tensors, which lie on the host, one after the other in every process.

        Only rank 0 gives `tensors`. Each is received into memory of its own, so that no process but rank 0
        holds more than the caller keeps.
        """
        if self.world_size == 1:
            assert tensors is not None
            yield from tensors.items()
            return
        listed = [[name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in (tensors or {}).items()]
        for name, shape, dtype in self._from_main(listed):
            tensor = tensors[name].contiguous() if tensors else torch.empty(shape, dtype=getattr(torch, dtype))
            dist.broadcast(tensor, src=0)
            yield name, tensor


def _fresh_store(rank: int, world_size: int, timeout: timedelta) -> Any:
    """The key-value store in which the processes of this start find each other.

    torchrun lends its own store, and after a restart the addresses of dead processes still stand in it
    (github.com/pytorch/pytorch/issues/135712). So rank 0 opens a new one and says where in torchrun's. Who reads an
    address of an earlier start finds nobody there, or a group that is full already, and reads again.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    lent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    common = _store(host, port, rank == 0 and not lent, timeout)
    if not lent:
        return common
    if rank == 0:
        own = _store(host, 0, True, timeout)
        common.set("gpt2/meeting", str(own.port))
        return own
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        meeting = int(common.get("gpt2/meeting"))
        try:
            own = _store(host, meeting, False, timedelta(seconds=2))
            if own.add("joined", 1) < world_size:
                own.set_timeout(timeout)
                return own
        except dist.DistError:
            pass
        if time.monotonic() > deadline:
            raise WorkError(f"rank 0 was not met at {host} within {timeout.total_seconds():g} s")
        time.sleep(0.2)


def _store(host: str, port: int, serves: bool, timeout: timedelta) -> Any:
    return dist.TCPStore(host, port, is_master=serves, wait_for_workers=False, timeout=timeout)  # type: ignore[attr-defined]


@contextmanager
def explained(timeout_seconds: float) -> Iterator[None]:
    """Turns what the collectives raise when a process is gone or hangs into WorkError."""
    try:
        yield
    except RuntimeError as error:
        if "MASTER_ADDR" not in os.environ:  # alone
            raise
        text = re.sub(r"^\[\S+?([^/]+)\]", r"[\1]", " ".join(str(error).split()))  # without the builder's paths
        known = ("gloo", "NCCL", "nccl", "ProcessGroup", "TCPStore", "Connection", "timed out", "Timed out", "store")
        if not isinstance(error, dist.DistError) and not any(word in text for word in known):
            raise
        raise WorkError(
            f"another process is gone, or did not answer within {timeout_seconds:g} s (train.collective_timeout): "
            f"{text[:200]}; the same command goes on from the newest checkpoint"
        ) from error


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


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has its tools: Triton on a GPU, a C++ compiler on a CPU."""
    if device.type == "cpu":  # the compiler that torch itself looks for
        usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        return shutil.which(os.environ.get("CXX", usual)) is not None
    return device.type == "cuda"


def multiplies_bf16_fast(device: torch.device) -> bool:
    """Whether the device has bfloat16 matmul instructions. Without them bf16 is emulated, up to 100 times slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False

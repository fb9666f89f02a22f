"""The network as the training loop calls it: ids and targets in, loss out; compiled, and spread over the processes.

ddp    every process holds the whole model; gradients are averaged in buckets while the backward pass runs
fsdp   every process holds a share of each tensor; a block is gathered when its turn comes (ZeRO-3)
"""

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from gpt2.config import Config
from gpt2.distributed import Distributed
from gpt2.model import GPT


class LossOnly(nn.Module):
    """The model without its logits, so that the compiler need not keep their (B·T, vocabulary) for anyone."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.model(idx, targets)[1]
        return loss


class TrainingNetwork:
    """(B, T) ids and targets -> mean loss in nats over these, under autocast as the config says."""

    def __init__(self, model: GPT, config: Config, distributed: Distributed, grouped: bool | None = None) -> None:
        """Moves the model to the device. After it the optimizers may be built: fsdp replaces the parameters.

        grouped: whether there is a process group to wrap it for; by default where there are several processes.
        """
        device, train = distributed.device, config.train
        grouped = distributed.world_size > 1 if grouped is None else grouped
        self.device_type = device.type
        self.autocast = train.precision == "bf16"
        self.sharded = train.parallel == "fsdp" and grouped
        if self.sharded:
            shard(model, config, distributed)
            self.module: nn.Module = LossOnly(model)
            return
        self.module = LossOnly(model.to(device))
        if train.compile:
            self.module.compile(dynamic=False)
        if grouped:
            parallel = DistributedDataParallel(
                self.module,
                device_ids=[device] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )
            if train.gradient_type == "bf16":
                parallel.register_comm_hook(None, add_in_bf16)
            self.module = parallel

    def __call__(self, idx: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.autocast):
            loss: Tensor = self.module(idx, targets)
        return loss

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch: processes add their gradients in the last one only."""
        if isinstance(self.module, DistributedDataParallel):
            return nullcontext() if last else self.module.no_sync()
        if self.sharded:
            root = self.module.model
            assert isinstance(root, FSDPModule)
            root.set_requires_gradient_sync(last)
        return nullcontext()


def add_in_bf16(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """A bucket of gradients, averaged over the processes in bfloat16.

    torch's own hook for this is for NCCL alone.
    """
    compressed = (bucket.buffer() / dist.get_world_size()).bfloat16()
    work = dist.all_reduce(compressed, async_op=True)
    done: torch.futures.Future[Tensor] = work.get_future().then(lambda sums: bucket.buffer().copy_(sums.value()[0]))
    return done


def shard(model: GPT, config: Config, distributed: Distributed) -> None:
    """FSDP2: each block, then what is left (embeddings, ln_f, lm_head), becomes one group of shards on the device."""
    gradients = torch.bfloat16 if config.train.gradient_type == "bf16" else torch.float32
    weights = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=weights, reduce_dtype=gradients)
    mesh = init_device_mesh(distributed.device.type, (distributed.world_size,))
    for block in model.h:
        if config.train.compile:
            block.compile(dynamic=False)  # the gathering happens between the blocks, outside of the graphs
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    # The logits without their padding are a view, into which nobody writes.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def whole(tensor: Tensor) -> Tensor:
    """A tensor of the model or of an optimizer, whole. All processes must ask for it where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process holds, as `like` is: this process's share of it, or a copy on its device."""
    if isinstance(like, DTensor):
        on_device = tensor.to(like.device)
        return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)
    return tensor.to(like.device, copy=True)

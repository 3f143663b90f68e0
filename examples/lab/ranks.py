"""Several processes, started by torchrun, that train one model on shares of every batch.

Every rank draws the whole batch from the same random generator and keeps its share. The ranks'
generators thus stay in step, and the first rank's checkpoint serves all ranks.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def join(device: str) -> str:
    """Join torchrun's group, if torchrun started this process, and return the rank's own device."""
    if "LOCAL_RANK" not in os.environ:
        return device
    own = f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device
    if not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(own)
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return own


def leave() -> None:
    """Leave the group together: a rank that is early breaks the others' connections."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def wait() -> None:
    if dist.is_initialized():
        dist.barrier()


def share(batch: Tensor) -> Tensor:
    """Return this rank's part of a batch."""
    return batch.chunk(count())[dist.get_rank()] if dist.is_initialized() else batch


def wrapped(network: nn.Module) -> nn.Module:
    """Return a network whose gradients are averaged over the ranks."""
    if not dist.is_initialized():
        return network
    # Real and fake pass D one after the other: the statistics of a rank's BatchNorm stay its own.
    return DistributedDataParallel(network, broadcast_buffers=False)

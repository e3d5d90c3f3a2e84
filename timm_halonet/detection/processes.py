"""The processes of a run: one, or those that torchrun started."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed

from .. import environment
from ..photos import choose_device


def world_and_rank() -> tuple[int, int]:
    """The number of processes, and which of them this is, from 0."""
    if not distributed.is_initialized():
        return 1, 0
    return distributed.get_world_size(), distributed.get_rank()


@contextmanager
def processes(name: str) -> Iterator[torch.device]:
    """The device of this process, with torch.distributed set up where torchrun started it.

    Args:
        name: auto, cpu, cuda, cuda:1 ...; in several processes the GPU is that of LOCAL_RANK.

    Raises:
        ValueError: no such device here.
    """
    if environment.world_size() < 2:
        yield choose_device(name)
        return
    device = choose_device("cpu" if name == "cpu" or not torch.cuda.is_available() else "cuda")
    if device.type == "cuda":
        device = torch.device("cuda", environment.local_rank())
        torch.cuda.set_device(device)
    # gloo for what lies on the CPU: the processes agree on when to stop without waiting for their GPUs
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def largest(values: list[float], device: torch.device) -> list[float]:
    """Each value's largest over the processes; the same in all of them."""
    world, _ = world_and_rank()
    own = torch.tensor(values, dtype=torch.float64)
    if world > 1:
        own = own.to(device) if distributed.get_backend() == "nccl" else own
        distributed.all_reduce(own, distributed.ReduceOp.MAX)
    return own.tolist()

"""The few things that training on several processes needs."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def in_processes() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    return dist.get_world_size() if in_processes() else 1


def mean_over_ranks(value: Tensor) -> Tensor:
    """A count, averaged over all processes: with it, their averaged gradients are those of one large batch."""
    if not in_processes():
        return value
    value = value.detach().clone()
    dist.all_reduce(value, op=dist.ReduceOp.SUM)
    return value / world_size()


def gather_objects(value: object) -> list[object]:
    """The value of every process, in order of rank."""
    if not in_processes():
        return [value]
    gathered: list[object] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered

"""Where things run: the choice of a device, copies between CPU and GPU with few waits, and several processes.

A GPU works through what is queued while Python runs ahead. Whenever Python asks for a number it waits until all that is
queued is done, and then the GPU waits for Python. So do `nonzero`, selection by bool, and the plain copies that
`tensor.to` and `new_tensor` make.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

Device = Literal["cpu", "cuda", "auto"]

Precision = Literal["32", "bf16"]


def choose_device(device: Device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch finds no GPU")
    return torch.device(device)


def to_host(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors on the CPU, for one wait in all; views of one tensor are fetched together, and stay views of one."""
    copies = list(tensors)
    storages: dict[tuple[int, torch.dtype], list[int]] = defaultdict(list)
    for i, t in enumerate(tensors):
        if t.device.type != "cpu" and t.numel() == 0:
            copies[i] = torch.empty(t.shape, dtype=t.dtype)
        elif t.device.type != "cpu":
            storages[t.untyped_storage().data_ptr(), t.dtype].append(i)
    begins, flat = [], []
    for views in storages.values():
        begin = min(tensors[i].storage_offset() for i in views)
        end = max(tensors[i].storage_offset() + _span(tensors[i]) for i in views)
        begins.append(begin)
        flat.append(tensors[views[0]].as_strided((end - begin,), (1,), begin).to("cpu", non_blocking=True))
    for device in {tensors[views[0]].device for views in storages.values()}:
        finish(device)
    for views, begin, fetched in zip(storages.values(), begins, flat, strict=True):
        own = fetched.clone()  # what was fetched is pinned, and there is little of such memory
        for i in views:
            copies[i] = own.as_strided(tensors[i].shape, tensors[i].stride(), tensors[i].storage_offset() - begin)
    return tuple(copies)


def _span(tensor: Tensor) -> int:
    """From its first entry to one past its last in its storage."""
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, without a wait if it comes from the CPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":  # only what is pinned is copied while Python runs on
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def finish(device: torch.device) -> None:
    """Wait until a device has done all that is queued."""
    torch.accelerator.current_stream(device).synchronize()


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

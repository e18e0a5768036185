"""Between the CPU and a GPU, with few waits.

A GPU works through what is queued while Python runs ahead. Whenever Python asks for a number it waits until all that is
queued is done, and then the GPU waits for Python. So do `nonzero`, selection by bool, and the plain copies that
`tensor.to` and `new_tensor` make.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor


def to_host(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors on the CPU, for one wait in all; views of one tensor are fetched together, and stay views of one."""
    copies = {i: t for i, t in enumerate(tensors) if t.device.type == "cpu"}
    storages: dict[int, list[int]] = defaultdict(list)
    for i, t in enumerate(tensors):
        if i not in copies:
            storages[t.untyped_storage().data_ptr() if t.numel() else -i].append(i)
    for views in storages.values():
        copies.update(zip(views, _fetch([tensors[i] for i in views]), strict=True))
    for device in {t.device for t in tensors if t.device.type != "cpu"}:
        finish(device)
    return tuple(copies[i] for i in range(len(tensors)))


def _fetch(views: list[Tensor]) -> list[Tensor]:
    """Copies of what lies in one storage, which are on their way."""
    if len(views) == 1:
        return [views[0].to("cpu", non_blocking=True)]
    begin = min(t.storage_offset() for t in views)
    end = max(t.storage_offset() + _reach(t) for t in views)
    whole = views[0].as_strided((end - begin,), (1,), begin).to("cpu", non_blocking=True)
    return [whole.as_strided(t.shape, t.stride(), t.storage_offset() - begin) for t in views]


def _reach(tensor: Tensor) -> int:
    """From its first entry to one past its last in its storage."""
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, without a wait."""
    if device.type == "cuda":  # only what is pinned is copied while Python runs on
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def finish(device: torch.device) -> None:
    """Wait until a device has done all that is queued."""
    torch.accelerator.current_stream(device).synchronize()

"""Where things run: the choice of a device, copies between CPU and GPU with few waits, and several processes.

A GPU works through what is queued while Python runs ahead. Whenever Python asks for a number it waits until all that is
queued is done, and then the GPU waits for Python. So do `nonzero`, selection by bool, and the plain copies that
`tensor.to` and `new_tensor` make.
"""

from __future__ import annotations

import logging
import platform
from collections import defaultdict
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

Device = Literal["cpu", "cuda", "auto"]

Precision = Literal["auto", "32", "bf16", "bf16-forced"]
"""of a network that predicts; training knows "16" besides"""

logger = logging.getLogger(__name__)


def choose_device(device: Device) -> torch.device:
    """The device of a name; "auto" is a GPU where there is one.

    Raises:
        ValueError: a GPU was asked for, and torch finds none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch finds no GPU")
    return torch.device(device)


def choose_precision(
    precision: Literal[Precision, "16"], device: torch.device, *, stored: bool = False
) -> Literal["32", "bf16", "16"]:
    """What a device computes in.

    Args:
        precision: "auto" is bfloat16 where the device has instructions for it, else float32; "bf16-forced" is bfloat16
            anywhere, to compare numbers.
        stored: it comes from a run or a preset, not from who starts this one: where the device has no instructions
            for "bf16", float32 takes its place with a warning.

    Raises:
        ValueError: an unknown precision, or one that the device has no instructions for.
    """
    if precision == "32" or (precision == "16" and device.type != "cpu"):
        return precision
    if precision == "16":
        raise ValueError("precision 16 needs a GPU; auto, bf16 and 32 work on the CPU")
    if precision not in ("auto", "bf16", "bf16-forced"):
        raise ValueError(f"unknown precision {precision!r}; valid are auto, 32, bf16 and bf16-forced")
    if precision == "bf16-forced" or has_bfloat16(device):
        return "bf16"
    if precision == "bf16":
        lack = f"this {'processor' if device.type == 'cpu' else 'GPU'} has no instructions for bfloat16"
        if not stored:
            raise ValueError(f"{lack}: it would be slower than 32; bf16-forced computes in it all the same")
        logger.warning("%s: float32 takes the place of the stored precision bf16", lack)
    return "32"


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16. Without them it is emulated, many times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.machine().lower() in ("arm64", "aarch64"):
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    # of x86, oneDNN calls every processor with AVX-512 able, and emulates
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


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

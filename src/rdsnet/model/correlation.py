"""Correlation (Eq. 1), the linear combination that it replaces (Table 3), and the mask loss on either."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def correlation_vectors(representations: Tensor) -> Tensor:
    """(N, 2, D) background and foreground representations -> (N, D), phi_foreground - phi_background.

    The softmax over background and foreground is the sigmoid of their difference, so one map an object is enough.
    """
    return representations[:, 1] - representations[:, 0]


def coefficient_vectors(representations: Tensor) -> Tensor:
    """(N, 1, D) -> (N, D) coefficients in -1..1 of YOLACT's linear combination."""
    return representations[:, 0].tanh()


Assembly = Literal["correlation", "linear"]
VECTORS: dict[Assembly, Callable[[Tensor], Tensor]] = {
    "correlation": correlation_vectors,
    "linear": coefficient_vectors,
}
"""How the object representations of each assembly become the vectors that `correlate` takes."""


EVERY = slice(None)


def correlate(
    vectors: Tensor, pixels: Tensor, objects: slice = EVERY, rows: slice = EVERY, columns: slice = EVERY
) -> Tensor:
    """Mask logits of objects (Eq. 1, or YOLACT's linear combination of prototypes).

    Args:
        vectors: (N, D), one an object.
        pixels: (D, h, w).
        objects, rows, columns: the objects and cells that are asked for, of which only those are computed.

    Returns:
        (N, h, w) logits; their sigmoid is the foreground channel of M_o.
    """
    pixels = pixels[:, rows, columns]
    return (vectors[objects] @ pixels.flatten(1)).view(-1, *pixels.shape[1:])


def mask_terms(logits: Tensor, target: Tensor, ohem_ratio: float | None, foreground: int | None = None) -> Tensor:
    """Pixel-wise cross entropy of crops that share a target, with online hard example mining of the background.

    Args:
        logits: (M, h, w) of M instances of one object, inside its crop.
        target: (h, w) bool.
        ohem_ratio: background pixels kept for each foreground pixel, the hardest; None keeps all.
        foreground: pixels of the target, where the caller knows their number: counting them waits for the device.

    Returns:
        (M,) sum over the kept pixels / (their number + 1); 0 where OHEM finds no foreground to balance.
    """
    # The loss of a pixel is softplus(wrong) and rises with it: one selection takes all foreground and the hardest rest
    wrong = torch.where(target, -logits, logits).flatten(1)
    if ohem_ratio is not None:
        foreground = int(target.sum()) if foreground is None else foreground
        kept = min(foreground + int(ohem_ratio * foreground), wrong.shape[1])
        rank = wrong.detach().masked_fill(target.flatten(), torch.inf)
        wrong = wrong.gather(1, rank.topk(kept, dim=1, sorted=False).indices)
    return F.softplus(wrong).sum(dim=1) / (wrong.shape[1] + 1)


class CropPixels(torch.autograd.Function):
    """Windows (x0, y0, x1, y1) of a map (D, Hm, Wm), each (D, h, w).

    The backward pass of a slice fills a map of zeros, one for each object; here all add to the same.
    """

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, windows: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.windows = pixels.shape, windows
        return tuple(pixels[:, y0:y1, x0:x1].clone(memory_format=torch.contiguous_format) for x0, y0, x1, y1 in windows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].new_zeros(ctx.shape)
        for (x0, y0, x1, y1), gradient in zip(ctx.windows, gradients, strict=True):
            total[:, y0:y1, x0:x1] += gradient
        return total, None


def pixels_within(masks: Tensor, windows: Tensor) -> Tensor:
    """(N,) how many pixels of masks (N, h, w) lie in windows (N, 4), int64 x0, y0, x1, y1."""
    x0, y0, x1, y1 = windows[:, :, None].unbind(1)
    column, row = (torch.arange(side, device=masks.device) for side in (masks.shape[2], masks.shape[1]))
    of_row = (masks & ((column >= x0) & (column < x1))[:, None]).sum(dim=2)
    return (of_row * ((row >= y0) & (row < y1))).sum(dim=1)


def draw_instances(objects: Tensor, limit: int, generator: torch.Generator | None) -> Tensor:
    """Which of an image's positive anchors make masks: at most `limit`, drawn at random and spread over the objects.

    Every object gets its first instance before any gets its second.

    Args:
        objects: (M,) int64, the object of each positive anchor.

    Returns:
        int64 indices into it, ascending.
    """
    if len(objects) <= limit:
        return torch.arange(len(objects), device=objects.device)
    order = torch.randperm(len(objects), generator=generator).to(objects.device)
    order = order[objects[order].argsort(stable=True)]  # by object, at random within each
    counts = torch.bincount(objects)
    first = (counts.cumsum(0) - counts)[objects[order]]
    turn = torch.arange(len(order), device=order.device) - first
    shuffle = torch.randperm(len(objects), generator=generator).to(objects.device)  # which objects miss the last turn
    picked = shuffle[turn[shuffle].argsort(stable=True)[:limit]]
    return order[picked].sort().values

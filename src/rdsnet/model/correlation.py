"""Correlation (Eq. 1), the linear combination that it replaces (Table 3), and the mask loss on either."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rdsnet.model.cropping import CropRule, crop_windows
from rdsnet.structures import Targets


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


def correlate(vectors: Tensor, pixels: Tensor) -> Tensor:
    """Mask logits of objects (Eq. 1, or YOLACT's linear combination of prototypes).

    Args:
        vectors: (N, D), one an object.
        pixels: (D, h, w), the whole map or a part of it.

    Returns:
        (N, h, w) logits; their sigmoid is the foreground channel of M_o.
    """
    return (vectors @ pixels.flatten(1)).view(-1, *pixels.shape[1:])


def mask_terms(logits: Tensor, target: Tensor, ohem_ratio: float | None) -> Tensor:
    """Pixel-wise cross entropy of crops that share a target, with online hard example mining of the background.

    Args:
        logits: (M, h, w) of M instances of one object, inside its crop.
        target: (h, w) bool.
        ohem_ratio: background pixels kept for each foreground pixel, the hardest; None keeps all.

    Returns:
        (M,) sum over the kept pixels / (their number + 1); 0 where OHEM finds no foreground to balance.
    """
    foreground = logits[:, target]
    background = logits[:, ~target]
    losses = F.softplus(background)
    kept = background.shape[1]
    if ohem_ratio is not None:
        kept = min(int(ohem_ratio * foreground.shape[1]), kept)
        losses = losses.topk(kept, dim=1, sorted=False).values
    total = F.softplus(-foreground).sum(dim=1) + losses.sum(dim=1)
    return total / (foreground.shape[1] + kept + 1)


def mask_loss(
    vectors: Tensor,
    pixels: Tensor,
    objects: Tensor,
    targets: Targets,
    *,
    step: tuple[float, float],
    expand: float,
    crop_rule: CropRule,
    ohem_ratio: float | None,
) -> Tensor:
    """Sum of the mask terms of an image's instances (L_mask of Eq. 8 before its division by their number).

    Args:
        vectors: (M, D) of the positive anchors that make masks.
        pixels: (D, Hm, Wm) of this image.
        objects: (M,) int64, the ground-truth object of each instance.
        targets: of this image; boxes are expanded (1.5 times) and pixels outside ignored.
        step: (y, x) input pixels a cell of the mask grid.
    """
    grid = (targets.masks.shape[1], targets.masks.shape[2])
    windows = crop_windows(targets.boxes, grid, expand=expand, rule=crop_rule, step=step).tolist()
    # Instances of one object share window and target: one small product and one selection serve them all.
    order = objects.argsort(stable=True)
    counts = torch.bincount(objects, minlength=len(targets)).tolist()
    terms = [vectors.new_zeros(1)]
    for i, instances in enumerate(vectors[order].split(counts)):
        x0, y0, x1, y1 = windows[i]
        if len(instances) and x1 > x0:
            logits = correlate(instances, pixels[:, y0:y1, x0:x1])
            terms.append(mask_terms(logits, targets.masks[i, y0:y1, x0:x1], ohem_ratio))
    return torch.cat(terms).sum()


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

"""What the losses of several streams share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rdsnet.structures import Targets

BACKGROUND, IGNORED = -1, -2  # what an anchor learns that learns no object


def focal_loss(
    logits: Tensor, learns: Tensor, positives: tuple[Tensor, Tensor, Tensor], alpha: float, gamma: float
) -> Tensor:
    """Sum of the sigmoid focal loss (RetinaNet, Eq. 5) over the anchors that learn.

    Every entry is taken as negative first, then the few positive ones are exchanged: no one-hot target of the
    logits' size is made.

    Args:
        logits: (B, R, C).
        learns: (B, R) bool.
        positives: image, anchor and class of each positive entry, (M,) each.
    """
    logits = logits.float()
    negative = ((1 - alpha) * logits.sigmoid() ** gamma * F.softplus(logits)).sum(dim=2)
    chosen = logits[positives]
    right = alpha * (-chosen).sigmoid() ** gamma * F.softplus(-chosen)
    wrong = (1 - alpha) * chosen.sigmoid() ** gamma * F.softplus(chosen)
    return (negative * learns).sum() + (right - wrong).sum()


def flatten_levels(maps: Sequence[Tensor], numbers: int) -> Tensor:
    """Levels of (B, A * numbers, h, w) -> (B, R, numbers) float32, R over level, row, column, anchor."""
    return torch.cat([m.float().unflatten(1, (-1, numbers)).permute(0, 3, 4, 1, 2).flatten(1, 3) for m in maps], dim=1)


def object_starts(targets: Sequence[Targets], device: torch.device) -> Tensor:
    """Where each image's objects begin when all images' are laid end to end."""
    counts = torch.tensor([len(t) for t in targets], device=device)
    return counts.cumsum(0) - counts

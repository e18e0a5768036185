"""YOLACT's semantic segmentation: a loss on one pyramid level that only training has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdsnet.model.layers import initialise
from rdsnet.structures import Targets


class SemanticBranch(nn.Module):
    """A pyramid level (B, channels, h, w) -> logits of C classes (B, C, h, w); a cell can be of several."""

    def __init__(self, *, channels: int, num_classes: int) -> None:
        super().__init__()
        self.classify = initialise(nn.Conv2d(channels, num_classes, 1), nn.init.xavier_uniform_)

    def forward(self, level: Tensor) -> Tensor:
        logits: Tensor = self.classify(level)
        return logits

    def loss(self, logits: Tensor, targets: Sequence[Targets]) -> Tensor:
        """Mean over images and cells of the classes' summed binary cross entropy.

        Args:
            logits: (B, C, h, w) of the padded images.
            targets: B of them; the masks of a class are united. Objects without a mask count as background.
        """
        size = (logits.shape[2], logits.shape[3])
        wanted = torch.stack([class_maps(t.masks, t.labels, logits.shape[1], size) for t in targets])
        total = F.binary_cross_entropy_with_logits(logits, wanted.to(logits.dtype), reduction="sum")
        return total / wanted.shape[0] / wanted.shape[2] / wanted.shape[3]


def class_maps(masks: Tensor, labels: Tensor, num_classes: int, size: tuple[int, int]) -> Tensor:
    """Where each class is: (N, H, W) bool masks and (N,) labels -> (num_classes, h, w) bool.

    A cell belongs to an object where the mask, resized bilinearly to `size` (h, w), is above one half.
    """
    present = torch.zeros(num_classes, *size, dtype=torch.bool, device=masks.device)
    if len(masks) == 0:
        return present
    resized = F.interpolate(masks[None].float(), size, mode="bilinear", align_corners=False)[0] > 0.5
    for label in labels.unique():
        present[label] = resized[labels == label].any(dim=0)
    return present

"""Pixel streams (3.1): a representation of each pixel, Panoptic FPN's way or YOLACT's; a segmentation for training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdsnet.model.layers import Norm, conv_norm_relu, initialise, kaiming
from rdsnet.settings import Rules
from rdsnet.structures import Targets


class PixelStream(nn.Module):
    """Pyramid levels -> pixel representations (B, D, Hm, Wm).

    Each level is brought to the finest one's size by (3x3 convolution, norm, ReLU, x2) for every octave between
    them; their sum goes through one more convolution, is projected to D channels and brought to `mask_stride`.

    Args:
        levels: pyramid levels in use, a run such as (3, 4, 5).
        channels: of the pyramid and of this stream.
        representation: D.
        mask_stride: input pixels a cell of the mask grid.
        rules: what differs between projects; the release aligns corners in the upsampling.
    """

    def __init__(
        self,
        *,
        levels: Sequence[int],
        channels: int,
        representation: int,
        mask_stride: int,
        norm: Norm,
        rules: Rules,
    ) -> None:
        super().__init__()
        finest = min(levels)
        self.final_scale = 2**finest // mask_stride
        if self.final_scale * mask_stride != 2**finest:
            raise ValueError(f"expected a mask_stride that divides {2**finest}, the finest level's, got {mask_stride}")
        self.align_corners = rules.align_corners
        self._octaves = [level - finest for level in levels]
        self.branches = nn.ModuleList(
            nn.Sequential(*(conv_norm_relu(channels, channels, norm, kaiming) for _ in range(max(1, octaves))))
            for octaves in self._octaves
        )
        self.merge = conv_norm_relu(channels, channels, norm, kaiming)
        self.project = initialise(nn.Conv2d(channels, representation, 1), kaiming)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """levels: (B, channels, h, w) for each of the levels, finest first."""
        sizes = [(level.shape[2], level.shape[3]) for level in levels]
        merged: Tensor | None = None
        for branch, octaves, level in zip(self.branches, self._octaves, levels, strict=True):
            for step, conv in enumerate(cast(nn.Sequential, branch)):
                level = conv(level)
                if octaves:  # to the next finer level, of twice the size, or one less where that was odd
                    level = self._upsample(level, sizes[octaves - 1 - step])
            merged = level if merged is None else merged + level
        # A 1x1 convolution and a bilinear upsampling commute: the projection goes first, on 4 to 16 times fewer cells
        h, w = sizes[0]
        return self._upsample(self.project(self.merge(merged)), (h * self.final_scale, w * self.final_scale))

    def _upsample(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if x.shape[2:] == size:
            return x
        return F.interpolate(x, size=size, mode="bilinear", align_corners=self.align_corners)


class Protonet(nn.Module):
    """A pyramid level -> pixel representations (B, D, Hm, Wm), YOLACT's prototypes before their ReLU.

    Args:
        level: of the pyramid; its cells are 2**level input pixels wide.
        channels: of the pyramid and of this stream.
        depth: 3x3 convolutions before the upsampling; one more follows it.
        representation: D.
        mask_stride: input pixels a cell of the mask grid.
    """

    def __init__(
        self, *, level: int, channels: int, depth: int = 3, representation: int, mask_stride: int, norm: Norm
    ) -> None:
        super().__init__()
        self.scale = 2**level // mask_stride
        if self.scale * mask_stride != 2**level:
            raise ValueError(f"expected a mask_stride that divides {2**level}, the level's, got {mask_stride}")

        def convolution() -> nn.Sequential:
            return conv_norm_relu(channels, channels, norm, nn.init.xavier_uniform_)

        self.before = nn.Sequential(*(convolution() for _ in range(depth)))
        self.after = convolution()
        self.project = initialise(nn.Conv2d(channels, representation, 1), nn.init.xavier_uniform_)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """levels: the one level, (B, channels, h, w)."""
        (level,) = levels
        x = self.before(level)
        if self.scale > 1:
            # YOLACT has a ReLU here, which changes nothing: no value is below 0, and none between two of them
            x = F.interpolate(x, scale_factor=self.scale, mode="bilinear", align_corners=False)
        return self.project(self.after(x))


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
    count = torch.zeros(num_classes, *size, dtype=torch.int32, device=masks.device)
    if len(masks) == 0:
        return count > 0
    resized = F.interpolate(masks[None].float(), size, mode="bilinear", align_corners=False)[0] > 0.5
    return count.index_add_(0, labels, resized.int()) > 0

"""The pixel stream (3.1): the semantic branch of Panoptic FPN, giving each pixel its representation Psi(U)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from rdsnet.model.layers import Norm, conv_norm_relu, initialise, kaiming
from rdsnet.structures import Rules


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

"""The pixel stream of RDSNet-s (4.2): YOLACT's protonet, on one level of the pyramid."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from rdsnet.model.layers import Norm, conv_norm_relu, initialise


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

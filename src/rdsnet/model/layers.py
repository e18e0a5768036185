"""The one building block that heads and pixel stream share."""

from __future__ import annotations

from typing import Literal

from torch import nn

Norm = Literal["group", "batch", "none"]


def conv_norm_relu(in_channels: int, out_channels: int, norm: Norm) -> nn.Sequential:
    """3x3 convolution, norm, ReLU. Group norm has 32 groups, as the release's heads have."""
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=norm == "none")
    nn.init.normal_(conv.weight, std=0.01)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    layers: list[nn.Module] = [conv]
    if norm == "group":
        layers.append(nn.GroupNorm(32, out_channels))
    elif norm == "batch":
        layers.append(nn.BatchNorm2d(out_channels))
    elif norm != "none":
        raise ValueError(f"unknown norm {norm!r}; valid are group, batch, none")
    return nn.Sequential(*layers, nn.ReLU(inplace=True))

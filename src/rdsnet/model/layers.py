"""The building block that heads and pixel stream share, and how weights begin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

Norm = Literal["group", "batch", "none"]


def initialise(conv: nn.Conv2d, weights: Callable[[Tensor], Tensor], bias: float = 0.0) -> nn.Conv2d:
    """Draw a convolution's weights, and set its bias if it has one."""
    weights(conv.weight)
    if conv.bias is not None:
        nn.init.constant_(conv.bias, bias)
    return conv


def small(weight: Tensor) -> Tensor:
    """Weights of the heads: normal with deviation 0.01, as RetinaNet's."""
    return nn.init.normal_(weight, std=0.01)


def kaiming(weight: Tensor) -> Tensor:
    """Weights of pyramid and pixel stream: uniform, variance 1 / inputs."""
    return nn.init.kaiming_uniform_(weight, a=1)


class GroupNorm(nn.GroupNorm):
    """torch's, around a kernel that makes training in bfloat16 on a CPU a third slower: its gradient for channels-last
    input takes 30 times as long as that for contiguous input."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype == torch.bfloat16 and input.device.type == "cpu" and input.requires_grad:
            return super().forward(input.contiguous()).contiguous(memory_format=torch.channels_last)
        return super().forward(input)


def conv_norm_relu(
    in_channels: int, out_channels: int, norm: Norm, weights: Callable[[Tensor], Tensor] = small
) -> nn.Sequential:
    """3x3 convolution, norm, ReLU. Group norm has 32 groups, as the release's heads have."""
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=norm == "none")
    layers: list[nn.Module] = [initialise(conv, weights)]
    if norm == "group":
        layers.append(GroupNorm(32, out_channels))
    elif norm == "batch":
        layers.append(nn.BatchNorm2d(out_channels))
    elif norm != "none":
        raise ValueError(f"unknown norm {norm!r}; valid are group, batch, none")
    return nn.Sequential(*layers, nn.ReLU(inplace=True))

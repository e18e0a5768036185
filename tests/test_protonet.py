"""YOLACT's protonet as pixel stream."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rdsnet.model.pixel_stream import Protonet


def protonet(**settings: int | str) -> Protonet:
    torch.manual_seed(0)
    arguments = {"level": 3, "channels": 32, "representation": 5, "mask_stride": 4, "norm": "none", **settings}
    return Protonet(**arguments)  # type: ignore[arg-type]


def test_a_level_becomes_a_grid_of_the_mask_stride() -> None:
    assert protonet()([torch.randn(2, 32, 9, 13)]).shape == (2, 5, 18, 26)
    assert protonet(level=2)([torch.randn(2, 32, 9, 13)]).shape == (2, 5, 9, 13)
    assert protonet(mask_stride=2)([torch.randn(2, 32, 9, 13)]).shape == (2, 5, 36, 52)


def test_it_is_yolacts_sequence_of_layers() -> None:
    """With the ReLU after the upsampling that ours leaves out."""
    net = protonet()
    convolutions = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    assert [c.kernel_size for c in convolutions] == [(3, 3)] * 4 + [(1, 1)]
    x = level = torch.randn(1, 32, 6, 7)
    for convolution in convolutions[:3]:
        x = convolution(x).relu()
    x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False).relu()
    expected = convolutions[4](convolutions[3](x).relu())
    torch.testing.assert_close(net([level]), expected)


def test_prototypes_can_be_negative() -> None:
    """Their ReLU belongs to the linear combination, and RDSNet-s has none."""
    assert protonet()([torch.randn(1, 32, 9, 13)]).min() < 0


def test_a_mask_stride_must_divide_the_levels() -> None:
    with pytest.raises(ValueError, match="divides 8"):
        protonet(mask_stride=3)


def test_it_reads_one_level() -> None:
    with pytest.raises(ValueError, match="unpack"):
        protonet()([torch.randn(1, 32, 9, 13), torch.randn(1, 32, 5, 7)])

"""The pixel stream (3.1): one map from several levels, projected before its last upsampling (DESIGN.md 6.2)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdsnet.model.pixel_stream import PixelStream
from rdsnet.settings import Rules


def stream(**settings: Any) -> PixelStream:
    arguments: dict[str, Any] = {
        "levels": (3, 4, 5),
        "channels": 32,
        "representation": 8,
        "mask_stride": 4,
        "norm": "group",
        "rules": Rules(),
        **settings,
    }
    torch.manual_seed(0)
    module = PixelStream(**arguments)
    assert module.project.bias is not None
    nn.init.normal_(module.project.bias)
    return module


def pyramid(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 32, h, w, generator=generator) for h, w in sizes]


def plain(s: PixelStream, levels: list[Tensor], scale: int, align_corners: bool) -> Tensor:
    """The stream of the paper: every map whole, projected last."""

    def up(x: Tensor, factor: int) -> Tensor:
        return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=align_corners)

    merged = torch.zeros(())
    for octaves, (branch, x) in enumerate(zip(s.branches, levels, strict=True)):
        for conv in branch.children():
            x = up(conv(x), 2) if octaves else conv(x)
        merged = merged + x
    return s.project(up(s.merge(merged), scale))


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("levels", "scale"), [((3, 4, 5), 2), ((4, 5), 4), ((2, 3, 4), 1)])
def test_projecting_before_the_upsampling_gives_the_same(
    levels: tuple[int, ...], scale: int, align_corners: bool
) -> None:
    s = stream(levels=levels, rules=Rules(align_corners=align_corners))
    maps = pyramid((8, 12), (4, 6), (2, 3))[: len(levels)]
    out = s(maps)
    assert out.shape == (2, 8, 8 * scale, 12 * scale)
    torch.testing.assert_close(out, plain(s, maps, scale, align_corners), atol=1e-5, rtol=1e-4)


def test_every_level_is_heard() -> None:
    s = stream()
    maps = [m.requires_grad_() for m in pyramid((8, 12), (4, 6), (2, 3))]
    s(maps).square().sum().backward()
    assert all(m.grad is not None and m.grad.abs().max() > 0 for m in maps)


def test_a_mask_stride_that_does_not_divide_the_finest_levels_is_refused() -> None:
    with pytest.raises(ValueError, match="a mask_stride that divides 4, the finest level's, got 8"):
        stream(levels=(2, 3, 4), mask_stride=8)


def test_an_unknown_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown norm 'layer'; valid are group, batch, none"):
        stream(norm="layer")


def test_maps_of_odd_sizes_meet_at_the_finest() -> None:
    """A square of 90 pixels has maps of 23, 12 and 6 cells: twice 12 is one too many."""
    levels = [torch.rand(1, 32, side, side) for side in (23, 12, 6)]
    assert stream(levels=(2, 3, 4), mask_stride=2, channels=32)(levels).shape[2:] == (46, 46)

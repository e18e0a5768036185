"""The trunk (timm) and the feature pyramid over it (4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import timm
import torch.nn.functional as F
from timm.models import FeatureListNet, load_state_dict
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock
from typing_extensions import Self

from rdsnet.model.layers import initialise, kaiming

ExtraFrom = Literal["trunk", "pyramid"]
TopDown = Literal["nearest", "bilinear"]


class StridedLevels(ExtraFPNBlock):
    """P6, P7, ...: 3x3 stride-2 convolutions on the last map of the trunk or of the pyramid.

    Args:
        in_channels: of the map that the first one reads.
        count: of levels.
        source: that map.
        relu: an activation between them.
    """

    def __init__(self, *, in_channels: int, channels: int, count: int, source: ExtraFrom, relu: bool) -> None:
        super().__init__()
        self.source: ExtraFrom = source
        self.relu = relu
        self.convs = nn.ModuleList(
            initialise(nn.Conv2d(inputs, channels, 3, stride=2, padding=1), kaiming)
            for inputs in ([in_channels] + [channels] * count)[:count]
        )

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        level = x[-1] if self.source == "trunk" else results[-1]
        for i, conv in enumerate(self.convs):
            level = conv(level.relu() if self.relu and i else level)
            results.append(level)
            names.append(f"extra{i}")
        return results, names


class Pyramid(FeaturePyramidNetwork):
    """torchvision's feature pyramid, with YOLACT's two differences as options.

    Args:
        in_channels: of the trunk's maps.
        channels: of every level.
        extra: coarser levels, or None.
        top_down: "nearest", or "bilinear" (half-pixel).
        relu: after the levels that come from the trunk; the coarser ones are made from what it leaves.
    """

    def __init__(
        self, *, in_channels: list[int], channels: int, extra: ExtraFPNBlock | None, top_down: TopDown, relu: bool
    ) -> None:
        super().__init__(in_channels, channels, extra)
        self.top_down: TopDown = top_down
        self.relu = relu

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        names, maps = list(x), list(x.values())
        merged = [inner(m) for inner, m in zip(self.inner_blocks, maps, strict=True)]
        for i in reversed(range(len(merged) - 1)):
            merged[i] = merged[i] + F.interpolate(merged[i + 1], size=merged[i].shape[2:], mode=self.top_down)
        levels = [layer(m) for layer, m in zip(self.layer_blocks, merged, strict=True)]
        if self.relu:
            levels = [level.relu() for level in levels]
        if self.extra_blocks is not None:
            levels, names = self.extra_blocks(levels, maps, names)
        return dict(zip(names, levels, strict=True))


class Backbone(nn.Module):
    """Image (B, 3, H, W) -> pyramid, a list of (B, channels, ceil(H / 2**l), ceil(W / 2**l)) for l in levels.

    Args:
        trunk: a timm model that serves feature maps.
        trunk_levels: the levels taken from it.
        levels: the pyramid's levels: trunk_levels, then any number of coarser ones.
        extra_from: whose last map the coarser ones are made from.
        extra_relu: an activation between the coarser ones.
        top_down, relu: of `Pyramid`.
        pretrained: "imagenet" (fetched by timm), "none", or a weights file of that trunk (timm's names).
        norm: "frozen" keeps the trunk's batch norm statistics (their affine parts still train), "batch" does not.
        frozen_stages: leading stages that are not trained (1: stem, 2: stem and first stage).
        checkpoint_activations: training keeps what the trained stages of the trunk read and computes what lies within
            them once more in the backward pass. Gradients and batch norm statistics stay the same.
    """

    def __init__(
        self,
        *,
        trunk: str,
        trunk_levels: Sequence[int],
        levels: Sequence[int],
        channels: int,
        pretrained: str,
        norm: Literal["frozen", "batch"],
        frozen_stages: int,
        extra_from: ExtraFrom,
        extra_relu: bool,
        top_down: TopDown,
        relu: bool,
        checkpoint_activations: bool,
    ) -> None:
        super().__init__()
        trunk_levels, levels = tuple(trunk_levels), tuple(levels)
        if levels != tuple(range(trunk_levels[0], levels[-1] + 1)) or levels[: len(trunk_levels)] != trunk_levels:
            raise ValueError(f"expected levels that go on from trunk_levels {trunk_levels} by one, got {levels}")
        self.levels = levels
        self.trunk: Any = _create_trunk(trunk, trunk_levels, pretrained)
        if checkpoint_activations and not isinstance(self.trunk, FeatureListNet):
            raise ValueError(f"activations of trunk {trunk!r} cannot be checkpointed: timm gives it no list of stages")
        self._checkpoint = checkpoint_activations
        trunk_channels = self.trunk.feature_info.channels()
        extra = StridedLevels(
            in_channels=trunk_channels[-1] if extra_from == "trunk" else channels,
            channels=channels,
            count=len(levels) - len(trunk_levels),
            source=extra_from,
            relu=extra_relu,
        )
        self.fpn = Pyramid(
            in_channels=trunk_channels,
            channels=channels,
            extra=extra if extra.convs else None,
            top_down=top_down,
            relu=relu,
        )
        self._frozen_norm = norm == "frozen"
        self._frozen = self._leading_stages(frozen_stages)
        for stage in self._frozen:
            stage.requires_grad_(False)

    def _leading_stages(self, count: int) -> list[nn.Module]:
        if count == 0:
            return []
        last = [info["module"].replace(".", "_") for info in self.trunk.feature_info.info]
        names = [name for name, _ in self.trunk.named_children()]
        if count > len(last) or last[count - 1] not in names:
            raise ValueError(f"cannot freeze {count} stages: the trunk has {names}")
        return list(self.trunk.children())[: names.index(last[count - 1]) + 1]

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self._frozen_norm:
            for module in self.trunk.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        for stage in self._frozen:
            stage.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self._checkpointed(images) if self._checkpoint and self.training else self.trunk(images)
        return list(self.fpn({str(i): m for i, m in enumerate(maps)}).values())

    def _checkpointed(self, x: Tensor) -> list[Tensor]:
        """The trunk's maps, stage by stage as the trunk itself does it."""
        maps = []
        for name, stage in self.trunk.items():
            # A single layer keeps its input and nothing else, a stage that is not trained may keep nothing at all
            if any(stage.children()) and any(p.requires_grad for p in stage.parameters()):
                x = checkpoint(stage, x, use_reentrant=False, context_fn=partial(_contexts, stage))
            else:
                x = stage(x)
            if name in self.trunk.return_layers:
                maps.append(x)
        return maps


class _KeepBuffers(AbstractContextManager[None]):
    """Puts a module's buffers back at the end: a batch that is recomputed must not count twice in batch norm."""

    def __init__(self, module: nn.Module) -> None:
        self.buffers = list(module.buffers())

    def __enter__(self) -> None:
        self._before = [buffer.clone() for buffer in self.buffers]

    def __exit__(self, *_: object) -> None:
        for buffer, before in zip(self.buffers, self._before, strict=True):
            buffer.copy_(before)


def _contexts(stage: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around the first computation of a stage, and around those in the backward pass."""
    return nullcontext(), _KeepBuffers(stage)


def _create_trunk(name: str, levels: Sequence[int], pretrained: str) -> Any:
    if pretrained not in ("imagenet", "none") and not Path(pretrained).is_file():
        raise FileNotFoundError(f"expected pretrained to be imagenet, none or a weights file, got {pretrained}")
    try:
        probe: Any = timm.create_model(name, features_only=True, pretrained=False)
    except RuntimeError as error:
        raise ValueError(f"timm has no trunk {name!r} with feature maps: {error}") from error
    strides = probe.feature_info.reduction()
    missing = [level for level in levels if 2**level not in strides]
    if missing:
        raise ValueError(f"trunk {name!r} has maps of strides {strides}, none for levels {missing}")
    overlay = None
    if pretrained not in ("imagenet", "none"):
        _check_file(name, pretrained)
        overlay = {"file": pretrained}
    try:
        return timm.create_model(
            name,
            features_only=True,
            out_indices=tuple(strides.index(2**level) for level in levels),
            pretrained=pretrained != "none",
            pretrained_cfg_overlay=overlay,
        )
    except OSError as error:  # what every download failure of the hub derives from
        raise ValueError(
            f"could not fetch the ImageNet weights of {name!r} ({type(error).__name__}); "
            "give --model.pretrained none, or a file"
        ) from error


def _check_file(trunk: str, path: str) -> None:
    """Every weight of the trunk must be in the file: timm would go on in silence without those it does not find."""
    try:
        weights = load_state_dict(path)
    except Exception as error:  # a damaged file raises errors of many kinds
        raise ValueError(f"cannot read weights from {path}: {type(error).__name__}") from error
    expected = timm.create_model(trunk, num_classes=0).state_dict()
    problems = [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(t.shape)}" if name in weights else f"missing {name}"
        for name, t in expected.items()
        if not name.endswith("num_batches_tracked") and (name not in weights or weights[name].shape != t.shape)
    ]
    if problems:
        raise ValueError(f"{path} does not fit trunk {trunk!r}: {'; '.join(problems)}")

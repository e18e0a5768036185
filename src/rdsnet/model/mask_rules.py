"""Which objects learn a mask, by which loss, and how masks reach the image: section 3.2's rules as one object.

YOLACT's, which the paper compares with, are in `yolact_masks.py` beside this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rdsnet.model.correlation import draw_instances, mask_loss
from rdsnet.model.masks import PastedMasks, paste_masks
from rdsnet.structures import Rules, Targets


class MaskRules(Protocol):
    """What RDSNet asks of either set of rules. `step` is the (y, x) input pixels of a cell of the mask grid."""

    def choose(self, objects: Tensor, targets: Targets, generator: torch.Generator | None) -> Tensor:
        """Which of an image's positive anchors make masks.

        Args:
            objects: (M,) int64, the object of each positive anchor.

        Returns:
            int64 indices into it.
        """

    def loss(
        self,
        vectors: Tensor,
        pixels: Tensor,
        objects: Tensor,
        targets: Targets,
        *,
        step: tuple[float, float],
        positives: int,
    ) -> Tensor:
        """Sum over an image's instances.

        Args:
            vectors: (M, D) of the instances.
            pixels: (D, Hm, Wm).
            objects: (M,) int64, the object of each instance.
            positives: anchors that `choose` had to choose from.
        """

    def divisor(self, positives: Tensor, instances: Tensor) -> Tensor:
        """What a batch's sum of losses is divided by: from its numbers of positive anchors and instances."""

    def paste(
        self,
        vectors: Tensor,
        pixels: Tensor,
        boxes: Tensor,
        *,
        size: tuple[int, int],
        output_size: tuple[int, int],
        step: tuple[float, float],
    ) -> PastedMasks:
        """Masks at full resolution; arguments as of `rdsnet.model.masks.paste_masks`."""


@dataclass(frozen=True, kw_only=True)
class RDSNetMasks:
    """The paper's rules (3.2, 3.4), and the release's where they differ.

    Args:
        max_instances: masks an image in training, at most.
        train_expand: of the crop of the loss, from the ground-truth box.
        ohem_ratio: background pixels kept for each foreground pixel; None: all.
        expand: of the crop of the result, from the regressed box.
        threshold: a pixel is foreground above this probability, 0..1.
        rules: what differs between projects.
    """

    max_instances: int
    train_expand: float
    ohem_ratio: float | None
    expand: float
    threshold: float
    rules: Rules

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"expected a mask threshold between 0 and 1, got {self.threshold}")

    def choose(self, objects: Tensor, targets: Targets, generator: torch.Generator | None) -> Tensor:
        eligible = targets.has_mask & (targets.areas > self.rules.min_mask_area)
        index = eligible[objects].nonzero()[:, 0]
        groups = objects[index] if self.rules.spread_masks else torch.zeros_like(index)
        return index[draw_instances(groups, self.max_instances, generator)]

    def loss(
        self,
        vectors: Tensor,
        pixels: Tensor,
        objects: Tensor,
        targets: Targets,
        *,
        step: tuple[float, float],
        positives: int,
    ) -> Tensor:
        return mask_loss(
            vectors,
            pixels,
            objects,
            targets,
            step=step,
            expand=self.train_expand,
            crop_rule=self.rules.crop_rule,
            ohem_ratio=self.ohem_ratio,
        )

    def divisor(self, positives: Tensor, instances: Tensor) -> Tensor:
        return instances + 1

    def paste(
        self,
        vectors: Tensor,
        pixels: Tensor,
        boxes: Tensor,
        *,
        size: tuple[int, int],
        output_size: tuple[int, int],
        step: tuple[float, float],
    ) -> PastedMasks:
        return paste_masks(
            vectors,
            pixels,
            boxes,
            size=size,
            output_size=output_size,
            step=step,
            expand=self.expand,
            crop_rule=self.rules.crop_rule,
            threshold=self.threshold,
            two_steps=self.rules.two_steps,
        )

"""RDSNet: the two streams and what they give each other (Figure 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from rdsnet.distributed import mean_over_ranks, world_size
from rdsnet.model.backbone import Backbone
from rdsnet.model.correlation import draw_instances, mask_loss
from rdsnet.model.cropping import CropRule
from rdsnet.model.masks import PastedMasks, paste_masks
from rdsnet.model.mbrm import MBRM
from rdsnet.model.object_stream import DenseStream, Found, Positives, Raw
from rdsnet.model.pixel_stream import PixelStream
from rdsnet.structures import Objects, Targets, ceil32

Refine = Literal["argmax", "mean", "direct", "off"]


class MaskSettings(NamedTuple):
    """How masks are trained and pasted; `rdsnet.config.LossConfig` and `DetectConfig` say what each is."""

    stride: int
    max_instances: int
    spread: bool
    min_area: float
    train_expand: float
    train_crop_rule: CropRule
    ohem_ratio: float | None
    expand: float
    crop_rule: CropRule
    threshold: float
    two_steps: bool


class RDSNet(nn.Module):
    """Images -> objects, each with a box, a class and a mask.

    Args:
        backbone: trunk and pyramid.
        object_stream: boxes, classes and object representations.
        pixel_stream: pixel representations from the pyramid's `pixel_levels`; None for a plain detector.
        mbrm: refines the boxes by the masks.
        masks: settings of mask training and pasting.
        refine: which boxes are the result; "off", "direct" (Table 4), or MBRM's "argmax" or "mean".
        box_weight, mask_weight: lambda_r and lambda_m of Eq. 8.
        image_mean, image_std: RGB, 0..255.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self,
        *,
        backbone: Backbone,
        object_stream: DenseStream,
        pixel_stream: PixelStream | None,
        pixel_levels: Sequence[int],
        mbrm: MBRM,
        masks: MaskSettings,
        refine: Refine,
        box_weight: float,
        mask_weight: float,
        image_mean: Sequence[float],
        image_std: Sequence[float],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.object_stream = object_stream
        self.pixel_stream = pixel_stream
        self.mbrm = mbrm
        self.masks = masks
        self.refine: Refine = refine
        self.loss_weights = {"cls": 1.0, "box": box_weight, "mask": mask_weight}
        if not 0 < masks.threshold < 1:
            raise ValueError(f"expected a mask threshold between 0 and 1, got {masks.threshold}")
        if not set(pixel_levels) <= set(backbone.levels):
            raise ValueError(f"expected pixel_levels among levels {backbone.levels}, got {tuple(pixel_levels)}")
        self._pixel_levels = [backbone.levels.index(level) for level in pixel_levels]
        self.register_buffer("image_mean", torch.tensor(image_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(image_std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> tuple[Raw, Tensor | None]:
        """Normalised images (B, 3, H, W) -> the object stream's raw output, pixel representations (B, D, Hm, Wm).

        H and W are multiples of 32.
        """
        pyramid = self.backbone(images)
        raw = self.object_stream(pyramid)
        if self.pixel_stream is None:
            return raw, None
        return raw, self.pixel_stream([pyramid[i] for i in self._pixel_levels])

    def normalise(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """uint8 RGB (B, 3, H, W) -> float32; what lies beyond each image's (h, w) becomes 0, as if padded now."""
        normal = (images - self.image_mean) / self.image_std
        for image, (h, w) in zip(normal, sizes, strict=True):
            image[:, h:] = 0
            image[:, :, w:] = 0
        return normal

    def losses(
        self, images: Tensor, targets: Sequence[Targets], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """The terms of Eq. 8, weighted: their sum is the loss.

        Args:
            images: (B, 3, H, W) uint8 RGB, padded on the right and at the bottom to a multiple of 32.
            targets: B of them.
            generator: draws the positive anchors that make masks, where there are too many.

        Returns:
            "cls", "box" and, where the model has masks, "mask": float32 scalars.
        """
        raw, pixels = self(self.normalise(images, [t.image_size for t in targets]))
        with torch.autocast(images.device.type, enabled=False):
            losses, positives = self.object_stream.losses(raw, targets)
            if pixels is not None:
                losses["mask"] = self._mask_loss(raw, pixels.float(), positives, targets, generator)
        return {name: loss * self.loss_weights[name] for name, loss in losses.items()}

    def _mask_loss(
        self,
        raw: Raw,
        pixels: Tensor,
        positives: Positives,
        targets: Sequence[Targets],
        generator: torch.Generator | None,
    ) -> Tensor:
        chosen = []
        for b, target in enumerate(targets):
            eligible = target.has_mask & (target.areas > self.masks.min_area)
            index = (positives.image == b).nonzero()[:, 0]
            index = index[eligible[positives.object[index]]]
            groups = positives.object[index] if self.masks.spread else torch.zeros_like(index)
            chosen.append(index[draw_instances(groups, self.masks.max_instances, generator)])
        counts, picked = [len(index) for index in chosen], torch.cat(chosen)
        representations = self.object_stream.representations(raw, positives.image[picked], positives.anchor[picked])
        sums = [
            mask_loss(
                per_image,
                pixels[b],
                objects,
                target,
                mask_stride=self.masks.stride,
                expand=self.masks.train_expand,
                crop_rule=self.masks.train_crop_rule,
                ohem_ratio=self.masks.ohem_ratio,
            )
            for b, (per_image, objects, target) in enumerate(
                zip(
                    representations.split(counts),
                    positives.object[picked].split(counts),
                    targets,
                    strict=True,
                )
            )
        ]
        divisor = mean_over_ranks(pixels.new_tensor(sum(counts) + 1 / world_size()))  # all processes' instances + 1
        # The zero keeps every parameter in the graph when no object of this process makes a mask
        return (torch.stack(sums).sum() + 0 * (representations.sum() + pixels.sum())) / divisor

    @torch.inference_mode()
    def detect(
        self,
        images: Tensor,
        sizes: Sequence[tuple[int, int]],
        output_sizes: Sequence[tuple[int, int]],
        scales: Sequence[float] | None = None,
    ) -> list[Objects]:
        """Find the objects of a batch (3.4).

        Args:
            images: (B, 3, H, W) uint8 RGB, padded on the right and at the bottom to a multiple of 32.
            sizes: (h, w) of each image in it, before padding.
            output_sizes: (H, W) of each original image: boxes and masks are in its pixels.
            scales: network pixels a pixel of each original, where boxes go back by this factor on both axes;
                default: by each axis' own ratio, which differs a little as sizes are whole pixels.
        """
        raw, pixels = self(self.normalise(images, sizes))
        factors: Sequence[float | None] = [None] * len(sizes) if scales is None else scales
        return [
            self._assemble(raw, pixels, b, size, output_size, scale)
            for b, (size, output_size, scale) in enumerate(zip(sizes, output_sizes, factors, strict=True))
        ]

    def _assemble(
        self,
        raw: Raw,
        pixels: Tensor | None,
        image: int,
        size: tuple[int, int],
        output_size: tuple[int, int],
        scale: float | None,
    ) -> Objects:
        found = self.object_stream.detect(raw, image, size, output_size, scale)
        if pixels is None:
            return _without_masks(found, output_size)
        index = torch.full_like(found.anchors, image)
        # In a batch of several sizes the grid ends with the image's own padding, as it does alone
        rows, columns = (ceil32(side) // self.masks.stride for side in size)
        pasted = paste_masks(
            self.object_stream.representations(raw, index, found.anchors),
            pixels[image, :, :rows, :columns].float(),
            found.boxes,
            size=size,
            output_size=output_size,
            mask_stride=self.masks.stride,
            expand=self.masks.expand,
            crop_rule=self.masks.crop_rule,
            threshold=self.masks.threshold,
            two_steps=self.masks.two_steps,
        )
        return self._refine(found, pasted, output_size)

    def _refine(self, found: Found, pasted: PastedMasks, output_size: tuple[int, int]) -> Objects:
        direct = torch.where(pasted.direct_boxes.isnan(), found.boxes, pasted.direct_boxes)
        boxes, edge_std = self.mbrm(
            pasted.columns, pasted.rows, found.boxes, "mean" if self.refine == "mean" else "argmax"
        )
        if self.refine == "direct":
            boxes = direct
        elif self.refine == "off" or self.mbrm.gamma == 0:
            boxes = found.boxes
        return Objects(
            boxes=boxes,
            regressed_boxes=found.boxes,
            direct_boxes=direct,
            scores=found.scores,
            labels=found.labels,
            edge_std=edge_std,
            masks=pasted.masks,
            windows=pasted.windows,
            anchors=found.anchors,
            image_size=output_size,
            profiles=(pasted.columns, pasted.rows),
        )


def _without_masks(found: Found, image_size: tuple[int, int]) -> Objects:
    return Objects(
        boxes=found.boxes,
        regressed_boxes=found.boxes,
        direct_boxes=found.boxes,
        scores=found.scores,
        labels=found.labels,
        edge_std=torch.full_like(found.boxes, torch.nan),
        masks=[],
        windows=found.boxes.new_zeros(found.boxes.shape, dtype=torch.int64),
        anchors=found.anchors,
        image_size=image_size,
    )

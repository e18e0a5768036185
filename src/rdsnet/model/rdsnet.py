"""RDSNet: the two streams and what they give each other (Figure 2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from rdsnet.device import mean_over_ranks, to_device, to_host, world_size
from rdsnet.model.backbone import Backbone
from rdsnet.model.correlation import VECTORS, Assembly, correlate
from rdsnet.model.mask_rules import MaskRules
from rdsnet.model.masks import Frame, PastedMasks
from rdsnet.model.mbrm import MBRM, not_refined
from rdsnet.model.object_stream.dense import DenseStream, Positives, Raw
from rdsnet.model.object_stream.suppression import Found
from rdsnet.model.pixel_stream import SemanticBranch
from rdsnet.structures import Objects, Targets, ceil32

Refine = Literal["argmax", "mean", "direct", "off"]


Find = Callable[[Raw, int, tuple[int, int], tuple[int, int], float | None], Found]
"""`DenseStream.detect`, or what takes its place"""


def no_mark(stage: str) -> None:
    """Stages go by unseen."""


class RDSNet(nn.Module):
    """Images -> objects, each with a box, a class and a mask.

    Args:
        backbone: trunk and pyramid.
        object_stream: boxes, classes and object representations.
        pixel_stream: pixel representations from the pyramid's `pixel_levels`, finest first; None for a plain detector.
        assembly: how representations make a mask, "correlation" (Eq. 1) or "linear".
        masks: how masks are trained, cropped and pasted.
        mbrm: refines the boxes by the masks.
        refine: which boxes are the result; "off", "direct" (Table 4), or MBRM's "argmax" or "mean".
        semantic: a segmentation branch for training only, on the finest of `pixel_levels`.
        loss_weights: of the losses "box", "mask" and "semantic" (lambda_r and lambda_m of Eq. 8); others weigh 1.
        image_mean, image_std: RGB, 0..255.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self,
        *,
        backbone: Backbone,
        object_stream: DenseStream,
        pixel_stream: nn.Module | None,
        pixel_levels: Sequence[int],
        assembly: Assembly,
        masks: MaskRules,
        mbrm: MBRM,
        refine: Refine,
        semantic: SemanticBranch | None,
        loss_weights: Mapping[str, float],
        image_mean: Sequence[float],
        image_std: Sequence[float],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.object_stream = object_stream
        self.pixel_stream = pixel_stream
        self.semantic = semantic
        self.assembly: Assembly = assembly
        self.masks = masks
        self.mbrm = mbrm
        self.refine: Refine = refine
        self.loss_weights = dict(loss_weights)
        if not set(pixel_levels) <= set(backbone.levels):
            raise ValueError(f"expected pixel_levels among levels {backbone.levels}, got {tuple(pixel_levels)}")
        self._pixel_levels = [backbone.levels.index(level) for level in pixel_levels]
        self.register_buffer("image_mean", torch.tensor(image_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(image_std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> tuple[Raw, Tensor | None]:
        """Normalised images (B, 3, H, W) -> the object stream's raw output, pixel representations (B, D, Hm, Wm).

        H and W are multiples of 32, or the side that `data.square` names. Computed in the precision of the weights.
        """
        dtype = next(self.backbone.parameters()).dtype
        return self._streams(self.backbone(images.to(dtype)), (images.shape[2], images.shape[3]))

    def _streams(self, pyramid: list[Tensor], size: tuple[int, int]) -> tuple[Raw, Tensor | None]:
        raw = self.object_stream(pyramid, size)
        if self.pixel_stream is None:
            return raw, None
        pixels = self.pixel_stream([pyramid[i] for i in self._pixel_levels])
        return raw, pixels.relu() if self.assembly == "linear" else pixels

    def class_rows(self) -> dict[str, int]:
        """The weights whose rows are those of classes, by name, and how many rows come before them for each anchor."""
        layers = [(self.object_stream.classify, self.object_stream.background_rows)]
        if self.semantic is not None:
            layers.append((self.semantic.classify, 0))
        rows = {id(values): first for layer, first in layers for values in layer.parameters()}
        return {name: rows[id(values)] for name, values in self.named_parameters() if id(values) in rows}

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
            images: (B, 3, H, W) uint8 RGB, padded on the right and at the bottom to a multiple of 32 (or squashed).
            targets: B of them.
            generator: draws the positive anchors that make masks, where there are too many.

        Returns:
            "cls", "box" and what else the stream learns, with "mask" and "semantic" where the model has them:
            float32 scalars.
        """
        pyramid = self.backbone(self.normalise(images, [t.image_size for t in targets]))
        raw, pixels = self._streams(pyramid, (images.shape[2], images.shape[3]))
        semantic = None if self.semantic is None else self.semantic(pyramid[self._pixel_levels[0]])
        with torch.autocast(images.device.type, enabled=False):
            losses, positives = self.object_stream.losses(raw, targets)
            if pixels is not None:
                pixels = pixels.float()
                chosen = self.choose(positives, targets, generator)
                vectors = self.vectors(raw, chosen.image, chosen.anchor)
                terms = []
                for b, (own, objects) in enumerate(zip(*chosen.by_image(vectors), strict=True)):
                    crops = self.masks.crops(  # expanded boxes (3.2)
                        pixels[b], objects, targets[b], step=_step(raw.size, pixels), positives=chosen.positives[b]
                    )
                    terms += [crop.loss(correlate(own, crop.pixels, crop.instances)) for crop in crops]  # Eq. 1
                # The zero keeps every parameter in the graph when no object of this process makes a mask
                total = torch.cat([*terms, 0 * vectors.sum()[None], 0 * pixels.sum()[None]]).sum()
                losses["mask"] = total / self._divisor(chosen, pixels.device)
            if self.semantic is not None and semantic is not None:
                losses["semantic"] = self.semantic.loss(semantic.float(), targets)
        return {name: loss * self.loss_weights.get(name, 1.0) for name, loss in losses.items()}

    def choose(self, positives: Positives, targets: Sequence[Targets], generator: torch.Generator | None) -> Instances:
        """The positive anchors that make masks."""
        # What is drawn among, on the host: one wait for a GPU
        image, anchor, owners, *facts = to_host(*positives, *(t.has_mask for t in targets), *(t.areas for t in targets))
        known = [
            replace(target, has_mask=has_mask, areas=areas)
            for target, has_mask, areas in zip(targets, facts[: len(targets)], facts[len(targets) :], strict=True)
        ]
        of_image = [(image == b).nonzero()[:, 0] for b in range(len(targets))]
        chosen = [
            index[self.masks.choose(owners[index], target, generator)]
            for index, target in zip(of_image, known, strict=True)
        ]
        picked = torch.cat(chosen)
        return Instances(
            image=image[picked],
            anchor=anchor[picked],
            object=owners[picked],
            counts=[len(index) for index in chosen],
            positives=[len(index) for index in of_image],
        )

    def vectors(self, raw: Raw, image: Tensor, anchor: Tensor) -> Tensor:
        """(M, D) what correlation takes of the object representations of (M,) anchors."""
        return VECTORS[self.assembly](self.object_stream.representations(raw, image, anchor))

    def _divisor(self, chosen: Instances, device: torch.device) -> Tensor:
        """Of this process: the gradients' mean over all is then that of one large batch."""
        ranks = world_size()
        counts = torch.tensor([sum(chosen.positives), sum(chosen.counts)], dtype=torch.float32)
        totals = mean_over_ranks(to_device(counts, device)) * ranks  # of all processes
        return self.masks.divisor(totals[0], totals[1]) / ranks

    @torch.inference_mode()
    def detect(
        self,
        images: Tensor,
        sizes: Sequence[tuple[int, int]],
        output_sizes: Sequence[tuple[int, int]],
        scales: Sequence[float] | None = None,
        mark: Callable[[str], None] = no_mark,
        find: Find | None = None,
    ) -> list[Objects]:
        """Find the objects of a batch (3.4).

        Args:
            images: (B, 3, H, W) uint8 RGB, padded on the right and at the bottom to a multiple of 32 (or squashed).
            sizes: (h, w) of each image in it, before padding.
            output_sizes: (H, W) of each original image: boxes and masks are in its pixels.
            scales: network pixels a pixel of each original, where boxes go back by this factor on both axes;
                default: by each axis' own ratio, which differs a little as sizes are whole pixels.
            mark: called with the name of each stage that begins: network, NMS, and masks where the model has them.
            find: finds boxes in the object stream's output; default: the stream's own `detect`.

        Returns:
            One for each image, on the device of the images.
        """
        normal = self.normalise(images, sizes)
        mark("network")
        raw, pixels = self(normal)
        mark("NMS")
        factors: Sequence[float | None] = [None] * len(sizes) if scales is None else scales
        with torch.autocast(images.device.type, enabled=False):
            # Waiting for a GPU comes first: then the masks of all images are queued in one go
            find = find or self.object_stream.detect
            found = [
                find(raw, b, size, output_size, scale)
                for b, (size, output_size, scale) in enumerate(zip(sizes, output_sizes, factors, strict=True))
            ]
            if pixels is None:
                return [
                    self._refine(own.to(images.device), None, output_size)
                    for own, output_size in zip(found, output_sizes, strict=True)
                ]
            mark("masks")
            objects = []
            for b, (own, size, output_size) in enumerate(zip(found, sizes, output_sizes, strict=True)):
                vectors = self.vectors(raw, torch.full_like(own.anchors, b), own.anchors)
                frame = _frame(raw.size, pixels, size, output_size)
                grid = pixels[b, :, : frame.grid[0], : frame.grid[1]].float()
                maps = partial(correlate, vectors, grid)  # Eq. 1, of as many objects at a time as are pasted
                pasted = self.masks.paste(maps, own.boxes, frame, grid.device)  # expanded boxes (3.2)
                own = own._replace(boxes=self.object_stream.finish(own.boxes, output_size))
                objects.append(self._refine(own.to(grid.device), pasted, output_size))  # MBRM (3.3)
            return objects

    def _refine(self, found: Found, pasted: PastedMasks | None, output_size: tuple[int, int]) -> Objects:
        """The boxes as `refine` says; without masks as they were regressed."""
        direct = found.boxes
        if pasted is not None:
            direct = torch.where(pasted.direct_boxes.isnan(), found.boxes, pasted.direct_boxes)
        if pasted is not None and self.refine in ("argmax", "mean") and self.mbrm.gamma > 0:
            refined = self.mbrm(pasted.columns, pasted.rows, found.boxes, self.refine)
        else:
            refined = not_refined(direct if self.refine == "direct" else found.boxes)
        return Objects(
            boxes=refined.boxes,
            regressed_boxes=found.boxes,
            direct_boxes=direct,
            scores=found.scores,
            labels=found.labels,
            edge_std=refined.edge_std,
            interval=refined.interval,
            masks=[] if pasted is None else pasted.masks,
            windows=torch.zeros(found.boxes.shape, dtype=torch.int64) if pasted is None else pasted.windows,
            anchors=found.anchors,
            image_size=output_size,
            profiles=None if pasted is None else (pasted.columns, pasted.rows),
        )


class Instances(NamedTuple):
    """The positive anchors of a batch that make masks, image by image, on the CPU.

    image, anchor, object  (M,) int64: image, flat anchor index, and object of that image
    counts                 of each image
    positives              of each image, how many there were to choose from
    """

    image: Tensor
    anchor: Tensor
    object: Tensor
    counts: list[int]
    positives: list[int]

    def by_image(self, vectors: Tensor) -> tuple[list[Tensor], Sequence[Tensor]]:
        """Of each image its vectors in order of their objects, and the objects of its instances."""
        objects = self.object.split(self.counts)
        orders = (to_device(own.argsort(stable=True), vectors.device) for own in objects)
        return [own[order] for own, order in zip(vectors.split(self.counts), orders, strict=True)], objects


def _step(size: tuple[int, int], pixels: Tensor) -> tuple[float, float]:
    """(y, x) input pixels a cell of the mask grid."""
    return size[0] / pixels.shape[2], size[1] / pixels.shape[3]


def _frame(padded: tuple[int, int], pixels: Tensor, size: tuple[int, int], output_size: tuple[int, int]) -> Frame:
    """Of an image in a batch of several sizes the grid ends with its own padding, as it does alone."""
    step = _step(padded, pixels)
    rows, columns = (round(min(ceil32(size[axis]), padded[axis]) / step[axis]) for axis in (0, 1))
    return Frame(size, output_size, (rows, columns), step)

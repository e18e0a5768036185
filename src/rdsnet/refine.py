"""Boundary refinement (MBRM, 3.3) for the boxes and masks of any model.

The numbers are those of `MBRM.forward` on whole images, but an edge is only looked for where the prior lets it be, and
masks may come as crops.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import supervision as sv
import torch
import torch.nn.functional as F
from torch import Tensor

from rdsnet.model.mbrm import REACH
from rdsnet.profiles import Array, Masks, Profiles, read_profiles
from rdsnet.refiner import BINARY, SOFT, WEIGHTS, Refiner

__all__ = ["RefinedBoxes", "Refiner", "refine_boxes"]

MIN_SIGMA = 1.0  # pixels; small objects keep a prior that can move by a pixel
NEGLIGIBLE = 17.0  # nats; what is left out of a posterior is less than 1e-7 of its peak
FARTHEST = 2.0**24  # pixels; float32 knows each whole number up to this
TOGETHER = 512  # objects that are refined at once: what they need grows with the widest prior among them

Decision = Literal["argmax", "mean"]


class RefinedBoxes(NamedTuple):
    """Boxes of N objects after refinement; arrays or tensors, as the boxes that were given.

    xyxy      (N, 4) float32, half-open: pixel i covers [i, i + 1)
    edge_std  (N, 4) float32, pixels: standard deviation of the left, top, right and bottom edge
    interval  (N, 4, 2) float32, lowest and highest position of each edge's central credible interval, whole pixels
    """

    xyxy: Array
    edge_std: Array
    interval: Array


@overload
def refine_boxes(
    boxes: sv.Detections,
    masks: None = ...,
    *,
    refiner: Refiner | str | Path | None = ...,
    decision: Decision = ...,
    credibility: float = ...,
) -> sv.Detections: ...


@overload
def refine_boxes(
    boxes: Array | Mapping[str, Any],
    masks: Masks | None = ...,
    *,
    origins: Any = ...,
    image_size: tuple[int, int] | None = ...,
    refiner: Refiner | str | Path | None = ...,
    decision: Decision = ...,
    credibility: float = ...,
) -> RefinedBoxes: ...


def refine_boxes(
    boxes: Array | sv.Detections | Mapping[str, Any],
    masks: Masks | None = None,
    *,
    origins: Any = None,
    image_size: tuple[int, int] | None = None,
    refiner: Refiner | str | Path | None = None,
    decision: Decision = "argmax",
    credibility: float = 0.95,
) -> RefinedBoxes | sv.Detections:
    """Refine the boxes of one image by its masks (Eq. 2-7), whatever model they come from.

    A box is believed to be about right (each edge within a few percent of its size), and a mask is read through its
    profile, the highest value of each column and row. An edge near which the mask shows nothing stays where it is.

    Args:
        boxes: (N, 4) xyxy in pixels of the image, half-open: pixel i covers [i, i + 1). Boxes of tools that end with
            the last pixel inside (`torchvision.ops.masks_to_boxes`, `sv.mask_to_xyxy`) need 1 added to x2 and y2.
            Or `sv.Detections` with masks; or torchvision's output, a dict with "boxes" and "masks" (with crops as
            masks, also "origins" and "image_size").
        masks: soft, probabilities 0..1, or binary (bool, or 0 and 1 of any type): N whole images (N, H, W) or
            (N, 1, H, W); N crops (h, w) with `origins`; or `sv.CompactMask`. Arrays or tensors. Masks that were cut
            off at their boxes cannot show that a box is too small.
        origins: (N, 2) whole pixels x, y of each crop's top left corner.
        image_size: (H, W) with crops: edges stay inside the image. Without it they only stay at 0 or above.
        refiner: numbers to read the masks with, see `rdsnet.fit_refiner`: a `Refiner`, its JSON file, or a run folder
            or weights of an RDSNet (a file is read at each call). Default: numbers for soft or for binary masks that
            suit masks whose 0.5 lies on the object's edge.
        decision: each edge's most likely position, a whole pixel, or the mean of its posterior.
        credibility: share of the posterior inside `interval`, 0..1.

    Returns:
        `RefinedBoxes`, arrays for array boxes, tensors on their device for tensors. For `sv.Detections` a copy with
        other `xyxy`, the same masks, and in `data` `regressed_xyxy` (the boxes that were given), `edge_std` (N, 4) and
        `interval` (N, 4, 2).

    Raises:
        FileNotFoundError: no such refiner.
        ValueError: boxes or masks of another form, different numbers of them, crops without origins, values that are
            not finite, masks outside 0..1, a box beyond the image.
    """
    if decision not in ("argmax", "mean"):
        raise ValueError(f"unknown decision {decision!r}; valid are argmax, mean")
    if not 0 < credibility < 1:
        raise ValueError(f"expected a credibility above 0 and below 1, got {credibility}")
    if isinstance(boxes, (sv.Detections, Mapping)) and (masks is not None or origins is not None):
        raise ValueError(f"expected no further masks or origins with a {type(boxes).__name__}, which holds its own")
    if isinstance(boxes, sv.Detections):
        found = detections_masks(boxes)
        refined = refine_boxes(boxes.xyxy, found, refiner=refiner, decision=decision, credibility=credibility)
        return _with_boxes(boxes, refined)
    if isinstance(boxes, Mapping):
        boxes, masks, origins, image_size = read_output(boxes)
    if masks is None:
        what = "masks: refine_boxes(boxes, masks), or sv.Detections or a dict that holds them"
        raise ValueError(f"expected {what}, got a {type(boxes).__name__} alone")
    corners = read_boxes(boxes)
    profiles = read_profiles(masks, len(corners), origins, image_size, corners.device)
    _require_inside(corners, profiles.size)
    chosen = as_refiner(refiner, profiles.soft)
    with torch.no_grad():
        results = _refine(corners, profiles, chosen, decision, credibility)
    if isinstance(boxes, Tensor):
        return results
    return RefinedBoxes(*(np.asarray(values) for values in results))


def read_boxes(boxes: Any) -> Tensor:
    """(N, 4) float32 boxes of an array or tensor, where they are; a ValueError for anything else."""
    if not isinstance(boxes, (np.ndarray, Tensor)):
        raise ValueError(f"expected boxes as an array or tensor (N, 4), sv.Detections or a dict, got {type(boxes)}")
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"expected boxes of shape (N, 4), xyxy, got {tuple(boxes.shape)}")
    if isinstance(boxes, np.ndarray) and boxes.dtype.kind not in "fiu":
        raise ValueError(f"expected boxes of numbers, got {boxes.dtype}")
    corners = torch.as_tensor(boxes).detach().float()
    finite = (corners.abs() <= FARTHEST).all(dim=1)  # NaN is not
    for right, what in (
        (finite, f"boxes of finite numbers up to {FARTHEST:.0f}"),
        ((corners[:, 2:] >= corners[:, :2]).all(dim=1), "boxes xyxy with x2 >= x1 and y2 >= y1"),
    ):
        if not right.all():
            i = int((~right).nonzero()[0])
            raise ValueError(f"expected {what}, got {corners[i].tolist()} for box {i}")
    return corners


def _require_inside(corners: Tensor, size: tuple[int, int] | None) -> None:
    """Raise a ValueError for a box beyond the image of its mask, as where one of them is scaled and the other not."""
    if size is None or not len(corners):
        return
    end = corners.new_tensor([size[1], size[0]])
    beyond = ((corners[:, :2] >= end) | (corners[:, 2:] <= 0)).any(dim=1)
    if beyond.any():
        i = int(beyond.nonzero()[0])
        raise ValueError(f"box {i}, {corners[i].tolist()}, lies outside of its image of (H, W) {tuple(size)}")


def read_output(output: Mapping[str, Any]) -> tuple[Any, Any, Any, Any]:
    """Boxes, masks, origins and image_size of a dict such as torchvision's Mask R-CNN returns for an image."""
    if "boxes" not in output or "masks" not in output:
        raise ValueError(f"expected a dict with boxes and masks, as torchvision's models give, got {sorted(output)}")
    return output["boxes"], output["masks"], output.get("origins"), output.get("image_size")


def detections_masks(detections: sv.Detections) -> Masks:
    """The masks of detections; a ValueError where there are none but objects."""
    if detections.mask is not None:
        return detections.mask
    if len(detections):
        raise ValueError("expected sv.Detections with masks, got none: there is nothing to refine boxes by")
    return np.zeros((0, 1, 1), bool)


def _with_boxes(detections: sv.Detections, refined: RefinedBoxes) -> sv.Detections:
    result = copy.copy(detections)
    result.xyxy = np.asarray(refined.xyxy)
    result.data = {
        **detections.data,
        "regressed_xyxy": detections.xyxy.astype(np.float32),
        "edge_std": np.asarray(refined.edge_std),
        "interval": np.asarray(refined.interval),
    }
    return result


def as_refiner(refiner: Refiner | str | Path | None, soft: bool) -> Refiner:
    """The refiner that was given, or that of a file; without one, the default for soft or for binary masks."""
    if refiner is None:
        return SOFT if soft else BINARY
    if isinstance(refiner, (str, Path)):
        return Refiner.load(refiner)
    if not isinstance(refiner, Refiner):
        raise ValueError(f"expected a Refiner, a path or None, got {type(refiner)}")
    return refiner


def _refine(
    boxes: Tensor, profiles: Profiles, refiner: Refiner, decision: Decision, credibility: float
) -> RefinedBoxes:
    edges = boxes.reshape(-1, 2, 2)  # (N, near and far, axis)
    sigma = ((edges[:, 1] - edges[:, 0]) * refiner.gamma).clamp(min=MIN_SIGMA)  # Eq. 7
    found = boxes.new_zeros(len(boxes), 2, 2, 4)  # refined edge, standard deviation, ends of the interval
    reach = _reach(refiner)
    for axis, values in enumerate(profiles.axes if len(boxes) else ()):
        if profiles.size is not None:
            length = profiles.size[1 - axis]
        else:  # so long that nothing ends there
            end = torch.maximum(edges[:, :, axis].amax(), (profiles.first[:, axis] + values.shape[1]).amax())
            length = int(end) + math.ceil(reach * float(sigma.amax())) + 1
        # Objects with priors of similar width together, in windows that fit the widest of them
        for part in sigma[:, axis].argsort().split(TOGETHER):
            half = math.ceil(reach * float(sigma[part[-1], axis]))
            some, wide = edges[part, :, axis], sigma[part, axis]
            window = _windows(values.index_select(0, part), profiles.first[part, axis], some, half, length)
            found[part, :, axis] = _decide(*window, some, wide, refiner, decision, credibility)
    refined, edge_std, low, high = found.flatten(1, 2).unbind(dim=2)
    crossed = (refined[:, 2:] <= refined[:, :2]).repeat(1, 2)
    return RefinedBoxes(torch.where(crossed, boxes, refined), edge_std, torch.stack([low, high], dim=2))


def _reach(refiner: Refiner) -> float:
    """Sigmas from the regressed edge beyond which the posterior is negligible, whatever the mask."""
    worst = refiner.bias + sum(min(w, 0.0) for w in refiner.weight)
    best = refiner.bias + sum(max(w, 0.0) for w in refiner.weight)
    # Nats by which one column's likelihood, sigmoid(score), can be above another's
    least, most = (min(score, 0.0) - math.log1p(math.exp(-abs(score))) for score in (worst, best))
    return math.sqrt(2 * (most - least + NEGLIGIBLE))


def _windows(profiles: Tensor, first: Tensor, edges: Tensor, half: int, length: int) -> tuple[Tensor, Tensor]:
    """The part of the image's axis that the prior of an edge covers.

    Args:
        profiles: (N, S) whose entry 0 is the column `first` (N,).
        edges: (N, 2) regressed, near and far.
        half: columns on each side of the edge.
        length: columns of the image.

    Returns:
        (N, 2, P) int64 columns 0..length - 1, of which entry i stands for the near edge i and for the far edge i + 1;
        (N, 2, P + 2 s) the profile there and as far around as the kernel reaches.
    """
    size, side = min(2 * half + 1, length), WEIGHTS // 2
    centre = (edges - edges.new_tensor([0, 1])).clamp(0, length).round().long()
    start = (centre - half).clamp(0, length - size)
    around = start[:, :, None] + torch.arange(-side, size + side, device=edges.device)
    entry = around - first[:, None, None]
    inside = (entry >= 0) & (entry < profiles.shape[1])
    values = profiles.gather(1, entry.clamp(0, profiles.shape[1] - 1).flatten(1)).view_as(entry) * inside
    return around[:, :, side : side + size], values


def _decide(
    columns: Tensor,
    values: Tensor,
    edges: Tensor,
    sigma: Tensor,
    refiner: Refiner,
    decision: Decision,
    credibility: float,
) -> Tensor:
    """(N, 2, 4): refined near and far edges, their standard deviations and the ends of their intervals.

    Args:
        columns, values: see `_windows`.
        edges: (N, 2) regressed.
        sigma: (N,) of the prior, pixels.
    """
    position = (columns + columns.new_tensor([[0], [1]])).to(edges.dtype)
    away = position - edges[:, :, None]
    prior = -0.5 * (away / sigma[:, None, None]) ** 2  # Eq. 6
    joint = prior - F.softplus(-_scores(values, refiner))  # Eq. 3 and 5: log sigmoid(s) is -softplus(-s)
    # The softmax. torch gives exp, logsigmoid and sqrt on a CPU to threads, however small the array: where the cores
    # have other work, each of them waits longer than all the rest takes. exp2, softplus and rsqrt it does at once.
    peaked = ((joint - joint.amax(dim=2, keepdim=True)) / math.log(2)).exp2()
    posterior = peaked / peaked.sum(dim=2, keepdim=True)
    mean = (posterior * away).sum(dim=2)
    variance = (posterior * (away - mean[:, :, None]) ** 2).sum(dim=2)
    below = posterior.cumsum(dim=2)
    tail = (1 - credibility) / 2
    # The first position with so much of the posterior up to it
    best, low, high = (
        position.gather(2, index.clamp(max=position.shape[2] - 1)[:, :, None])[:, :, 0]
        for index in (posterior.argmax(dim=2), (below < tail).sum(dim=2), (below < 1 - tail).sum(dim=2))
    )
    refined = edges + mean if decision == "mean" else best
    informed = _has_evidence(columns, values, edges, sigma, refiner.mask_threshold)
    std = variance * variance.clamp(min=1e-12).rsqrt()
    return torch.stack([torch.where(informed, refined, edges), std, low, high], dim=2)


def _scores(values: Tensor, refiner: Refiner) -> Tensor:
    """(N, 2, P + 2 s) -> (N, 2, P): the kernel at each column, mirrored for far edges."""
    kernels = values.new_tensor([refiner.weight, refiner.weight[::-1]])
    size = values.shape[2] - WEIGHTS + 1
    scores = values.new_tensor(refiner.bias)
    for i in range(WEIGHTS):  # a convolution of so few channels costs several times this sum
        scores = scores + values[:, :, i : i + size] * kernels[:, i, None]
    return scores


def _has_evidence(columns: Tensor, values: Tensor, edges: Tensor, sigma: Tensor, threshold: float) -> Tensor:
    """(N, 2): whether the mask holds a foreground pixel within reach of the edge and its kernel, as in MBRM."""
    side = WEIGHTS // 2
    centre = columns[:, :, :1] + torch.arange(-side, values.shape[2] - side, device=values.device) + 0.5
    near = (centre - edges[:, :, None]).abs() <= (REACH * sigma + side + 1)[:, None, None]
    return ((values > threshold) & near).any(dim=2)

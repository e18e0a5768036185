"""Boundary refinement (MBRM, 3.3) for the boxes and masks of any model.

The numbers are those of `MBRM.forward` on whole images, but an edge is only looked for where the prior lets it be, and
masks may come as crops.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, overload

import numpy as np
import supervision as sv
import torch
import torch.nn.functional as F
from torch import Tensor

from rdsnet.files import read_json, write_text
from rdsnet.model.mbrm import MBRM, PUBLISHED_WEIGHT, REACH
from rdsnet.model.mbrm_fit import Edges, collect_edges, fit_edges
from rdsnet.refine.forms import (
    Array,
    Masks,
    Prediction,
    Profiles,
    Truth,
    _read_prediction,
    _read_truth,
    _require_inside,
    detections_masks,
    read_boxes,
    read_output,
    read_profiles,
)
from rdsnet.results.exchange import Results

MIN_SIGMA = 1.0  # pixels; small objects keep a prior that can move by a pixel

NEGLIGIBLE = 17.0  # nats; what is left out of a posterior is less than 1e-7 of its peak

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


FORMAT = "rdsnet-refiner/1"

WEIGHTS = len(PUBLISHED_WEIGHT)

Kind: TypeAlias = Literal["soft", "binary"]


@dataclass(frozen=True)
class Refiner:
    """Ten numbers that read an edge off a mask, and what goes with them (3.3).

    weight          nine numbers, by column of the profile around an edge, the object's inside last
    bias            the tenth
    gamma           sigma of the prior is gamma times the box's width or height, and at least a pixel
    mask_threshold  a mask says something of an edge only if it holds a pixel above this within reach of it
    masks           what kind it was fitted to, "soft" or "binary"; None where that is not known
    edges           so many edges it was fitted to; None likewise
    before, after   nats an edge: negative log likelihood of the true edges, before the fit and after; None likewise

    Raises:
        ValueError: not nine weights, a number that is not finite, a gamma that is not positive.
    """

    weight: tuple[float, ...]
    bias: float
    gamma: float = 0.05
    mask_threshold: float = 0.4
    masks: Kind | None = None
    edges: int | None = None
    before: float | None = None
    after: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.weight, (tuple, list)) or len(self.weight) != WEIGHTS:
            raise ValueError(f"expected a refiner of {WEIGHTS} weights, got {self.weight!r}")
        object.__setattr__(self, "weight", tuple(self.weight))
        for name, value in [("weight", w) for w in self.weight] + [("bias", self.bias), ("gamma", self.gamma)]:
            if not _is_number(value):
                raise ValueError(f"expected finite numbers for a refiner's {name}, got {value!r}")
        if self.gamma <= 0:
            raise ValueError(f"expected a refiner's gamma above 0, got {self.gamma}")
        if not _is_number(self.mask_threshold) or not 0 <= self.mask_threshold < 1:
            raise ValueError(
                f"expected a refiner's mask_threshold of 0 or more and below 1, got {self.mask_threshold!r}"
            )
        if self.masks not in ("soft", "binary", None):
            raise ValueError(f"expected a refiner's masks to be 'soft', 'binary' or null, got {self.masks!r}")

    def save(self, path: str | Path) -> None:
        """Write a JSON file, whole or not at all."""
        write_text(Path(path), json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @staticmethod
    def load(path: str | Path) -> Refiner:
        """A refiner from the JSON file that `save` wrote, or that of an RDSNet: a run folder or a .safetensors file.

        Of an RDSNet the ten numbers, gamma and the mask threshold are taken; they were fitted to soft masks.

        Raises:
            FileNotFoundError: nothing is there.
            ValueError: something else is there; says what is wrong.
        """
        path = Path(path)
        if path.suffix.lower() != ".json":
            return _of_weights(path)
        content = read_json(path)
        found = content.pop("format", None) if isinstance(content, dict) else None
        if found != FORMAT:
            raise ValueError(f"{path}: expected a refiner of format {FORMAT!r}, got {found!r}")
        unknown = sorted(set(content) - {field.name for field in fields(Refiner)})
        if unknown or "weight" not in content or "bias" not in content:
            wrong = f"unknown {', '.join(unknown)}" if unknown else f"only {', '.join(content) or 'nothing'}"
            raise ValueError(f"{path}: expected a refiner with weight, bias and gamma, got {wrong}")
        try:
            return Refiner(**content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _of_weights(path: Path) -> Refiner:
    from rdsnet.weights.checkpoint import read

    weights, checkpoint = read(path)
    detect = checkpoint.config.detect
    if "mbrm.weight" not in weights or not detect.gamma > 0:
        raise ValueError(f"{path}: expected the weights of a model with boundary refinement, this one has none")
    return Refiner(
        weight=tuple(weights["mbrm.weight"].double().tolist()),
        bias=weights["mbrm.bias"].double().item(),
        gamma=detect.gamma,
        mask_threshold=detect.mask_threshold,
        masks="soft",
    )


SOFT = Refiner(
    weight=(-8.720, -1.080, -1.671, -0.756, 4.058, 1.889, 4.694, 1.580, 2.582),
    bias=-32.483,
    masks="soft",
)
"""for soft masks of any model. The numbers of the authors' release suit RDSNet's own masks; edges of others they put
about a pixel too far out. Fitted to true masks of nuclei, blurred and with noise"""

BINARY = Refiner(
    weight=(-0.264, -0.934, -0.959, -2.405, 1.470, 0.825, 0.536, 0.489, 1.208),
    bias=-21.766,
    masks="binary",
)
"""for binary masks: fitted to what `rdsnet_tiny` of 400 steps finds in training images of the nuclei, its boxes paired
with its masks and with the true ones. Both by `python benchmarks/refine_boxes.py default RUN nuclei/train.json`"""

GAMMAS = (0.025, 0.05, 0.075, 0.1, 0.15)

MAX_EDGES = 8_000  # plenty for ten numbers


def fit_refiner(
    predictions: Iterable[Prediction], truth: Iterable[Truth], *, gammas: Sequence[float] = GAMMAS
) -> Refiner:
    """Fit the numbers of `refine_boxes` to what a model finds in images whose objects are known.

    A prediction finds an object at an IoU of 0.5 or more, each object is found once, by the best score. Of many found
    objects a sample is taken (seeded), so the same data give the same numbers.

    Args:
        predictions: of each image, in pixels: `sv.Detections` with masks; a dict with boxes, masks and, if there are
            any, scores and labels, as torchvision's; or a tuple (boxes, masks) or (boxes, masks, labels), best scores
            first. Boxes and masks as `refine_boxes` takes them, before any refinement; of crops the image_size must be
            known.
        truth: of each image: `sv.Detections`; a dict with boxes and, if there are any, labels; a tuple (boxes,
            labels); or boxes (K, 4) xyxy, half-open. Without crowds. Labels must agree where both sides have some.
        gammas: widths of the prior to choose from, by the likelihood of the true edges.

    Returns:
        A `Refiner`, with the number of edges that it was fitted to and the nats an edge before and after.

    Raises:
        ValueError: different numbers of images, a form that is not known (says of which image), no gamma above 0, or no
            prediction that finds an object.
    """
    if not gammas or min(gammas) <= 0:
        raise ValueError(f"expected gammas above 0, got {tuple(gammas)}")
    mbrm = MBRM(gamma=max(gammas))
    collected: list[tuple[Edges, int]] = []
    images, soft = 0, False
    missing = object()
    for images, (prediction, objects) in enumerate(zip_longest(predictions, truth, fillvalue=missing), start=1):
        if prediction is missing or objects is missing:
            raise ValueError("expected predictions and truth of as many images, got more of one than of the other")
        try:
            boxes, labels = _read_truth(objects)
            found, found_labels, found_soft = _read_prediction(prediction)
        except ValueError as error:
            raise ValueError(f"image {images - 1}: {error}") from None
        soft |= found_soft
        if labels is None or found_labels is None:
            labels, found_labels = torch.zeros(len(boxes)), torch.zeros(len(found.regressed_boxes))
        collected += collect_edges(mbrm, found._replace(labels=found_labels), boxes, labels)
    start = SOFT if soft else BINARY
    mbrm.weight.data.copy_(torch.tensor(start.weight))
    mbrm.bias.data.fill_(start.bias)
    report = fit_edges(mbrm, _sample(collected), images, widest=mbrm.gamma, gammas=gammas)
    return Refiner(
        weight=tuple(mbrm.weight.double().tolist()),
        bias=mbrm.bias.double().item(),
        gamma=report.gamma,
        mask_threshold=start.mask_threshold,
        masks="soft" if soft else "binary",
        edges=report.edges,
        before=report.before,
        after=report.after,
    )


def _sample(collected: Sequence[tuple[Edges, int]]) -> list[tuple[Edges, int]]:
    """About MAX_EDGES of the edges."""
    share = MAX_EDGES / max(sum(len(edges.target) for edges, _ in collected), 1)
    if share >= 1:
        return list(collected)
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for edges, skipped in collected:
        chosen = torch.rand(len(edges.target), generator=generator) < share
        drawn.append((Edges(*(values[chosen] for values in edges)), skipped))
    return drawn


def refine_results(results: Results, refiner: Refiner | None) -> np.ndarray:
    """Boxes (M, 4) xyxy of COCO results after refinement, by entry."""
    boxes = results.boxes()
    for image in results.images:
        boxes[results.by_image[image]] = refine_boxes(results.prediction(image), refiner=refiner).xyxy
    return boxes

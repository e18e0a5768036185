"""Boundary refinement (MBRM, 3.3) for the boxes and masks of any model.

What comes out is that of `MBRM.forward` on whole images, but an edge is only looked for where the prior lets it be, and
masks may come as crops.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import supervision as sv
import torch
from torch import Tensor

from rdsnet.files import read_json, write_text
from rdsnet.model.mbrm import BINARY, MBRM, SOFT, Decision, Numbers, Refined, reach, window
from rdsnet.model.mbrm_fit import Edges, Pairs, collect_edges, fit_edges
from rdsnet.refine.forms import (
    Array,
    Masks,
    Prediction,
    Profiles,
    Truth,
    read_boxes,
    read_output,
    read_prediction,
    read_profiles,
    read_truth,
    require_inside,
)
from rdsnet.results.exchange import Results
from rdsnet.results.matching import match_boxes

TOGETHER = 512  # objects that are refined at once: what they need grows with the widest prior among them


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
    refiner: Numbers | str | Path | None = ...,
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
    refiner: Numbers | str | Path | None = ...,
    decision: Decision = ...,
    credibility: float = ...,
) -> RefinedBoxes: ...


def refine_boxes(
    boxes: Array | sv.Detections | Mapping[str, Any],
    masks: Masks | None = None,
    *,
    origins: Any = None,
    image_size: tuple[int, int] | None = None,
    refiner: Numbers | str | Path | None = None,
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
    given = boxes
    if isinstance(boxes, (sv.Detections, Mapping)):
        if masks is not None or origins is not None:
            raise ValueError(f"expected no further masks or origins with a {type(boxes).__name__}, which holds its own")
        boxes, masks, _, _, origins, image_size = read_output(boxes)
    if masks is None:
        what = "masks: refine_boxes(boxes, masks), or sv.Detections or a dict that holds them"
        raise ValueError(f"expected {what}, got a {type(boxes).__name__} alone")
    corners = read_boxes(boxes)
    profiles = read_profiles(masks, len(corners), origins, image_size, corners.device)
    require_inside(corners, profiles.size)
    mbrm = MBRM(_numbers(refiner, profiles.soft)).to(corners.device)
    with torch.no_grad():
        results = _refine(mbrm, corners, profiles, decision, credibility)
    refined = RefinedBoxes(*(results if isinstance(boxes, Tensor) else map(np.asarray, results)))
    if not isinstance(given, sv.Detections):
        return refined
    xyxy, edge_std, interval = (np.asarray(part) for part in refined)
    added = {"regressed_xyxy": given.xyxy.astype(np.float32), "edge_std": edge_std, "interval": interval}
    return replace(given, xyxy=xyxy, data={**given.data, **added})


def _numbers(refiner: Numbers | str | Path | None, soft: bool) -> Numbers:
    """Those that were given, or of a file; the default for soft or for binary masks."""
    if refiner is None:
        return SOFT if soft else BINARY
    if isinstance(refiner, (str, Path)):
        return Refiner.load(refiner)
    if not isinstance(refiner, Numbers):
        raise ValueError(f"expected a Refiner, a path or None, got {type(refiner)}")
    return refiner


def _refine(mbrm: MBRM, boxes: Tensor, profiles: Profiles, decision: Decision, credibility: float) -> Refined:
    sigma, sigmas = mbrm.sigma(boxes), reach(mbrm.weight, mbrm.bias)
    found = boxes.new_zeros(len(boxes), 2, 2, 4)  # of near and far edges, of both axes
    for axis, values in enumerate(profiles.axes if len(boxes) else ()):
        edges, first, wide = boxes[:, axis::2], profiles.first[:, axis], sigma[:, axis]
        if profiles.size is not None:
            length = profiles.size[1 - axis]
        else:  # so long that nothing ends there
            end = torch.maximum(edges.amax(), (first + values.shape[1]).amax())
            length = int(end) + math.ceil(sigmas * float(sigma.amax())) + 1
        # Objects with priors of similar width together, in windows that fit the widest of them
        for part in wide.argsort().split(TOGETHER):
            half = math.ceil(sigmas * float(wide[part[-1]]))
            span = window(values.index_select(0, part), first[part], edges[part], half, length, mbrm.s)
            found[part, :, axis] = mbrm.decide(span, edges[part], wide[part], decision, credibility)
    return mbrm.settle(boxes, found)


FORMAT = "rdsnet-refiner/1"

WEIGHTS = len(SOFT.weight)


@dataclass(frozen=True)
class Refiner(Numbers):
    """`Numbers`, and where they come from.

    masks          what kind they were fitted to, "soft" or "binary"; None where that is not known
    edges          so many edges they were fitted to; None likewise
    before, after  nats an edge: negative log likelihood of the true edges, before the fit and after; None likewise

    Raises:
        ValueError: not nine weights, a number that is not finite, a gamma that is not positive.
    """

    masks: Literal["soft", "binary"] | None = None
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
    start = {soft: MBRM(replace(numbers, gamma=max(gammas))) for soft, numbers in ((True, SOFT), (False, BINARY))}
    collected: list[Edges] = []
    images, soft = 0, False
    missing = object()
    for images, (prediction, objects) in enumerate(zip_longest(predictions, truth, fillvalue=missing), start=1):
        if prediction is missing or objects is missing:
            raise ValueError("expected predictions and truth of as many images, got more of one than of the other")
        try:
            pairs, own_soft = _pairs(prediction, objects)
        except ValueError as error:
            raise ValueError(f"image {images - 1}: {error}") from None
        soft |= own_soft
        collected += collect_edges(start[own_soft], pairs)
    mbrm = start[soft]
    report = fit_edges(mbrm, collected, images, gammas, limit=MAX_EDGES)
    return Refiner(
        **asdict(mbrm.numbers),
        masks="soft" if soft else "binary",
        edges=report.edges,
        before=report.before,
        after=report.after,
    )


def _pairs(prediction: Any, truth: Any) -> tuple[Pairs, bool]:
    """What was found of an image's objects, and whether its masks are soft."""
    boxes, labels = read_truth(truth)
    found = read_prediction(prediction)
    found_labels = found.labels
    if labels is None or found_labels is None:
        labels, found_labels = torch.zeros(len(boxes)), torch.zeros(len(found.boxes))
    index, known = match_boxes(found.boxes, found_labels, boxes, labels)
    columns, rows = found.profiles.whole()
    return Pairs(found.boxes[index], boxes[known], (columns[index], rows[index])), found.profiles.soft


def refine_results(results: Results, refiner: Refiner | None) -> np.ndarray:
    """Boxes (M, 4) xyxy of COCO results after refinement, by entry."""
    boxes = results.boxes()
    for image in results.images:
        boxes[results.by_image[image]] = refine_boxes(results.prediction(image), refiner=refiner).xyxy
    return boxes

"""Fitting the boundary refinement to the outputs of any model, against ground truth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import supervision as sv
import torch
from torch import Tensor

from rdsnet.model.mbrm import MBRM
from rdsnet.profiles import Array, Masks, read_profiles
from rdsnet.refine import detections_masks, read_boxes, read_output
from rdsnet.refinement import Edges, collect_edges, fit_edges
from rdsnet.refiner import BINARY, SOFT, Refiner

GAMMAS = (0.025, 0.05, 0.075, 0.1, 0.15)
MAX_EDGES = 8_000  # plenty for ten numbers

Prediction: TypeAlias = sv.Detections | Mapping[str, Any] | tuple[Array, Masks] | tuple[Array, Masks, Array]
Truth: TypeAlias = sv.Detections | Mapping[str, Any] | tuple[Array, Array] | Array


class _Found(NamedTuple):
    """See `rdsnet.refinement.Detected`."""

    regressed_boxes: Tensor
    labels: Tensor
    profiles: tuple[Tensor, Tensor]


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


def _read_prediction(prediction: Any) -> tuple[_Found, Tensor | None, bool]:
    """Boxes and profiles on the CPU by descending score, labels if there are any, and whether masks are soft."""
    origins = image_size = labels = scores = None
    if isinstance(prediction, sv.Detections):
        boxes, masks = prediction.xyxy, detections_masks(prediction)
        labels, scores = prediction.class_id, prediction.confidence
    elif isinstance(prediction, Mapping):
        boxes, masks, origins, image_size = read_output(prediction)
        labels, scores = prediction.get("labels"), prediction.get("scores")
    elif isinstance(prediction, (tuple, list)) and len(prediction) in (2, 3):
        boxes, masks, labels = (*prediction, None)[:3]
    else:
        raise ValueError(
            f"expected a prediction as sv.Detections, a dict or (boxes, masks[, labels]), got {type(prediction)}"
        )
    corners = read_boxes(boxes).cpu()
    profiles = read_profiles(masks, len(corners), origins, image_size)
    if profiles.size is None and len(corners):
        raise ValueError("expected the image_size (H, W) of masks given as crops")
    read_labels, read_scores = _vector(labels, len(corners), "labels"), _vector(scores, len(corners), "scores")
    columns, rows = profiles.whole()
    order = torch.arange(len(corners)) if read_scores is None else read_scores.argsort(descending=True, stable=True)
    found = _Found(corners[order], torch.zeros(0), (columns[order], rows[order]))
    return found, None if read_labels is None else read_labels[order], profiles.soft


def _read_truth(truth: Any) -> tuple[Tensor, Tensor | None]:
    boxes: Any
    labels: Any
    if isinstance(truth, sv.Detections):
        boxes, labels = truth.xyxy, truth.class_id
    elif isinstance(truth, Mapping):
        if "boxes" not in truth:
            raise ValueError(f"expected a dict with boxes as truth, got {sorted(truth)}")
        boxes, labels = truth["boxes"], truth.get("labels")
    elif isinstance(truth, (tuple, list)) and len(truth) == 2:
        boxes, labels = truth
    elif isinstance(truth, (np.ndarray, Tensor)):
        boxes, labels = truth, None
    else:
        raise ValueError(f"expected truth as sv.Detections, a dict, (boxes, labels) or boxes, got {type(truth)}")
    corners = read_boxes(boxes).cpu()
    return corners, _vector(labels, len(corners), "labels")


def _vector(values: Any, count: int, name: str) -> Tensor | None:
    if values is None:
        return None
    vector = torch.as_tensor(values).cpu()
    if vector.shape != (count,):
        raise ValueError(f"expected {name} of shape ({count},), got {tuple(vector.shape)}")
    return vector

"""Fitting MBRM (3.3): its ten numbers, on a data set's detections, with everything else frozen.

The profiles do not change while it is fitted: they are read once, and every edge becomes a short window of them. A
far edge is the mirror image of a near one, so all four kinds share one form.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from rdsnet.config import Config
from rdsnet.data import CocoFolder, ImageRecord
from rdsnet.inference import detect_folder
from rdsnet.model import RDSNet
from rdsnet.model.mbrm import MBRM
from rdsnet.structures import Objects

WINDOW_SIGMAS = 6.0  # the prior beyond is under 2e-8 of its peak
MATCH_IOU = 0.5
MAX_IMAGES = 2000


class NothingToFit(ValueError):
    """No detection matches any object: a model that has learnt too little."""


class Detected(Protocol):
    """What a fit reads of an image's detections, the best scores first; `Objects` of a model of ours have it.

    regressed_boxes  (N, 4) float32 xyxy
    labels           (N,) int64
    profiles         highest foreground probability of each column (N, W) and row (N, H)
    """

    @property
    def regressed_boxes(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...

    @property
    def profiles(self) -> tuple[Tensor, Tensor] | None: ...


class Edges(NamedTuple):
    """M edges of matched detections, all as near edges: position p of a window is column `start + p`.

    profile   (M, P + 2 s) highest foreground probability of the columns around, 0 outside the image
    offset    (M,) the regressed edge, in positions of the window
    sigma     (M,) pixels
    possible  (M, P) bool, positions inside the image
    target    (M,) int64, the position of the ground-truth edge
    """

    profile: Tensor
    offset: Tensor
    sigma: Tensor
    possible: Tensor
    target: Tensor


@dataclass(frozen=True)
class FitReport:
    """How a fit went: negative log likelihood of the true edges, nats an edge, before and after."""

    edges: int
    skipped: int
    before: float
    after: float
    gamma: float


def fit_refiner(model: RDSNet, folder: CocoFolder, config: Config, *, gammas: Sequence[float] = ()) -> FitReport:
    """Fit a model's MBRM to its own detections of a data set, at the size of the original images.

    Args:
        model: its MBRM is changed in place.
        folder: usually the training set; a sample of a large one is enough for ten numbers.
        gammas: see `fit`; a chosen gamma is also written to `config.detect.gamma`.
    """
    report = fit(model.mbrm, matched_detections(model, folder, config), gammas=gammas)
    config.detect.gamma = report.gamma
    return report


def matched_detections(model: RDSNet, folder: CocoFolder, config: Config) -> list[tuple[Objects, Tensor, Tensor]]:
    """What a model's MBRM is fitted to: of each image of a data set, the detections that find an object, with
    profiles and without masks, and the ground-truth boxes (K, 4) and labels (K,).

    Args:
        folder: of a large one a sample is taken (by `config.seed`).
    """
    draw = np.random.default_rng(config.seed).permutation(len(folder.images))[:MAX_IMAGES]
    sample = copy.copy(folder)
    sample.images = [folder.images[i] for i in sorted(draw)]
    mode = model.training
    model.eval()
    matched = list(_with_truth(detect_folder(model, sample, config)))
    model.train(mode)
    return matched


def _with_truth(found: Iterable[tuple[ImageRecord, Objects]]) -> Iterator[tuple[Objects, Tensor, Tensor]]:
    for record, objects in found:
        truth = [a for a in record.annotations if not a.crowd and a.rle is not None]
        boxes = torch.tensor([a.box for a in truth], dtype=torch.float32).view(-1, 4)
        labels = torch.tensor([a.label for a in truth], dtype=torch.int64)
        # Nothing else is needed of a data set's detections, and it would add up
        matched = replace(objects, masks=[]).select(match(objects, boxes, labels)[0])
        yield matched, boxes, labels


def match(objects: Detected, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Detections and the ground truth that they find, at an IoU of 0.5 or more, the best scores first.

    Args:
        boxes, labels: (K, 4) and (K,) of the ground truth, in the same pixels.

    Returns:
        (M,) indices of detections and of ground truth; each is used once.
    """
    iou = box_iou(objects.regressed_boxes, boxes) * (objects.labels[:, None] == labels)
    pairs = []
    for detection in range(len(iou) if len(boxes) else 0):
        best, found = iou[detection].max(dim=0)
        if best >= MATCH_IOU:
            pairs.append((detection, int(found)))
            iou[:, found] = 0
    index = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    return index[:, 0], index[:, 1]


def collect_edges(mbrm: MBRM, objects: Detected, boxes: Tensor, labels: Tensor) -> list[tuple[Edges, int]]:
    """The edges of one image's matched detections, and how many were left out, one entry an axis and side.

    A true edge that lies outside the window of the prior (6 sigmas) is left out: no likelihood could reach it.
    """
    assert objects.profiles is not None
    found, truth = match(objects, boxes, labels)
    if len(found) == 0:
        return []
    regressed, true = objects.regressed_boxes[found], boxes[truth]
    sigma = mbrm.sigma(regressed)
    side = len(mbrm.weight) // 2
    collected = []
    for axis, profiles in enumerate(objects.profiles):
        length = profiles.shape[1]
        near = (profiles[found], regressed[:, axis], true[:, axis].round().clamp(0, length - 1))
        # Mirrored, the far edge i in 1..length becomes the near edge length - i
        far = (
            profiles[found].flip(1),
            length - regressed[:, axis + 2],
            length - true[:, axis + 2].round().clamp(1, length),
        )
        for profile, edge, target in (near, far):
            collected.append(_windows(profile, edge, target, sigma[:, axis], side))
    return collected


def _windows(profile: Tensor, edge: Tensor, target: Tensor, sigma: Tensor, side: int) -> tuple[Edges, int]:
    half = int((WINDOW_SIGMAS * sigma.max()).ceil())
    start = edge.round().long() - half
    position = start[:, None] + torch.arange(2 * half + 1)
    around = start[:, None] - side + torch.arange(2 * (half + side) + 1)
    inside = (around >= 0) & (around < profile.shape[1])
    values = profile.gather(1, around.clamp(0, profile.shape[1] - 1)) * inside
    possible = (position >= 0) & (position < profile.shape[1])
    within = (target - edge).abs() <= WINDOW_SIGMAS * sigma
    edges = Edges(values, edge - start, sigma, possible, target.long() - start)
    return Edges(*(t[within] for t in edges)), int((~within).sum())


def _merge(parts: Sequence[Edges]) -> list[Edges]:
    """Windows of similar size laid together, padded to powers of two: few large tensors instead of many small ones."""
    buckets: dict[int, list[Edges]] = {}
    for part in parts:
        size = part.possible.shape[1]
        wide = max(16, 1 << (size - 1).bit_length())
        pad = (0, wide - size)
        padded = part._replace(profile=F.pad(part.profile, pad), possible=F.pad(part.possible, pad))
        buckets.setdefault(wide, []).append(padded)
    return [Edges(*(torch.cat(t) for t in zip(*bucket, strict=True))) for bucket in buckets.values()]


def _double(edges: Edges) -> Edges:
    return Edges(*(t.double() if t.is_floating_point() else t for t in edges))


def _negative_log_likelihood(weight: Tensor, bias: Tensor, edges: Edges) -> Tensor:
    """Sum over edges of the cross entropy of the posterior against the true edge (3.3)."""
    scores = edges.profile.unfold(1, len(weight), 1) @ weight + bias  # twice as fast as a convolution of one channel
    position = torch.arange(edges.possible.shape[1], dtype=scores.dtype)
    prior = -0.5 * ((position - edges.offset[:, None]) / edges.sigma[:, None]) ** 2
    joint = (prior + F.logsigmoid(scores)).masked_fill(~edges.possible, -torch.inf)
    return F.cross_entropy(joint, edges.target, reduction="sum")


def with_reach(mbrm: MBRM, reach: int) -> MBRM:
    """A copy whose kernel has another length, 2 s + 1 for the reach s: its middle, or with zeros at both ends."""
    copied = copy.deepcopy(mbrm)
    more = reach - len(mbrm.weight) // 2
    copied.weight = torch.nn.Parameter(F.pad(mbrm.weight.detach(), (more, more)), requires_grad=False)
    return copied


def fit(mbrm: MBRM, samples: Iterable[tuple[Detected, Tensor, Tensor]], *, gammas: Sequence[float] = ()) -> FitReport:
    """Fit MBRM to detections of images whose objects are known, to convergence (L-BFGS, float64).

    Args:
        mbrm: changed in place.
        samples: detections with profiles, ground-truth boxes (K, 4) and labels (K,) of each image, in its pixels; read
            one at a time.
        gammas: widths of the prior to choose from, by the likelihood of the true edges; default: its own.

    Raises:
        NothingToFit: no detection matches any object.
    """
    # All gammas are judged by the edges within the widest prior's window: a narrow one may not skip the hard ones
    wide = copy.copy(mbrm)
    wide.gamma = max(gammas or (mbrm.gamma,))
    images, collected = 0, []
    for sample in samples:
        images += 1
        collected += collect_edges(wide, *sample)
    return fit_edges(mbrm, collected, images, widest=wide.gamma, gammas=gammas or (mbrm.gamma,))


def fit_edges(
    mbrm: MBRM, collected: Sequence[tuple[Edges, int]], images: int, *, widest: float, gammas: Sequence[float]
) -> FitReport:
    """As `fit`, to what `collect_edges` gave of so many images with the gamma `widest`."""
    widest_buckets = [_double(edges) for edges in _merge([edges for edges, _ in collected])]
    count, skipped = sum(len(e.target) for e in widest_buckets), sum(n for _, n in collected)
    if count == 0:
        raise NothingToFit(f"MBRM cannot be fitted: no detection of {images} images finds an object")
    best: tuple[float, float, Tensor, Tensor, FitReport] | None = None
    for gamma in gammas:
        share = gamma / widest if widest else 0.0
        buckets = [e._replace(sigma=(e.sigma * share).clamp(min=mbrm.min_sigma)) for e in widest_buckets]
        weight, bias, before, after = _minimise(mbrm, buckets, count)
        if best is None or after < best[0]:
            best = (after, gamma, weight, bias, FitReport(count, skipped, before, after, gamma))
    assert best is not None
    _, mbrm.gamma, weight, bias, report = best
    mbrm.weight.data.copy_(weight)
    mbrm.bias.data.copy_(bias)
    return report


def _minimise(mbrm: MBRM, buckets: Sequence[Edges], count: int) -> tuple[Tensor, Tensor, float, float]:
    weight = mbrm.weight.detach().double().cpu().requires_grad_()
    bias = mbrm.bias.detach().double().cpu().requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, tolerance_change=1e-10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        return torch.stack([_negative_log_likelihood(weight, bias, edges) for edges in buckets]).sum() / count

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    before = loss().item()
    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach(), before, loss().item()

"""Fitting MBRM (3.4): the cross entropy of true edges under its posterior, and its minimum over the ten numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rdsnet.model.mbrm import MBRM
from rdsnet.results.matching import Detected, match

WINDOW_SIGMAS = 6.0  # the prior beyond is under 2e-8 of its peak


class NothingToFit(ValueError):
    """No detection matches any object: a model that has learnt too little."""


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

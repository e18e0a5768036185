"""Fitting MBRM (3.4): the cross entropy of true edges under its posterior, and its minimum over the ten numbers."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rdsnet.model.mbrm import MBRM, Span, log_joint, prior_sigma, reach, window

LEFT_OUT = -100  # the target that torch's cross entropy passes over
FAR = 1e6  # pixels: a prior there is 0


class NothingToFit(ValueError):
    """No detection matches any object: a model that has learnt too little."""


class Pairs(NamedTuple):
    """What was found in an image and the objects of the truth that it is, in the same pixels.

    regressed  (M, 4) xyxy
    true       (M, 4) xyxy
    profiles   highest foreground probability of each column (M, W) and row (M, H)
    """

    regressed: Tensor
    true: Tensor
    profiles: tuple[Tensor, Tensor]


class Edges(NamedTuple):
    """Near and far edges of M objects along one axis.

    span    windows around the regressed edges
    size    (M,) width or height of the regressed boxes
    target  (M, 2) int64, index of the true edge in the window, or LEFT_OUT
    """

    span: Span
    size: Tensor
    target: Tensor


@dataclass(frozen=True)
class FitReport:
    """How a fit went: negative log likelihood of the true edges, nats an edge, before and after."""

    edges: int
    skipped: int
    before: float
    after: float
    gamma: float


def collect_edges(mbrm: MBRM, pairs: Pairs) -> list[Edges]:
    """The edges of an image, horizontal and vertical.

    A true edge that lies so far from the regressed one that the posterior there is negligible is left out.
    """
    if not len(pairs.regressed):
        return []
    sizes, sigma = mbrm.size(pairs.regressed), mbrm.sigma(pairs.regressed)
    sigmas = reach(mbrm.weight, mbrm.bias)
    collected = []
    for axis, profiles in enumerate(pairs.profiles):
        edges, length = pairs.regressed[:, axis::2], profiles.shape[1]
        side = torch.arange(2)
        true = torch.minimum(pairs.true[:, axis::2].round().clamp(min=0).maximum(side), length - 1 + side)
        half = math.ceil(sigmas * sigma[:, axis].max())
        span = window(profiles, torch.zeros(len(edges), dtype=torch.int64), edges, half, length, mbrm.s)
        within = (true - edges).abs() <= sigmas * sigma[:, axis, None]
        target = torch.where(within, true - span.start, LEFT_OUT)
        collected.append(Edges(span, sizes[:, axis], target.long()))
    return collected


def _merge(parts: Iterable[Edges]) -> list[Edges]:
    """Windows of similar size laid together, padded to powers of two: few large tensors instead of many small ones."""
    buckets: dict[int, list[Edges]] = {}
    for span, size, target in parts:
        length, s = span.values.shape[2], span.s
        wide = max(16, 1 << (length - 1).bit_length())
        # Behind the last position of the window there is no other, however far the values go
        around = F.pad(span.around[:, :, : length - s], (0, wide - length + s), value=FAR)
        padded = span._replace(values=F.pad(span.values, (0, wide - length)), around=around)
        buckets.setdefault(wide, []).append(Edges(padded, size, target))
    merged = []
    for bucket in buckets.values():
        spans, sizes, targets = zip(*bucket, strict=True)
        values, start, around = (torch.cat(t).double() for t in zip(*(span[:3] for span in spans), strict=True))
        merged.append(Edges(Span(values, start, around, spans[0].s), torch.cat(sizes).double(), torch.cat(targets)))
    return merged


def _negative_log_likelihood(weight: Tensor, bias: Tensor, gamma: float, edges: Edges) -> Tensor:
    """Sum over edges of the cross entropy of the posterior against the true edge (3.3)."""
    joint = log_joint(edges.span, prior_sigma(edges.size, gamma), weight, bias)
    return F.cross_entropy(joint.flatten(0, 1), edges.target.flatten(), ignore_index=LEFT_OUT, reduction="sum")


def with_kernel(mbrm: MBRM, s: int) -> MBRM:
    """A copy whose kernel has another length, 2 s + 1: its middle, or with zeros at both ends."""
    copied = copy.deepcopy(mbrm)
    copied.weight = torch.nn.Parameter(F.pad(mbrm.weight.detach(), (s - mbrm.s, s - mbrm.s)), requires_grad=False)
    return copied


def fit(mbrm: MBRM, images: Iterable[Pairs], *, gammas: Sequence[float] = ()) -> FitReport:
    """Fit MBRM to detections whose objects are known, to convergence (L-BFGS, float64).

    Args:
        mbrm: changed in place.
        images: read one at a time.
        gammas: widths of the prior to choose from, by the likelihood of the true edges; default: its own.

    Raises:
        NothingToFit: there is no pair.
    """
    gammas = gammas or (mbrm.gamma,)
    # All gammas are judged by the edges within the widest prior's window: a narrow one may not skip the hard ones
    wide = copy.copy(mbrm)
    wide.gamma = max(gammas)
    count, collected = 0, []
    for pairs in images:
        count += 1
        collected += collect_edges(wide, pairs)
    return fit_edges(mbrm, collected, count, gammas)


def fit_edges(
    mbrm: MBRM, collected: Sequence[Edges], images: int, gammas: Sequence[float], limit: float = math.inf
) -> FitReport:
    """As `fit`, to what `collect_edges` gave of so many images with the widest gamma; about `limit` edges of it."""
    merged = _merge(_sample(collected, limit))
    known = [int((edges.target != LEFT_OUT).sum()) for edges in merged]
    count, skipped = sum(known), sum(edges.target.numel() for edges in merged) - sum(known)
    if count == 0:
        raise NothingToFit(f"MBRM cannot be fitted: no detection of {images} images finds an object")
    fits = [(gamma, *_minimise(mbrm, merged, gamma, count)) for gamma in gammas]
    mbrm.gamma, weight, bias, before, after = min(fits, key=lambda found: found[-1])
    mbrm.weight.data.copy_(weight)
    mbrm.bias.data.copy_(bias)
    return FitReport(count, skipped, before, after, mbrm.gamma)


def _sample(collected: Sequence[Edges], limit: float) -> list[Edges]:
    """About so many of the edges, always the same."""
    share = limit / max(sum(edges.target.numel() for edges in collected), 1)
    if share >= 1:
        return list(collected)
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for span, size, target in collected:
        chosen = torch.rand(len(size), generator=generator) < share
        part = Span(span.values[chosen], span.start[chosen], span.around[chosen], span.s)
        drawn.append(Edges(part, size[chosen], target[chosen]))
    return drawn


def _minimise(mbrm: MBRM, merged: Sequence[Edges], gamma: float, count: int) -> tuple[Tensor, Tensor, float, float]:
    """The best weight and bias, and nats an edge before and after."""
    weight = mbrm.weight.detach().double().cpu().requires_grad_()
    bias = mbrm.bias.detach().double().cpu().requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, tolerance_change=1e-10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        return torch.stack([_negative_log_likelihood(weight, bias, gamma, edges) for edges in merged]).sum() / count

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    before = loss().item()
    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach(), before, loss().item()

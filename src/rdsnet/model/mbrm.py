"""Mask-based boundary refinement, MBRM (3.3, Eq. 2-7): masks and boxes -> edge posteriors -> refined boxes.

An edge's position is an integer. Edge i on the left (top) means that column i is the first of the object; on the
right (bottom), that column i - 1 is the last. So left edges run over 0..W-1 and right edges over 1..W. Left and top
are the near edges, right and bottom the far ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdsnet.settings import Rules

Decision = Literal["argmax", "mean"]

MIN_SIGMA = 1.0  # pixels; small objects keep a prior that can move by a pixel

# A mask says something of an edge if it holds foreground within so many sigmas of it (and as far as the kernel reads);
# there the prior is 0.0044 of its peak, where the release cuts it off
EVIDENCE = math.sqrt(-2 * math.log(0.0044))

NEGLIGIBLE = 17.0  # nats; what is left out of a posterior is less than 1e-7 of its peak


@dataclass(frozen=True)
class Numbers:
    """What an edge is read off a mask with.

    weight          2 s + 1 numbers, by column of the profile around an edge, the object's inside last
    bias
    gamma           sigma of the prior is gamma times the box's width (left, right) or height (top, bottom)
    mask_threshold  a mask says something of an edge only if it holds a pixel above this near it
    """

    weight: tuple[float, ...]
    bias: float
    gamma: float = 0.05
    mask_threshold: float = 0.4


PUBLISHED = Numbers(
    (-0.2968, -0.2892, -0.2635, -3.2545, -0.1874, 2.5041, 0.0196, 0.0651, 0.0917),
    -1.9536,
)
"""of the authors' release, for RDSNet's own masks; edges of others they put about a pixel too far out"""

SOFT = Numbers((-8.720, -1.080, -1.671, -0.756, 4.058, 1.889, 4.694, 1.580, 2.582), -32.483)
"""for soft masks of any model: fitted to true masks of nuclei, blurred and with noise"""

BINARY = Numbers((-0.264, -0.934, -0.959, -2.405, 1.470, 0.825, 0.536, 0.489, 1.208), -21.766)
"""for binary masks: fitted to what `rdsnet_tiny` of 400 steps finds in training images of the nuclei, its boxes paired
with its masks and with the true ones. Both by `python benchmarks/refine_boxes.py default RUN nuclei/train.json`"""


class Span(NamedTuple):
    """The part of an image's axis on which the near and far edges of N objects are looked for.

    values  (N, 1 or 2, P + 2 s) the profile there and as far around as the kernel reads, 0 outside of the image
    start   (N or 1, 2) float, whole numbers: the first of the P positions of near and far edges
    around  (N, 2, P + 2 s) of the positions and as many more as of the values: how far from the regressed edge
    s       columns that the kernel reads on each side of an edge
    """

    values: Tensor
    start: Tensor
    around: Tensor
    s: int

    @property
    def away(self) -> Tensor:
        """(N, 2, P) how far each position is from the regressed edge."""
        return self.around[:, :, self.s : self.around.shape[2] - self.s]


def _span(values: Tensor, start: Tensor, edges: Tensor, s: int) -> Span:
    position = start[:, :, None] + torch.arange(-s, values.shape[2] - s, device=edges.device)
    return Span(values, start, position - edges[:, :, None], s)


class Refined(NamedTuple):
    """Boxes of N objects after refinement.

    boxes     (N, 4) float32 xyxy
    edge_std  (N, 4) standard deviation of left, top, right and bottom, pixels
    interval  (N, 4, 2) lowest and highest position of each edge's central credible interval, whole pixels; NaN where
              the prior's cut leaves no position
    """

    boxes: Tensor
    edge_std: Tensor
    interval: Tensor


def not_refined(boxes: Tensor) -> Refined:
    """What stands for MBRM's result where it is off."""
    unknown = torch.full_like(boxes, torch.nan)
    return Refined(boxes, unknown, torch.stack([unknown, unknown], dim=2))


def whole(profiles: Tensor, edges: Tensor, s: int) -> Span:
    """The whole axis.

    Args:
        profiles: (N, S) highest foreground probability, 0..1, of each column or row.
        edges: (N, 2) regressed, near and far.
        s: columns that the kernel reads on each side.
    """
    start = torch.arange(2, device=edges.device, dtype=edges.dtype)[None]  # the far edge i lies behind the column i - 1
    return _span(F.pad(profiles, (s, s))[:, None], start, edges, s)


def window(profiles: Tensor, first: Tensor, edges: Tensor, half: int, length: int, s: int) -> Span:
    """The part of the axis around each edge; see `whole`.

    Args:
        profiles: (N, S) whose entry 0 is the column `first` (N,).
        half: columns on each side of the edge.
        length: columns of the image.
    """
    size = min(2 * half + 1, length)
    side = torch.arange(2, device=edges.device)
    start = ((edges - side).clamp(0, length).round().long() - half).clamp(0, length - size)
    around = start[:, :, None] + torch.arange(-s, size + s, device=edges.device)
    entry = around - first[:, None, None]
    inside = (entry >= 0) & (entry < profiles.shape[1])
    values = profiles.gather(1, entry.clamp(0, profiles.shape[1] - 1).flatten(1)).view_as(entry) * inside
    return _span(values, (start + side).to(edges.dtype), edges, s)


def reach(weight: Tensor, bias: Tensor) -> float:
    """Sigmas from the regressed edge beyond which the posterior is negligible, whatever the mask."""
    extremes = torch.stack([weight.clamp(max=0).sum(), weight.clamp(min=0).sum()]) + bias
    least, most = (-F.softplus(-extremes)).tolist()
    return math.sqrt(2 * (most - least + NEGLIGIBLE))


def surprise(span: Span, weight: Tensor, bias: Tensor) -> Tensor:
    """(N, 2, P) -log P(M' | X = i) (Eq. 5), nats: one kernel, mirrored for far edges."""
    kernels = torch.stack([weight, weight.flip(0)])
    if span.values.shape[1] == 1:
        scores = F.conv1d(span.values, kernels[:, None], bias.expand(2))
    else:  # a convolution of two channels, each with its own kernel, costs several times this sum
        size = span.values.shape[2] - 2 * span.s
        scores = torch.addcmul(bias, span.values[:, :, :size], kernels[:, :1])
        for i in range(1, len(weight)):
            scores.addcmul_(span.values[:, :, i : i + size], kernels[:, i, None])
    return F.softplus(-scores)


def log_prior(span: Span, sigma: Tensor, cut: float | None = None) -> Tensor:
    """(N, 2, P) log P(X = i) up to a constant (Eq. 6), sigma (N,) pixels; values up to `cut` of the peak become 0."""
    exponent = -0.5 * (span.away / sigma[:, None, None]) ** 2
    return exponent if cut is None else exponent.masked_fill(exponent.exp() <= cut, -math.inf)


def log_joint(span: Span, sigma: Tensor, weight: Tensor, bias: Tensor, cut: float | None = None) -> Tensor:
    """(N, 2, P) log P(X = i | M') up to a constant (Eq. 3): its softmax is the posterior."""
    return log_prior(span, sigma, cut).sub_(surprise(span, weight, bias))


def prior_sigma(size: Tensor, gamma: float) -> Tensor:
    """Pixels, of the prior of edges of boxes of this width or height (Eq. 7)."""
    return (gamma * size).clamp(min=MIN_SIGMA)


def _interval(posterior: Tensor, span: Span, credibility: float) -> tuple[Tensor, Tensor]:
    """(N, 2) ends of the central interval: the first positions with so much of the posterior up to them."""
    below = posterior.cumsum(dim=2)[:, :, :-1]  # where no sum gets so far, for rounding, it is the last
    tail = (1 - credibility) / 2
    # bool is counted in 32 bits several times faster than in 64
    low, high = ((below < share).sum(dim=2, dtype=torch.int32) for share in (tail, 1 - tail))
    return span.start + low, span.start + high


class MBRM(nn.Module):
    """Ten numbers that read an edge off a mask.

    Args:
        numbers: to begin with.
        rules: what differs between projects. `inclusive` measures the box as the release does, x2 - x1 - 1 pixels; with
            `keep_without_evidence` edges that would cross keep their regressed value, too.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        numbers: Numbers = PUBLISHED,
        *,
        rules: Rules = Rules(),
    ) -> None:
        super().__init__()
        self.gamma, self.mask_threshold = numbers.gamma, numbers.mask_threshold
        self.rules = rules
        self.weight = nn.Parameter(torch.tensor(numbers.weight, dtype=torch.float32))
        self.bias = nn.Parameter(torch.tensor(numbers.bias, dtype=torch.float32))
        self.requires_grad_(False)  # fitted by itself, with everything else frozen (3.4)

    @property
    def numbers(self) -> Numbers:
        weight = tuple(self.weight.double().tolist())
        return Numbers(weight, self.bias.double().item(), self.gamma, self.mask_threshold)

    @property
    def s(self) -> int:
        """Columns that the kernel reads on each side of an edge."""
        return len(self.weight) // 2

    def size(self, boxes: Tensor) -> Tensor:
        """(N, 2) width and height as the prior measures them."""
        size = boxes[:, 2:] - boxes[:, :2]
        return size - 1 if self.rules.inclusive else size

    def sigma(self, boxes: Tensor) -> Tensor:
        """(N, 2) pixels, of the horizontal and of the vertical prior."""
        return prior_sigma(self.size(boxes), self.gamma)

    def log_joint(self, span: Span, sigma: Tensor) -> Tensor:
        """See `log_joint`; with the numbers of this one."""
        return log_joint(span, sigma, self.weight, self.bias, self.rules.prior_cut)

    def posterior(self, profiles: Tensor, edges: Tensor, sigma: Tensor) -> Tensor:
        """(N, 2, S) P(X = i | M') of near and far edges along a whole axis (Eq. 3).

        Entry i is the probability that the near edge is i, and that the far edge is i + 1. NaN where `prior_cut` leaves
        no position to the prior.
        """
        return self.log_joint(whole(profiles, edges, self.s), sigma).softmax(dim=2)

    def forward(
        self, columns: Tensor, rows: Tensor, boxes: Tensor, decision: Decision = "argmax", credibility: float = 0.95
    ) -> Refined:
        """Refine boxes by their masks' profiles; no shape depends on what is in them.

        Args:
            columns, rows: (N, W) and (N, H), highest foreground probability of each column and row, 0..1.
            boxes: (N, 4) xyxy, regressed, in the same pixels.
            decision: the posterior's most likely position (Eq. 2), or its mean, which is not an integer.
            credibility: share of the posterior inside the interval.
        """
        sigma = self.sigma(boxes)
        axes = [
            self.decide(whole(profiles, edges, self.s), edges, sigma[:, axis], decision, credibility)
            for axis, profiles, edges in ((0, columns, boxes[:, 0::2]), (1, rows, boxes[:, 1::2]))
        ]
        return self.settle(boxes, torch.stack(axes, dim=2))

    def decide(self, span: Span, edges: Tensor, sigma: Tensor, decision: Decision, credibility: float) -> Tensor:
        """(N, 2, 4): refined near and far edges, their variances and the ends of their intervals.

        Args:
            edges: (N, 2) regressed.
            sigma: (N,) of the prior, pixels.
        """
        joint = self.log_joint(span, sigma)
        # The softmax. torch gives exp, logsigmoid and sqrt on a CPU to threads, however small the array: where the
        # cores have other work, each of them waits longer than all the rest takes. exp2, softplus and rsqrt it does
        # at once. In place, as new memory costs more than what is written to it.
        peak = joint.amax(dim=2, keepdim=True)
        posterior = joint.sub_(peak).mul_(1 / math.log(2)).exp2_()
        posterior /= posterior.sum(dim=2, keepdim=True)
        mean = (posterior * span.away).sum(dim=2)
        variance = (span.away - mean[:, :, None]).square_().mul_(posterior).sum(dim=2)
        low, high = _interval(posterior, span, credibility)
        refined = edges + mean if decision == "mean" else span.start + posterior.argmax(dim=2)
        informed = self._has_evidence(span, sigma) if self.rules.keep_without_evidence else None
        if self.rules.prior_cut is not None:
            # It can leave no position at all: then there is nothing to believe but the regressed edge
            possible = peak[:, :, 0] > -math.inf
            variance = torch.where(possible, variance, sigma[:, None] ** 2)
            low, high = (end.masked_fill(~possible, math.nan) for end in (low, high))
            informed = possible if informed is None else informed & possible
        if informed is not None:
            refined = torch.where(informed, refined, edges)
        return torch.stack([refined, variance, low, high], dim=2)

    def _has_evidence(self, span: Span, sigma: Tensor) -> Tensor:
        """(N, 2): whether the mask holds a foreground pixel near the edge."""
        # Half a pixel behind the near edge i lies the centre of its column, i, and half a pixel before the far edge
        # that of its own, i - 1
        centre = span.around + torch.arange(0.5, -1, -1, device=sigma.device)[:, None]
        near = centre.abs_() <= (EVIDENCE * sigma + (self.s + 1))[:, None, None]
        return near.logical_and_(span.values > self.mask_threshold).any(dim=2)

    def settle(self, boxes: Tensor, edges: Tensor) -> Refined:
        """The boxes that their edges make, (N, 2 near and far, 2 axes, 4) as `decide` gives them for each axis."""
        refined, variance, low, high = edges.flatten(1, 2).unbind(dim=2)
        std = variance * variance.clamp(min=1e-12).rsqrt()
        if self.rules.keep_without_evidence:
            crossed = (refined[:, 2:] <= refined[:, :2]).repeat(1, 2)
            refined = torch.where(crossed, boxes, refined)
        return Refined(refined, std, torch.stack([low, high], dim=2))

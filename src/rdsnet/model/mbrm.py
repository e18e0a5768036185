"""Mask-based boundary refinement, MBRM (3.3, Eq. 2-7): masks and boxes -> edge posteriors -> refined boxes.

An edge's position is an integer. Edge i on the left (top) means that column i is the first of the object; on the
right (bottom), that column i - 1 is the last. So left edges run over 0..W-1 and right edges over 1..W, and in both
cases the entry i of an array of W stands for column i.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdsnet.settings import Rules

# The numbers published with the authors' release: nine weights, the object's inside on the right, and a bias.
PUBLISHED_WEIGHT = (-0.2968, -0.2892, -0.2635, -3.2545, -0.1874, 2.5041, 0.0196, 0.0651, 0.0917)
PUBLISHED_BIAS = -1.9536

# An edge is believed to lie within so many sigmas of the regressed one; beyond, the prior is under 0.0044 of its peak.
REACH = math.sqrt(-2 * math.log(0.0044))


class Refined(NamedTuple):
    """boxes (N, 4) float32 xyxy; edge_std (N, 4), pixels, of left, top, right, bottom."""

    boxes: Tensor
    edge_std: Tensor


class MBRM(nn.Module):
    """Ten numbers that read an edge off a mask.

    Args:
        gamma: sigma of the prior is gamma times the box's width (left, right) or height (top, bottom).
        min_sigma: pixels; small objects keep a prior that can move by a pixel.
        rules: what differs between projects. `inclusive` measures the box as the release does, x2 - x1 - 1 pixels.
        mask_threshold: a mask says something of an edge if it holds a pixel above this within reach of it.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        *,
        gamma: float = 0.05,
        min_sigma: float = 1.0,
        mask_threshold: float = 0.4,
        rules: Rules = Rules(),
    ) -> None:
        super().__init__()
        self.gamma, self.min_sigma = gamma, min_sigma
        self.rules = rules
        self.mask_threshold = mask_threshold
        self.weight = nn.Parameter(torch.tensor(PUBLISHED_WEIGHT))
        self.bias = nn.Parameter(torch.tensor(PUBLISHED_BIAS))
        self.requires_grad_(False)  # fitted by itself, with everything else frozen (3.4)

    def sigma(self, boxes: Tensor) -> Tensor:
        """(N, 2) pixels, of the horizontal and of the vertical prior (Eq. 7)."""
        size = boxes[:, 2:] - boxes[:, :2] - (1 if self.rules.inclusive else 0)
        return (self.gamma * size).clamp(min=self.min_sigma)

    def log_likelihood(self, profiles: Tensor) -> Tensor:
        """log P(M' | X = i) of near and far edges (Eq. 5): (N, S) profiles -> (N, 2, S).

        One kernel serves all four edges: mirrored for the far ones, right and bottom.
        """
        kernels = torch.stack([self.weight, self.weight.flip(0)])[:, None]
        scores = F.conv1d(profiles[:, None], kernels, self.bias.expand(2), padding=len(self.weight) // 2)
        return F.logsigmoid(scores)

    def log_prior(self, edges: Tensor, sigma: Tensor, length: int) -> Tensor:
        """log P(X = i) up to a constant (Eq. 6): (N, 2) near and far regressed edges -> (N, 2, S)."""
        near = torch.arange(length, device=edges.device, dtype=edges.dtype)
        position = torch.stack([near, near + 1])
        exponent = -0.5 * ((position - edges[:, :, None]) / sigma[:, None, None]) ** 2
        cut = self.rules.prior_cut
        return exponent if cut is None else exponent.masked_fill(exponent.exp() <= cut, -math.inf)

    def posterior(self, profiles: Tensor, edges: Tensor, sigma: Tensor) -> Tensor:
        """P(X = i | M') of both edges along one axis (Eq. 3).

        Args:
            profiles: (N, S) highest foreground probability of each column or row, 0..1.
            edges: (N, 2) regressed left and right, or top and bottom.
            sigma: (N,) of the prior, pixels.

        Returns:
            (N, 2, S); entry i is the probability that the near edge is i, and that the far edge is i + 1. NaN
            where `prior_cut` leaves no position to the prior.
        """
        joint = self.log_prior(edges, sigma, profiles.shape[1]) + self.log_likelihood(profiles)
        return joint.softmax(dim=2)

    def forward(
        self, columns: Tensor, rows: Tensor, boxes: Tensor, decision: Literal["argmax", "mean"] = "argmax"
    ) -> Refined:
        """Refine boxes by their masks' profiles.

        Args:
            columns, rows: (N, W) and (N, H), highest foreground probability of each column and row, 0..1.
            boxes: (N, 4) xyxy, regressed, in the same pixels.
            decision: the posterior's most likely position (Eq. 2), or its mean, which is not an integer.
        """
        sigma = self.sigma(boxes)
        edges, spread = zip(
            *(
                self._axis(profiles, boxes[:, axis::2], sigma[:, axis], decision)
                for axis, profiles in enumerate((columns, rows))
            ),
            strict=True,
        )
        refined = torch.stack(edges, dim=2).flatten(1)  # (N, 2 near and far, 2 axes) -> x1, y1, x2, y2
        if self.rules.keep_without_evidence:
            crossed = (refined[:, 2:] <= refined[:, :2]).repeat(1, 2)
            refined = torch.where(crossed, boxes, refined)
        return Refined(refined, torch.stack(spread, dim=2).flatten(1))

    def _axis(self, profiles: Tensor, edges: Tensor, sigma: Tensor, decision: str) -> tuple[Tensor, Tensor]:
        """(N, 2) refined edges of one axis and their standard deviations."""
        position = torch.arange(profiles.shape[1], device=edges.device, dtype=edges.dtype)
        position = torch.stack([position, position + 1])
        posterior = self.posterior(profiles, edges, sigma)
        # The prior's cut can leave no position at all: then there is nothing to believe but the regressed edge
        possible = posterior.isfinite().all(dim=2)
        mean = (posterior * position).sum(dim=2)
        variance = (posterior * (position - mean[:, :, None]) ** 2).sum(dim=2)
        refined = mean if decision == "mean" else position.gather(1, posterior.argmax(dim=2).t()).t()
        informed = possible
        if self.rules.keep_without_evidence:
            informed = informed & self._has_evidence(profiles, edges, sigma)
        spread = torch.where(possible, variance.sqrt(), sigma[:, None])
        return torch.where(informed, refined, edges), spread

    def _has_evidence(self, profiles: Tensor, edges: Tensor, sigma: Tensor) -> Tensor:
        """(N, 2): whether the mask holds a foreground pixel within reach of the edge and its kernel."""
        centre = torch.arange(profiles.shape[1], device=edges.device) + 0.5
        reach = REACH * sigma + len(self.weight) // 2 + 1
        near = (centre - edges[:, :, None]).abs() <= reach[:, None, None]
        return ((profiles > self.mask_threshold)[:, None] & near).any(dim=2)

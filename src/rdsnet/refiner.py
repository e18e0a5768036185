"""The numbers of the boundary refinement (MBRM) for a model that is not RDSNet's own: kept, saved and found again."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

from rdsnet.files import read_json, write_text
from rdsnet.model.mbrm import PUBLISHED_WEIGHT

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
    from rdsnet.checkpoint import read

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

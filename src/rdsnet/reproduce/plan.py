"""The paper's comparisons as data: rows are settings over a preset, and the figures that the paper gives for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rdsnet.presets import Changes

Metric = Literal["mask", "regressed", "direct", "refined"]
"""mask AP, or box AP of these boxes"""
PaperNumbers = Mapping[str, tuple[float, ...]]
"""by column; several where the paper has the row at several sizes or schedules"""

AP = ("AP", "AP50", "AP75", "APs", "APm", "APl")
SPEED = "images/s"
ALL = (*AP, SPEED)
SIZES = ("AP", "APs", "APm", "APl")

GAMMAS = (0.0, 0.01, 0.025, 0.05, 0.1, 0.2)
"""figure 5; 0 is no refinement"""
KERNEL_SIDES = (1, 2, 3, 4, 5, 6)
"""figure 5: s, the weights on each side of the kernel's middle"""

FAMILIES = {
    "full": {"rdsnet": "rdsnet_r101", "rdsnet_s": "rdsnet_s", "yolact": "yolact_base"},
    "tiny": {"rdsnet": "rdsnet_tiny", "rdsnet_s": "rdsnet_s_tiny", "yolact": "yolact_tiny"},
}
"""The presets: the paper's, and small ones that learn from scratch on small data."""


@dataclass(frozen=True)
class Row:
    """One line of a table: a system, what it changes, and which of its numbers are shown."""

    name: str
    preset: str = "rdsnet"
    """a key of `FAMILIES`"""
    changes: Changes = field(default_factory=dict)
    """of settings, over the preset"""
    metric: Metric = "refined"
    paper: PaperNumbers = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """A table of the paper."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    baseline: str | None
    """the row that differences are to"""
    note: str = ""
    """what the paper's figures are"""


@dataclass(frozen=True)
class Budget:
    """How much is spent on a training, and how large the synthetic data set is that is made for it."""

    images: int
    val_images: int
    size: int
    short_side: int
    """of the synthetic images at the network"""
    train: dict[str, Any]
    """changes of the section of that name"""
    speed_images: int = 20
    speed_rounds: int = 7


BUDGETS = {
    # seconds: shows that everything runs, and learns nothing
    "tiny": Budget(6, 4, 64, 64, {"max_steps": 2, "batch_size": 2}, speed_images=2, speed_rounds=2),
    # a training in minutes on two CPU cores
    "small": Budget(600, 200, 256, 128, {"max_steps": 1000}),
    # the presets' own schedules
    "full": Budget(5000, 1000, 256, 256, {}),
}


def _paper(columns: tuple[str, ...], *settings: tuple[float, ...]) -> PaperNumbers:
    """The paper's numbers of a row, in the order of the columns; one tuple a size or schedule."""
    return dict(zip(columns, zip(*settings, strict=True), strict=True))


FULL = Row("RDSNet")


def _cropping(name: str, paper: float, *, assembly: str = "correlation", te: bool, ohem: bool, ie: bool) -> Row:
    """A row of table 3: expansion in training, OHEM and expansion at inference, over RDSNet-s."""
    changes: Changes = {
        "model": {"assembly": assembly},
        "loss": {"crop_expand": 1.5 if te else 1.0, "ohem_ratio": 1.0 if ohem else None},
        "detect": {"crop_expand": 1.2 if ie else 1.0},
    }
    return Row(name, "rdsnet_s", changes, "mask", {"AP": (paper,)})


COMPARISONS = {
    "table1": Comparison(
        title="Table 1: instance segmentation, mask AP",
        columns=ALL,
        rows=(
            Row("YOLACT", "yolact", {}, "mask", _paper(ALL, (29.8, 48.5, 31.2, 9.9, 31.3, 47.7, 33.0))),
            Row("RDSNet-s", "rdsnet_s", {}, "mask", _paper(ALL, (32.1, 53.0, 33.4, 11.0, 33.8, 51.0, 32.0))),
            Row(
                "RDSNet",
                "rdsnet",
                {},
                "mask",
                _paper(ALL, (34.6, 55.8, 36.7, 14.9, 37.4, 50.3, 8.8), (36.4, 57.9, 39.0, 16.4, 39.5, 51.6, 8.8)),
            ),
        ),
        baseline="YOLACT",
        note="COCO test-dev; RDSNet after 12 and 24 epochs; speed on a Titan XP or 1080 Ti, RDSNet's on a V100",
    ),
    "table2": Comparison(
        title="Table 2: object detection, box AP",
        columns=ALL,
        rows=(
            Row(
                "RetinaNet",
                "rdsnet",
                {"model": {"masks": False}},
                "regressed",
                _paper(ALL, (36.0, 55.2, 38.7, 17.4, 39.6, 49.7, 16.8), (38.1, 58.5, 40.8, 21.2, 41.5, 48.2, 10.9)),
            ),
            Row(
                "+ mask",
                "rdsnet",
                {"detect": {"refine": "off"}},
                "refined",
                _paper(ALL, (36.1, 56.7, 38.5, 17.3, 38.9, 51.3, 15.5), (39.4, 60.1, 42.5, 22.1, 42.6, 49.9, 8.8)),
            ),
            Row(
                "+ MBRM",
                "rdsnet",
                {},
                "refined",
                _paper(ALL, (37.3, 56.7, 39.3, 17.0, 40.0, 54.0, 14.5), (40.3, 60.1, 43.0, 22.1, 43.5, 51.5, 8.5)),
            ),
        ),
        baseline="RetinaNet",
        note="COCO test-dev, R-101, at 600 and 800 px; speed on a V100",
    ),
    "table3": Comparison(
        title="Table 3: correlation and cropping, mask AP of RDSNet-s",
        columns=AP,
        rows=(
            _cropping("1 linear combination", 29.9, assembly="linear", te=False, ohem=False, ie=False),
            _cropping("2 correlation", 31.0, te=False, ohem=False, ie=False),
            _cropping("3 correlation, expand at inference", 30.0, te=False, ohem=False, ie=True),
            _cropping("4 correlation, expand in training", 30.7, te=True, ohem=False, ie=False),
            _cropping("5 correlation, expand in both", 30.8, te=True, ohem=False, ie=True),
            _cropping("6 correlation, expand in training, OHEM", 31.6, te=True, ohem=True, ie=False),
            _cropping("7 correlation, expand in both, OHEM", 31.8, te=True, ohem=True, ie=True),
        ),
        baseline="1 linear combination",
        note="COCO val2017",
    ),
    "table4": Comparison(
        title="Table 4: boundary refinement, box AP",
        columns=SIZES,
        rows=(
            Row("baseline", metric="regressed", paper=_paper(SIZES, (35.9, 17.1, 39.7, 53.3))),
            Row("direct", metric="direct", paper=_paper(SIZES, (34.2, 11.8, 37.7, 55.1))),
            Row("MBRM", metric="refined", paper=_paper(SIZES, (37.2, 16.9, 40.8, 56.5))),
        ),
        baseline="baseline",
        note="COCO val2017",
    ),
    "figure4": Comparison(
        title="Figure 4: without and with expanded crops and MBRM, box AP",
        columns=SIZES,
        rows=(
            Row("without expanded crops and MBRM", changes={"detect": {"crop_expand": 1.0, "refine": "off"}}),
            Row("full"),
        ),
        baseline="without expanded crops and MBRM",
    ),
}

TITLES = {name: comparison.title for name, comparison in COMPARISONS.items()} | {
    "figure3": "Figure 3: pixels as the objects' representations see them",
    "figure5": "Figure 5: sensitivity of MBRM, box AP",
}

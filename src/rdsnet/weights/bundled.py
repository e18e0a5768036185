"""What comes with the package: weights by name, and sample images."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent

WEIGHTS = {"nuclei": _HERE / "nuclei.safetensors"}
"""docs/nuclei.md is the model's card"""

SAMPLES = _HERE.parent / "samples" / "samples.json"
"""COCO JSON of six images of nuclei: 2018 Data Science Bowl (Broad Bioimage Benchmark Collection BBBC038v1), CC0"""


def sample_images() -> list[Path]:
    """The image files, in order of name."""
    return sorted(SAMPLES.parent.glob("*.jpg"))

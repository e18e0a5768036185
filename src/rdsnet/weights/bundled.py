"""Where weights are: those that come with the package, by name, and those of a run; sample images. Free of torch."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent

WEIGHTS = {"nuclei": _HERE / "nuclei.safetensors"}
"""docs/nuclei.md is the model's card"""

BEST = "best.safetensors"
"""the weights of a run folder"""

SAMPLES = _HERE.parent / "samples" / "samples.json"
"""COCO JSON of six images of nuclei: 2018 Data Science Bowl (Broad Bioimage Benchmark Collection BBBC038v1), CC0"""


def sample_images() -> list[Path]:
    """The image files, in order of name."""
    return sorted(SAMPLES.parent.glob("*.jpg"))


def find_weights(source: str | Path) -> Path:
    """The bundled weights of a name (text; `./nuclei` is a path), those of a run folder, or the file itself.

    Raises:
        FileNotFoundError: there is none of them.
    """
    if source in WEIGHTS:
        return WEIGHTS[str(source)]
    path = Path(source)
    if path.is_dir():
        if not (path / BEST).is_file():
            raise FileNotFoundError(f"run folder {path} holds no {BEST}: it appears with the first validation")
        return path / BEST
    if not path.is_file():
        names = ", ".join(WEIGHTS)
        raise FileNotFoundError(f"expected {names}, a run folder or a .safetensors file, found nothing at {path}")
    return path

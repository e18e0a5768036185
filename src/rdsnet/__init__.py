"""RDSNet: objects as tight boxes and full-resolution masks, each correcting the other."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rdsnet.config import Config, get_config
    from rdsnet.model.build import build_model
    from rdsnet.model.rdsnet import RDSNet
    from rdsnet.predict.predictor import Predictor, load
    from rdsnet.refine.boxes import RefinedBoxes, Refiner, fit_refiner, refine_boxes

__all__ = [
    "Config",
    "Predictor",
    "RDSNet",
    "RefinedBoxes",
    "Refiner",
    "build_model",
    "fit_refiner",
    "get_config",
    "load",
    "refine_boxes",
]

_HOMES = {
    "Config": "rdsnet.config",
    "Predictor": "rdsnet.predict",
    "RDSNet": "rdsnet.model",
    "RefinedBoxes": "rdsnet.refine",
    "Refiner": "rdsnet.refine",
    "build_model": "rdsnet.model",
    "fit_refiner": "rdsnet.refine",
    "get_config": "rdsnet.config",
    "load": "rdsnet.predict",
    "refine_boxes": "rdsnet.refine",
}


def __getattr__(name: str) -> Any:
    # Imported when first used: `rdsnet --help` does not wait for torch
    if name == "__version__":
        from importlib.metadata import version

        return version("rdsnet")
    if name not in _HOMES:
        raise AttributeError(f"module 'rdsnet' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)

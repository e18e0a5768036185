"""RDSNet: objects as tight boxes and full-resolution masks, each correcting the other."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rdsnet.config import Config, get_config
    from rdsnet.model import RDSNet, build_model
    from rdsnet.predict import Predictor, load

__all__ = ["Config", "Predictor", "RDSNet", "build_model", "get_config", "load"]

_HOMES = {
    "Config": "rdsnet.config",
    "Predictor": "rdsnet.predict",
    "RDSNet": "rdsnet.model",
    "build_model": "rdsnet.model",
    "get_config": "rdsnet.config",
    "load": "rdsnet.predict",
}


def __getattr__(name: str) -> Any:
    # Imported when first used: `rdsnet --help` does not wait for torch
    if name == "__version__":
        return version("rdsnet")
    if name not in _HOMES:
        raise AttributeError(f"module 'rdsnet' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)

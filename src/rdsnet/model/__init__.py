"""The network: Figure 2 of the paper, left to right."""

from rdsnet.model.build import build_model
from rdsnet.model.rdsnet import RDSNet

__all__ = ["RDSNet", "build_model"]

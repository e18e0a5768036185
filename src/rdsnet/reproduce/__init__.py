"""The paper's tables and figures: settings over shared trainings."""

from rdsnet.reproduce.run import reproduce

__all__ = ["reproduce"]

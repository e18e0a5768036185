"""Training: `train` makes a run folder."""

from rdsnet.train.run import train

__all__ = ["train"]

"""Speed and memory, stage by stage."""

from rdsnet.benchmark.run import benchmark

__all__ = ["benchmark"]

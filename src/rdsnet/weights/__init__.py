"""Weights: what comes with the package, files, and those of other projects."""

"""Boundary refinement (MBRM, 3.3) for the boxes and masks of any model."""

from rdsnet.refine.boxes import RefinedBoxes, Refiner, fit_refiner, refine_boxes

__all__ = ["RefinedBoxes", "Refiner", "fit_refiner", "refine_boxes"]

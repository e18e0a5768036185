"""Figure 5: what MBRM's boxes are worth over gamma and over s.

Every setting reads the same masks: detections are made once, and refined again by an MBRM of each setting, whose
numbers are fitted to the training images with that gamma and that kernel.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rdsnet.config import Config
from rdsnet.data import CocoFolder
from rdsnet.evaluation import CocoEvaluator
from rdsnet.inference import detect_folder, progress_bar
from rdsnet.model import RDSNet
from rdsnet.model.mbrm import MBRM
from rdsnet.refinement import NothingToFit, fit, matched_detections, with_reach
from rdsnet.reproduce.plan import GAMMAS, REACHES
from rdsnet.reproduce.run import Numbers, percent
from rdsnet.structures import Objects


def sweep(model: RDSNet, val: CocoFolder, config: Config, fitted_to: CocoFolder) -> dict[str, Numbers]:
    """Box AP in percent by setting, "gamma = 0.05" or "s = 4"; the other one is the model's own.

    Args:
        val: evaluated.
        fitted_to: training images, for the fits of MBRM.
    """
    own = copy.deepcopy(model.mbrm).cpu()
    samples = matched_detections(model, fitted_to, config)
    variants = {f"gamma = {gamma:g}": _fitted(own, samples, gamma=gamma) for gamma in GAMMAS}
    variants |= {f"s = {reach}": _fitted(own, samples, reach=reach) for reach in REACHES}
    evaluators = {
        name: CocoEvaluator(val.json_path, val.category_ids, config.detect.max_detections) for name in variants
    }
    decision = "mean" if config.detect.refine == "mean" else "argmax"
    detections = detect_folder(model, val, config, batch_size=config.train.batch_size)
    for record, objects in progress_bar("refining", detections, total=len(val), leave=False):
        assert objects.profiles is not None
        for name, mbrm in variants.items():
            boxes = objects.regressed_boxes
            if mbrm.gamma > 0:
                with torch.inference_mode():
                    boxes = mbrm(*objects.profiles, boxes, decision).boxes
            # as a plain detector's, so that nothing but these boxes is measured
            evaluators[name].add(record.id, replace(objects, regressed_boxes=boxes, masks=[], profiles=None))
    return {name: percent(evaluator.summarize()["box"]["regressed"]) for name, evaluator in evaluators.items()}


def _fitted(
    own: MBRM,
    samples: Sequence[tuple[Objects, Tensor, Tensor]],
    *,
    gamma: float | None = None,
    reach: int | None = None,
) -> MBRM:
    """A copy of an MBRM with another gamma or s, fitted anew."""
    mbrm = with_reach(own, len(own.weight) // 2 if reach is None else reach)
    if gamma is not None:
        mbrm.gamma = gamma
    if mbrm.gamma > 0:
        try:
            fit(mbrm, samples)
        except NothingToFit as error:
            print(f"{error}; it keeps the numbers that its authors published")
    return mbrm

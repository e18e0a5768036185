"""What each of the release's rules changes: its network with one rule at a time as in the paper's presets.

    PYTHONPATH=src python benchmarks/release_rules.py

Reads the vectors recorded from the release (RDSNET_PARITY_DIR, as the tests do): photos, and weights drawn by a rule.
They are not trained, so the numbers say how much a rule moves, not what it is worth in AP.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torchvision.ops import box_iou

from rdsnet.config import get_config
from rdsnet.model.build import build_model
from rdsnet.model.rdsnet import RDSNet
from rdsnet.presets import PRESETS
from rdsnet.structures import Objects
from rdsnet.weights.convert import from_release

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from parity import parity_folder
from release_weights import release_state
from test_parity_release import cases, photos, shape

OF_TRAINING = ("spread_masks", "min_mask_area")  # change nothing of what is found
SAME = 0.5  # IoU from which two boxes of a class are taken for the same object


def detect(model: RDSNet, one_scale: bool) -> Iterator[Objects]:
    """Objects of every recorded photo, in its own pixels."""
    for _, _, v in cases("end_to_end_r50*.npz"):
        images, sizes = photos(v)
        originals = [shape(v, f"img{i}_ori_shape") for i in range(len(sizes))]
        scales = [v[f"img{i}_scale_factor"].item() for i in range(len(sizes))]
        yield from model.detect(images, sizes, originals, scales if one_scale else None)


def full_mask(objects: Objects, i: int) -> Tensor:
    mask = torch.zeros(objects.image_size, dtype=torch.bool)
    x0, y0, x1, y1 = objects.windows[i].tolist()
    mask[y0:y1, x0:x1] = objects.masks[i]
    return mask


def compare(release: list[Objects], changed: list[Objects]) -> str:
    """Share found again; of these the mean shift of a box's sides, share of refined edges that move, mean mask IoU."""
    found, shifts, moved, ious = 0, [], [], []
    for ours, theirs in zip(release, changed, strict=True):
        overlap = box_iou(ours.regressed_boxes, theirs.regressed_boxes)
        overlap[ours.labels[:, None] != theirs.labels] = 0
        best, j = overlap.max(dim=1)
        for i in (best >= SAME).nonzero()[:, 0].tolist():
            found += 1
            shifts.append((ours.regressed_boxes[i] - theirs.regressed_boxes[j[i]]).abs())
            moved.append((ours.boxes[i] - theirs.boxes[j[i]]).abs() >= 0.5)
            a, b = full_mask(ours, i), full_mask(theirs, int(j[i]))
            ious.append(((a & b).sum() / (a | b).sum().clamp(min=1)).item() if (a | b).any() else 1.0)
    total = sum(len(objects) for objects in release)
    shift, edges = torch.stack(shifts).mean().item(), torch.stack(moved).float().mean().item()
    return f"{found / total:7.1%} {shift:7.2f} px {edges:7.1%} {sum(ious) / len(ious):7.4f}"


def main() -> None:
    release = from_release(release_state(parity_folder() / "release", "r50", 0))[0]
    expected = list(detect(release, one_scale=True))
    print(f"{'rule as in the paper':32} found again, box shift, refined edges moved, mask IoU")
    paper = get_config("rdsnet_r50", {"model": {"pretrained": "none"}})
    configs = {"all": paper}
    for rule in PRESETS["rdsnet_r50_release"]["rules"]:
        changes = {"model": {"pretrained": "none"}, "rules": {rule: getattr(paper.rules, rule)}}
        configs[f"rules.{rule}"] = get_config("rdsnet_r50_release", changes)
    for rule in OF_TRAINING:
        del configs[f"rules.{rule}"]  # a KeyError for a name that is none
    for name, config in configs.items():
        changed = build_model(config, num_classes=80).eval()
        changed.load_state_dict(release.state_dict())
        print(f"{name:32} {compare(expected, list(detect(changed, config.rules.one_scale)))}", flush=True)


if __name__ == "__main__":
    main()

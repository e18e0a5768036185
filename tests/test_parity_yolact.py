"""YOLACT's parts against the vectors recorded from its authors' code: priors, code, matching, losses, crops and NMS.

The code works in coordinates relative to the image, ours in pixels of the network input.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import make
from parity import Vectors, compare, vectors
from rdsnet.config import get_config
from rdsnet.data.transforms import eval_image
from rdsnet.model.mask_rules import YolactMasks, padded_windows
from rdsnet.model.object_stream.dense import Raw
from rdsnet.model.object_stream.learning import IGNORED, grid_iou
from rdsnet.model.object_stream.suppression import fast_nms, traditional_nms
from rdsnet.model.object_stream.yolact import (
    YolactStream,
    classification_loss,
    corners,
    decode,
    encode,
    hard_negatives,
    place_priors,
    prior_shapes,
    share_inside,
)
from rdsnet.model.pixel_stream import SemanticBranch
from rdsnet.structures import Targets

SIDE = 550
RATIOS = (1.0, 0.5, 2.0)
CPU = torch.device("cpu")
PRESETS = {"resnet50": "yolact_r50", "base": "yolact_base", "im700": "yolact_im700", "im400": "yolact_im400"}


def named(v: Vectors, prefix: str, suffix: str) -> list[str]:
    """What stands between them in the names of the arrays: the recorded cases."""
    found = [name[len(prefix) : -len(suffix)] for name in v if name.startswith(prefix) and name.endswith(suffix)]
    assert found
    return found


def resized(masks: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(masks[None].float(), size, mode="bilinear", align_corners=False)[0] > 0.5


def truth(boxes: Tensor, labels: Tensor, masks: Tensor | None = None, crowds: Tensor | None = None) -> Targets:
    n = len(labels)
    return Targets(
        boxes=boxes,
        labels=labels,
        masks=torch.zeros(n, 1, 1, dtype=torch.bool) if masks is None else masks,
        has_mask=torch.full((n,), masks is not None),
        areas=torch.zeros(n),
        image_size=(SIDE, SIDE),
        crowd_boxes=torch.zeros(0, 4) if crowds is None else crowds,
    )


def stream() -> YolactStream:
    return make.yolact(num_classes=80, strides=(8, 16, 32, 64, 128), channels=32, norm="none", representation=None)


def empty_raw(size: int = SIDE) -> Raw:
    """Of an image for which only the sizes count."""
    cells = [math.ceil(size / stride) for stride in (8, 16, 32, 64, 128)]
    return Raw(
        size=(size, size), logits=[torch.zeros(1, 243, n, n) for n in cells], deltas=[torch.zeros(1)] * 5, features=[]
    )


def test_priors_are_those_of_every_configuration() -> None:
    for _, v in vectors("yolact/priors*.npz"):
        for case in named(v, "", "_count"):
            side, square = v[f"{case}_max_size"].item(), bool(v[f"{case}_use_square_anchors"])
            levels = [
                place_priors(prior_shapes(sizes, RATIOS, square=square), (n, n), (side, side), CPU) / side
                for sizes, n in zip(v[f"{case}_pred_scales"].tolist(), v[f"{case}_conv_sizes"].tolist(), strict=True)
            ]
            priors = torch.cat(levels)
            compare(f"{case} numbers", torch.tensor([len(p) for p in levels]), v[f"{case}_counts_per_level"])
            compare(f"{case} first of a level", torch.stack([p[0] for p in levels]), v[f"{case}_first_row_of_level"])
            sums = torch.stack([p.double().sum(dim=0) for p in levels])
            compare(f"{case} sums", sums, v[f"{case}_column_sums_per_level_f64"], 1e-4)
            rows = {"first12": priors[:12], "last12": priors[-12:], "first50": priors[:50], "last50": priors[-50:]}
            for name, ours in {**rows, "every_97th": priors[::97]}.items():
                if f"{case}_{name}" in v:
                    compare(f"{case} {name}", ours, v[f"{case}_{name}"], 1e-6)


def test_the_presets_have_these_priors() -> None:
    for _, v in vectors("yolact/priors*.npz"):
        for case, preset in PRESETS.items():
            config = get_config(preset)
            assert list(config.yolact.prior_sizes) == v[f"{case}_pred_scales"].flatten().tolist()
            assert config.rules.square_priors == bool(v[f"{case}_use_square_anchors"])
            assert config.data.square == v[f"{case}_max_size"].item()


def test_box_code_and_overlaps_are_yolacts() -> None:
    for _, v in vectors("yolact/modules_geometry*.npz"):
        priors = v["codec_priors_cxcywh"] * SIDE
        compare("decoded", decode(priors, v["codec_loc"]) / SIDE, v["codec_decoded_xyxy"])
        compare("encoded", encode(priors, v["codec_gt_xyxy"] * SIDE), v["codec_encoded"])
        compare("encoded again", encode(priors, v["codec_decoded_xyxy"] * SIDE), v["codec_reencoded"], 1e-4)
        compare("corners", corners(v["codec_gt_cxcywh"]), v["codec_gt_xyxy"])
        a, b = v["iou_a"], v["iou_b"]
        overlap = torch.empty(len(a), 1, 1, len(b))
        grid_iou(a, b, (1, 1), overlap)
        compare("IoU", overlap[:, 0, 0], v["iou"])
        inside = torch.stack([share_inside(a, region[None]) for region in b], dim=1)
        compare("share of a in b", inside.nan_to_num(), v["iou_crowd"].nan_to_num())


def test_crops_are_yolacts() -> None:
    for _, v in vectors("yolact/modules_geometry*.npz"):
        h, w = v["crop_hw"].tolist()
        boxes = v["crop_boxes"] * torch.tensor([w, h, w, h])
        boxes = torch.cat([torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])], dim=1)
        kept = torch.zeros(len(boxes), h, w)
        for plane, (x0, y0, x1, y1) in zip(kept, padded_windows(boxes, (h, w)).tolist(), strict=True):
            plane[y0:y1, x0:x1] = 1
        compare("cells", kept.byte(), v["crop_pad1"])


def test_matching_is_yolacts() -> None:
    s, raw = stream(), empty_raw()
    priors = torch.cat(s.priors(raw))
    for _, v in vectors("yolact/modules_match*.npz"):
        for case in named(v, "match_", "_gt_boxes"):
            boxes, labels = v[f"match_{case}_gt_boxes"] * SIDE, v[f"match_{case}_gt_labels"]
            crowds = v[f"match_{case}_crowd_boxes"] * SIDE if f"match_{case}_crowd_boxes" in v else None
            assigned = s.assign(raw, truth(boxes, labels, crowds=crowds))
            wanted, matched = v[f"match_{case}_conf_t"].long(), v[f"match_{case}_idx_t"].long()
            positive = (assigned >= 0).nonzero()[:, 0]
            if case.startswith("ties"):  # rounding decides which of equal priors an object gets
                ours = assigned[positive].bincount(minlength=len(boxes))
                compare(f"{case} priors of each object", ours, matched[wanted > 0].bincount(minlength=len(boxes)))
                continue
            learns = torch.where(assigned >= 0, labels[assigned.clamp(min=0)] + 1, 0)
            compare(f"{case} classes", learns.masked_fill(assigned == IGNORED, -1), wanted)
            compare(f"{case} positives", positive, v[f"match_{case}_positive_priors"])
            compare(f"{case} objects", assigned[positive], matched[positive])
            ours = encode(priors[positive], boxes[assigned[positive]])
            compare(f"{case} deltas", ours, v[f"match_{case}_positive_loc_t"], 1e-4)
            some = encode(priors[::97], boxes[matched[::97]])
            compare(f"{case} deltas of all", some, v[f"match_{case}_loc_t_every_97th"])


def test_hard_negatives_and_class_loss_are_yolacts() -> None:
    for _, v in vectors("yolact/modules_losses*.npz"):
        for case in named(v, "ohem_", "_logits"):
            logits = v[f"ohem_{case}_logits"].requires_grad_()
            classes = v[f"ohem_{case}_conf_t"]
            wanted = classes.masked_fill(classes < 0, IGNORED)
            used = hard_negatives(logits.detach(), wanted, 3.0) | (wanted > 0)
            compare(f"{case} rows", used.byte(), v[f"ohem_{case}_used"])
            loss = classification_loss(logits, wanted, 3.0)
            compare(f"{case} loss", loss.detach(), v[f"ohem_{case}_loss"])
            loss.backward()
            assert logits.grad is not None
            compare(f"{case} gradient", logits.grad, v[f"ohem_{case}_grad"])


def mask_cases(v: Vectors) -> Iterator[tuple[str, list[tuple[Tensor, Tensor, Tensor, Targets]]]]:
    """Name of a case, and of each image its prototypes, coefficients, positive rows and truth in cells."""
    for case in named(v, "lincomb_", "_proto"):
        prototypes, coefficients = v[f"lincomb_{case}_proto"], v[f"lincomb_{case}_coef"]
        h, w = prototypes.shape[1:3]
        images = []
        for b in range(len(prototypes)):
            boxes = v[f"lincomb_{case}_gt_boxes_{b}"] * torch.tensor([w, h, w, h])
            masks = resized(v[f"lincomb_{case}_gt_masks_{b}"], (h, w))
            rows = v[f"lincomb_{case}_pos"][b].nonzero()[:, 0]
            labels = torch.zeros(len(boxes), dtype=torch.int64)
            images.append((prototypes[b], coefficients[b], rows, truth(boxes, labels, masks)))
        yield case, images


def test_mask_loss_is_yolacts() -> None:
    rules = YolactMasks(max_instances=100, threshold=0.5)
    for _, v in vectors("yolact/modules_losses*.npz"):
        for case, images in mask_cases(v):
            total, leaves = torch.zeros(()), []
            for b, (prototypes, coefficients, rows, target) in enumerate(images):
                prototypes.requires_grad_()
                coefficients.requires_grad_()
                used = rows[:100]  # what was recorded took the first where ours draws
                objects = v[f"lincomb_{case}_idx_t"][b, used]
                total = total + make.mask_loss(
                    rules,
                    coefficients[used],
                    prototypes.permute(2, 0, 1),
                    objects,
                    target,
                    step=(1, 1),
                    positives=len(rows),
                )
                leaves.append((prototypes, coefficients, rows))
            compare(f"{case} loss", 6.125 * total.detach(), v[f"lincomb_{case}_loss"])
            (6.125 * total).backward()
            to_prototypes = torch.stack([gradient(prototypes) for prototypes, _, _ in leaves])
            to_coefficients = torch.stack([gradient(coefficients) for _, coefficients, _ in leaves])
            norms = torch.stack([to_prototypes.double().norm(), to_coefficients.double().norm()])
            compare(f"{case} gradient norms", norms, v[f"lincomb_{case}_grad_l2_proto_coef"])
            recorded = v[f"lincomb_{case}_grad_proto_s2"]
            compare(f"{case} gradient of prototypes", to_prototypes[:, ::2, ::2], recorded)
            of_positives = torch.cat([gradient(coefficients)[rows] for _, coefficients, rows in leaves])
            compare(f"{case} gradient of coefficients", of_positives, v[f"lincomb_{case}_grad_coef_pos"])


def gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def test_segmentation_loss_is_yolacts() -> None:
    for _, v in vectors("yolact/modules_losses*.npz"):
        logits = v["segm_logits"].requires_grad_()
        targets = []
        for b in range(len(logits)):
            masks, labels = v[f"segm_gt_masks_{b}"].bool(), v[f"segm_gt_labels_{b}"]
            targets.append(truth(torch.tensor([[0.0, 0, 1, 1]]).repeat(len(labels), 1), labels, masks))
        loss = SemanticBranch(channels=4, num_classes=logits.shape[1]).loss(logits, targets) * len(logits)
        compare("loss", loss.detach(), v["segm_loss"])
        loss.backward()
        assert logits.grad is not None
        compare("gradient", logits.grad, v["segm_grad"])


def test_both_kinds_of_nms_are_yolacts() -> None:
    for _, v in vectors("yolact/modules_nms*.npz"):
        for case in named(v, "", "_boxes"):
            boxes, scores = v[f"{case}_boxes"], v[f"{case}_scores"]
            box = torch.arange(len(boxes)).repeat(len(scores))
            label = torch.arange(len(scores)).repeat_interleave(len(boxes))
            order = scores.flatten().argsort(descending=True, stable=True)
            box, label, score = box[order], label[order], scores.flatten()[order]
            above = score > 0.05
            fast = fast_nms(boxes[box], label, 0.5)
            kept = {
                "fast": fast[:100],
                "fast_second_threshold": fast[:100][above[fast[:100]]],
                "fast_top40": fast_nms(boxes[box], label, 0.5, top_k=40)[:100],
                "fast_iou03": fast_nms(boxes[box], label, 0.3)[:100],
                "trad": traditional_nms(SIDE * boxes[box][above], label[above], 0.5)[:100],
            }
            for name, index in kept.items():
                compare(f"{case} {name} boxes", box[index], v[f"{case}_{name}_index"])
                compare(f"{case} {name} classes", label[index], v[f"{case}_{name}_class"])
                compare(f"{case} {name} scores", score[index], v[f"{case}_{name}_score"], 0)


@pytest.mark.parametrize("path", ["fast", "base"])
def test_photos_reach_the_network_as_in_yolact(path: str) -> None:
    config = get_config("yolact_r50")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.model.image_mean, config.model.image_std))
    for _, v in vectors("yolact/modules_preprocess*.npz"):
        image = eval_image(v["pre_rgb_u8"].numpy(), config.data)
        ours = ((image - mean) / std)[:, ::10, ::10]
        # YOLACT resizes in float32 where ours rounds to whole grey values: half of one, and a little
        compare(path, ours, v[f"pre_{path}_s10"], 0.51 / 57)

"""The whole of YOLACT on photos: its weights, through the converter, give its answers.

Tolerances are those that its code in float32 keeps towards itself in float64, with room to spare (section 4 of the
vectors' README).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor, nn

import make
from parity import Vectors, compare, parity_folder, vectors
from rdsnet.model.correlation import coefficient_vectors, correlate
from rdsnet.model.object_stream.dense import Raw
from rdsnet.model.object_stream.learning import IGNORED, flatten_levels
from rdsnet.model.object_stream.suppression import Rule
from rdsnet.model.object_stream.yolact import YolactStream, encode, hard_negatives
from rdsnet.model.rdsnet import RDSNet
from rdsnet.structures import Objects, Targets
from rdsnet.weights.convert import YOLACT_KEYS, from_yolact, source_names
from release_weights import release_state

RULES: dict[str, Rule] = {"fast": "fast", "trad": "traditional"}
LOSSES = {"B": "box", "M": "mask", "C": "cls", "S": "semantic"}


@lru_cache(maxsize=1)
def yolact(arch: str, config: str, seed: int) -> RDSNet:
    size = next((size for size in ("im700", "im400") if size in config), None)
    return from_yolact(
        release_state(parity_folder() / "yolact", arch, seed), preset=None if size is None else f"yolact_{size}"
    )[0]


def cases(pattern: str) -> Iterator[tuple[str, dict[str, Any], Vectors, RDSNet]]:
    """Name, JSON, arrays and network of every recorded file, those of one network together."""
    found = [
        (json.loads(file.with_suffix(".json").read_text()), file.stem, v) for file, v in vectors(f"yolact/{pattern}")
    ]
    for info, name, v in sorted(found, key=lambda case: (case[0]["arch"], case[0]["config"], case[0]["seed"], case[1])):
        model = yolact(info["arch"], info["config"], info["seed"])
        model.object_stream.nms = "fast"
        yield name, info, v, model.eval()


def photo(v: Vectors) -> tuple[Tensor, tuple[int, int]]:
    """(1, 3, H, W) uint8 and its size."""
    image = v["rgb_u8"].permute(2, 0, 1)[None]
    return image, (image.shape[2], image.shape[3])


@contextmanager
def outputs(modules: dict[str, nn.Module]) -> Iterator[dict[str, Any]]:
    """What each module returns meanwhile."""
    seen: dict[str, Any] = {}
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output}))
        for name, module in modules.items()
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def rows(maps: list[Tensor], numbers: int) -> Tensor:
    """Of the one image, in the order of the priors."""
    return flatten_levels(maps, numbers)[0]


def test_the_networks_of_both_depths_are_recognised() -> None:
    files = sorted((parity_folder() / "yolact").glob("state_dict_keys_*.json"))
    assert files
    for file in files:
        state = {name: torch.zeros(()).expand(size) for name, size in json.loads(file.read_text()).items()}
        trunk = from_yolact(state)[1].config.model.trunk
        assert trunk.startswith(file.stem.split("_")[-1].replace("r", "resnet"))


@torch.no_grad()
def test_photos_give_yolacts_maps_detections_and_masks() -> None:
    for case, info, v, model in cases("e2e_*.npz"):
        image, size = photo(v)
        stages = {f"C{i + 1}": getattr(model.backbone.trunk, f"layer{i}") for i in range(1, 5)}
        width, height = v["image_wh"].tolist()
        with outputs({**stages, "pyramid": model.backbone, "network": model}) as seen:
            objects = model.detect(image, [size], [(height, width)])[0]
        raw, pixels = seen["network"]
        maps = {name: seen[name] for name in stages}
        maps |= {f"P{level}": m for level, m in zip(range(3, 8), seen["pyramid"], strict=True)}
        compare_maps(case, info, v, model.normalise(image, [size]), maps)
        compare_rows(case, info, v, model, raw)
        sy, sx, _ = info["proto_strides_y_x_channel"]
        prototypes = pixels[0].permute(1, 2, 0)
        compare(f"{case} prototypes", prototypes[::sy, ::sx], v["proto"], 3e-4)
        sums = prototypes.double().flatten(0, 1).sum(dim=0)
        compare(f"{case} prototypes, all", sums / v["proto_sum_per_channel"], torch.ones_like(sums), 1e-4)
        compare_detections(f"{case} fast", info, v, "fast", model, raw, pixels, objects)
        compare_logits(case, v, model, raw, pixels)
        model.object_stream.nms = "traditional"
        objects = model.detect(image, [size], [(height, width)])[0]
        compare_detections(f"{case} traditional", info, v, "trad", model, raw, pixels, objects)


def compare_maps(case: str, info: dict[str, Any], v: Vectors, image: Tensor, maps: dict[str, Tensor]) -> None:
    compare(f"{case} input", image[0, :, ::55, ::11], v["input_rows"], 1e-5)
    for name, values in maps.items():
        c, y, x = info["strides_channel_y_x"][name]
        compare(f"{case} {name}", values[0, ::c, ::y, ::x], v[name], 3e-4)
    means = torch.stack([maps[f"P{level}"].double().abs().mean() for level in range(3, 8)])
    compare(f"{case} pyramid, all", means, v["fpn_mean_abs"], 3e-5)


def compare_rows(case: str, info: dict[str, Any], v: Vectors, model: RDSNet, raw: Raw) -> None:
    """Of all priors: box code, class logits, coefficients and best scores."""
    stream = model.object_stream
    maps = {
        "loc": rows(raw.deltas, 4),
        "logits": rows(raw.logits, 81),
        "coef": rows([stream.represent(features) for features in raw.features], 32).tanh(),
    }
    for name, values in maps.items():
        compare(f"{case} {name}", values[:: info["row_strides"][name]], v[name], 3e-4)
        sums = v[f"{name}_column_sums"]
        compare(f"{case} {name}, all", values.double().sum(dim=0), sums, 1e-4 * sums.abs().max().item())
    scores = maps["logits"].softmax(dim=1)[:, 1:].amax(dim=1)
    compare(f"{case} best scores", scores, v["best_foreground_score"], 1e-4)


def order_of(anchors: Tensor, labels: Tensor, v: Vectors, rule: str) -> Tensor:
    """Our detections in the recorded order: the same pairs of prior and class, or the test fails."""
    ours = {pair: i for i, pair in enumerate(zip(anchors.tolist(), labels.tolist(), strict=True))}
    theirs = list(zip(v[f"{rule}_prior"].tolist(), v[f"{rule}_class"].tolist(), strict=True))
    assert ours.keys() == set(theirs), f"{rule}: found by one of the two only: {ours.keys() ^ set(theirs)}"
    return torch.tensor([ours[pair] for pair in theirs], dtype=torch.int64)


def compare_detections(
    case: str, info: dict[str, Any], v: Vectors, rule: str, model: RDSNet, raw: Raw, pixels: Tensor, objects: Objects
) -> None:
    stream, (h, w) = model.object_stream, raw.size
    found = stream.detect(raw, 0, raw.size, raw.size)
    index = order_of(found.anchors, found.labels, v, rule)
    compare(f"{case} scores", found.scores[index], v[f"{rule}_score"], 1e-4)
    assert (found.scores.diff() <= 0).all()
    compare(f"{case} boxes", found.boxes[index] / torch.tensor([w, h, w, h]), v[f"{rule}_box"], 1e-5)
    anchors = found.anchors[index]
    coefficients = coefficient_vectors(stream.representations(raw, torch.zeros_like(anchors), anchors))
    compare(f"{case} coefficients", coefficients, v[f"{rule}_coef"], 3e-4)
    objects = objects.select(order_of(objects.anchors, objects.labels, v, rule))
    compare_whole_boxes(case, v, rule, objects)
    compare_masks(case, v, rule, info[f"{rule}_rle"], objects)


def compare_whole_boxes(case: str, v: Vectors, rule: str, objects: Objects) -> None:
    """In whole pixels of the photo; where a corner is within 0.001 of one, rounding decides."""
    before, height, width = v[f"{rule}_post_box_before_truncation"], *objects.image_size
    sure = (before - before.round()).abs() > 1e-3
    # a box outside the photo has its left edge clipped at 0 only, and its right at the width only
    recorded = torch.minimum(v[f"{rule}_post_box"].clamp(min=0), torch.tensor([width, height, width, height]))
    sure |= (before <= 0) | (before >= torch.tensor([width, height, width, height]))
    assert (objects.boxes == objects.boxes.trunc()).all()
    compare(f"{case} whole boxes", objects.boxes.long()[sure], recorded[sure])


def compare_masks(case: str, v: Vectors, rule: str, rles: list[dict[str, Any]], objects: Objects) -> None:
    """1 - IoU below 0.002, but for pixels within 0.0001 of the threshold, which are much of a tiny mask."""
    agreement = torch.ones(len(rles))
    areas = torch.zeros(len(rles), dtype=torch.int64)
    for i, (mask, rle) in enumerate(zip(objects.masks, rles, strict=True)):
        ours = torch.zeros(objects.image_size, dtype=torch.bool)
        x0, y0, x1, y1 = objects.windows[i].tolist()
        ours[y0:y1, x0:x1] = mask
        theirs = torch.from_numpy(coco_mask.decode(rle)).bool()
        assert ours.shape == theirs.shape
        areas[i] = theirs.sum()
        if (ours != theirs).sum() > v[f"{rule}_mask_near_thr_1e-4"][i]:
            agreement[i] = (ours & theirs).sum() / (ours | theirs).sum()
    compare(f"{case} areas", areas, v[f"{rule}_mask_area"])
    compare(f"{case} mask IoU", agreement, torch.ones(len(rles)), 0.002)


def compare_logits(case: str, v: Vectors, model: RDSNet, raw: Raw, pixels: Tensor) -> None:
    """Of the first detections: prototypes combined, before cropping, and the probabilities that are thresholded."""
    count = len(v["fast_lincomb_logit"])
    logits = correlate(v["fast_coef"][:count], pixels[0])
    compare(f"{case} combined", logits[:, ::4, ::4], v["fast_lincomb_logit_f32_s4"], 1e-3)
    width, height = v["image_wh"].tolist()
    pasted = make.paste(
        model.masks,
        v["fast_coef"][:count],
        pixels[0],
        v["fast_box"][:count] * torch.tensor([width, height, width, height]),
        size=raw.size,
        output_size=(height, width),
        step=(raw.size[0] / pixels.shape[2], raw.size[1] / pixels.shape[3]),
    )
    for k in range(count):
        x0, y0, x1, y1 = v["fast_prob_window"][k].tolist()
        step = v["fast_prob_step"][k].item()
        crop = v[f"fast_prob_crop_{k}"].float()
        # profiles are the maxima of all rows and columns; what was recorded may leave some out
        columns, lines = pasted.columns[k, x0:x1:step], pasted.rows[k, y0:y1:step]
        assert (columns >= crop.amax(dim=0) - 1e-3).all() and (lines >= crop.amax(dim=1) - 1e-3).all()
        if step == 1:
            compare(f"{case} columns of mask {k}", columns, crop.amax(dim=0), 1e-3)
            compare(f"{case} rows of mask {k}", lines, crop.amax(dim=1), 1e-3)
        outside = torch.ones(width, dtype=torch.bool)
        outside[x0:x1] = False
        assert (pasted.columns[k, outside] == 0).all()


def truths(v: Vectors, grid: tuple[int, int]) -> tuple[Targets, Targets]:
    """Targets with masks on the mask grid, and the same with masks of the network's size."""
    n, h, w = v["gt_masks_shape"].tolist()
    packed = np.unpackbits(v["gt_masks_packed"].numpy(), axis=1)[:, : h * w]
    masks = torch.from_numpy(packed).view(n, h, w).bool()
    small = F.interpolate(masks[None].float(), grid, mode="bilinear", align_corners=False)[0] > 0.5
    both = [
        Targets(
            boxes=v["gt_boxes_label"][:, :4] * torch.tensor([w, h, w, h]),
            labels=v["gt_boxes_label"][:, 4].long(),
            masks=m,
            has_mask=torch.ones(n, dtype=torch.bool),
            areas=masks.flatten(1).sum(dim=1).float(),
            image_size=(h, w),
        )
        for m in (small, masks)
    ]
    return both[0], both[1]


@pytest.mark.slow
def test_a_training_step_gives_yolacts_losses_and_gradients() -> None:
    for case, _, v, model in cases("multibox_*.npz"):
        image, _ = photo(v)
        grid = tuple(model.pixel_stream.scale * -(-side // 8) for side in image.shape[2:])
        target, whole = truths(v, (grid[0], grid[1]))
        modules = {"network": model.object_stream, "pixels": model.pixel_stream, "semantic": model.semantic}
        with outputs(modules) as seen:
            losses = model.train().losses(image, [target])
        # Ours brings masks to the segmentation's size from the mask grid, YOLACT from the network's size
        finer = model.semantic.loss(seen["semantic"], [whole])
        compare(f"{case} segmentation of coarser masks", (losses["semantic"] / finer).detach(), torch.ones(()), 2e-3)
        losses["semantic"] = finer
        compare_step(case, v, model.object_stream, seen, target)
        compare_losses(case, v, model, losses)


def compare_step(case: str, v: Vectors, stream: YolactStream, seen: dict[str, Any], target: Targets) -> None:
    """Which priors learn what, and what the network says of them."""
    raw = seen["network"]
    assigned = stream.assign(raw, target)
    wanted = torch.where(assigned >= 0, target.labels[assigned.clamp(min=0)] + 1, 0)
    compare(f"{case} classes", wanted.masked_fill(assigned == IGNORED, -1), v["conf_t"].long())
    positive = (assigned >= 0).nonzero()[:, 0]
    compare(f"{case} positives", positive, v["positive_priors"])
    compare(f"{case} objects", assigned[positive], v["idx_t"].long()[positive])
    priors = torch.cat(stream.priors(raw))
    compare(f"{case} deltas", encode(priors[positive], target.boxes[assigned[positive]]), v["positive_loc_t"], 1e-4)
    logits = rows(raw.logits, 81).detach()
    wanted = wanted.masked_fill(assigned == IGNORED, IGNORED)[None]
    used = (hard_negatives(logits[None], wanted, stream.negative_ratio) | (wanted > 0))[0].nonzero()[:, 0]
    compare(f"{case} rows of the class loss", used, v["ohem_rows_used"])
    compare(f"{case} box code", rows(raw.deltas, 4).detach()[positive], v["loc_pos"], 3e-4)
    compare(f"{case} logits", logits[positive], v["conf_pos"], 3e-4)
    coefficients = coefficient_vectors(stream.representations(raw, torch.zeros_like(positive), positive))
    compare(f"{case} coefficients", coefficients.detach(), v["coef_pos"], 3e-4)
    compare(f"{case} segmentation", seen["semantic"].detach()[0, ::4, ::4, ::4], v["segm_s4"], 3e-4)
    prototypes = seen["pixels"].relu().detach()[0].permute(1, 2, 0)
    compare(f"{case} prototypes", prototypes[::6, ::6], v["proto_s6"], 3e-4)


def compare_losses(case: str, v: Vectors, model: RDSNet, losses: dict[str, Tensor]) -> None:
    """Each loss within 1e-4 and the norm of its gradient within 3e-3, for some parameters of every part."""
    ours = {theirs: name for name, theirs in source_names(model, YOLACT_KEYS).items()}
    names = [str(name) for name in v.arrays["grad_param_names"]]
    parameters = [model.get_parameter(ours[name]) for name in names]
    total = [torch.zeros_like(p) for p in parameters]
    values = torch.stack([losses[name] for name in LOSSES.values()]).detach()
    compare(f"{case} losses", values / v["loss_B_M_C_S"], torch.ones(4, dtype=torch.float64), 1e-4)
    compare(f"{case} loss", values.double().sum() / v["loss_total"], torch.ones((), dtype=torch.float64), 1e-4)
    for part, name in LOSSES.items():
        gradients = torch.autograd.grad(losses[name], parameters, retain_graph=True, materialize_grads=True)
        compare_norms(f"{case} {name}", gradients, v[f"grad_l2_{part}"])
        total = [t + g for t, g in zip(total, gradients, strict=True)]
    compare_norms(f"{case} total", total, v["grad_l2_total"])
    for name, gradient in zip(names, total, strict=True):
        if f"grad_total/{name}" in v:
            recorded = v[f"grad_total/{name}"]
            compare(f"{case} gradient of {name}", gradient, recorded, 3e-3 * recorded.norm().item())


def compare_norms(what: str, gradients: list[Tensor] | tuple[Tensor, ...], recorded: Tensor) -> None:
    norms = torch.stack([g.double().norm() for g in gradients])
    nothing = recorded == 0
    assert (norms[nothing] == 0).all(), f"{what}: gradients where YOLACT has none"
    ratio = norms[~nothing] / recorded[~nothing]
    compare(f"{what} gradient norms", ratio, torch.ones_like(ratio), 3e-3)

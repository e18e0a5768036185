"""The whole network against the authors' release on photos: its weights, through the converter, give its answers.

Tolerances are those that the release in float32 keeps towards itself in float64, with room to spare (section 6 of the
vectors' README).
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import pytest
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn

import make
from parity import Vectors, compare, exclusive, parity_folder, targets, vectors
from rdsnet.data.loading import pad_images
from rdsnet.model.object_stream.dense import Raw
from rdsnet.model.rdsnet import RDSNet
from rdsnet.structures import Objects, Targets
from rdsnet.weights.convert import RELEASE_KEYS, from_release, source_names
from release_weights import loss_overrides, release_state

MAPS = {"fpn": 5e-4, "cls_score": 1e-3, "bbox_pred": 2e-4, "obj_rep": 2e-4}


@lru_cache(maxsize=1)
def release_model(arch: str, seed: int) -> RDSNet:
    return from_release(release_state(parity_folder() / "release", arch, seed))[0]


def cases(pattern: str) -> list[tuple[str, dict[str, Any], Vectors]]:
    """Name, JSON and arrays of every recorded file, those of one network together."""
    found = [
        (file.stem, json.loads(file.with_suffix(".json").read_text()), v) for file, v in vectors(f"release/{pattern}")
    ]
    return sorted(found, key=lambda case: (case[1]["arch"], case[1]["seed"], case[0]))


def shape(v: Vectors, name: str) -> tuple[int, int]:
    height, width = v[name][:2].tolist()
    return height, width


def photos(v: Vectors) -> tuple[Tensor, list[tuple[int, int]]]:
    """(B, 3, H, W) uint8, padded together, and the size of each before."""
    count = sum(name.endswith("_rgb_u8") for name in v)
    images = [v[f"img{i}_rgb_u8"].permute(2, 0, 1) for i in range(count)]
    return pad_images(images), [(image.shape[1], image.shape[2]) for image in images]


def run(
    model: RDSNet, images: Tensor, *arguments: Any, **options: Any
) -> tuple[list[Tensor], Raw, Tensor, list[Objects]]:
    """`RDSNet.detect`, and on its way the pyramid, the raw output and the pixel representations."""
    seen: dict[nn.Module, Any] = {}

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        seen[module] = output

    hooks = [module.register_forward_hook(keep) for module in (model, model.backbone)]
    objects = model.detect(images, *arguments, **options)
    for hook in hooks:
        hook.remove()
    raw, pixels = seen[model]
    return seen[model.backbone], raw, pixels, objects


def recorded_order(objects: Objects, v: Vectors, prefix: str) -> Objects:
    """Our objects in the order of the recorded ones: the same pairs of anchor and class, or the test fails."""
    ours = {pair: i for i, pair in enumerate(zip(objects.anchors.tolist(), objects.labels.tolist(), strict=True))}
    theirs = list(zip(v[f"{prefix}det_anchor_index"].tolist(), v[f"{prefix}det_labels"].tolist(), strict=True))
    assert ours.keys() == set(theirs), (
        f"{prefix}: found, but not in the release, or the other way: {ours.keys() ^ theirs}"
    )
    return objects.select(torch.tensor([ours[pair] for pair in theirs], dtype=torch.int64))


def compare_maps(case: str, info: dict[str, Any], v: Vectors, maps: dict[str, list[Tensor]]) -> None:
    for name, tolerance in MAPS.items():
        for level, values in zip(("P3", "P4", "P5", "P6", "P7"), maps[name], strict=True):
            c, y, x = info["strides_channel_y_x"][name][level]
            compare(f"{case} {name} {level}", values[:, ::c, ::y, ::x], v[f"{name}_{level}"], tolerance)
            whole = torch.stack([values.mean(), values.std(), values.min(), values.max()])
            compare(f"{case} {name} {level}, all of it", whole, v[f"stats_{name}_{level}"], tolerance)


def compare_boxes(case: str, objects: Objects, v: Vectors, prefix: str) -> None:
    compare(f"{case} scores", objects.scores, v[f"{prefix}det_scores"], 1e-4)
    compare(f"{case} boxes", objects.regressed_boxes, exclusive(v[f"{prefix}det_boxes"]), 0.02)
    clear = v[f"{prefix}refined_margin"] > 1e-3
    refined = exclusive(v[f"{prefix}refined_boxes"][:, :4])
    compare(f"{case} refined boxes", objects.boxes[clear].long(), refined[clear].long())


def compare_masks(case: str, objects: Objects, rles: list[dict[str, Any]]) -> None:
    """IoU of at least 0.999, but for two pixels, which are much of a tiny mask."""
    assert len(objects) == len(rles)
    agreement = torch.ones(len(rles))
    for i, (mask, rle) in enumerate(zip(objects.masks, rles, strict=True)):
        ours = torch.zeros(objects.image_size, dtype=torch.bool)
        x0, y0, x1, y1 = objects.windows[i].tolist()
        ours[y0:y1, x0:x1] = mask
        theirs = torch.from_numpy(coco_mask.decode(rle)).bool()
        assert ours.shape == theirs.shape
        if (ours != theirs).sum() > 2:
            agreement[i] = (ours & theirs).sum() / (ours | theirs).sum()
    compare(f"{case} mask IoU", agreement, torch.ones(len(rles)), 0.001)


def compare_crops(case: str, model: RDSNet, objects: Objects, v: Vectors, prefix: str) -> None:
    """Where masks are cut, the highest probability of their rows and columns, and what MBRM makes of these."""
    sure = (v[f"{prefix}crop_windows_unrounded"] % 1 - 0.5).abs() < 0.48  # no rounding error can move these
    compare(f"{case} windows", objects.windows[sure], v[f"{prefix}crop_windows"][sure])
    assert objects.profiles is not None
    count = len(v[f"{prefix}boundary_dist_l"])
    for k in range(count):
        x0, y0, x1, y1 = v[f"{prefix}crop_windows"][k].tolist()
        crop = v[f"{prefix}prob_crop_{k}"].float()
        compare(f"{case} columns of mask {k}", objects.profiles[0][k, x0:x1], crop.amax(dim=0), 1e-3)
        compare(f"{case} rows of mask {k}", objects.profiles[1][k, y0:y1], crop.amax(dim=1), 1e-3)
    sigma = model.mbrm.sigma(objects.regressed_boxes)
    for axis, names in enumerate(("lr", "tb")):
        edges = objects.regressed_boxes[:count, axis::2]
        posterior = model.mbrm.posterior(objects.profiles[axis][:count], edges, sigma[:count, axis])
        for side, name in enumerate(names):
            compare(f"{case} distribution {name}", posterior[:, side], v[f"{prefix}boundary_dist_{name}"], 1e-3)


def compare_logits(
    case: str, model: RDSNet, raw: Raw, pixels: Tensor, image: int, objects: Objects, v: Vectors
) -> None:
    """Representations of what was found, and their correlation with the pixels' (Eq. 1)."""
    index = torch.full_like(objects.anchors, image)
    representations = model.object_stream.representations(raw, index, objects.anchors)
    compare(f"{case} representations", representations.flatten(1), v[f"img{image}_det_reps"], 2e-4)
    recorded = v[f"img{image}_mask_logits"]
    count, _, rows, columns = recorded.shape
    both = torch.einsum("nkd,dhw->nkhw", representations[:count], pixels[image, :, :rows, :columns])
    compare(f"{case} mask logits", both, recorded, 1e-3)


def test_every_network_of_the_release_is_recognised() -> None:
    files = sorted((parity_folder() / "release").glob("state_dict_keys_*.json"))
    assert files
    for file in files:
        state = {name: torch.zeros(()).expand(size) for name, size in json.loads(file.read_text()).items()}
        trunk = from_release(state)[1].config.model.trunk
        assert trunk.startswith(file.stem.split("_")[-1].replace("r", "resnet"))


@torch.inference_mode()
def test_photos_give_the_releases_maps_boxes_masks_and_refined_boxes() -> None:
    for case, info, v in cases("end_to_end_*.npz"):
        model = release_model(info["arch"], info["seed"])
        images, sizes = photos(v)
        assert images.shape[2:] == shape(v, "stack_shape")
        pyramid, raw, pixels, found = run(model, images, sizes, sizes)
        wholes = [model.object_stream.represent(features) for features in raw.features]
        compare_maps(
            case, info, v, {"fpn": pyramid, "cls_score": raw.logits, "bbox_pred": raw.deltas, "obj_rep": wholes}
        )
        c, y, x = info["strides_channel_y_x"]["pixel_rep"]
        compare(f"{case} pixel representations", pixels[:, ::c, ::y, ::x], v["pixel_rep"], 2e-4)
        originals = [shape(v, f"img{i}_ori_shape") for i in range(len(sizes))]
        scales = [v[f"img{i}_scale_factor"].item() for i in range(len(sizes))]
        rescaled = model.detect(images, sizes, originals, scales)
        for i, image in enumerate(info["images"]):
            objects = recorded_order(found[i], v, f"img{i}_")
            compare_boxes(f"{case} {i}", objects, v, f"img{i}_")
            compare_masks(f"{case} {i}", objects, image["rle"])
            compare_crops(f"{case} {i}", model, objects, v, f"img{i}_")
            compare_logits(f"{case} {i}", model, raw, pixels, i, objects, v)
            objects = recorded_order(rescaled[i], v, f"img{i}_rescaled_")
            compare_boxes(f"{case} {i} rescaled", objects, v, f"img{i}_rescaled_")
            compare_masks(f"{case} {i} rescaled", objects, image["rescaled_rle"])


def truth(v: Vectors, i: int) -> Targets:
    return targets(
        v[f"img{i}_gt_boxes"], v[f"img{i}_gt_labels"] - 1, v[f"img{i}_gt_masks"], shape(v, f"img{i}_img_shape")
    )


def compare_instances(
    case: str, model: RDSNet, map_sizes: list[tuple[int, int]], target: Targets, v: Vectors, i: int
) -> None:
    assigned = model.object_stream.assign(make.raw(map_sizes), target)
    positive = (assigned >= 0).nonzero()[:, 0]
    compare(f"{case} positives", positive, v[f"img{i}_pos_anchor_index"])
    large = target.areas[assigned[positive]] > model.masks.rules.min_mask_area
    compare(f"{case} mask instances", positive[large], v[f"img{i}_mask_instance_anchor_index"])


@pytest.mark.slow
def test_a_training_step_gives_the_releases_losses_and_gradients() -> None:
    folder = parity_folder() / "release"
    for case, info, v in cases("losses_*.npz"):
        state = dict(release_state(folder, info["arch"], info["seed"]))
        state |= {name: torch.full_like(state[name], value) for name, value in loss_overrides(folder).items()}
        model = from_release(state)[0].train()
        images, sizes = photos(v)
        truths = [truth(v, i) for i in range(len(sizes))]
        map_sizes = [(-(-images.shape[2] // s), -(-images.shape[3] // s)) for s in model.object_stream.strides]
        for i, target in enumerate(truths):
            compare_instances(f"{case} {i}", model, map_sizes, target, v, i)
        losses = model.losses(images, truths)
        compare_gradients(case, model, losses, v)


def compare_gradients(case: str, model: RDSNet, losses: dict[str, Tensor], v: Vectors) -> None:
    """Each loss within 1e-4 and the norm of its gradient within 1e-3, for some parameters of every part."""
    ours = {theirs: name for name, theirs in source_names(model, RELEASE_KEYS).items()}
    names = [str(name) for name in v.arrays["grad_param_names"]]
    parameters = [model.get_parameter(ours[name]) for name in names]
    total = [torch.zeros_like(p) for p in parameters]
    for part, recorded in (("cls", "cls"), ("box", "bbox"), ("mask", "mask")):
        value = v[f"loss_{recorded}"].double().sum()
        compare(f"{case} loss {part}", (losses[part].double() / value).detach(), torch.ones(()), 1e-4)
        gradients = torch.autograd.grad(losses[part], parameters, retain_graph=part != "mask", materialize_grads=True)
        compare_norms(f"{case} {part}", gradients, v[f"grad_l2_{recorded}"])
        total = [t + g for t, g in zip(total, gradients, strict=True)]
    compare_norms(f"{case} total", total, v["grad_l2_total"])
    for name, gradient in zip(names, total, strict=True):
        if f"grad_total/{name}" in v:
            recorded = v[f"grad_total/{name}"]
            compare(f"{case} gradient of {name}", gradient, recorded, 1e-3 * recorded.norm().item())


def compare_norms(what: str, gradients: list[Tensor] | tuple[Tensor, ...], recorded: Tensor) -> None:
    norms = torch.stack([g.double().norm() for g in gradients])  # float32 sums millions of squares to 1e-4 only
    nothing = recorded == 0
    assert (norms[nothing] == 0).all(), f"{what}: gradients where the release has none"
    ratio = norms[~nothing] / recorded[~nothing]
    compare(f"{what} gradient norms", ratio, torch.ones_like(ratio), 1e-3)

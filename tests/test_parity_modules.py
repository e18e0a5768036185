"""Every module against the vectors recorded from the authors' release, in the release's conventions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

import make
from parity import Vectors, compare, exclusive, targets, vectors
from rdsnet.model.correlation import correlation_vectors, mask_terms
from rdsnet.model.cropping import clip_boxes, crop_windows
from rdsnet.model.masks import axis_matrix
from rdsnet.model.object_stream.learning import focal_loss
from rdsnet.model.object_stream.retinanet import (
    RetinaNetStream,
    anchor_shapes,
    base_anchors,
    decode,
    encode,
    place_anchors,
)
from rdsnet.model.object_stream.suppression import NO_PAIR, suppress

SHAPES = anchor_shapes(4, 3, (0.5, 1, 2))


def stream(num_classes: int = 80) -> RetinaNetStream:
    return make.retinanet(
        num_classes=num_classes,
        strides=(8, 16, 32, 64, 128),
        channels=32,
        tower_depth=1,
        norm="none",
        representation=None,
        anchor_rounding=True,
        inclusive=True,
    )


def placed(map_size: tuple[int, int], stride: int) -> Tensor:
    return place_anchors(base_anchors(stride, SHAPES, True), map_size, (stride, stride))


def test_anchors_are_the_releases() -> None:
    for _, v in vectors("release/modules_geometry*.npz"):
        for i, stride in enumerate(v["anchor_strides"].tolist()):
            compare(
                f"base anchors {stride}",
                base_anchors(stride, SHAPES, True),
                exclusive(v["base_anchors"][i]),
                0,
            )
            grid = v[f"grid_anchors_3x4_P{i + 3}"]
            compare(f"grid anchors {stride}", placed((3, 4), stride), exclusive(grid), 0)


def test_box_coding_is_the_releases() -> None:
    for _, v in vectors("release/modules_geometry*.npz"):
        anchors = exclusive(v["delta_anchors"])
        compare("encoded", encode(anchors, exclusive(v["delta_gt"])), v["delta_encoded"])
        decoded = decode(anchors, v["delta_in"])
        compare("decoded", decoded, exclusive(v["delta_decoded"]), 1e-4)
        compare(
            "clipped", clip_boxes(decoded, (160, 200), inclusive=True), exclusive(v["delta_decoded_clip_160x200"]), 1e-4
        )
        compare("iou", box_iou(anchors[:12], exclusive(v["delta_gt"])[:9]), v["iou_matrix"])


def test_valid_anchors_are_the_releases() -> None:
    for _, v in vectors("release/modules_geometry*.npz"):
        sizes = [tuple(size) for size in v["valid_flags_map_sizes"].tolist()]
        for i, shape in enumerate(v["valid_flags_pad_shapes"].tolist()):
            compare(f"flags {i}", stream().valid(sizes, tuple(shape[:2])), v[f"valid_flags_img{i}"])


def test_assignment_is_the_releases() -> None:
    for _, v in vectors("release/modules_geometry*.npz"):
        sizes = [tuple(size) for size in v["assign_map_sizes"].tolist()]
        masks = v["assign_gt_masks"]
        truth = targets(
            v["assign_gt_boxes"], v["assign_gt_labels"] - 1, masks, tuple(v["assign_img_shape"][:2].tolist())
        )
        s = stream()
        anchors = torch.cat([placed(size, stride) for size, stride in zip(sizes, s.strides, strict=True)])
        assigned = s.assign(make.raw(sizes), truth)
        recorded = v["assign_gt_index_per_anchor"].long()
        learns = (recorded != -2) & (recorded != -1)
        compare("object of each anchor", assigned[learns] + 1, recorded[learns])
        compare("ignored or not valid", assigned == -2, ~learns)
        positive = (assigned >= 0).nonzero()[:, 0]
        compare("positives", positive, v["assign_pos_indices"])
        compare("their objects", assigned[positive], v["assign_pos_gt"])
        compare(
            "their targets",
            encode(anchors[positive], truth.boxes[assigned[positive]]),
            v["assign_pos_bbox_targets"],
        )
        eligible = truth.areas[assigned[positive]] > 100
        compare("large enough for a mask", positive[eligible], v["assign_mask_eligible_indices"])


def test_crops_are_the_releases() -> None:
    for _, v in vectors("release/modules_geometry*.npz"):
        h, w = v["crop_map_hw"].tolist()
        for padding in (0.25, 0.1, 0):
            windows = crop_windows(exclusive(v["crop_boxes"]), (h, w), expand=1 + 2 * padding, rule="truncate")
            pasted = torch.zeros(len(windows), h, w, dtype=torch.bool)
            for mask, (x0, y0, x1, y1) in zip(pasted, windows.tolist(), strict=True):
                mask[y0:y1, x0:x1] = True
            compare(f"crop {padding}", pasted, v[f"crop_mask_pad_{padding}"])


def test_mask_loss_and_its_gradient_are_the_releases() -> None:
    for _, v in vectors("release/modules_losses*.npz"):
        for name, ratio in (("ohem", 1.0), ("ohem3", 3.0), ("plain", None)):
            both = v["maskloss_logits"].requires_grad_()
            terms = []
            for logits, truth in zip(both, v["maskloss_gt"], strict=True):
                inside = truth >= 0  # a recorded crop is a rectangle of the map
                rows, columns = inside.any(dim=1).nonzero()[:, 0], inside.any(dim=0).nonzero()[:, 0]
                window = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
                difference = (logits[1] - logits[0])[window]
                terms.append(mask_terms(difference[None], truth[window] == 1, ratio))
            compare(f"{name} terms", torch.cat(terms).detach().double(), v[f"maskloss_{name}_per_instance"])
            torch.cat(terms).sum().backward()
            assert both.grad is not None
            compare(f"{name} gradient", both.grad, v[f"maskloss_{name}_grad"])


def test_mask_head_loss_on_two_images_is_the_releases() -> None:
    for _, v in vectors("release/modules_losses*.npz"):
        total, count, leaves = torch.zeros(()), 0, []
        for i in range(2):
            both = v[f"headloss_img{i}_logits_nhwc2"].requires_grad_()
            n, h, w, _ = both.shape
            boxes = v[f"headloss_img{i}_boxes"]
            truth = targets(boxes, torch.zeros(n, dtype=torch.int64), v[f"headloss_img{i}_gt_full"], (4 * h, 4 * w))
            compare("target", truth.masks, v[f"headloss_img{i}_gt_quarter"])
            # Instance n's logits come out of the correlation when its representation picks pixel channels n and N + n
            pixels = both.permute(3, 0, 1, 2).flatten(0, 1)
            pick = torch.eye(2 * n)
            differences = correlation_vectors(torch.stack([pick[:n], pick[n:]], dim=1))
            total = total + make.mask_loss(
                make.masks(train_expand=1.5, ohem_ratio=1.0, crop_rule="truncate"),
                differences,
                pixels,
                torch.arange(n),
                truth,
                step=(4, 4),
            )
            count, leaves = count + n, [*leaves, both]
        value = total / (count + 1)
        compare("value", value.detach()[None], v["headloss_value"])
        value.backward()
        for i, leaf in enumerate(leaves):
            assert leaf.grad is not None
            compare(f"gradient {i}", leaf.grad, v[f"headloss_img{i}_grad"])


def test_focal_and_box_loss_are_the_releases() -> None:
    for _, v in vectors("release/modules_losses*.npz"):
        logits = v["focal_logits"].requires_grad_()
        labels = v["focal_labels_0_is_background"]
        learns = v["focal_weights"] > 0
        positive = ((labels > 0) & learns).nonzero()[:, 0]
        entries = (torch.zeros_like(positive), positive, labels[positive] - 1)
        value = focal_loss(logits[None], learns[None], entries, 0.25, 2.0) / 9
        compare("focal", value.detach()[None], v["focal_loss_avg9"])
        value.backward()
        assert logits.grad is not None
        compare("focal gradient", logits.grad, v["focal_grad_avg9"])
        prediction = v["smoothl1_pred"].requires_grad_()
        weight = v["smoothl1_weight"]
        box = (F.smooth_l1_loss(prediction, v["smoothl1_target"], beta=0.11, reduction="none") * weight).sum() / 7
        compare("smooth L1", box.detach()[None], v["smoothl1_loss_avg7"])


def test_resampling_is_the_releases() -> None:
    for _, v in vectors("release/modules_resample*.npz"):
        up = F.interpolate(v["up2_in"], scale_factor=2, mode="bilinear", align_corners=True)
        compare("x2, corners aligned", up, v["up2_corners_aligned"])
        h, w = v["up2_in"].shape[2:]
        rows, columns = axis_matrix(4 * h, 4 * h, h, 4, False), axis_matrix(4 * w, 4 * w, w, 4, False)
        compare("x4, half pixel", rows @ v["up2_in"] @ columns.T, v["up4_half_pixel"])


def test_masks_come_to_the_image_as_the_releases() -> None:
    for _, v in vectors("release/modules_resample*.npz"):
        size, _, original = (tuple(shape[:2]) for shape in v["getmasks_shapes_img_pad_ori"].tolist())
        for name, output_size in (("getmasks_", size), ("getmasks_rescaled_", original)):
            compare_pasted(v, name, size, output_size)


def compare_pasted(v: Vectors, name: str, size: tuple[int, int], output_size: tuple[int, int]) -> None:
    """Our crops, with their logits recovered through the profiles' plain form, against full recorded maps."""
    both, recorded = v["getmasks_logits_nhw2"], v[f"{name}prob"]
    n = len(both)
    pixels = both.permute(3, 0, 1, 2).flatten(0, 1)
    pick = torch.eye(2 * n)
    pasted = make.paste(
        make.masks(expand=1.2, threshold=0.4, crop_rule="truncate", two_steps=True),
        correlation_vectors(torch.stack([pick[:n], pick[n:]], dim=1)),
        pixels,
        exclusive(v[f"{name}boxes_scores"][:, :4]),
        size=size,
        output_size=output_size,
        step=(4, 4),
    )
    full = torch.zeros(n, *output_size, dtype=torch.bool)
    for mask, crop, (x0, y0, x1, y1) in zip(full, pasted.masks, pasted.windows.tolist(), strict=True):
        mask[y0:y1, x0:x1] = crop
    compare(
        f"{name}mask",
        full | ((recorded - 0.4).abs() < 1e-5),
        (recorded > 0.4) | ((recorded - 0.4).abs() < 1e-5),
    )
    compare(f"{name}columns", pasted.columns, recorded.amax(dim=1))
    compare(f"{name}rows", pasted.rows, recorded.amax(dim=2))


def test_refinement_is_the_releases() -> None:
    for _, v in vectors("release/modules_mbrm*.npz"):
        mbrm = make.mbrm(gamma=v["mbrm_gamma"].item(), prior_cut=0.0044, inclusive=True, keep_without_evidence=False)
        mbrm.load_state_dict({"weight": v["mbrm_weight"].flatten(), "bias": v["mbrm_bias"][0]})
        boxes = exclusive(v["mbrm_boxes"])
        columns, rows = v["mbrm_masks"].amax(dim=1), v["mbrm_masks"].amax(dim=2)
        sigma = mbrm.sigma(boxes)
        for axis, profiles, names in ((0, columns, "lr"), (1, rows, "tb")):
            posterior = mbrm.posterior(profiles, boxes[:, axis::2], sigma[:, axis])
            for side, name in enumerate(names):
                compare(f"distribution {name}", posterior[:, side], v[f"mbrm_dist_{name}"])
        refined = mbrm(columns, rows, boxes).boxes
        clear = v["mbrm_margin"] > 1e-6
        compare("boxes", refined[clear], exclusive(v["mbrm_refined"][:, :4])[clear], 1e-4)


def test_nms_is_the_releases() -> None:
    for _, v in vectors("release/modules_geometry*.npz"):
        for name, limit in (("cut20", 20), ("all", 10000)):
            candidates, scores = exclusive(v["nms_boxes"]), v["nms_scores_with_background"][:, 1:]
            scores = scores.masked_fill(scores <= 0.05, NO_PAIR)
            found = suppress(candidates, scores, torch.arange(len(scores)), "greedy", 0.5, limit)
            ours = torch.cat([found.boxes, found.scores[:, None]], dim=1)
            recorded, labels = exclusive_scored(v[f"nms_{name}_boxes_scores"]), v[f"nms_{name}_labels"]
            order = (-recorded[:, 4]).argsort(stable=True)  # the release lists class by class, ours by score
            compare(f"{name} boxes", ours[:, :4], recorded[order, :4], 1e-4)
            compare(f"{name} scores", ours[:, 4], recorded[order, 4], 1e-6)
            compare(f"{name} labels", found.labels, labels[order])


def exclusive_scored(boxes: Tensor) -> Tensor:
    return boxes + boxes.new_tensor([0, 0, 1, 1, 0])

import numpy as np
import pytest
import supervision as sv
import torch

import make
from rdsnet.results.exchange import to_detections
from rdsnet.structures import Objects

SIZE = (20, 30)


def make_objects(windows: list[list[int]], masks: list[torch.Tensor], boxes: list[list[float]]) -> Objects:
    n = len(boxes)
    return make.objects(
        boxes,
        size=SIZE,
        regressed_boxes=torch.tensor(boxes).reshape(n, 4) + 1,
        scores=torch.linspace(0.9, 0.5, n),
        labels=torch.arange(n) % 2,
        edge_std=torch.full((n, 4), 0.5),
        interval=torch.full((n, 4, 2), 3.0),
        masks=masks,
        windows=torch.tensor(windows, dtype=torch.int64).reshape(n, 4),
    )


def test_masks_lie_where_their_windows_are():
    generator = torch.Generator().manual_seed(0)
    windows = [[0, 0, 30, 20], [5, 4, 12, 9], [29, 19, 30, 20], [0, 7, 3, 20]]
    masks = [torch.rand(y1 - y0, x1 - x0, generator=generator) < 0.5 for x0, y0, x1, y1 in windows]
    detections = to_detections(make_objects(windows, masks, [[5.0, 5.0, 9.0, 9.0]] * 4), ["cat", "dog"])
    pasted = np.zeros((4, *SIZE), bool)
    for i, (x0, y0, x1, y1) in enumerate(windows):
        pasted[i, y0:y1, x0:x1] = masks[i]
    assert isinstance(detections.mask, sv.CompactMask)
    np.testing.assert_array_equal(detections.mask.to_dense(), pasted)


def test_a_mask_that_reaches_beyond_its_refined_box_is_not_cut():
    window, box = [4, 4, 14, 14], [6.0, 6.0, 12.0, 12.0]
    detections = to_detections(make_objects([window], [torch.ones(10, 10, dtype=torch.bool)], [box]), ["cat"])
    assert detections.xyxy.tolist() == [box]
    assert detections.mask.area.tolist() == [100]
    assert detections[detections.confidence > 0.5].mask.area.tolist() == [100]


def test_boxes_scores_and_names_come_along():
    detections = to_detections(
        make_objects([[0, 0, 2, 2]] * 2, [torch.ones(2, 2, dtype=torch.bool)] * 2, [[1.0, 2.0, 3.5, 4.0]] * 2),
        ["cat", "dog"],
    )
    assert detections.xyxy.dtype == np.float32
    assert detections.data["class_name"].tolist() == ["cat", "dog"]
    assert detections.class_id.tolist() == [0, 1]
    np.testing.assert_allclose(detections.confidence, [0.9, 0.5])
    assert detections.data["regressed_xyxy"].tolist() == [[2.0, 3.0, 4.5, 5.0]] * 2
    assert detections.data["edge_std"].tolist() == [[0.5] * 4] * 2
    assert detections.data["interval"].tolist() == [[[3.0, 3.0]] * 4] * 2


def test_no_objects():
    detections = to_detections(make_objects([], [], []), ["cat"])
    assert len(detections) == 0
    assert detections.xyxy.shape == (0, 4)
    assert detections.mask.to_dense().shape == (0, *SIZE)
    names = detections.data["class_name"]
    assert names.shape == (0,)
    assert names.dtype.kind == "U"
    assert detections.data["regressed_xyxy"].shape == (0, 4)


def test_a_model_without_masks_gives_none():
    assert to_detections(make_objects([[0, 0, 0, 0]], [], [[1.0, 2.0, 3.0, 4.0]]), ["cat"]).mask is None


def test_a_window_without_pixels_gives_an_empty_mask():
    empty = torch.zeros(0, 5, dtype=torch.bool)
    detections = to_detections(make_objects([[25, 20, 30, 20]], [empty], [[1.0, 2.0, 3.0, 4.0]]), ["cat"])
    assert detections.mask.to_dense().shape == (1, *SIZE)
    assert not detections.mask.to_dense().any()
    assert detections.mask.crop(0).size == 1  # supervision's tools need a pixel


def test_a_label_without_a_name_is_an_error():
    objects = make_objects([[0, 0, 0, 0]] * 2, [], [[1.0, 2.0, 3.0, 4.0]] * 2)
    with pytest.raises(ValueError, match="labels below 1"):
        to_detections(objects, ["cat"])

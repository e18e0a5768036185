"""Vectors recorded from the authors' release and from YOLACT, found through RDSNET_PARITY_DIR."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rdsnet.structures import Targets

COMPARED: dict[str, int] = {}  # test name -> vectors compared; printed at the end of the run


def parity_folder() -> Path:
    """The folder of vectors; the test skips where there is none."""
    folder = Path(os.environ.get("RDSNET_PARITY_DIR", Path(__file__).parents[2] / "shared" / "parity"))
    if not folder.is_dir():
        pytest.skip(f"no recorded vectors at {folder} (set RDSNET_PARITY_DIR)")
    return folder


def vectors(pattern: str) -> list[tuple[Path, Vectors]]:
    """All recorded files of a form, such as "release/modules_mbrm*.npz"; none at all is a failure."""
    folder = parity_folder()
    files = sorted(folder.glob(pattern))
    if not files:
        pytest.fail(f"{folder} holds no {pattern}")
    return [(file, Vectors(np.load(file))) for file in files]


class Vectors(Mapping[str, Tensor]):
    """An .npz file as tensors."""

    def __init__(self, arrays: np.lib.npyio.NpzFile) -> None:
        self.arrays = arrays

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(np.array(self.arrays[name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays.files)

    def __len__(self) -> int:
        return len(self.arrays.files)


def compare(name: str, ours: Tensor, recorded: Tensor, tolerance: float | None = None) -> None:
    """Integers must be equal; floats within `tolerance`, or 1e-5 of the recorded array's largest value."""
    test = os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].split(" ")[0]
    COMPARED[test] = COMPARED.get(test, 0) + 1
    assert ours.shape == recorded.shape, f"{name}: shape {tuple(ours.shape)}, recorded {tuple(recorded.shape)}"
    if not recorded.is_floating_point():
        different = (ours.long() != recorded.long()).sum().item()
        assert different == 0, f"{name}: {different} of {recorded.numel()} values differ"
        return
    if tolerance is None:
        tolerance = 1e-5 * recorded.abs().max().item()
    worst = (ours.double() - recorded.double()).abs().max().item() if recorded.numel() else 0.0
    logging.info("%s: largest difference %.3g, allowed %.3g", name, worst, tolerance)  # pytest --log-cli-level=INFO
    assert worst <= tolerance, f"{name}: largest difference {worst:.3g}, allowed {tolerance:.3g}"


def exclusive(boxes: Tensor) -> Tensor:
    """The release's inclusive boxes in our coordinates: x2 and y2 one more."""
    return boxes + boxes.new_tensor([0, 0, 1, 1])


def targets(boxes: Tensor, labels: Tensor, masks: Tensor, size: tuple[int, int]) -> Targets:
    """Targets from masks at network resolution: quarter size, more than half of the middle 2x2 of each 4x4."""
    grid = F.interpolate(masks[None].float(), scale_factor=0.25, mode="bilinear")[0] > 0.5
    return Targets(
        boxes=exclusive(boxes),
        labels=labels,
        masks=grid,
        has_mask=torch.ones(len(labels), dtype=torch.bool),
        areas=masks.flatten(1).sum(dim=1).float(),
        image_size=size,
    )

"""Slow: RDSNet learns something real."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rdsnet.cli.main import main


@pytest.mark.slow
def test_tiny_learns_shapes_and_refinement_does_not_lose_to_the_mask_rectangle(tmp_path: Path) -> None:
    shapes = tmp_path / "shapes"
    assert main(["shapes", str(shapes), "--images", "200", "--val_images", "40", "--size", "128"]) == 0
    arguments = ["train", "--preset", "rdsnet_tiny", "--output", str(tmp_path / "run"), "--device", "cpu"]
    arguments += ["--data.train", str(shapes / "train.json"), "--data.val", str(shapes / "val.json")]
    assert main([*arguments, "--data.short_side", "128", "--train.epochs", "12"]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["box"]["refined"]["AP50"] > 0.3
    assert metrics["mask"]["AP50"] > 0.2
    assert metrics["refiner"]["after"] < metrics["refiner"]["before"]

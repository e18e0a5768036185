"""What comes with the package: the nuclei model and the sample images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import rdsnet
from rdsnet.data.coco import CocoFolder
from rdsnet.weights import checkpoint
from rdsnet.weights.bundled import SAMPLES, WEIGHTS, find_weights, sample_images


def test_nuclei_model_finds_the_nuclei_of_the_samples() -> None:
    """The samples are training images: this says that weights, settings and package fit together, no more."""
    predictor = rdsnet.load("nuclei", device="cpu")
    assert predictor.class_names == ["nucleus"]
    folder = CocoFolder(SAMPLES)
    assert len(folder) == len(sample_images()) == 6
    predictor.config.data.workers = 0
    metrics = predictor.evaluate(folder).summarize()
    assert metrics["box"]["refined"]["AP"] > 0.5
    assert metrics["mask"]["AP50"] > 0.8


def test_bundled_weights_are_small_and_know_no_machine() -> None:
    for path in WEIGHTS.values():
        assert path.stat().st_size <= 8_000_000
        weights, stored = checkpoint.read(path)
        assert stored.config.data.train is stored.config.data.val is None
        assert {t.dtype for t in weights.values() if t.ndim > 1} == {torch.float16}


def test_a_name_means_the_bundled_weights_and_a_path_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nuclei").mkdir()  # data sets may have that name
    assert find_weights("nuclei") == WEIGHTS["nuclei"]
    for path in (Path("nuclei"), "./nuclei"):
        with pytest.raises(FileNotFoundError, match="run folder nuclei"):
            find_weights(path)
    with pytest.raises(FileNotFoundError, match="expected nuclei, a run folder or"):
        find_weights("nuclear")

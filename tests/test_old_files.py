"""What older versions wrote lives on: old_run/ is a run of commit 626507d, killed five steps before its end."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import rdsnet
from rdsnet.cli import main

OLD = Path(__file__).parent / "old_run"
FACTS = json.loads((OLD / "facts.json").read_text()) if (OLD / "facts.json").exists() else {}


def arithmetic() -> str:
    """A hash of what a few seeded training steps give: the same where processor and torch round as those of FACTS."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 32, 32, generator=generator).to(memory_format=torch.channels_last)
    weights = [torch.randn(8, n, 3, 3, generator=generator).mul(0.1).requires_grad_() for n in (3, 8)]
    optimizer = torch.optim.AdamW(weights)
    for _ in range(3):
        x = F.conv2d(images, weights[0], padding=1)
        x = F.conv2d(F.batch_norm(x, None, None, training=True).relu(), weights[1], stride=2)
        optimizer.zero_grad()
        (x.sigmoid().log().mean() + x.exp().softmax(1).square().mean()).backward()
        optimizer.step()
    return digest({str(i): weight.detach() for i, weight in enumerate(weights)})


def digest(weights: dict[str, Tensor]) -> str:
    """A hash of names and bits."""
    total = hashlib.sha256()
    for name in sorted(weights):
        total.update(name.encode())
        total.update(weights[name].contiguous().numpy().tobytes())
    return total.hexdigest()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """As the run was made: sums of several threads round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def same_machine(one_thread: None) -> bool:
    return arithmetic() == FACTS["arithmetic"]


def test_weights_of_an_old_run_find_what_they_found(same_machine: bool) -> None:
    image = np.array(Image.open(OLD / "data" / "images" / "val_00000.png").convert("RGB"))
    found = rdsnet.load(OLD / "run", device="cpu").predict(image, threshold=0.0)
    expected = np.load(OLD / "detections.npz")
    assert len(found) == len(expected["xyxy"]) == 20
    if not same_machine:  # objects of nearly equal scores may have changed places
        np.testing.assert_allclose(found.confidence, expected["confidence"], atol=1e-3)
        return
    np.testing.assert_array_equal(found.confidence, expected["confidence"])
    np.testing.assert_array_equal(found.class_id, expected["class_id"])
    np.testing.assert_array_equal(found.data["regressed_xyxy"], expected["regressed_xyxy"])
    np.testing.assert_array_equal(np.packbits(found.mask.to_dense()), expected["mask"])
    np.testing.assert_array_equal(found.xyxy, expected["xyxy"])
    np.testing.assert_allclose(found.data["edge_std"], expected["edge_std"], atol=1e-4)


def test_old_run_resumes_to_the_weights_that_it_would_have_had(same_machine: bool, tmp_path: Path) -> None:
    """Steps, moving average, optimizer and everything random go on where they were; the fit of MBRM is left out."""
    run = shutil.copytree(OLD / "run", tmp_path / "run")
    data = ["--data.train", str(OLD / "data" / "train.json"), "--data.val", str(OLD / "data" / "val.json")]
    assert main(["train", "--resume", str(run), *data, "--device", "cpu"]) == 0

    state = torch.load(run / "last.ckpt", weights_only=True)
    assert state["global_step"] == FACTS["steps"] == 100
    assert (run / "metrics.csv").read_text().splitlines()[-1].startswith("100,")
    weights = network(state["state_dict"], "model.")
    average = network(state["state_dict"], "_average.module.")
    expected = load_file(OLD / "final.safetensors")
    assert weights.keys() == average.keys() == expected.keys()
    if same_machine:
        assert [name for name in expected if not torch.equal(weights[name], expected[name])] == []
        assert digest(average) == FACTS["average"]
    else:
        for name in expected:
            torch.testing.assert_close(weights[name], expected[name], atol=1e-3, rtol=1e-3)


def network(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin with a prefix, without MBRM's ten numbers."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix) and "mbrm" not in k}


def test_bundled_weights_of_the_old_format_load() -> None:
    predictor = rdsnet.load("nuclei", device="cpu")
    assert predictor.class_names == ["nucleus"]
    assert len(predictor.predict(np.zeros((64, 64, 3), np.uint8))) == 0

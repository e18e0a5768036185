"""The choice of a device and of a precision."""

from __future__ import annotations

import logging

import pytest
import torch

from rdsnet import device as device_module
from rdsnet.device import choose_device, choose_precision, has_bfloat16
from rdsnet.predict.predictor import untrained

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(params=[False, True])
def able(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether there are instructions for bfloat16."""
    monkeypatch.setattr(device_module, "has_bfloat16", lambda device: request.param)
    return bool(request.param)


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == CPU
    with pytest.raises(ValueError, match="device cuda was asked for, but torch finds no GPU"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == choose_device("cuda") == GPU


def test_auto_is_bfloat16_where_there_are_instructions_for_it(able: bool) -> None:
    for device in (CPU, GPU):
        assert choose_precision("auto", device) == ("bf16" if able else "32")
        assert choose_precision("32", device) == "32"
        assert choose_precision("bf16-forced", device) == "bf16"


def test_bf16_that_would_be_slower_is_refused_in_one_line(able: bool) -> None:
    if able:
        assert choose_precision("bf16", CPU) == "bf16"
        return
    with pytest.raises(ValueError, match=r"^this processor has no instructions for bfloat16: .* bf16-forced .*$"):
        choose_precision("bf16", CPU)
    with pytest.raises(ValueError, match="this GPU has no instructions"):
        choose_precision("bf16", GPU)


def test_bf16_of_a_stored_run_falls_to_float32_with_one_warning(able: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose_precision("bf16", CPU, stored=True) == ("bf16" if able else "32")
    assert len(caplog.records) == (0 if able else 1)


def test_float16_needs_a_gpu() -> None:
    assert choose_precision("16", GPU) == "16"
    with pytest.raises(ValueError, match="precision 16 needs a GPU"):
        choose_precision("16", CPU)


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", (), False),
        ("x86_64", ("_is_avx512_bf16_supported",), True),
        ("x86_64", ("_is_amx_tile_supported",), True),
        ("x86_64", ("_is_avx512_supported",), False),  # which oneDNN would emulate it with
        ("aarch64", ("_is_avx512_bf16_supported",), False),
    ],
)
def test_a_processor_is_asked_for_its_instructions(
    machine: str, flags: tuple[str, ...], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_module.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    for flag in ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_avx512_supported"):
        monkeypatch.setattr(torch.cpu, flag, lambda flag=flag: flag in flags)
    assert has_bfloat16(CPU) is expected


def test_a_predictor_computes_in_what_was_chosen(able: bool) -> None:
    predictor = untrained("rdsnet_tiny", num_classes=1, device="cpu", precision="auto")
    assert next(predictor.model.backbone.parameters()).dtype == (torch.bfloat16 if able else torch.float32)

"""Data sets that the tests share: small enough that a person can work out every number."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import make
from parity import COMPARED
from rdsnet.data.shapes import make_shapes


@pytest.fixture(autouse=True)
def messages_end_with_the_test() -> Iterator[None]:
    """What shows the package's messages is bound to the streams of the test whose command was first."""
    yield
    messages = logging.getLogger("rdsnet")
    for handler in list(messages.handlers):
        messages.removeHandler(handler)
    messages.setLevel(logging.NOTSET)


@pytest.fixture
def coco_content() -> dict[str, Any]:
    """The content of `coco_folder`'s JSON, to be broken."""
    return make.coco()


@pytest.fixture
def coco_folder(tmp_path: Path) -> Path:
    """A folder with train.json and val.json (the same three images, see `make.coco`) and images/."""
    folder = tmp_path / "coco"
    make.write_coco(folder, make.coco(), "train.json")
    make.write_coco(folder, make.coco(), "val.json")
    return folder


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 8 + 4 synthetic images of 64 pixels; do not write into it."""
    folder = tmp_path_factory.mktemp("shapes")
    return make_shapes(folder, images=8, val_images=4, size=64, objects=(2, 4), object_size=(0.2, 0.5))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if COMPARED:
        total = sum(COMPARED.values())
        terminalreporter.write_line(f"{total} recorded vectors compared in {len(COMPARED)} tests")

"""Every file is whole or not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rdsnet.files import replace_file, write_image, write_text

PICTURE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def test_pictures_are_what_was_given(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", PICTURE)
    assert (np.asarray(Image.open(tmp_path / "a.png")) == PICTURE).all()
    grey = np.full((20, 30, 3), 90, np.uint8)
    write_image(tmp_path / "a.jpg", grey)
    assert Image.open(tmp_path / "a.jpg").format == "JPEG"
    assert (np.asarray(Image.open(tmp_path / "a.jpg")) == grey).all()
    assert {file.name for file in tmp_path.iterdir()} == {"a.png", "a.jpg"}


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
@pytest.mark.parametrize("before", [None, b"an earlier picture"])
def test_a_picture_that_fails_half_way_leaves_nothing_and_an_old_file_whole(
    name: str, before: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(self: Image.Image, path: Path, **options: object) -> None:
        path.write_bytes(b"half of")
        raise OSError("no space left")

    if before is not None:
        (tmp_path / name).write_bytes(before)
    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_image(tmp_path / name, PICTURE)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == ({} if before is None else {name: before})


def test_until_it_is_whole_a_reader_meets_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def write(partial: Path) -> None:
        partial.write_text("new")
        assert path.read_text() == "old" and partial.suffix == ".txt"

    replace_file(path, write)
    assert path.read_text() == "new"

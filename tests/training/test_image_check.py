from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dnw_graph import InputError
from dnw_graph.data.image_files import check_images, inspect


@pytest.fixture(params=["jpg", "png", "bmp", "webp"])
def image_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"image.{request.param}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def test_whole_image_passes(image_file: Path):
    assert inspect(str(image_file))[1] is None


def test_bytes_after_the_end_are_accepted(image_file: Path):
    image_file.write_bytes(image_file.read_bytes() + b"something appended")
    assert inspect(str(image_file))[1] is None


@pytest.mark.parametrize("share", [0.99, 0.5, 0.02])
def test_truncated_image_is_found(image_file: Path, share: float):
    content = image_file.read_bytes()
    image_file.write_bytes(content[: int(len(content) * share)])
    assert inspect(str(image_file))[1]


@pytest.mark.parametrize("content", [b"", b"not an image at all"])
def test_other_files_are_found(tmp_path: Path, content: bytes):
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    assert inspect(str(path))[1] == "not an image"


def test_message_names_the_first_files_and_their_number(image_directory: Path):
    paths = sorted(str(path) for path in image_directory.rglob("*.png"))
    check_images(paths)
    for path in paths[2:7]:
        Path(path).write_bytes(b"broken")
    with pytest.raises(InputError, match=f"5 of 24 image files cannot be read: {paths[2]} \\(not an image\\)") as error:
        check_images(paths)
    assert "\n" not in str(error.value)
    assert paths[5] not in str(error.value)


def test_what_never_ends_is_not_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "away.png").symlink_to("nothing")
    for name in ("pipe.png", "away.png"):
        assert inspect(str(tmp_path / name))[1] == "not a regular file"

"""The preprocessing of images, which is stored in a model's files."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dnw_graph.arguments import check_fields, require, wrong
from dnw_graph.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

ORIENTATION = 0x0112  # EXIF's tag
# How to turn an image back, by its orientation.
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
UNSUPPORTED = ("F", "LAB")
"""Modes of Pillow that it cannot convert to 8-bit RGB, or clips."""


@dataclass(frozen=True)
class Preprocessing:
    """Converts an image to the input of a model: scales the shorter side, crops the centre, normalises.

    x = (pixel / 255 − mean) / std, per channel. Sides are scaled with bilinear interpolation and antialiasing.

    Args:
        image_size: Height and width of the crop.
        resize: Length of the shorter side before cropping.
        mean: Means of red, green and blue, on a scale from 0 to 1.
        std: Standard deviations of the three.

    Raises:
        InputError: If a number is out of range, or the crop is larger than the image.
    """

    image_size: int
    resize: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        check_fields(self)
        require(1 <= self.image_size <= self.resize, "image_size", f"from 1 to resize ({self.resize})", self.image_size)
        require(min(self.std) > 0, "std", "three numbers above 0", self.std)

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """Return the input of the model, ``[3, image_size, image_size]``.

        Args:
            image: A PIL image of any mode, see :func:`rgb`, or a tensor ``[…, 3, height, width]``: 8-bit integers, or
                floating-point numbers from 0 to 1.

        Raises:
            InputError: If it is neither.
        """
        return _transform(self, True)(_taken(image))

    def pixels(self, image: Image.Image | Tensor) -> Tensor:
        """Return the same crop as 8-bit integers, not normalised: for exported files that normalise themselves."""
        return _transform(self, False)(_taken(image))

    def to_tensor(self) -> list[Any]:
        """Return the last steps as torchvision transforms, from an image of the right size to a tensor."""
        from torchvision.transforms import v2

        return [
            v2.ToImage(),
            v2.ToPureTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(self.mean, self.std),
        ]


@cache
def _transform(preprocessing: Preprocessing, normalised: bool) -> Callable[[Any], Tensor]:
    from torchvision.transforms import v2

    cut = [v2.Resize(preprocessing.resize), v2.CenterCrop(preprocessing.image_size)]
    bytes_ = [v2.ToImage(), v2.ToPureTensor(), v2.ToDtype(torch.uint8, scale=True)]
    composed: Callable[[Any], Tensor] = v2.Compose([*cut, *(preprocessing.to_tensor() if normalised else bytes_)])
    return composed


def _taken(image: Image.Image | Tensor) -> Image.Image | Tensor:
    """Return an image that the transforms accept."""
    from PIL import Image

    if isinstance(image, Image.Image):
        return rgb(image)
    if not (
        isinstance(image, Tensor)
        and image.dim() >= 3
        and image.size(-3) == 3
        and (image.dtype == torch.uint8 or image.is_floating_point())
    ):
        raise wrong("an image", "a PIL image, or a tensor [..., 3, height, width] of uint8 or of 0 to 1", image)
    return image


def rgb(image: Image.Image) -> Image.Image:
    """Return an image as 8-bit RGB, rotated according to its EXIF orientation.

    16-bit grey images are scaled by 1 / 257; Pillow would clip values above 255.
    """
    from PIL import Image

    image.load()  # Pillow turns TIFF files itself.
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except (SyntaxError, struct.error):  # Unreadable EXIF says nothing.
        orientation = 1
    # Not Pillow's exif_transpose, which also writes all other tags again, and fails where one of them is wrong.
    if turn := TURNS.get(orientation):
        image = image.transpose(Image.Transpose[turn])
    if image.mode in UNSUPPORTED:
        raise InputError(f"an image of mode {image.mode} has no known range: convert it to RGB or grey")
    if image.mode.startswith("I"):
        scaled = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8))
    return image.convert("RGB")

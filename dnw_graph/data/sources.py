"""The images that ``--data`` names: digits, CIFAR-10, or a directory in ImageNet's layout."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dnw_graph.arguments import checked
from dnw_graph.data.images import ArrayImages, FileImages, Images, class_names
from dnw_graph.errors import InputError

NUM_TEST_DIGITS = 360
# By default a tenth of the training images is held out, and no more than these.
MOST_HELD_OUT = 5000


@dataclass(frozen=True)
class ImageData:
    """Training and test images with the names of their classes.

    Attributes:
        name: ``digits``, ``cifar10`` or ``directory``; other names need the option ``image_size``.
        train: Images to learn from.
        test: Images to evaluate on.
        classes: Class names, in the order of their labels.
        held_out: Training images that are not learned from, see ``hold_out``; they choose the best epoch.
    """

    name: str
    train: Images
    test: Images
    classes: list[str]
    held_out: Images | None = None

    @property
    def validation(self) -> Images:
        """What an epoch is evaluated on: the images held out, or the test images."""
        return self.test if self.held_out is None else self.held_out


def digits() -> ImageData:
    """Return scikit-learn's digits: 1,797 grey 8×8 images, converted to RGB; the last 360 are the test images.

    The last images were written by other people than the first, so the test is harder than with a random split.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    grey = np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    images = ArrayImages(np.repeat(grey[..., None], 3, axis=-1), labels)
    train, test = np.split(np.arange(len(labels)), [-NUM_TEST_DIGITS])
    return ImageData("digits", images.part(train), images.part(test), [str(d) for d in range(10)])


def cifar10(root: Path = Path("data")) -> ImageData:
    """Return CIFAR-10, downloaded by torchvision into ``root`` unless it is there.

    Raises:
        InputError: If it is neither found nor downloaded.
    """
    from torchvision.datasets import CIFAR10

    try:
        train, test = (CIFAR10(root, train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"CIFAR-10 is not in {root.resolve()} and could not be downloaded ({error}): check the connection, "
            "or give a directory with train/<class>/ and test/<class>/ with --data"
        ) from error
    learned, tested = (ArrayImages(part.data, part.targets) for part in (train, test))
    return ImageData("cifar10", learned, tested, train.classes)


def directory(root: Path, classes: Sequence[str] | None = None) -> ImageData:
    """Return images in ImageNet's layout: ``train/<class>/`` and ``val/<class>/`` or ``test/<class>/``.

    Args:
        root: The directory.
        classes: Names of the classes, to load only the test images; ``train/`` is then neither needed nor read.

    Raises:
        InputError: If a directory is missing, a class is empty, or classes do not match.
    """
    if not os.path.isdir(root):
        raise InputError(
            f"data directory {str(root)!r} does not exist: give 'digits', 'cifar10' or a directory with "
            "train/<class>/ and val/<class>/ with --data"
        )
    train = root / "train"
    test = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    missing = "train/" if not (classes or train.is_dir()) else "val/ (or test/)" if test is None else None
    if missing or test is None:
        raise InputError(f"{root} has no {missing}: expected train/<class>/ and val/<class>/ or test/<class>/")
    for part in (test,) if classes else (train, test):
        if not class_names(part):
            raise InputError(f"{part} has no class directories: expected {part}/<class>/ with images")
    if classes:
        tested = FileImages(test, classes)
        return ImageData("directory", tested.part(np.arange(0)), tested, list(classes))
    classes = class_names(train)
    return ImageData("directory", FileImages(train, classes), FileImages(test, classes), classes)


@checked
def load_images(data: str, classes: Sequence[str] | None = None) -> ImageData:
    """Return the images that ``--data`` names: ``digits``, ``cifar10`` or a directory.

    Args:
        data: The name.
        classes: For a directory, load only the test images of these classes.

    Raises:
        InputError: If there are no images, or they cannot be used.
    """
    if data in ("digits", "cifar10"):
        return digits() if data == "digits" else cifar10()
    try:
        return directory(Path(data), classes)
    except OSError as error:
        raise InputError(f"data directory {data!r} cannot be read ({error}): give another one with --data") from error


@checked
def hold_out(images: ImageData, count: int | None) -> ImageData:
    """Return the images with some of those for training held out.

    The choice depends only on the data.

    Args:
        images: All images.
        count: Number of images to hold out; 0 changes nothing. None: a tenth, at most 5,000.

    Raises:
        InputError: If no training images would be left.
    """
    if count is None:
        count = min(len(images.train) // 10, MOST_HELD_OUT)
    if not count:
        return images
    if count >= len(images.train):
        raise InputError(f"--held-out is {count}: expected less than the {len(images.train)} training images")
    order = np.random.default_rng(0).permutation(len(images.train))
    held, rest = np.sort(order[:count]), np.sort(order[count:])
    return replace(images, train=images.train.part(rest), held_out=images.train.part(held))

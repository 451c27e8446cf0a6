"""Images with class labels: digits, CIFAR-10, or folders in ImageNet's layout."""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import IMG_EXTENSIONS

from dnw_graph.arguments import checked
from dnw_graph.errors import InputError
from dnw_graph.preprocessing import rgb
from dnw_graph.training.order import Purpose, mix

NUM_TEST_DIGITS = 360
ENDINGS = (*IMG_EXTENSIONS, ".jfif")
# Of archives made by macOS, and of network storage.
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir"}


class Images(ABC):
    """A sequence of images with labels.

    Attributes:
        labels: Class of every image, ``[num_images]``.
    """

    labels: NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    @abstractmethod
    def load(self, index: int) -> Image.Image:
        """Return one image, in RGB."""

    @abstractmethod
    def part(self, index: NDArray[np.int64]) -> Images:
        """Return the images at some indices."""


class ArrayImages(Images):
    """Images held in memory.

    Args:
        pixels: ``[num_images, height, width, 3]``, 0 to 255.
        labels: ``[num_images]``.
    """

    def __init__(self, pixels: NDArray[np.uint8], labels: Sequence[int] | NDArray[np.int64]) -> None:
        self.pixels = pixels
        self.labels = np.asarray(labels, dtype=np.int64)

    def load(self, index: int) -> Image.Image:
        """Return one image, in RGB."""
        return Image.fromarray(self.pixels[index])

    def part(self, index: NDArray[np.int64]) -> ArrayImages:
        """Return the images at some indices."""
        return ArrayImages(self.pixels[index], self.labels[index])


class FileImages(Images):
    """Images in ``root/<class>/``, at any depth.

    Args:
        root: The folder with one folder per class.
        classes: The classes, in the order of their labels. Folders of other names are an error; a class without a
            folder is not, unless ``classes`` was read from this very folder.

    Attributes:
        paths: The files.
        ignored: How many other files there are, by class and ending.

    Raises:
        InputError: For a class folder without images, or one whose name is not in ``classes``.
    """

    def __init__(self, root: Path, classes: Sequence[str]) -> None:
        here = class_names(root)
        if unknown := sorted(set(here) - set(classes)):
            raise InputError(
                f"{root} has {len(unknown)} class folders that the training images lack, such as "
                f"{unknown[0]!r}: expected the same class names in both"
            )
        self.ignored: Counter[tuple[str, str]] = Counter()
        samples: list[tuple[str, int]] = []
        for name in here:
            found, others = image_files(root / name)
            samples += [(path, classes.index(name)) for path in found]
            self.ignored.update((name, Path(path).suffix.lower() or "no suffix") for path in others)
        self.paths = [path for path, _ in samples]
        self.labels = np.array([label for _, label in samples], dtype=np.int64)
        filled = {classes[label] for label in np.unique(self.labels)}
        if empty := sorted(set(here) - filled):
            raise InputError(
                f"{root / empty[0]} holds no image ({', '.join(ENDINGS)}): "
                "add images or remove the folder of this class"
            )

    def load(self, index: int) -> Image.Image:
        """Return one image, in RGB."""
        return load_rgb(self.paths[index])

    def part(self, index: NDArray[np.int64]) -> FileImages:
        """Return the images at some indices."""
        part = copy.copy(self)
        part.paths = [self.paths[place] for place in index]
        part.labels = self.labels[index]
        return part


def load_rgb(path: str) -> Image.Image:
    """Return the image in a file, in RGB.

    Raises:
        InputError: If there is none, or it is damaged.
    """
    try:
        with open_image(path) as image:
            return rgb(image)
    except Exception as error:  # a damaged file can fail anywhere in the decoder
        raise InputError(f"cannot read image {path} ({error}): replace or remove it") from error


def image_files(folder: Path) -> tuple[list[str], list[str]]:
    """Return the images below a folder, in the order of folders, then names, and the other files.

    Images are what has the ending of one, and files without an ending that hold one. Links are followed, but no folder
    is entered twice, so that a link back ends; hidden folders and those that systems leave are not entered.
    """
    found: list[tuple[str, str]] = []
    others: list[str] = []
    entered: set[tuple[int, int]] = set()
    for parent, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        state = os.stat(parent)
        if (state.st_dev, state.st_ino) in entered:
            folders.clear()
            continue
        entered.add((state.st_dev, state.st_ino))
        folders[:] = sorted(name for name in folders if not _left_by_a_system(name))
        for name in names:
            if _is_image(parent, name):
                found.append((parent, name))
            else:
                others.append(os.path.join(parent, name))
    return [os.path.join(parent, name) for parent, name in sorted(found)], others


def _is_image(parent: str, name: str) -> bool:
    if name.startswith("."):
        return False
    if os.path.splitext(name)[1]:
        return name.lower().endswith(ENDINGS)
    try:
        with open_image(os.path.join(parent, name)):
            return True
    except Exception:  # whatever it is, it is no image
        return False


def _left_by_a_system(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM_FOLDERS


def _raise(error: OSError) -> None:
    raise error


def open_image(path: str) -> Image.Image:
    """Open an image file; reading from anything else, such as a named pipe, might never end.

    Raises:
        OSError: If it is no regular file.
    """
    if not os.path.isfile(path):
        raise OSError("not a regular file")
    return Image.open(path)


def class_names(root: Path) -> list[str]:
    """Return the names of the class folders in ``root``, sorted.

    Hidden folders, those that systems leave, and links back to a folder around them are none.
    """
    around = {root.resolve(), *root.resolve().parents}
    folders = [entry for entry in root.iterdir() if entry.is_dir() and not _left_by_a_system(entry.name)]
    return sorted(entry.name for entry in folders if not (entry.is_symlink() and entry.resolve() in around))


@dataclass(frozen=True)
class ImageData:
    """Training and test images with the names of their classes.

    Attributes:
        name: ``digits``, ``cifar10`` or ``folder``; other names need ``image_size`` among the options.
        train: Images to learn from.
        test: Images to evaluate on.
        classes: Class names, in the order of their labels.
    """

    name: str
    train: Images
    test: Images
    classes: list[str]


def digits() -> ImageData:
    """Return scikit-learn's digits: 1,797 grey 8×8 images, brought to RGB; the last 360 are the test images.

    The last images were written by other people than the first, so the test asks for more than a random split would.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    grey = np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    rgb = np.repeat(grey[..., None], 3, axis=-1)
    train, test = slice(None, -NUM_TEST_DIGITS), slice(-NUM_TEST_DIGITS, None)
    return ImageData(
        "digits",
        ArrayImages(rgb[train], labels[train]),
        ArrayImages(rgb[test], labels[test]),
        [str(d) for d in range(10)],
    )


def cifar10(root: Path = Path("data")) -> ImageData:
    """Return CIFAR-10, downloaded by torchvision into ``root`` unless it is there.

    Raises:
        InputError: If it can neither be found nor downloaded.
    """
    try:
        train, test = (CIFAR10(root, train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"CIFAR-10 is not in {root.resolve()} and could not be downloaded ({error}): check the connection, "
            "or give a folder with train/<class>/ and test/<class>/ with --data"
        ) from error
    return ImageData(
        "cifar10", ArrayImages(train.data, train.targets), ArrayImages(test.data, test.targets), train.classes
    )


def folder(root: Path, classes: Sequence[str] | None = None) -> ImageData:
    """Return the images of a folder in ImageNet's layout: ``train/<class>/`` and ``val/<class>/`` or ``test/<class>/``.

    Args:
        root: The folder.
        classes: Names of the classes, for the test images alone; there need be no ``train/`` then, and nothing is read
            from it.

    Raises:
        InputError: If a folder is missing, a class is empty, or classes do not match.
    """
    if not os.path.isdir(root):
        raise InputError(
            f"data folder {str(root)!r} does not exist: give 'digits', 'cifar10' or a folder with train/<class>/ and "
            "val/<class>/ with --data"
        )
    train = root / "train"
    test = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    missing = "train/" if not (classes or train.is_dir()) else "val/ (or test/)" if test is None else None
    if missing or test is None:
        raise InputError(f"{root} has no {missing}: expected train/<class>/ and val/<class>/ or test/<class>/")
    for part in (test,) if classes else (train, test):
        if not class_names(part):
            raise InputError(f"{part} has no class folders: expected {part}/<class>/ with images")
    if classes:
        tested = FileImages(test, classes)
        return ImageData("folder", tested.part(np.arange(0)), tested, list(classes))
    classes = class_names(train)
    return ImageData("folder", FileImages(train, classes), FileImages(test, classes), classes)


@checked
def load_images(data: str, classes: Sequence[str] | None = None) -> ImageData:
    """Return the images that ``--data`` names: ``digits``, ``cifar10`` or a folder.

    Args:
        data: The name.
        classes: Of a folder, take the test images of these classes alone.

    Raises:
        InputError: If there are none, or they cannot be used.
    """
    if data == "digits":
        return digits()
    if data == "cifar10":
        return cifar10()
    try:
        return folder(Path(data), classes)
    except OSError as error:
        raise InputError(f"data folder {data!r} cannot be read ({error}): give another one with --data") from error


@checked
def hold_out(images: ImageData, count: int) -> ImageData:
    """Return the same training images without some of them, which take the place of the test images.

    Which ones they are depends on the data alone.

    Args:
        images: All images.
        count: How many to hold out; with 0 nothing changes.

    Raises:
        InputError: If none would be left to train on.
    """
    if not count:
        return images
    if count >= len(images.train):
        raise InputError(f"--held-out is {count}: expected less than the {len(images.train)} training images")
    order = np.random.default_rng(0).permutation(len(images.train))
    held, rest = np.sort(order[:count]), np.sort(order[count:])
    return replace(images, train=images.train.part(rest), test=images.train.part(held))


Transform = Callable[[Image.Image], Tensor]


class TrainSamples(Dataset[tuple[Tensor, int]]):
    """Augmented images. Sample (epoch, index) is a pure function of the seed, the epoch and the index.

    Args:
        images: The images.
        transform: Turns an image into a tensor ``[3, height, width]``; draws only from PyTorch's CPU generator.
        seed: Seed of the run.
    """

    def __init__(self, images: Images, transform: Transform, seed: int) -> None:
        self.images = images
        self.transform = transform
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        """Return the tensor and the label of (epoch, index)."""
        epoch, index = key
        image = self.images.load(index)
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(mix(self.seed, Purpose.AUGMENTATION, epoch, index))
        try:
            return self.transform(image), int(self.images.labels[index])
        finally:
            torch.set_rng_state(state)


class EvaluationSamples(Dataset[tuple[Tensor, int]]):
    """Images as they are evaluated, without randomness.

    Args:
        images: The images.
        transform: Turns an image into a tensor ``[3, height, width]``.
    """

    def __init__(self, images: Images, transform: Transform) -> None:
        self.images = images
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return the tensor and the label of an image."""
        return self.transform(self.images.load(index)), int(self.images.labels[index])

"""Images with labels, in memory or in files."""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from dnw_graph.errors import InputError
from dnw_graph.preprocessing import rgb

ENDINGS = (*IMG_EXTENSIONS, ".jfif")
# Left by macOS archives and network storage.
SYSTEM_DIRECTORIES = {"__MACOSX", "@eaDir"}


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


# Not torchvision's ImageFolder: it follows links in circles, and does not count ignored files per class.
class FileImages(Images):
    """Images in ``root/<class>/``, at any depth.

    Args:
        root: The directory with one directory per class.
        classes: The classes, in the order of their labels. Directories with other names are an error; a class without a
            directory is not, unless ``classes`` was read from that directory.

    Attributes:
        paths: The files.
        ignored: Number of other files, by class and suffix.

    Raises:
        InputError: For a class directory without images, or one whose name is not in ``classes``.
    """

    def __init__(self, root: Path, classes: Sequence[str]) -> None:
        here = class_names(root)
        if unknown := sorted(set(here) - set(classes)):
            raise InputError(
                f"{root} has {len(unknown)} class directories that the training images lack, such as "
                f"{unknown[0]!r}: expected the same class names in both"
            )
        self.ignored: Counter[tuple[str, str]] = Counter()
        self.paths: list[str] = []
        labels: list[int] = []
        for name in here:
            found, others = image_files(root / name)
            if not found:
                raise InputError(
                    f"{root / name} contains no images ({', '.join(ENDINGS)}): "
                    "add images or remove the directory of this class"
                )
            self.paths += found
            labels += [classes.index(name)] * len(found)
            self.ignored.update((name, Path(path).suffix.lower() or "no suffix") for path in others)
        self.labels = np.array(labels, dtype=np.int64)

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
        InputError: If the file is missing or damaged.
    """
    try:
        with open_image(path) as image:
            return rgb(image)
    except Exception as error:  # a damaged file can fail anywhere in the decoder
        raise InputError(f"cannot read image {path} ({error}): replace or remove it") from error


def image_files(directory: Path) -> tuple[list[str], list[str]]:
    """Return the images below a directory, ordered by directory, then name; and the other files.

    Images are files with an image suffix, and files without a suffix that contain an image. Links are followed, but no
    directory is entered twice, so cyclic links end; hidden directories and those that systems leave are skipped.
    """
    found: list[tuple[str, str]] = []
    others: list[str] = []
    entered: set[tuple[int, int]] = set()
    for parent, directories, names in os.walk(directory, onerror=_raise, followlinks=True):
        state = os.stat(parent)
        if (state.st_dev, state.st_ino) in entered:
            directories.clear()
            continue
        entered.add((state.st_dev, state.st_ino))
        directories[:] = sorted(name for name in directories if not _left_by_a_system(name))
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
    except Exception:  # not an image
        return False


def _left_by_a_system(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM_DIRECTORIES


def _raise(error: OSError) -> None:
    raise error


def open_image(path: str) -> Image.Image:
    """Open an image file; reading from anything else, such as a named pipe, might never end.

    Raises:
        OSError: If it is not a regular file.
    """
    if not os.path.isfile(path):
        raise OSError("not a regular file")
    return Image.open(path)


def class_names(root: Path) -> list[str]:
    """Return the names of the class directories in ``root``, sorted.

    Hidden directories, those that systems leave, and links to a parent directory are not classes.
    """
    around = {root.resolve(), *root.resolve().parents}
    found = [entry for entry in root.iterdir() if entry.is_dir() and not _left_by_a_system(entry.name)]
    return sorted(entry.name for entry in found if not (entry.is_symlink() and entry.resolve() in around))

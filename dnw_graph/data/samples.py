"""Images as inputs of a model: read one at a time, or decoded once and augmented in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from dnw_graph.data.images import Images
from dnw_graph.data.order import Purpose
from dnw_graph.seeding import mix

KEPT_BYTES = 2**28
"""Larger image sets are read again in every epoch."""


def keep(images: Images, size: int) -> UInt8[Tensor, "images 3 size size"] | None:
    """Return all images, the shorter side scaled to ``size`` and the centre cropped; None if they need too much memory.

    Args:
        images: The images.
        size: Height and width of the result.
    """
    if len(images) * 3 * size**2 > KEPT_BYTES:
        return None
    prepare = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])
    pixels = torch.empty(len(images), 3, size, size, dtype=torch.uint8)
    for index, image in enumerate(pixels):
        image.copy_(prepare(images.load(index)))
    return pixels


class Samples(Dataset[tuple[Tensor, int]]):
    """Images that are read on access.

    A training sample is indexed by (epoch, index), and is a pure function of these and the seed; an evaluation sample
    by its index.

    Args:
        images: The images.
        transform: Converts an image to a tensor ``[3, height, width]``; uses only PyTorch's CPU generator.
        seed: Seed of the run.
    """

    def __init__(self, images: Images, transform: Callable[[Image.Image], Tensor], seed: int = 0) -> None:
        self.images = images
        self.transform = transform
        self.seed = seed

    def __getitem__(self, key: tuple[int, int] | int) -> tuple[Tensor, int]:
        """Return the tensor and the label of one sample."""
        index = key[1] if isinstance(key, tuple) else key
        image = self.images.load(index)
        with torch.random.fork_rng(devices=[]):
            if isinstance(key, tuple):
                torch.default_generator.manual_seed(mix(self.seed, Purpose.AUGMENTATION, *key))
            return self.transform(image), int(self.images.labels[index])


class KeptSamples(Dataset[tuple[Tensor, int]]):
    """Images in memory, in batches.

    The results equal those of :class:`Samples`, bit for bit, in a tenth of the time: 36 instead of 364 µs per training
    image for CIFAR-10 as JPEG files.

    Args:
        pixels: The images, see :func:`keep`.
        images: Their source, for the labels.
        normalise: Converts a batch of bytes to floating-point numbers.
        augment: Whether they are for training: a random crop after padding by an eighth of the size, and a flip.
            Samples are then indexed by (epoch, index), otherwise by index.
        flip: Whether half of the samples are flipped.
        seed: Seed of the run; augmentation is a function of it, epoch and index.
    """

    def __init__(
        self,
        pixels: UInt8[Tensor, "images 3 size size"],
        images: Images,
        normalise: Callable[[Tensor], Tensor],
        augment: bool = False,
        flip: bool = True,
        seed: int = 0,
    ) -> None:
        # Tensors would reach spawned workers through /dev/shm, which is small in containers.
        self.pixels = pixels.numpy()
        self.labels = images.labels.tolist()
        self.normalise = normalise
        self.augment, self.flip, self.seed = augment, flip, seed

    def __getitem__(self, key: tuple[int, int] | int) -> tuple[Tensor, int]:
        """Return the tensor and the label of one sample."""
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, int] | int]) -> list[tuple[Tensor, int]]:
        """Return the tensors and labels of several samples; PyTorch's loader calls this for a batch."""
        index = [key[1] if isinstance(key, tuple) else key for key in keys]
        batch = torch.from_numpy(self.pixels[index])
        if self.augment:
            batch = self._augmented(batch, [key for key in keys if isinstance(key, tuple)])
        return [(image, self.labels[i]) for image, i in zip(self.normalise(batch), index, strict=True)]

    def _augmented(self, batch: Tensor, keys: Sequence[tuple[int, int]]) -> Tensor:
        size = batch.size(-1)
        border = size // 8
        padded = F.pad(batch, (border,) * 4)
        generator = torch.Generator()
        for key, image, target in zip(keys, padded, batch, strict=True):
            generator.manual_seed(mix(self.seed, Purpose.AUGMENTATION, *key))
            # In the order of v2.RandomCrop and v2.RandomHorizontalFlip.
            top, left = (int(torch.randint(0, 2 * border + 1, (), generator=generator)) for _ in range(2))
            window = image[:, top : top + size, left : left + size]
            flipped = self.flip and bool(torch.rand(1, generator=generator) < 0.5)
            target.copy_(window.flip(-1) if flipped else window)
        return batch

"""The transforms of images for training and testing."""

from __future__ import annotations

from torchvision.transforms import v2

from dnw_graph.arguments import checked
from dnw_graph.preprocessing import Preprocessing

# Images of this size and above are treated like ImageNet's, smaller ones like CIFAR's.
LARGE = 64

# Mean and standard deviation per channel, on a scale from 0 to 1.
STATISTICS = {
    "digits": ((0.305,) * 3, (0.376,) * 3),
    "cifar10": ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def is_small(data: str, size: int) -> bool:
    """Return whether images get the augmentation of small images."""
    return data == "digits" or size < LARGE


def is_flipped(data: str) -> bool:
    """Return whether images are flipped in training."""
    return data != "digits"


@checked
def transforms(data: str, size: int, randaugment: int = 0) -> tuple[v2.Compose, Preprocessing]:
    """Return the transforms of an RGB image for training and for testing; both return a tensor ``[3, size, size]``.

    - 64 pixels and above: a random crop of random area and aspect ratio, scaled to ``size``, and horizontal flips; for
      testing the shorter side is scaled to ``size`` · 256 / 224 and the centre is cropped. ImageNet's mean and
      standard deviation. (At 224: the paper's Table 3.)
    - Below 64 pixels: scaled to ``size``, then a random crop after padding by ``size`` / 8, and horizontal flips; for
      testing only scaled. CIFAR's mean and standard deviation. (At 32: the paper's Tables 1 and 2.)
    - Digits are never flipped or cropped to a part: they get the random crop after padding at every size.

    Args:
        data: ``digits``, ``cifar10`` or ``directory``.
        size: Height and width of the result.
        randaugment: Magnitude of two additional random operations in training (RandAugment, Cubuk et al. 2020); 0 for
            none.
    """
    small = is_small(data, size)
    statistics = STATISTICS["digits" if data == "digits" else "cifar10" if small else "imagenet"]
    test = Preprocessing(size, size if small else round(size * 256 / 224), *statistics)
    if small:
        crop = [v2.Resize(size), v2.CenterCrop(size), v2.RandomCrop(size, padding=size // 8)]
    else:
        crop = [v2.RandomResizedCrop(size)]
    flip = [v2.RandomHorizontalFlip()] if is_flipped(data) else []
    operations = [v2.RandAugment(2, randaugment)] if randaugment else []
    return v2.Compose([*crop, *flip, *operations, *test.to_tensor()]), test

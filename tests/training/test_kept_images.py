"""Images that are decoded once and augmented by the batch: bit for bit what is decoded and augmented one by one."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image

from dnw_graph.data.images import Images
from dnw_graph.data.samples import KeptSamples, Samples, keep
from dnw_graph.data.sources import ImageData
from dnw_graph.data.transforms import is_flipped, transforms
from dnw_graph.training import RunOptions
from dnw_graph.training.data_module import DataModule

SIZES = ((32, 32), (45, 32), (20, 37), (64, 50))


class Noise(Images):
    """Images of several sizes; counts how often each is loaded."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self.pixels = [generator.integers(0, 256, (height, width, 3), np.uint8) for width, height in SIZES]
        self.labels = np.arange(len(SIZES))
        self.loaded = [0] * len(SIZES)

    def load(self, index: int) -> Image.Image:
        self.loaded[index] += 1
        return Image.fromarray(self.pixels[index])

    def part(self, index: np.ndarray) -> Images:
        raise NotImplementedError


@pytest.mark.parametrize(("data", "size"), [("directory", 32), ("cifar10", 24), ("digits", 16)])
def test_the_numbers_are_those_of_one_by_one(data: str, size: int):
    images = Noise()
    train, test = transforms(data, size)
    pixels = keep(images, size)
    assert pixels is not None
    assert pixels.shape == (4, 3, size, size)
    before = torch.get_rng_state()
    keys = list(product(range(8), range(4)))
    samples = KeptSamples(pixels, images, test, True, is_flipped(data), seed=5)
    singly = Samples(images, train, seed=5)
    for (x, label), key in zip(samples.__getitems__(keys), keys, strict=True):
        assert torch.equal(x, singly[key][0])
        assert label == key[1]
        assert type(label) is int
    assert torch.equal(samples[keys[3]][0], singly[keys[3]][0])
    assert torch.equal(torch.get_rng_state(), before)
    evaluated = KeptSamples(pixels, images, test).__getitems__([3, 0, 1, 2])
    for (x, label), index in zip(evaluated, [3, 0, 1, 2], strict=True):
        assert torch.equal(x, Samples(images, test)[index][0])
        assert label == index
    assert torch.equal(pixels, keep(images, size))  # which augmentation leaves alone


@pytest.mark.parametrize(
    ("size", "room", "times"), [(32, 2**28, 1), (32, 1000, 3), (64, 2**28, 3)], ids=["kept", "too many", "large"]
)
def test_small_images_are_decoded_once(monkeypatch: pytest.MonkeyPatch, size: int, room: int, times: int):
    monkeypatch.setattr("dnw_graph.data.samples.KEPT_BYTES", room)
    images = Noise()
    options = RunOptions(data="directory", image_size=size, batch_size=2, workers=0, accelerator="cpu")
    data = DataModule(ImageData("directory", images, images, ["0", "1", "2", "3"]), options)
    data.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    loader = data.train_dataloader()
    for _ in range(3):
        batches = list(loader)
    assert images.loaded == [times] * 4
    assert [batch.shape for batch, _ in batches] == [(2, 3, size, size)] * 2
    assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == [0, 1, 2, 3]

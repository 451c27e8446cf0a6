from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dnw_graph.data.transforms import transforms


def gradient(size: int) -> Image.Image:
    """An image whose red channel grows from left to right, so that a flip shows."""
    row = np.linspace(0, 255, size).astype(np.uint8)
    return Image.fromarray(np.stack([np.tile(row, (size, 1))] * 3, axis=-1))


def is_flipped(x: torch.Tensor) -> bool:
    middle = x[0, x.shape[1] // 2]
    inner = middle[len(middle) // 4 : 3 * len(middle) // 4]
    return bool(inner[-1] < inner[0])


@pytest.mark.parametrize(
    ("data", "size", "flips"), [("digits", 16, False), ("cifar10", 32, True), ("directory", 64, True)]
)
def test_flips(data: str, size: int, flips: bool):
    train, test = transforms(data, size)
    torch.manual_seed(0)
    assert {is_flipped(train(gradient(size))) for _ in range(30)} == ({True, False} if flips else {False})
    assert not is_flipped(test(gradient(size)))


@pytest.mark.parametrize("data", ["digits", "cifar10", "directory"])
@pytest.mark.parametrize("size", [8, 32, 63, 64, 224])
def test_any_image_comes_out_square_and_of_the_asked_size(data: str, size: int):
    for image in (gradient(20), gradient(300), Image.new("RGB", (31, 70))):
        for transform in transforms(data, size):
            assert transform(image).shape == (3, size, size)


def test_cifar_images_are_moved_by_up_to_four_pixels():
    train, test = transforms("cifar10", 32)
    white = Image.new("RGB", (32, 32), "white")
    level = test(white)[0, 0, 0]
    torch.manual_seed(0)
    borders = set()
    for _ in range(200):
        filled = train(white)[0] == level
        borders.add((32 - int(filled.any(0).sum()), 32 - int(filled.any(1).sum())))
    assert {across for across, _ in borders} == {down for _, down in borders} == set(range(5))


def test_normalisation_is_that_of_the_data():
    grey = Image.new("RGB", (224, 224), (51, 51, 51))
    assert transforms("cifar10", 32)[1](grey)[:, 0, 0].tolist() == pytest.approx(
        [(0.2 - 0.491) / 0.247, (0.2 - 0.482) / 0.243, (0.2 - 0.447) / 0.262]
    )
    assert transforms("directory", 224)[1](grey)[:, 0, 0].tolist() == pytest.approx(
        [(0.2 - 0.485) / 0.229, (0.2 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    )


def test_digits_have_mean_0_and_deviation_1_after_normalisation():
    from dnw_graph.training import load_images

    images = load_images("digits").train
    _, test = transforms("digits", 8)
    x = torch.stack([test(images.load(index)) for index in range(len(images))])
    assert x.mean().abs() < 0.01
    assert (x.std() - 1).abs() < 0.01


def test_large_test_images_are_the_centre_at_256_over_224():
    # A white square of 224 in an image of 256: exactly what the centre crop keeps.
    image = Image.new("RGB", (256, 256))
    image.paste((255, 255, 255), (16, 16, 240, 240))
    x = transforms("directory", 224)[1](image)
    assert x.unique().numel() == 3  # white, in three channels

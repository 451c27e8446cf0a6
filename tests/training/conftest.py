from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dnw_graph import NeuralGraph
from dnw_graph.training.images import ArrayImages, ImageData, digits
from dnw_graph.training.options import RunOptions


class TinyModel(nn.Module):
    """A stem, one neural graph, dropout (so that random numbers within a step matter) and a classifier."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        self.graph = NeuralGraph(blocks=(4, 12, 6), num_edges=40, name="tiny")
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(6, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.graph(self.stem(x)).mean((2, 3))))


def create_tiny(num_classes: int, image_size: int) -> nn.Module:
    return TinyModel(num_classes)


@pytest.fixture
def create() -> Callable[[int, int], nn.Module]:
    return create_tiny


def first_digits() -> ImageData:
    """The first 70 training and 30 test images of digits."""
    whole = digits()

    def first(images: object, count: int) -> ArrayImages:
        assert isinstance(images, ArrayImages)
        return ArrayImages(images.pixels[:count], images.labels[:count])

    return ImageData("digits", first(whole.train, 70), first(whole.test, 30), whole.classes)


@pytest.fixture(scope="session")
def small_digits() -> ImageData:
    return first_digits()


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., RunOptions]:
    """Options of a short run on a CPU: 4 steps per epoch of small_digits, 3 epochs."""

    def make(**changes: object) -> RunOptions:
        values = {
            "image_size": 8,
            "batch_size": 16,
            "epochs": 3,
            "lr": 1.0,
            "accelerator": "cpu",
            "workers": 0,
            "output": str(tmp_path / "run"),
        }
        return RunOptions(**{**values, **changes})  # type: ignore[arg-type]

    return make


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """The first 6 digits of classes 0 and 1 as files: train/{zero,one}/ and val/{zero,one}/."""
    root = tmp_path / "images"
    whole = digits()
    for part, images in (("train", whole.train), ("val", whole.test)):
        for label, name in enumerate(("zero", "one")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in (images.labels == label).nonzero()[0][:6]:
                images.load(int(index)).resize((16, 16)).save(folder / f"{index}.png")
    return root


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)

"""The model and the images of short runs."""

from __future__ import annotations

from torch import Tensor, nn

from dnw_graph import NeuralGraph
from dnw_graph.data.images import ArrayImages
from dnw_graph.data.sources import ImageData, digits


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


def first_digits(num_train: int = 70, num_test: int = 30) -> ImageData:
    """The first training and test images of digits."""
    whole = digits()

    def first(images: object, count: int) -> ArrayImages:
        assert isinstance(images, ArrayImages)
        return ArrayImages(images.pixels[:count], images.labels[:count])

    return ImageData("digits", first(whole.train, num_train), first(whole.test, num_test), whole.classes)

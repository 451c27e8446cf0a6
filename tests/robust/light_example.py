"""Trains a model so small that a run is nearly all loading, starting and stopping. Started by kills.py."""

import faulthandler
import signal
import sys
from dataclasses import dataclass

from dnw_graph import stopping

if __name__ == "__main__":
    stopping.start()
    faulthandler.register(signal.SIGUSR1)  # prints the stacks, also of the processes that load data

from torch import Tensor, nn

from dnw_graph import NeuralGraph
from dnw_graph.training import ModelOptions, RunOptions, main


class LightModel(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        self.graph = NeuralGraph(blocks=(4, 12, 6), num_edges=40, name="light")
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(6, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.graph(self.stem(x)).mean((2, 3))))


@dataclass(frozen=True)
class LightOptions(ModelOptions):
    def create(self, num_classes: int, image_size: int) -> nn.Module:
        return LightModel(num_classes)


if __name__ == "__main__":
    sys.exit(main(__doc__, LightOptions, RunOptions(accelerator="cpu", image_size=8)))

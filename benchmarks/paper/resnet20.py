r"""Train and evaluate ResNet-20 for CIFAR-10 (He et al. 2016) with any rule for its weights.

With no option, it learns scikit-learn's digits with a tenth of its weights:

    python benchmarks/paper/resnet20.py
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from dnw_graph import stopping

if __name__ == "__main__":
    stopping.start()  # before the imports that take seconds

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from dnw_graph.recipes.models import Family
from dnw_graph.sparse_layers import sparsify
from dnw_graph.sparse_layers.budget import DISTRIBUTIONS
from dnw_graph.training import RunOptions, WiringOptions, main, option
from dnw_graph.wirings import Wiring

WIDTHS = (16, 32, 64)
BLOCKS_PER_WIDTH = 3


class Shortcut(nn.Module):
    """Every second pixel, and zeros for new channels: He's option A, without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """Return half the resolution and twice the channels of ``x``."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, x.size(1)))


class ResNet20(nn.Sequential):
    """ResNet-20 for images of 32 pixels (He et al. 2016, Section 4.2): 270 thousand parameters.

    Convolutions are initialised Kaiming-normal (He et al. 2015). Maps are channels-last: a fifth less time on a CPU.

    Args:
        num_classes: Number of classes.
    """

    def __init__(self, num_classes: int = 10) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU()]
        channels = WIDTHS[0]
        for width in WIDTHS:
            for _ in range(BLOCKS_PER_WIDTH):
                down = width != channels
                layers.append(BasicBlock(channels, width, 2 if down else 1, Shortcut() if down else None))
                channels = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``[batch, num_classes]``."""
        return super().forward(x.contiguous(memory_format=torch.channels_last))


@dataclass(frozen=True)
class ResNet20Options(WiringOptions):
    """Options of ResNet-20."""

    density: float | None = option(
        None, "share of weights to keep; 1 for the dense network. Default: that of the rule, or 0.1"
    )
    distribution: str = option(
        "erdos_renyi_kernel", f"how the budget is divided among layers: one of {', '.join(DISTRIBUTIONS)}"
    )

    def with_wiring(self, wiring: Wiring, num_classes: int, image_size: int) -> nn.Module:
        """Return the model with a wiring for the weights of every layer."""
        model = ResNet20(num_classes)
        if self.density != 1:
            sparsify(model, self.density, wiring, distribution=self.distribution)
        return model


MODELS = Family(ResNet20Options, RunOptions(lr=0.1, weight_decay=1e-4), ("resnet20",))


def run_example(argv: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return main(__doc__ or "", MODELS.options, MODELS.defaults, argv)


if __name__ == "__main__":
    sys.exit(run_example())

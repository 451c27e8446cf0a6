r"""Train and evaluate sparse ResNets (Table 4 of the paper): every layer keeps the strongest of its weights.

With no option, a ResNet-18 with a tenth of its weights learns scikit-learn's digits on two CPU cores:

    python examples/imagenet_resnet50.py

A row of Table 4 on ImageNet, on 4 GPUs:

    python examples/imagenet_resnet50.py --config examples/configs/resnet50_sparse_0.1.yaml \
        --data /path/to/imagenet --devices 4
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dnw_graph import stopping

if __name__ == "__main__":
    stopping.start()  # before the imports that take seconds

import torchvision
from torch import nn

from dnw_graph import InputError
from dnw_graph.errors import unknown_name
from dnw_graph.sparse_layers import sparsify
from dnw_graph.sparse_layers.budget import DISTRIBUTIONS
from dnw_graph.training import RunOptions, WiringOptions, main, option
from dnw_graph.wirings import Wiring, create_wiring

MODELS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
LARGE_IMAGE = 64
FIRST_LAYER = "conv1"


@dataclass(frozen=True)
class ResNetOptions(WiringOptions):
    """Which ResNet of torchvision. The first convolution has stride 2, or 1 for images smaller than 64 pixels."""

    model: str = option("resnet18", f"one of {', '.join(MODELS)}")
    density: float | None = option(
        None, "share of weights that every layer keeps, 0.1 if the rule does not decide it; 1 for the dense network"
    )
    first_layer_dense: bool = option(False, "keep all weights of the first convolution (First Layer Dense)")
    distribution: str = option(
        "uniform", f"how the weights are divided among layers: one of {', '.join(DISTRIBUTIONS)}"
    )

    def with_wiring(self, wiring: Wiring, num_classes: int, image_size: int) -> nn.Module:
        """Return the model with a wiring for the weights of every layer."""
        if self.model not in MODELS:
            raise unknown_name("model", self.model, MODELS)
        model = torchvision.models.get_model(self.model, weights=None, num_classes=num_classes)
        if image_size < LARGE_IMAGE:
            model.conv1.stride = (1, 1)
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
        if self.density == 1:
            if self.first_layer_dense or self.wiring != "dnw" or self.distribution != "uniform":
                raise InputError(
                    "--first-layer-dense, --wiring and --distribution are for sparse networks: give a --density below 1"
                )
            return model
        skip = [FIRST_LAYER] if self.first_layer_dense else []
        sparsify(model, self.share, wiring, skip, self.distribution)
        return model

    @property
    def share(self) -> float | None:
        """The density; None where the rule decides it."""
        if self.density is None and create_wiring(self.wiring, **self.wiring_options).decides_k:
            return None
        return 0.1 if self.density is None else self.density

    def identity(self) -> dict[str, Any]:
        """Return all options, the density as it is used."""
        return {**super().identity(), "density": self.share}


def run_example(argv: Sequence[str] | None = None) -> int:
    """Run the example and return its exit status."""
    defaults = RunOptions(
        epochs=5,
        lr=0.064,
        warmup_epochs=1,
        momentum=0.875,
        weight_decay=2**-15,
        norm_weight_decay=False,
        label_smoothing=0.1,
    )
    return main(__doc__ or "", ResNetOptions, defaults, argv)


if __name__ == "__main__":
    sys.exit(run_example())

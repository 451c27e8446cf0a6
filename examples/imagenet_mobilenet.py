r"""Train and evaluate MobileNetV1, MobileNetV1-DNW and their random graphs (Table 3 of the paper).

With no option, MobileNetV1-DNW x0.225 learns scikit-learn's digits in about a minute and a half on two CPU cores:

    python examples/imagenet_mobilenet.py

A row of Table 3 on ImageNet, on 4 GPUs:

    python examples/imagenet_mobilenet.py --config examples/configs/mobilenet_v1_dnw_x0.225.yaml \
        --data /path/to/imagenet --devices 4
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from dnw_graph import stopping

if __name__ == "__main__":
    stopping.start()  # before the imports that take seconds

from torch import nn

from dnw_graph import InputError
from dnw_graph.errors import unknown_name
from dnw_graph.models import create_model
from dnw_graph.node_functions import EPS, NormReluConv
from dnw_graph.training import RunOptions, WiringOptions, main, option
from dnw_graph.wirings import Wiring

MODELS = ("mobilenet_v1_dnw", "mobilenet_v1")
LARGE_IMAGE = 64


@dataclass(frozen=True)
class MobileNetOptions(WiringOptions):
    """Which model. The first convolution has stride 2, or 1 for images smaller than 64 pixels."""

    model: str = option("mobilenet_v1_dnw", f"one of {', '.join(MODELS)}")
    width: float = option(0.225, "width multiplier")
    small: bool = option(False, "mobilenet_v1_dnw: learn the edges of the classifier too (DNW-Small)")
    node_norm_eps: float = option(EPS, "mobilenet_v1_dnw: what the norms of nodes add to the variance")

    def with_wiring(self, wiring: Wiring, num_classes: int, image_size: int) -> nn.Module:
        """Return the model with a wiring."""
        if self.model not in MODELS:
            raise unknown_name("model", self.model, MODELS)
        shared = {
            "width": self.width,
            "num_classes": num_classes,
            "stem_stride": 2 if image_size >= LARGE_IMAGE else 1,
        }
        if self.model == "mobilenet_v1":
            if self.small or self.wiring != "dnw" or self.node_norm_eps != EPS:
                raise InputError(
                    "--small, --wiring and --node-norm-eps are for mobilenet_v1_dnw: mobilenet_v1 has no nodes or edges"
                )
            return create_model(self.model, **shared)
        node_function = partial(NormReluConv, eps=self.node_norm_eps)
        return create_model(self.model, **shared, small=self.small, wiring=wiring, node_function=node_function)


def run_example(argv: Sequence[str] | None = None) -> int:
    """Run the example and return its exit status."""
    return main(__doc__ or "", MobileNetOptions, RunOptions(), argv)


if __name__ == "__main__":
    sys.exit(run_example())

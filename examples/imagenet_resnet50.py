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

from dnw_graph import stopping

if __name__ == "__main__":
    stopping.start()  # before the imports that take seconds

from dnw_graph.recipes.models import RESNET_RECIPE, ResNetOptions
from dnw_graph.training import main


def run_example(argv: Sequence[str] | None = None) -> int:
    """Run the example and return its exit status."""
    return main(__doc__ or "", ResNetOptions, RESNET_RECIPE, argv)


if __name__ == "__main__":
    sys.exit(run_example())

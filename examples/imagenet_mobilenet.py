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

from dnw_graph import stopping

if __name__ == "__main__":
    stopping.start()  # before the imports that take seconds

from dnw_graph.recipes.models import MOBILENET_RECIPE, MobileNetOptions
from dnw_graph.training import main


def run_example(argv: Sequence[str] | None = None) -> int:
    """Run the example and return its exit status."""
    return main(__doc__ or "", MobileNetOptions, MOBILENET_RECIPE, argv)


if __name__ == "__main__":
    sys.exit(run_example())

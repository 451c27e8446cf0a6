"""Train and evaluate the tiny classifiers of Table 1: a graph of 800 nodes in static, discrete or continuous time.

With no option, the static graph learns scikit-learn's digits on a CPU:

    python examples/cifar10_tiny.py

A row of Table 1 on CIFAR-10:

    python examples/cifar10_tiny.py --config examples/configs/tiny_discrete_dnw.yaml --data cifar10
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

from dnw_graph.errors import unknown_name
from dnw_graph.models import TINY_DYNAMICS, TINY_NODE_FUNCTIONS, create_model
from dnw_graph.node_functions import EPS
from dnw_graph.training import RunOptions, WiringOptions, main, option
from dnw_graph.wirings import Wiring


@dataclass(frozen=True)
class TinyOptions(WiringOptions):
    """Which of the tiny classifiers."""

    dynamics: str = option("static", f"one of {', '.join(TINY_DYNAMICS)}")
    node_norm_eps: float = option(EPS, "what the norms of nodes add to the variance")
    adjoint: bool = option(False, "continuous: train by the adjoint equation instead of through the solver")

    def with_wiring(self, wiring: Wiring, num_classes: int, image_size: int) -> nn.Module:
        """Return the model with a wiring."""
        if self.dynamics not in TINY_DYNAMICS:
            raise unknown_name("dynamics", self.dynamics, TINY_DYNAMICS)
        kind = TINY_NODE_FUNCTIONS[self.dynamics]
        return create_model(
            "tiny_classifier",
            dynamics=self.dynamics,
            num_classes=num_classes,
            wiring=wiring,
            node_function=partial(kind, norm="instance", eps=self.node_norm_eps),
            adjoint=self.adjoint,
        )


def run_example(argv: Sequence[str] | None = None) -> int:
    """Run the example and return its exit status."""
    defaults = RunOptions(image_size=16, epochs=5, schedule="step", lr=0.1, weight_decay=1e-4)
    return main(__doc__ or "", TinyOptions, defaults, argv)


if __name__ == "__main__":
    sys.exit(run_example())

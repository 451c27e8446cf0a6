"""Compares the gradient of the adjoint method with backpropagation through the solver, in float64.

One continuous-time graph of 24 nodes with 150 of 576 candidates real, ``dopri5``, two random inputs of 8×8. The
difference is ‖a - b‖ / ‖b‖ over the gradients of all candidates. Run with ``python benchmarks/adjoint.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timing import arguments, report
from torch import Tensor, nn

from dnw_graph import Continuous, NeuralGraph
from dnw_graph.node_functions import NormReluConv

TOLERANCES = (1e-3, 1e-4, 1e-5)


class ConvTanh(nn.Module):
    """A smooth node function: single-channel convolution → tanh."""

    def __init__(self, num_nodes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_nodes, num_nodes, 3, padding=1, groups=num_nodes, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        """Apply f_θ."""
        return torch.tanh(self.conv(z))


def gradient(
    node_function: Callable[..., nn.Module], tolerance: float, adjoint: bool, device: torch.device
) -> tuple[Tensor, Continuous]:
    """Return the gradient of the candidates, and the dynamics with its evaluation counts."""
    torch.manual_seed(0)
    dynamics = Continuous(rtol=tolerance, atol=tolerance, adjoint=adjoint)
    graph = NeuralGraph(
        num_nodes=24, num_inputs=6, num_outputs=5, num_edges=150, node_function=node_function, dynamics=dynamics
    )
    graph.double().to(device)(torch.randn(2, 6, 8, 8, dtype=torch.float64, device=device)).square().sum().backward()
    assert isinstance(graph.dynamics, Continuous)
    assert graph.candidates.weight.grad is not None
    return graph.candidates.weight.grad, graph.dynamics


def main() -> None:
    """Print one row per node function and tolerance."""
    options = arguments(__doc__ or "", takes=("device",)).parse_args()
    functions: dict[str, Callable[..., nn.Module]] = {
        "conv → tanh": ConvTanh,
        "instance norm → ReLU → conv": partial(NormReluConv, norm="instance"),
    }
    rows: list[dict[str, Any]] = []
    for name, node_function in functions.items():
        for tolerance in TOLERANCES:
            through, solver = gradient(node_function, tolerance, False, options.device)
            adjoint, solved = gradient(node_function, tolerance, True, options.device)
            rows.append(
                {
                    "node function": name,
                    "tolerance": tolerance,
                    "difference": float((adjoint - through).norm() / through.norm()),
                    "evaluations": solver.num_evaluations,
                    "adjoint's, backwards": solved.num_backward_evaluations,
                }
            )
    report("Adjoint against backpropagation through the solver", rows, options)


if __name__ == "__main__":
    main()

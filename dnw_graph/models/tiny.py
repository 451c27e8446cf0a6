"""The tiny classifiers of Table 1: static, discrete-time and continuous-time, with the same nodes and edges."""

from __future__ import annotations

from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from dnw_graph.arguments import checked, require
from dnw_graph.dynamics import Continuous, Discrete
from dnw_graph.errors import InputError, unknown_name
from dnw_graph.models.image_classifier import ImageClassifier
from dnw_graph.neural_graph import NeuralGraph
from dnw_graph.node_functions import NodeFunction, NormReluConv, ReluConvSendNorm
from dnw_graph.propagation import Propagation
from dnw_graph.wirings import Wiring, budget

NUM_NODES, NUM_INPUTS, NUM_OUTPUTS = 800, 32, 100
STATIC_BLOCKS = (32, 192, 192, 192, 192, 100)
NUM_EDGES = 32_000
"""5% of 800²."""

TINY_NODE_FUNCTIONS = {"static": NormReluConv, "discrete": ReluConvSendNorm, "continuous": ReluConvSendNorm}
TINY_DYNAMICS = tuple(TINY_NODE_FUNCTIONS)


class TinyClassifier(ImageClassifier):
    """A classifier of 41 thousand parameters for 32×32 images: downsampling, one neural graph, a linear read-out.

    Section 3.1 of the paper (arXiv 1906.00586). Two strided convolutions make 32 channels of 8×8, the inputs of a graph
    of 800 nodes and 32,000 edges. The static graph has 5 blocks of nodes and, fed by all of them, 100 outputs without a
    node function; in the dynamic graphs the last 100 of the 800 nodes are the outputs. The read-out is the mean over
    rows and columns 2 and 3 (counted from 0) of the outputs' maps, then a linear layer.

    Args:
        dynamics: ``"static"``, ``"discrete"`` (5 steps) or ``"continuous"`` (``dopri5`` from 0 to 1 with tolerances
            1e-3, backpropagation through the solver).
        num_classes: Number of classes.
        wiring: See :class:`~dnw_graph.NeuralGraph`.
        node_function: See :class:`~dnw_graph.NeuralGraph`. Default:
            :class:`~dnw_graph.node_functions.NormReluConv` in the static graph,
            :class:`~dnw_graph.node_functions.ReluConvSendNorm` in the dynamic ones, both with an instance norm. In
            continuous time that is Ż = norm(A conv(relu(Z))), as the authors of the paper computed it (without their
            ReLU in place, which clamps the solver's own state too). Equation 13 read literally,
            Ż = conv(relu(norm(A Z))), is ``partial(NormReluConv, norm="instance")``.
        adjoint: Continuous only: see :class:`~dnw_graph.Continuous`.
        propagation: See :class:`~dnw_graph.NeuralGraph`.
        recompute: See :class:`~dnw_graph.NeuralGraph`.

    Shapes:
        - input: ``[batch, 3, 32, 32]``; larger images give larger maps, but the same patch is read
        - output: logits ``[batch, num_classes]``

    Raises:
        InputError: If a name is unknown, an image too small, or ``adjoint`` is given for other dynamics.
    """

    smallest = 13  # Its maps have the 4 × 4 values that the read-out needs.

    @checked
    def __init__(
        self,
        dynamics: str = "static",
        num_classes: int = 10,
        *,
        wiring: str | Wiring = "dnw",
        node_function: NodeFunction | None = None,
        adjoint: bool = False,
        propagation: str | Propagation = "auto",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if dynamics not in TINY_DYNAMICS:
            raise unknown_name("dynamics", dynamics, TINY_DYNAMICS)
        if adjoint and dynamics != "continuous":
            raise InputError(f"adjoint is for dynamics='continuous'; got {dynamics!r}: leave adjoint out")
        require(num_classes >= 1, "num_classes", "an integer >= 1", num_classes)
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 16, 3, 2, 1, groups=16, bias=False),
            nn.Conv2d(16, NUM_INPUTS, 1, bias=False),
            nn.BatchNorm2d(NUM_INPUTS),
        )
        options: dict[str, Any] = {"num_nodes": NUM_NODES, "num_inputs": NUM_INPUTS, "num_outputs": NUM_OUTPUTS}
        if dynamics == "static":
            options = {"blocks": STATIC_BLOCKS}
        else:
            options["dynamics"] = Discrete(steps=5) if dynamics == "discrete" else Continuous(adjoint=adjoint)
        self.graph = NeuralGraph(
            num_edges=budget(wiring, NUM_EDGES),
            wiring=wiring,
            node_function=node_function or partial(TINY_NODE_FUNCTIONS[dynamics], norm="instance"),
            propagation=propagation,
            recompute=recompute,
            name=f"{dynamics}_graph",
            **options,
        )
        self.read_out = PatchMean(2, 4)
        self.classifier = nn.Linear(NUM_OUTPUTS, num_classes)

    def modules_in_order(self) -> list[nn.Module]:
        """Return the modules in the order in which they are applied."""
        return [self.stem, self.graph, self.read_out, self.classifier]


class PatchMean(nn.Module):
    """The mean over a square patch of every map.

    Args:
        start: First row and column of the patch, counted from 0.
        stop: One past the last row and column.

    Shapes:
        - input: ``[batch, channels, height, width]``
        - output: ``[batch, channels]``
    """

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, z: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels"]:
        """Average."""
        return z[:, :, self.start : self.stop, self.start : self.stop].mean(dim=(2, 3))

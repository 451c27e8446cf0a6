"""The networks of the paper as usually written in plain PyTorch: the reference of the other benchmarks.

One full sort per forward pass ranks the candidates; the real edges are the non-zero entries of masked dense weights. In
a static graph a 1×1 convolution sends the states of each block to all later nodes, and each later block sums what it
receives. A dynamic graph applies one 1×1 convolution over all nodes per step or evaluation; the original code even
sorted at each of them. Node functions are PyTorch's norms, ReLU and depthwise convolutions. In evaluation the masked
weights are computed once and cached.

Ties go to the lower index, so that the real edges are exactly those of the package.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchdiffeq import odeint

from dnw_graph import Continuous, Discrete, NeuralGraph
from dnw_graph.models import MobileNetV1DNW, TinyClassifier


class _Masked(torch.autograd.Function):
    """The weights of real edges, zero elsewhere; every candidate gets a gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class NodeFunction(nn.Module):
    """Normalisation → ReLU → depthwise convolution, with the parameters of one of the package's node functions."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        norm, conv = ours.get_submodule("norm"), ours.get_submodule("conv")
        assert isinstance(norm, nn.BatchNorm2d | nn.InstanceNorm2d)
        assert isinstance(conv, nn.Conv2d)
        nodes = conv.out_channels
        self.norm = type(norm)(nodes, norm.eps, affine=True).to(conv.weight)
        self.conv = nn.Conv2d(nodes, nodes, 3, conv.stride[0], 1, groups=nodes, bias=False).to(conv.weight)
        self.norm.load_state_dict(norm.state_dict())
        self.conv.load_state_dict(conv.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        """Return the states for the inputs."""
        return self.conv(F.relu(self.norm(x), inplace=True))


class DenseGraph(nn.Module):
    """Base of static and dynamic graphs: dense weights, a ranking of the candidates, node functions.

    Args:
        graph: A graph of this package with the rule ``dnw``, or ``random_graph`` and no training.

    Attributes:
        weights: Dense matrices ``[targets, sources]`` that hold every candidate once.
    """

    def __init__(self, graph: NeuralGraph) -> None:
        super().__init__()
        self.num_edges = graph.num_edges
        self.functions = nn.ModuleList(
            nn.Identity() if isinstance(function, nn.Identity) else NodeFunction(function)
            for function, _ in graph.dynamics.functions()
        )
        self._kept: list[Tensor] | None = None

    def set_weights(self, flat: Tensor) -> None:
        """Set the candidate weights from the package's flat vector."""
        self.weights = nn.ParameterList(nn.Parameter(part.contiguous()) for part in self.matrices(flat.detach()))

    def matrices(self, flat: Tensor) -> list[Tensor]:
        """Split a vector in the order of the package's candidates into matrices like the weights."""
        raise NotImplementedError

    def flat(self, matrices: Sequence[Tensor]) -> Tensor:
        """Return the values of such matrices in the order of the package's candidates."""
        raise NotImplementedError

    def real_weights(self) -> list[Tensor]:
        """Rank the candidates and return 1×1 kernels in which all hallucinated edges are zero."""
        if self._kept is not None:
            return self._kept
        magnitude = self.flat([weight.detach() for weight in self.weights]).abs()
        order = magnitude.sort(descending=True, stable=True).indices
        mask = torch.zeros_like(magnitude, dtype=torch.bool)
        mask[order[: self.num_edges]] = True
        pairs = zip(self.weights, self.matrices(mask), strict=True)
        kernels = [_Masked.apply(weight, part)[:, :, None, None] for weight, part in pairs]
        if not self.training:
            self._kept = [kernel.detach() for kernel in kernels]
        return kernels

    def train(self, mode: bool = True) -> DenseGraph:
        """Switch between training and evaluation."""
        self._kept = None
        super().train(mode)
        return self


class StaticGraph(DenseGraph):
    """A static graph: one matrix ``[all later nodes, block]`` per block of nodes except the last."""

    def __init__(self, graph: NeuralGraph) -> None:
        super().__init__(graph)
        self.blocks = graph.blocks
        self.set_weights(graph.candidates.weight)

    def matrices(self, flat: Tensor) -> list[Tensor]:
        """See :class:`DenseGraph`."""
        shapes = [(size, before) for size, before in zip(self.blocks[1:], accumulate(self.blocks), strict=False)]
        by_target = [
            part.view(shape).split(self.blocks[: place + 1], dim=1)
            for place, (part, shape) in enumerate(zip(flat.split([a * b for a, b in shapes]), shapes, strict=True))
        ]
        return [torch.cat([parts[source] for parts in by_target[source:]]) for source in range(len(shapes))]

    def flat(self, matrices: Sequence[Tensor]) -> Tensor:
        """See :class:`DenseGraph`."""
        parts = [matrix.split(self.blocks[source + 1 :]) for source, matrix in enumerate(matrices)]
        rows = [
            torch.cat([parts[source][target - source] for source in range(target + 1)], dim=1)
            for target in range(len(matrices))
        ]
        return torch.cat([part.flatten() for part in rows])

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        z = self.functions[0](x)
        received: list[Tensor] = []
        for place, kernel in enumerate(self.real_weights()):
            sent = F.conv2d(z, kernel).split(self.blocks[place + 1 :], dim=1)
            received = [a + b for a, b in zip(received, sent, strict=True)] if place else list(sent)
            z = self.functions[place + 1](received.pop(0))
        return z


class DynamicGraph(DenseGraph):
    """A graph in discrete or continuous time: one matrix over all nodes."""

    def __init__(self, graph: NeuralGraph) -> None:
        super().__init__(graph)
        self.num_nodes, self.num_outputs = graph.num_nodes, graph.num_outputs
        self.set_weights(graph.candidates.weight)

    def matrices(self, flat: Tensor) -> list[Tensor]:
        """See :class:`DenseGraph`."""
        return [flat.view(self.num_nodes, self.num_nodes)]

    def flat(self, matrices: Sequence[Tensor]) -> Tensor:
        """See :class:`DenseGraph`."""
        return matrices[0].flatten()

    def start(self, x: Tensor) -> Tensor:
        """Return the states of all nodes: the inputs, and zero elsewhere."""
        return F.pad(x, (0, 0, 0, 0, 0, self.num_nodes - x.size(1)))

    def received(self, z: Tensor, kernel: Tensor) -> Tensor:
        """Return f(Z) for states Z: ReLU → depthwise convolution → 1×1 convolution → norm."""
        (function,) = self.functions
        assert isinstance(function, NodeFunction)
        return function.norm(F.conv2d(function.conv(F.relu(z)), kernel))


class DiscreteGraph(DynamicGraph):
    """A fixed number of steps."""

    def __init__(self, graph: NeuralGraph) -> None:
        super().__init__(graph)
        assert isinstance(graph.dynamics, Discrete)
        assert graph.dynamics.steps
        self.steps = graph.dynamics.steps

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs after the last step."""
        (kernel,) = self.real_weights()
        z = self.start(x)
        for _ in range(self.steps):
            z = self.received(z, kernel)
        return z[:, -self.num_outputs :]


class ContinuousGraph(DynamicGraph):
    """A step as the right-hand side of an ODE."""

    def __init__(self, graph: NeuralGraph) -> None:
        super().__init__(graph)
        dynamics = graph.dynamics
        assert isinstance(dynamics, Continuous)
        self.t_span = dynamics.t_span
        self.solver: dict[str, Any] = {"method": dynamics.method, "rtol": dynamics.rtol, "atol": dynamics.atol}

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs at the end."""
        (kernel,) = self.real_weights()
        times = torch.tensor(self.t_span, device=x.device, dtype=x.dtype)
        states = odeint(lambda _, z: self.received(z, kernel), self.start(x), times, **self.solver)
        return states[-1][:, -self.num_outputs :]


class _Patch(nn.Module):
    """The read-out of the tiny classifiers: the mean over rows and columns 2 and 3."""

    def forward(self, z: Tensor) -> Tensor:
        return z[:, :, 2:4, 2:4].mean(dim=(2, 3))


class ReferenceModel(nn.Module):
    """A classifier with dense graphs.

    Args:
        stem: Layers before the graphs.
        graphs: The graphs, in order.
        head: From the last graph's outputs to features.
        classifier: From features to logits.
        layout: Memory format of the feature maps.
    """

    def __init__(
        self,
        stem: nn.Module,
        graphs: Sequence[DenseGraph],
        head: nn.Module,
        classifier: nn.Module,
        layout: torch.memory_format,
    ) -> None:
        super().__init__()
        self.stem, self.graphs, self.head, self.classifier = stem, nn.ModuleList(graphs), head, classifier
        self.layout = layout
        for parameter in self.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=layout)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        z = self.stem(x.contiguous(memory_format=self.layout))
        for graph in self.graphs:
            z = graph(z)
        return self.classifier(self.head(z))


def from_ours(model: nn.Module, layout: torch.memory_format = torch.contiguous_format) -> ReferenceModel:
    """Return the reference formulation of a model, with copies of its weights.

    Args:
        model: A :class:`~dnw_graph.models.MobileNetV1DNW` with a dense classifier, or a
            :class:`~dnw_graph.models.TinyClassifier`; its rule is ``dnw``, or ``random_graph`` and it is not trained.
        layout: Memory format of the feature maps: ``torch.contiguous_format`` or ``torch.channels_last``.
    """
    assert isinstance(model, MobileNetV1DNW | TinyClassifier)
    stem, classifier = copy.deepcopy(model.stem), copy.deepcopy(model.classifier)
    head = _Patch() if isinstance(model, TinyClassifier) else copy.deepcopy(model.head)
    graphs = [dense_graph(graph) for graph in graphs_of(model)]
    reference = ReferenceModel(stem, graphs, head, classifier, layout)
    return reference.to(next(model.parameters()).device).train(model.training)


def dense_graph(graph: NeuralGraph) -> DenseGraph:
    """Return the reference formulation of a graph, with copies of its weights."""
    if isinstance(graph.dynamics, Discrete):
        return DiscreteGraph(graph)
    return ContinuousGraph(graph) if isinstance(graph.dynamics, Continuous) else StaticGraph(graph)


def graphs_of(model: nn.Module) -> list[NeuralGraph]:
    """Return the graphs of a model of this package, in order."""
    return [module for module in model.modules() if isinstance(module, NeuralGraph)]

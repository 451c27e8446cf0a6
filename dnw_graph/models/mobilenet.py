"""MobileNetV1 and MobileNetV1-DNW: the two columns of Table 5 of the paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dnw_graph.arguments import checked, require
from dnw_graph.candidates import CandidateEdges
from dnw_graph.errors import InputError
from dnw_graph.models.image_classifier import ImageClassifier
from dnw_graph.neural_graph import NeuralGraph
from dnw_graph.node_functions import Biased, NodeFunction
from dnw_graph.propagation import Propagation
from dnw_graph.wirings import Wiring, budget

STAGES = ((32, 64), (64, 128, 128), (128, 256, 256), (256, *[512] * 6), (512, 1024, 1024))
"""Channels of each stage at width 1: its inputs, then the outputs of each pointwise convolution."""

WIDEST = 32
"""Largest width of MobileNetV1, with three billion weights."""


def _check(width: float | int, num_classes: int, stem_stride: int) -> None:
    require(width > 0, "width", "a positive number, such as 0.225", width)
    require(num_classes >= 1, "num_classes", "an integer >= 1", num_classes)
    require(stem_stride in (1, 2), "stem_stride", "2, or 1 for small images", stem_stride)


class MobileNetV1(ImageClassifier):
    """MobileNetV1 (Howard et al. 2017, arXiv 1704.04861), built of depthwise separable convolutions.

    Batch norm and ReLU follow each convolution. Channels are ⌊width · c⌋, at least 1.

    Args:
        width: Width multiplier of all channels.
        num_classes: Number of classes.
        stem_stride: Stride of the first convolution: 2, or 1 for small images.

    Shapes:
        - input: ``[batch, 3, height, width]``
        - output: logits ``[batch, num_classes]``

    Raises:
        InputError: If an argument is out of range.
    """

    @checked
    def __init__(self, width: float | int = 1.0, num_classes: int = 1000, stem_stride: int = 2) -> None:
        super().__init__()
        _check(width, num_classes, stem_stride)
        require(width <= WIDEST, "width", f"at most {WIDEST}", width)
        self.width = width

        def scaled(channels: int) -> int:
            return max(1, math.floor(channels * Fraction(str(width))))

        self.stem = nn.Sequential(*_conv_norm_relu(3, scaled(STAGES[0][0]), 3, stem_stride))
        layers: list[nn.Module] = []
        for number, stage in enumerate(STAGES):
            channels = [scaled(c) for c in stage]
            for position, (c_in, c_out) in enumerate(pairwise(channels)):
                stride = 2 if number > 0 and position == 0 else 1
                layers += _conv_norm_relu(c_in, c_in, 3, stride, groups=c_in)
                layers += _conv_norm_relu(c_in, c_out, 1)
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(scaled(STAGES[-1][-1]), num_classes)

    def modules_in_order(self) -> list[nn.Module]:
        """Return the modules in the order in which they are applied."""
        return [self.stem, self.features, self.pool, self.flatten, self.classifier]


def _conv_norm_relu(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]


class GraphClassifier(nn.Module):
    """A linear classifier with few real edges: a bipartite neural graph and a bias.

    Args:
        num_features: Number of input features.
        num_classes: Number of classes.
        num_edges: Number of real edges.
        wiring: See :class:`~dnw_graph.NeuralGraph`.

    Shapes:
        - input: ``[batch, num_features]``
        - output: ``[batch, num_classes]``
    """

    @checked
    def __init__(self, num_features: int, num_classes: int, num_edges: int, wiring: str | Wiring) -> None:
        super().__init__()
        self.graph = NeuralGraph(
            (num_features, num_classes),
            budget(wiring, num_edges),
            wiring=wiring,
            input_function=False,
            name="classifier",
        )
        bound = 1 / math.sqrt(num_features)
        self.bias = nn.Parameter(torch.empty(num_classes).uniform_(-bound, bound))

    def forward(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch classes"]:
        """Return the logits."""
        return self.graph(x) + self.bias

    def modules_in_order(self) -> list[nn.Module]:
        """Return the graph, and a layer with a copy of the bias."""
        return [self.graph, Biased(self.bias, nn.Identity())]


class MobileNetV1DNW(ImageClassifier):
    """MobileNetV1-DNW: one neural graph per resolution in place of MobileNetV1's layers (Section 2.4 of the paper).

    arXiv 1906.00586. Stage i is a static graph with the blocks of Table 5; its outputs are the inputs of the next
    stage. It has as many edges as MobileNetV1 × width has pointwise weights at that resolution: ⌊width² · c⌋. The
    stride of a stage belongs to the node function of its inputs. Batch norm and ReLU follow the last stage, before the
    pooling.

    Args:
        width: Width multiplier d: it sets the number of edges, never the number of nodes. The rule
            ``"nm"`` determines the number of edges itself.
        num_classes: Number of classes.
        stem_stride: Stride of the first convolution: 2, or 1 for small images.
        small: Learn the classifier's edges too, ⌊width · 1024 · num_classes⌋ of them (MobileNetV1-DNW-Small).
        wiring: Rule for all graphs, see :class:`~dnw_graph.NeuralGraph`.
        node_function: Node function of all stages.
        layered: Allow edges between adjacent blocks only. With ``width=1`` and ``node_function=
            "norm_relu_conv_norm_relu"`` the stages are then those of MobileNetV1, weight for weight.
        propagation: See :class:`~dnw_graph.NeuralGraph`.
        recompute: See :class:`~dnw_graph.NeuralGraph`.

    Shapes:
        - input: ``[batch, 3, height, width]``
        - output: logits ``[batch, num_classes]``

    Raises:
        InputError: If an argument is out of range or a name unknown.
    """

    memory_format = torch.channels_last

    @checked
    def __init__(
        self,
        width: float | int = 0.225,
        num_classes: int = 1000,
        stem_stride: int = 2,
        *,
        small: bool = False,
        wiring: str | Wiring = "dnw",
        node_function: NodeFunction = "norm_relu_conv",
        layered: bool = False,
        propagation: str | Propagation = "auto",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        _check(width, num_classes, stem_stride)
        self.width = width
        self.stem = nn.Conv2d(3, STAGES[0][0], 3, stem_stride, 1, bias=False)
        self.stages = nn.ModuleList(
            NeuralGraph(
                stage,
                budget(wiring, edges_at_width(stage, width)),
                wiring=wiring,
                node_function=node_function,
                propagation=propagation,
                stride=1 if number == 1 else 2,
                candidates=CandidateEdges.adjacent(stage) if layered else None,
                recompute=recompute,
                name=f"stage{number}",
            )
            for number, stage in enumerate(STAGES, start=1)
        )
        num_features = STAGES[-1][-1]
        self.head = nn.Sequential(
            nn.BatchNorm2d(num_features), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.classifier: nn.Module
        if small:
            num_edges = math.floor(num_features * num_classes * Fraction(str(width)))
            self.classifier = GraphClassifier(num_features, num_classes, num_edges, wiring)
        else:
            self.classifier = nn.Linear(num_features, num_classes)

    def modules_in_order(self) -> list[nn.Module]:
        """Return the modules in the order in which they are applied."""
        return [self.stem, *self.stages, self.head, self.classifier]


@checked
def edges_at_width(stage: Sequence[int], width: float | int) -> int:
    """Return ⌊width² · c⌋ for the c pointwise weights of a stage of MobileNetV1.

    Raises:
        InputError: If no edge is left.
    """
    weights = sum(a * b for a, b in pairwise(stage))
    # Exact fractions of the decimal number: 0.1² · 100 must not fall below 1.
    num_edges = math.floor(weights * Fraction(str(width)) ** 2)
    if num_edges < 1:
        raise InputError(f"width {width} leaves no edge in a stage of {weights:,} pointwise weights")
    return num_edges

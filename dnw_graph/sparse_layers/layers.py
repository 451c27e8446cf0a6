"""The weights of layers as candidate edges between the inputs and the output channels of a layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dnw_graph.arguments import checked
from dnw_graph.candidates import CandidateEdges, RankedWeight

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
PROJECTIONS = ("q", "k", "v")
LAYERS: dict[type[nn.Module], tuple[tuple[str, ...], bool]] = {
    nn.Linear: (("weight",), False),
    **{kind: (("weight",), kind in TRANSPOSED) for kind in CONVOLUTIONS},
    nn.MultiheadAttention: (("in_proj_weight", *(f"{each}_proj_weight" for each in PROJECTIONS)), False),
}
"""Layer types, with the names of their weights and whether these have their input channels first."""


@checked
def register_layer(kind: type[nn.Module], weights: Sequence[str] = ("weight",), *, inputs_first: bool = False) -> None:
    """Register a layer type for :func:`sparsify`, including subclasses that do not override its methods.

    A layer must use its weight unchanged: y = W x, at every position of a map. For subclasses of PyTorch's layers that
    override the forward pass, ``sparsify`` tests this by a trial; registering the subclass asserts it.

    Args:
        kind: The type.
        weights: Names of its weights: parameters ``[outputs, inputs, *kernel]``.
        inputs_first: Whether they are ``[inputs, outputs, *kernel]``.

    Raises:
        InputError: If it is not a type of modules.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from dnw_graph.sparse_layers import register_layer, sparsify
        >>> class Conv1D(nn.Module):  # of GPT-2 in Hugging Face's transformers
        ...     def __init__(self, outputs, inputs):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(0.02 * torch.randn(inputs, outputs))
        ...
        ...     def forward(self, x):
        ...         return x @ self.weight
        >>> register_layer(Conv1D, inputs_first=True)
        >>> print(sparsify(nn.Sequential(Conv1D(20, 10)), density=0.1))
        weight                shape  weights  kept   share
        0.weight              10×20      200    20  10.00%
        total, sparse layers             200    20  10.00%
    """
    LAYERS[kind] = (tuple(weights), inputs_first)


def registered(layer: nn.Module) -> type[nn.Module] | None:
    """Return the most specific registered type of a layer, or None."""
    return next((kind for kind in type(layer).__mro__ if kind in LAYERS), None)


@dataclass(frozen=True, eq=False)
class LayerWeight(RankedWeight):
    """One weight of a layer, ranked as a vector in the order output channel, input channel, position in the kernel.

    Attributes:
        names: The parameter's names in the model, one per path to its layer; a projection in ``in_proj_weight`` adds
            ``.q``, ``.k`` or ``.v``.
        layer: The module that the parameter belongs to.
        parameter_name: The parameter's name in that module.
        third: Which third of the parameter's rows this weight is; None for all rows.
        transposed: Whether the parameter has its input channels first, as transposed convolutions do.
    """

    names: tuple[str, ...]
    layer: nn.Module
    parameter_name: str
    third: int | None = None
    transposed: bool = False

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    @property
    def parameter(self) -> Tensor:
        """The parameter as the optimiser has it, sparse or not."""
        if parametrize.is_parametrized(self.layer, self.parameter_name):
            return self.layer.parametrizations[self.parameter_name].original  # type: ignore[union-attr, index]
        return getattr(self.layer, self.parameter_name)

    @property
    def holder(self) -> Any:
        """The parametrization, which has the probe."""
        return self.layer.parametrizations[self.parameter_name][0]  # type: ignore[index]

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight; of a projection, a third of the parameter's rows."""
        rows, *others = self.parameter.shape
        return torch.Size([rows if self.third is None else rows // 3, *others])

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.shape.numel()

    @property
    def groups(self) -> int:
        """Groups of a convolution; each is a graph of its own channels."""
        return self.layer.groups if isinstance(self.layer, CONVOLUTIONS) else 1

    @property
    def channels(self) -> tuple[int, int]:
        """Number of input and of output channels."""
        first, second = self.shape[:2]
        return (first, second * self.groups) if self.transposed else (second * self.groups, first)

    @property
    def kernel(self) -> torch.Size:
        """Size of the kernel; empty for a matrix."""
        return self.shape[2:]

    def flat(self, parameter: Shaped[Tensor, "rows ..."]) -> Shaped[Tensor, " candidates"]:
        """Return the weight's part of a tensor of the parameter's shape as a vector; a view where possible."""
        if self.third is not None:
            parameter = parameter.chunk(3)[self.third]
        if self.transposed:
            parameter = parameter.unflatten(0, (self.groups, -1)).transpose(1, 2)
        return parameter.reshape(-1)

    def shaped(self, flat: Shaped[Tensor, " candidates"]) -> Shaped[Tensor, "rows ..."]:
        """Return a vector of one value per candidate in the shape of the weight: the inverse of :meth:`flat`."""
        if not self.transposed:
            return flat.view(self.shape)
        return flat.view(self.groups, self.shape[1], -1, *self.kernel).transpose(1, 2).reshape(self.shape)

    def mask(self, index: Shaped[Tensor, " edges"], like: Tensor) -> Shaped[Tensor, "rows ..."]:
        """Return 1 for some candidates and 0 for all others, in the shape of the weight.

        Args:
            index: Flat indices of the candidates.
            like: A tensor with the dtype of the mask.
        """
        return self.shaped(like.detach().new_zeros(self.numel).index_fill_(0, index, 1))

    def write(self, flat: Shaped[Tensor, " candidates"], parameter: Shaped[Tensor, "rows ..."]) -> None:
        """Set the weight's part of a tensor of the parameter's shape from a vector."""
        rows = parameter if self.third is None else parameter.chunk(3)[self.third]
        rows.copy_(self.shaped(flat))

    @property
    def matrices(self) -> tuple[tuple[int, int, int]]:
        """First index in the parameter, rows, and columns."""
        rows = self.shape[0]
        return (((self.third or 0) * self.numel, rows, self.numel // rows),)

    def positions(self, index: Shaped[Tensor, " edges"]) -> Shaped[Tensor, " edges"]:
        """Return the positions of candidates in the flattened parameter."""
        if not self.transposed:
            return index + self.third * self.numel if self.third else index
        inputs, outputs = self.channels
        sizes = torch.Size([self.groups, outputs // self.groups, inputs // self.groups, self.kernel.numel()])
        group, target, source, place = torch.unravel_index(index, sizes)
        return ((group * sizes[2] + source) * sizes[1] + target) * sizes[3] + place

    def channel_pairs(self, index: Shaped[Tensor, " edges"]) -> tuple[Tensor, Tensor, Tensor]:
        """Return input channel, output channel and kernel position, ``[edges, kernel dims]``, of flat indices."""
        inputs, outputs = self.channels
        places = math.prod(self.kernel)
        slot = index // places
        target, within = slot // (inputs // self.groups), slot % (inputs // self.groups)
        group = target // (outputs // self.groups)
        place = (
            torch.stack(torch.unravel_index(index % places, self.kernel), 1) if self.kernel else index[:, None][:, :0]
        )
        return group * (inputs // self.groups) + within, target, place


def find_weights(module: nn.Module) -> Iterator[LayerWeight]:
    """Yield the weights of all layers of registered types that are plain parameters."""
    paths: dict[nn.Module, list[str]] = {}
    for path, layer in module.named_modules(remove_duplicate=False):
        paths.setdefault(layer, []).append(f"{path}." if path else "")
    for layer, prefixes in paths.items():
        kind = registered(layer)
        if kind is None:
            continue
        own = dict(own_parameters(layer))
        weights, inputs_first = LAYERS[kind]
        for name in weights:
            if name in own:
                for third in range(3) if name == "in_proj_weight" else (None,):
                    names = tuple(weight_name(path + name, third) for path in prefixes)
                    yield LayerWeight(names, layer, name, third, inputs_first)


def own_parameters(layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield a layer's own parameters, each under every name that it has there."""
    return layer.named_parameters(recurse=False, remove_duplicate=False)


def weight_name(parameter: str, third: int | None) -> str:
    """Return the name of a weight from its parameter's: a projection in ``in_proj_weight`` adds its letter."""
    return parameter if third is None else f"{parameter}.{PROJECTIONS[third]}"


def candidate_edges(weights: tuple[LayerWeight, ...], flat: Tensor) -> CandidateEdges:
    """Return the candidates for a rule: a dense block per weight; blocks have no node in common.

    The targets of a block are the layer's output channels; its sources are pairs of an input channel (of its group) and
    a position in the kernel.

    Args:
        weights: The weights that are ranked together.
        flat: Their values, one vector.
    """
    blocks, start = [], 0
    for weight in weights:
        targets = weight.channels[1]
        sources = range(start, start + weight.numel // targets)
        start = sources.stop + targets
        blocks.append((sources, range(sources.stop, start)))
    with torch.device("meta"):  # The weights exist already: no memory and no random numbers for them.
        candidates = CandidateEdges(blocks)
    candidates.places = tuple(weight.kernel.numel() for weight in weights)
    candidates.weight = nn.Parameter(flat, requires_grad=False)
    return candidates

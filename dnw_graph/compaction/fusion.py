"""Fuses operations: norms are folded into the layers before them, static graphs become one operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dnw_graph.compaction.plain_layers import Activation, Affine, Chain, Conv, Layer, MapMean
from dnw_graph.compaction.products import SparseProduct
from dnw_graph.compaction.sparse_layers import SparseLayer
from dnw_graph.compaction.static_graphs import FusedGraph, StaticGraph


def fold(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """Fold every scale and shift into the layer before it, where that layer is linear.

    A norm behind a linear layer is folded for vectors only: of other inputs it normalises another dimension.
    """
    folded: list[nn.Module] = []
    vectors = False  # whether the layers so far certainly return vectors
    for layer in layers:
        last = folded[-1] if folded else None
        known = isinstance(last, Layer) and (vectors or not last.on_last)
        if isinstance(layer, Affine) and isinstance(last, Layer) and known and last.absorb(layer.scale, layer.shift):
            continue
        folded.append(layer)
        flattens = isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) == (1, -1)
        vectors = flattens or isinstance(layer, MapMean) or (vectors and isinstance(layer, Layer))
    return folded


def fuse(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """Fuse sequences of static graphs of (norm →) ReLU → 3×3 convolution (→ ReLU) into one operator each.

    A ReLU after a sparse layer becomes part of it, unless a graph begins with it.
    """
    fused: list[nn.Module] = []
    place = 0
    while place < len(layers):
        last = fused[-1] if fused else None
        run, after = _run(layers, place)
        if run is None and isinstance(last, SparseLayer) and _is_relu(layers[place]):
            last.relu = True
        else:
            fused.append(run or layers[place])
        place = after
    return fused


@dataclass(frozen=True)
class _Function:
    """A node function ReLU → 3×3 convolution, followed by a ReLU if ``relu`` is true."""

    conv: Conv
    relu: bool


def _function(layers: Sequence[nn.Module]) -> tuple[_Function | None, int]:
    """Return the node function at the start of the layers, if the operator supports it, and its number of layers."""
    if len(layers) < 2 or not _is_relu(layers[0]):
        return None, 0
    conv = layers[1]
    if not (isinstance(conv, Conv) and conv.single_channel and conv.weight.shape[2:] == (3, 3)):
        return None, 0
    if conv.stride not in ([1, 1], [2, 2]) or conv.padding != [1, 1] or conv.dilation != [1, 1]:
        return None, 0
    if len(layers) > 2 and _is_relu(layers[2]):
        return _Function(conv, True), 3
    return (_Function(conv, False), 2) if conv.bias is None else (None, 0)


def _run(layers: Sequence[nn.Module], place: int) -> tuple[FusedGraph | None, int]:
    """Return the static graphs that begin at an index as one operator, and the index after them."""
    start = place
    affine = layers[place] if isinstance(layers[place], Affine) else None
    place += affine is not None
    functions: list[_Function] = []
    shifts: list[Tensor] = []
    parts: list[tuple[SparseProduct, int]] = []  # Each with the number of the first node that feeds it.
    strides: list[int] = []
    sizes: list[int] = []
    while True:
        entry, length = _function(layers[place:])
        graph = layers[place + length] if entry and place + length < len(layers) else None
        inner = _inner(graph) if isinstance(graph, StaticGraph) else None
        if entry is None or inner is None or {f.relu for f in [entry, *inner, *functions[:1]]} != {entry.relu}:
            break
        assert isinstance(graph, StaticGraph)
        if not sizes:
            sizes.append(entry.conv.num_outputs)
            strides.append(0)
            zero = torch.zeros_like(entry.conv.weight[:, 0, 0, 0])
            shifts.append(affine.shift.to(zero.dtype) if isinstance(affine, Affine) else zero)
        strides[-1] = entry.conv.stride[0]
        first = sum(sizes[:-1])
        blocks = [sizes[-1]]
        for product, (low, _) in zip(graph.products, graph.feeding, strict=True):
            assert isinstance(product, SparseProduct)
            parts.append((product, first + sum(blocks[:low])))
            blocks.append(product.num_outputs)
            shifts.append(product.bias)
        sizes += blocks[1:]
        strides += [1] * len(inner) + [0]
        functions += [entry, *inner]
        place += length + 1
    if not functions:
        return None, start + 1
    *shifts, output_shift = shifts
    scale = torch.ones_like(torch.cat(shifts))
    if isinstance(affine, Affine):
        scale[: sizes[0]] = affine.scale
    bias = None
    if functions[0].relu:
        biases = [
            f.conv.weight.new_zeros(f.conv.num_outputs) if f.conv.bias is None else f.conv.bias for f in functions
        ]
        bias = torch.cat(biases)
    rowptrs, edges = [parts[0][0].rowptr[:1]], 0
    for product, _ in parts:
        rowptrs.append(product.rowptr[1:] + edges)
        edges += product.num_edges
    graph = FusedGraph(
        sizes=sizes,
        strides=strides,
        rowptr=torch.cat(rowptrs),
        columns=torch.cat([product.columns + first for product, first in parts]),
        values=torch.cat([product.values for product, _ in parts]),
        scale=scale,
        shift=torch.cat(shifts),
        kernel=torch.cat([function.conv.weight[:, 0] for function in functions]),
        bias=bias,
        output_shift=output_shift,
    )
    return graph, place


def _inner(graph: StaticGraph) -> list[_Function] | None:
    """Return the node functions between inputs and outputs, if the operator supports them and products are sparse."""
    inner = []
    for chain in graph.functions:
        layers = list(chain.layers) if isinstance(chain, Chain) else []
        function, length = _function(layers)
        if function is None or length != len(layers) or function.conv.stride != [1, 1]:
            return None
        inner.append(function)
    return inner if all(isinstance(product, SparseProduct) for product in graph.products) else None


def _is_relu(layer: nn.Module) -> bool:
    return isinstance(layer, Activation) and layer.name == "relu"

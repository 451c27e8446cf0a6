"""The rows of the report for linear layers and convolutions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dnw_graph.compaction.functions import linear_or_conv
from dnw_graph.compaction.gaps import to_gaps
from dnw_graph.compaction.plain_layers import Layer, Linear
from dnw_graph.compaction.report import LayerRow
from dnw_graph.compaction.sparse_layers import DENSEST, SMALLEST, SparseLayer, SparseLinear, pays
from dnw_graph.sparse_layers.layers import CONVOLUTIONS, TRANSPOSED

LAYERS = (nn.Linear, *CONVOLUTIONS)


def layer_rows(model: nn.Module, compacted: nn.Module, example: Tensor | None) -> list[LayerRow]:
    """Return a row for every linear layer and convolution that is not removed as a whole.

    Args:
        model: The model, with zeros for hallucinated weights.
        compacted: The compact model.
        example: A batch of inputs; multiply-adds are for one of them.
    """
    made: dict[str, nn.Module] = {}
    labelled = ((getattr(layer, "label", ""), layer) for layer in compacted.modules())
    made |= {label: layer for label, layer in labelled if label and isinstance(layer, (Layer, *LAYERS))}
    made |= {name: layer for name, layer in compacted.named_modules() if name and isinstance(layer, LAYERS)}
    originals = {name: layer for name, layer in model.named_modules() if isinstance(layer, LAYERS) and name in made}
    places = _places(made, compacted, example)
    return [_row(name, layer, made[name], places.get(name)) for name, layer in originals.items()]


def _row(name: str, original: nn.Module, layer: nn.Module, places: int | None) -> LayerRow:
    if isinstance(layer, SparseLayer):
        weights, kept, why = (len(layer.rowptr) - 1) * layer.sources, len(layer.values), ""
        size = layer.values.nbytes + to_gaps(layer.rowptr, layer.columns, layer.sources).nbytes
    else:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        weights, kept, size = weight.numel(), int(weight.count_nonzero()), weight.nbytes
        why = _why_dense(original, weight)
    bias = layer.bias
    size += bias.nbytes if isinstance(bias, Tensor) else 0
    form = "sparse" if isinstance(layer, SparseLayer) else "dense"
    return LayerRow(name, weights, kept, form, why, size, None if places is None else kept * places)


def _why_dense(original: nn.Module, weight: Tensor) -> str:
    if pays(weight):
        return "" if linear_or_conv(original) else f"{type(original).__name__} has no sparse form"
    return (
        f"fewer than {SMALLEST:,} weights" if weight.numel() < SMALLEST else f"more than {DENSEST:.0%} of the weights"
    )


def _places(made: dict[str, nn.Module], compacted: nn.Module, example: Tensor | None) -> dict[str, int]:
    """Return how often each layer applies each of its weights to one input of the example."""
    found: dict[str, int] = {}
    if example is None:
        return found
    handles = []
    for name, layer in made.items():
        channels_last = isinstance(layer, nn.Linear | Linear | SparseLinear)

        def note(
            module: nn.Module, args: tuple[Tensor, ...], out: Tensor, name: str = name, last: bool = channels_last
        ) -> None:
            # Each weight of a transposed convolution acts once per position of its input.
            shape = out.shape[1:-1] if last else (args[0] if isinstance(module, TRANSPOSED) else out).shape[2:]
            found[name] = found.get(name, 0) + math.prod(shape)

        handles.append(layer.register_forward_hook(note))
    try:
        with torch.no_grad():
            compacted(example[:1])
    finally:
        for handle in handles:
            handle.remove()
    return found

"""Converts state dicts between dense and sparse models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dnw_graph.arguments import checked
from dnw_graph.errors import InputError
from dnw_graph.ranking import check_saved
from dnw_graph.sparse_layers.access import sparse_parameters
from dnw_graph.sparse_layers.reading import plain


def before_loading(layer: nn.Module, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
    """Convert the state of a dense layer for a sparse one, and refuse edges that the layer cannot have.

    A pre-hook of ``load_state_dict``. With a dense state, rules keep their own state.

    Raises:
        InputError: See :meth:`~dnw_graph.wirings.Wiring.check_saved`.
    """
    for path, _, name, real in sparse_parameters(layer):
        if path:
            continue
        chain = f"{prefix}parametrizations.{name}."
        if prefix + name in state_dict:
            state_dict[chain + "original"] = state_dict.pop(prefix + name)
            for key, value in real.state_dict().items():
                state_dict.setdefault(f"{chain}0.{key}", value)
        for number, graph in enumerate(real.owned):
            saved = state_dict.get(f"{chain}0.owned.{number}.num_edges")
            if graph.has_parted and isinstance(saved, Tensor) and 1 <= int(saved) <= graph.num_candidates:
                graph._num_edges = int(saved)  # After layers have left, it depends on their weights.
            check_saved(graph, state_dict, f"{chain}0.owned.{number}.")


@checked
def dense_state_dict(module: nn.Module, *, keep_hallucinated: bool = False) -> dict[str, Tensor]:
    """Return the state dict that the module would have without sparse weights, for a dense model to load.

    Args:
        module: A module with sparse weights.
        keep_hallucinated: Include the values of hallucinated weights instead of zeros.

    Raises:
        InputError: If there is no sparse weight.
    """
    found = list(sparse_parameters(module))
    if not found:
        raise InputError(f"{type(module).__name__} has no sparse weight: its state_dict() is a dense one")
    state = module.state_dict()
    for path, layer, name, _ in found:
        prefix = f"{path}." if path else ""
        chain = f"{prefix}parametrizations.{name}."
        original = state[chain + "original"]
        with torch.no_grad():
            state[prefix + name] = original if keep_hallucinated else plain(getattr(layer, name))
        for key in [key for key in state if key.startswith(chain)]:
            del state[key]
    return state

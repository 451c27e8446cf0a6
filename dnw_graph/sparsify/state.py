"""State dicts of dense models for sparse ones, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dnw_graph.arguments import checked
from dnw_graph.errors import InputError
from dnw_graph.sparsify.access import sparse_parameters


def accept_dense_names(layer: nn.Module, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
    """Have a layer load the weights of a dense one (a pre-hook of ``load_state_dict``); rules keep their state."""
    for path, _, name, real in sparse_parameters(layer):
        if not path and prefix + name in state_dict:
            chain = f"{prefix}parametrizations.{name}."
            state_dict[chain + "original"] = state_dict.pop(prefix + name)
            for key, value in real.state_dict().items():
                state_dict.setdefault(f"{chain}0.{key}", value)


@checked
def dense_state_dict(module: nn.Module, *, keep_hallucinated: bool = False) -> dict[str, Tensor]:
    """Return the state dict that the module would have without sparse weights, for a dense model to load.

    Args:
        module: A module with sparse weights.
        keep_hallucinated: Give the hallucinated weights' values instead of zeros.

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
            state[prefix + name] = original if keep_hallucinated else getattr(layer, name)
        for key in [key for key in state if key.startswith(chain)]:
            del state[key]
    return state

"""One small file for a model that can still be trained: the weights of real edges, and all other parameters."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dnw_graph._compat import unwrapped, unwrapped_name
from dnw_graph.arguments import checked
from dnw_graph.checksum import checksum
from dnw_graph.compaction.gaps import from_gaps, to_gaps
from dnw_graph.errors import InputError
from dnw_graph.model_card import written_card
from dnw_graph.neural_graph import NeuralGraph
from dnw_graph.whole_file import write_whole

FORMAT, VERSION = "dnw_graph.weights", "1"
# Buffers of rules that hold the real edges, as indices or as a mask; the file has these edges already.
INDEX, MASK = "wiring.index", "wiring.real"


@checked
def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model to a file from which :func:`dnw_graph.load` restores it, including norms and graphs.

    Of the candidate weights of neural graphs the file holds only those of real edges; the others are 0 after loading.
    The model computes the same, and can be trained further. The index of an edge takes about one byte
    (:mod:`dnw_graph.compaction.gaps`).

    Args:
        model: A model that :func:`dnw_graph.load` returned, perhaps trained further: its card describes it. Of a
            wrapper for compilation, averages or several devices, the model in it is written.
        path: The file, with the suffix ``.safetensors``. It is written atomically.

    Raises:
        InputError: If the model has no card that names its options, or the file cannot be written.
    """
    from safetensors.torch import save

    model = unwrapped(model)
    card = written_card(model)
    if card is None or card.models is None:
        raise InputError(
            f"this {type(model).__name__} has no card with options: save a model that dnw_graph.load returned, with "
            "registered options (dnw_graph.training.register_models)"
        )
    state = model.state_dict()
    tensors = {unwrapped_name(name): tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    for prefix, graph in _graphs(model):
        index = graph.real_index.cpu()
        weight = tensors.pop(f"{prefix}candidates.weight")
        tensors[f"{prefix}edge_weight"] = weight[index]
        tensors[f"{prefix}edge_gaps"] = to_gaps(index.new_tensor([0, len(index)]), index, len(weight))
        for name in (INDEX, MASK):
            tensors.pop(prefix + name, None)
    metadata = {"format": FORMAT, "version": VERSION, "card": card.to_json()}
    write_whole(Path(path), save(tensors, {**metadata, "checksum": checksum([metadata, tensors])}), "path")


def read_weights(path: Path) -> Callable[[nn.Module], dict[str, Any]]:
    """Read a file that :func:`save_weights` wrote.

    Returns:
        A function that makes the ``state_dict`` of a model.

    Raises:
        InputError: If it is damaged, or of another version.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            # Copied: the tensors are views of the file, which may be overwritten later.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        found = metadata.pop("checksum", None)
        intact = checksum([metadata, tensors]) == found
    except Exception as error:  # a damaged file can fail anywhere in the decoder
        raise InputError(f"{path} cannot be read ({type(error).__name__}): it is damaged") from error
    if metadata.get("version") != VERSION:
        raise InputError(f"{path} has another format version than {VERSION}: update dnw-graph")
    if not intact:
        raise InputError(f"{path} does not hold what was written (its checksum differs): it is damaged")
    return partial(_restored, path, tensors)


def _restored(path: Path, tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {unwrapped_name(name): tensor for name, tensor in tensors.items()}
    own = {unwrapped_name(name): name for name in model.state_dict()}
    for prefix, graph in _graphs(model):
        like = graph.candidates.weight
        try:
            weights, gaps = state.pop(f"{prefix}edge_weight"), state.pop(f"{prefix}edge_gaps")
            _, index = from_gaps(gaps, 1, like.numel(), torch.long)
            state[f"{prefix}candidates.weight"] = torch.zeros_like(like).index_copy(0, index, weights.to(like.dtype))
        except (KeyError, RuntimeError, IndexError, InputError) as error:
            raise InputError(f"{path} does not hold the edges of {graph.name}: give a file of this model") from error
        if prefix + INDEX in own:
            state[prefix + INDEX] = index
        if prefix + MASK in own:
            state[prefix + MASK] = torch.zeros(like.numel(), dtype=torch.uint8, device=index.device).index_fill(
                0, index, 1
            )
    return {own.get(name, name): tensor for name, tensor in state.items()}


def is_weights_file(path: Path) -> bool:
    """Return whether a ``.safetensors`` file is one of :func:`save_weights`; False for one that cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


def _graphs(model: nn.Module) -> list[tuple[str, NeuralGraph]]:
    """Return the neural graphs of a model, each with the prefix of its names in the ``state_dict``."""
    graphs = ((unwrapped_name(path), each) for path, each in model.named_modules() if isinstance(each, NeuralGraph))
    return [(f"{path}." if path else "", each) for path, each in graphs]

"""One file for a compact model: its tensors in safetensors, its structure as JSON in the file's metadata."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dnw_graph._compat import unwrapped
from dnw_graph.arguments import checked, wrong
from dnw_graph.checksum import checksum
from dnw_graph.compaction.dynamic_graphs import ContinuousGraph, DiscreteGraph, RungeKuttaGraph, Step
from dnw_graph.compaction.functions import PerBlock
from dnw_graph.compaction.gaps import from_gaps, to_gaps
from dnw_graph.compaction.model import CompactModel
from dnw_graph.compaction.network import Network, Operation
from dnw_graph.compaction.plain_layers import (
    Activation,
    Affine,
    Chain,
    Conv,
    InstanceNorm,
    Layer,
    Linear,
    MapMean,
    Select,
)
from dnw_graph.compaction.products import DenseProduct, SparseProduct
from dnw_graph.compaction.sparse_layers import SparseConv, SparseLinear
from dnw_graph.compaction.static_graphs import FusedGraph, StaticGraph
from dnw_graph.errors import InputError
from dnw_graph.model_card import ModelCard, written_card
from dnw_graph.ops.operands import FLOATS, INTEGERS
from dnw_graph.whole_file import write_whole

FORMAT = "dnw_graph.compact"
VERSION = 3

KINDS: dict[str, type[Layer]] = {
    "activation": Activation,
    "affine": Affine,
    "chain": Chain,
    "continuous_graph": ContinuousGraph,
    "conv": Conv,
    "dense_product": DenseProduct,
    "discrete_graph": DiscreteGraph,
    "fused_graph": FusedGraph,
    "instance_norm": InstanceNorm,
    "linear": Linear,
    "map_mean": MapMean,
    "model": CompactModel,
    "network": Network,
    "operation": Operation,
    "per_block": PerBlock,
    "runge_kutta_graph": RungeKuttaGraph,
    "select": Select,
    "sparse_conv": SparseConv,
    "sparse_linear": SparseLinear,
    "sparse_product": SparseProduct,
    "static_graph": StaticGraph,
    "step": Step,
}
"""The layers that a file can hold. A new layer, or a new option without a default, needs a new version."""
ROUNDED = ("values", "weight")  # Tensors that may be rounded; biases and folded norms may not.


@checked
def save_compact(module: nn.Module, path: str | os.PathLike[str], weight_dtype: torch.dtype | None = None) -> None:
    """Write a compact model to a file, from which :func:`load_compact` restores it without the original model.

    Besides its value, an edge or a weight of a sparse layer takes one byte for its position: the number of zeros before
    it, with a further byte for every 255 of them. The file is written atomically. It includes the card of a model that
    :func:`dnw_graph.load` returned.

    Args:
        module: What :func:`~dnw_graph.compaction.compact` returned.
        path: The file, usually with the suffix ``.safetensors``.
        weight_dtype: ``torch.bfloat16`` or ``torch.float16``: weights are rounded to it in the file, at half the size,
            and have the dtype of the model again when loaded. Default: no rounding.

    Raises:
        InputError: If ``weight_dtype`` is another dtype or too small for a weight, the model contains a module that is
            not a layer of this package or an option that is not a plain value, or the file cannot be written.
    """
    from safetensors.torch import save

    module = unwrapped(module)
    if not isinstance(module, CompactModel):
        raise InputError(
            f"{type(module).__name__} is not a CompactModel: save what compact(…) returned for a NeuralGraph, a model "
            "of this package or an nn.Sequential; any other module can be written with torch.export"
        )
    if weight_dtype not in (None, torch.bfloat16, torch.float16):
        raise wrong("weight_dtype", "torch.bfloat16, torch.float16 or None", weight_dtype)
    tensors: dict[str, Tensor] = {}
    config = json.dumps(_describe(module, "", weight_dtype, tensors))
    metadata = {"format": FORMAT, "version": str(VERSION), "config": config}
    if card := written_card(module):
        metadata["card"] = card.to_json()
    contents = save(tensors, {**metadata, "checksum": checksum([metadata, tensors])})
    write_whole(Path(path), contents, "path")


@checked
def load_compact(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> CompactModel:
    """Return the compact model that :func:`save_compact` wrote; no code in the file is run.

    Args:
        path: The file.
        device: Where the tensors go.

    Raises:
        InputError: If the file is missing, truncated, damaged, not a compact model, or of another version.
    """
    from safetensors import safe_open

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise wrong("device", "a device of this machine, such as 'cpu' or 'cuda'", device) from error
    path = Path(path)
    if not os.path.isfile(path):
        raise InputError(f"{str(path)!r} is not a file: give a file that save_compact wrote")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copied: the tensors are views of the file, which may be overwritten later.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # A damaged file can fail anywhere in the decoder.
        raise InputError(
            f"{path} cannot be read ({_short(error)}): it is damaged or not a file of save_compact"
        ) from error
    _check_format(path, metadata)
    found = metadata.pop("checksum", None)
    if checksum([metadata, tensors]) != found:
        raise InputError(f"{path} does not hold what was written (its checksum differs): it is damaged")
    try:
        model = _build(json.loads(metadata["config"]), tensors, "")
    except Exception as error:  # A wrong description can fail anywhere.
        raise InputError(f"{path} does not describe a compact model ({_short(error)}): it is damaged") from error
    if tensors or not isinstance(model, CompactModel):
        raise InputError(f"{path} holds unused tensors ({', '.join(sorted(tensors)[:3]):.100}): it is damaged")
    if "card" in metadata:
        try:
            ModelCard.from_dict(json.loads(metadata["card"])).describe(model)
        except ValueError as error:
            raise InputError(f"{path} does not describe its model ({_short(error)}): it is damaged") from error
    return model.eval().to(device)


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _check_format(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path} is a safetensors file, but not of a compact model: give one that save_compact wrote")
    if metadata.get("version") != str(VERSION):
        raise InputError(
            f"{path} has format version {metadata.get('version')!r:.20}, this package reads version {VERSION}: "
            "update dnw-graph, or save the model again"
        )


def _describe(layer: nn.Module, name: str, dtype: torch.dtype | None, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the description of a layer for a file, and add its tensors to those of the file."""
    kinds = [kind for kind, cls in KINDS.items() if type(layer) is cls]
    if not kinds or not isinstance(layer, Layer):
        raise InputError(
            f"the model holds a {type(getattr(layer, 'function', layer)).__name__} ({name}), which a file cannot "
            "describe without its code; write the model with torch.export"
        )
    parts: dict[str, Any] = {}
    prefix = f"{name}." if name else ""
    for part, child in layer.named_children():
        if isinstance(child, nn.ModuleList):
            parts[part] = [
                _describe(each, f"{prefix}{part}.{number}", dtype, tensors) for number, each in enumerate(child)
            ]
        else:
            parts[part] = _describe(child, f"{prefix}{part}", dtype, tensors)
    held = {key: getattr(layer, key) for key in layer.tensor_names}
    options = {key: getattr(layer, key) for key in layer.options}
    try:
        json.dumps(options)
    except TypeError as error:
        raise InputError(
            f"the {type(layer).__name__} ({name}) has options that a file cannot hold ({error}): expected numbers and "
            f"names; got {reprlib.repr(options)}"
        ) from error
    described: dict[str, Any] = {"kind": kinds[0], "options": options}
    if "rowptr" in held:
        rowptr, columns, sources = held.pop("rowptr"), held.pop("columns"), layer.sources
        described["csr"] = {"rows": len(rowptr) - 1, "sources": sources, "index": _name(columns.dtype)}
        tensors[f"{prefix}gaps"] = to_gaps(rowptr, columns, sources)
    described["types"] = {}
    for key, tensor in held.items():
        if dtype is not None and key in ROUNDED and tensor is not None:
            described["types"][key] = _name(tensor.dtype)
            held[key] = rounded = tensor.to(dtype)
            if not torch.equal(rounded.isfinite(), tensor.isfinite()):
                raise InputError(
                    f"the {type(layer).__name__} ({name}) has weights beyond the range of {_name(dtype)}, "
                    f"{torch.finfo(dtype).max:,.0f}: use weight_dtype=torch.bfloat16, or none"
                )
            tensor = rounded
        if tensor is not None:
            tensors[prefix + key] = tensor.detach().cpu().contiguous()
    described["tensors"] = {key: None if tensor is None else list(tensor.shape) for key, tensor in held.items()}
    return described | {"parts": parts}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _type(name: object, known: Sequence[torch.dtype]) -> torch.dtype:
    return {_name(dtype): dtype for dtype in known}[str(name)]


def _build(config: dict[str, Any], tensors: dict[str, Tensor], prefix: str) -> Layer:
    cls = KINDS[config["kind"]]
    if set(config["options"]) - set(cls.options):
        raise InputError(f"{config['kind']} has no options {sorted(set(config['options']) - set(cls.options))}")
    given: dict[str, Any] = dict(config["options"])
    for name, shape in config["tensors"].items():
        given[name] = None if shape is None else tensors.pop(f"{prefix}{name}")
        if shape is not None and list(given[name].shape) != shape:
            raise InputError(f"tensor {prefix}{name} should be {shape}, and is {list(given[name].shape)}")
    for name, dtype in config["types"].items():
        given[name] = given[name].to(_type(dtype, FLOATS))
    if "csr" in config:
        sizes = int(config["csr"]["rows"]), int(config["csr"]["sources"])
        index = _type(config["csr"]["index"], INTEGERS)
        given["rowptr"], given["columns"] = from_gaps(tensors.pop(f"{prefix}gaps"), *sizes, index)
    for name, part in config["parts"].items():
        if isinstance(part, Iterable) and not isinstance(part, dict):
            given[name] = [_build(each, tensors, f"{prefix}{name}.{number}.") for number, each in enumerate(part)]
        else:
            given[name] = _build(part, tensors, f"{prefix}{name}.")
    return cls(**given)

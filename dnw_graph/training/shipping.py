"""Evaluating and writing a trained model in its compact form."""

from __future__ import annotations

import importlib.util
import io
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from dnw_graph.compaction import CompactModel, compact, save_compact
from dnw_graph.errors import InputError
from dnw_graph.whole_file import make_writable, write_whole

# What writes a kind of file besides PyTorch.
FORMATS = {".safetensors": ("safetensors",), ".pt2": (), ".onnx": ("onnx", "onnxscript")}


def check_export(path: Path) -> None:
    """Refuse a file that could not be written after an evaluation.

    Raises:
        InputError: If the kind of file is unknown, a package for it is missing, or its folder cannot be written to.
    """
    if path.suffix not in FORMATS:
        raise InputError(f"--export is {str(path)!r}: expected a file ending in {', '.join(FORMATS)}")
    missing = [name for name in FORMATS[path.suffix] if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"--export to {path.suffix} needs {' and '.join(missing)}: install the extra dnw-graph[export]"
        )
    if not os.path.isdir(path.parent):
        raise InputError(f"--export is {str(path)!r}: the folder {path.parent} does not exist")
    if os.path.isdir(path):
        raise InputError(f"--export is {str(path)!r}: expected a file, and this is a folder")
    make_writable(path.parent, "--export")


def export(model: nn.Module, path: Path, example: Tensor) -> None:
    """Write the compact form of a model, whole or not at all.

    - ``.safetensors``: wiring and weights, for :func:`~dnw_graph.compaction.load_compact`;
    - ``.pt2``: a program of ``torch.export``, with sparse products over the edges of neural graphs;
    - ``.onnx``: with dense products.

    Sparse weights of layers (see :func:`~dnw_graph.sparse_layers.sparsify`) are written as dense ones with zeros.

    Args:
        model: The model.
        path: The file.
        example: A batch of inputs; the file takes any number of them.

    Raises:
        InputError: If the file cannot be written, or is ``.safetensors`` and the model not made of neural graphs.
    """
    small = compact(model, products="dense" if path.suffix == ".onnx" else "sparse")
    batch = ({0: torch.export.Dim("batch")},)
    if path.suffix == ".safetensors":
        if not isinstance(small, CompactModel):
            raise InputError(
                f"--export to .safetensors is for models made of neural graphs, and {type(model).__name__} is "
                "none: give a file ending in .pt2 or .onnx"
            )
        save_compact(small, path)
        return
    if path.suffix == ".pt2":
        buffer = io.BytesIO()
        torch.export.save(torch.export.export(small, (example,), dynamic_shapes=batch), buffer)
        content = buffer.getvalue()
    else:
        program = torch.onnx.export(small, (example,), dynamo=True, dynamic_shapes=batch, verbose=False)
        assert program is not None
        content = program.model_proto.SerializeToString()
    write_whole(path, content, "--export")

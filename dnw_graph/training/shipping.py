"""Evaluating and writing a trained model in its compact form."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from dnw_graph.compact import compact, save_compact
from dnw_graph.errors import InputError

# What writes a kind of file besides PyTorch.
FORMATS = {".safetensors": ("safetensors",), ".pt2": (), ".onnx": ("onnx", "onnxscript")}


def check_export(path: Path) -> None:
    """Refuse a file that could not be written after an evaluation.

    Raises:
        InputError: If the kind of file is unknown, a package for it is missing, or its folder does not exist.
    """
    if path.suffix not in FORMATS:
        raise InputError(f"--export is {str(path)!r}: expected a file ending in {', '.join(FORMATS)}")
    missing = [name for name in FORMATS[path.suffix] if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"--export to {path.suffix} needs {' and '.join(missing)}: install the extra dnw-graph[export]"
        )
    if not path.parent.is_dir():
        raise InputError(f"--export is {str(path)!r}: the folder {path.parent} does not exist")


def export(model: nn.Module, path: Path, example: Tensor) -> None:
    """Write the compact form of a model, whole or not at all.

    - ``.safetensors``: wiring and weights, for :func:`~dnw_graph.compact.load_compact`;
    - ``.pt2``: a program of ``torch.export``, with sparse products;
    - ``.onnx``: with dense products.

    Args:
        model: The model.
        path: The file.
        example: A batch of inputs; the file takes any number of them.

    Raises:
        InputError: If the file cannot be written.
    """
    small = compact(model, products="dense" if path.suffix == ".onnx" else "sparse")
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    batch = ({0: torch.export.Dim("batch")},)
    try:
        if path.suffix == ".safetensors":
            save_compact(small, path)
            return
        if path.suffix == ".pt2":
            torch.export.save(torch.export.export(small, (example,), dynamic_shapes=batch), partial)
        else:
            torch.onnx.export(
                small, (example,), partial, dynamo=True, dynamic_shapes=batch, external_data=False, verbose=False
            )
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"cannot write {path} ({error.strerror}): make room, or give another --export") from error

"""Runs exported programs as models, for ``dnw-graph predict`` with ``.pt2`` and ``.onnx`` files."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dnw_graph.errors import InputError
from dnw_graph.model_card import ModelCard


class _OnnxModel(nn.Module):
    def __init__(self, session: Any) -> None:
        super().__init__()
        self.session = session

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits ``[batch, classes]``."""
        return torch.from_numpy(self.session.run(["logits"], {"image": image.numpy()})[0])


def onnx_session(path: Path) -> Any:
    """Return a session of onnxruntime on the CPU, with as many threads as PyTorch has.

    Raises:
        InputError: If onnxruntime is not installed.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise InputError(f"running {path} needs onnxruntime: install the extra dnw-graph[export]")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def load_program(path: Path, card: ModelCard) -> nn.Module:
    """Return a model that runs an exported file, with its card. Use it only for files that you trust.

    Args:
        path: The file, ``.pt2`` or ``.onnx``.
        card: Its card. The model's ``preprocess`` omits normalisation that is part of the file.

    Raises:
        InputError: If it is damaged, or onnxruntime is not installed.
    """
    model: nn.Module
    try:
        if path.suffix == ".onnx":
            model = _OnnxModel(onnx_session(path))
            takes_bytes = model.session.get_inputs()[0].type == "tensor(uint8)"
        else:
            program = torch.export.load(path)
            model = program.module()
            (name,) = program.graph_signature.user_inputs
            (image,) = (node.meta["val"] for node in program.graph.nodes if node.name == name)
            takes_bytes = image.dtype == torch.uint8
    except InputError:
        raise
    except Exception as error:  # A damaged file can fail anywhere in the decoder.
        raise InputError(f"{path} cannot be run ({type(error).__name__}): give a file that export wrote") from error
    card.describe(model)
    if takes_bytes:
        model.preprocess = card.preprocess.pixels  # type: ignore[assignment]
    return model

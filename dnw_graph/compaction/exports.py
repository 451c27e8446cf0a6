"""Exports a compact model to one file for other programs, with everything they need to use it."""

from __future__ import annotations

import importlib.util
import io
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dnw_graph._compat import unwrapped
from dnw_graph.arguments import checked, require
from dnw_graph.compaction.dynamic_graphs import TABLEAUS, ContinuousGraph
from dnw_graph.compaction.files import load_compact, save_compact
from dnw_graph.compaction.model import CompactModel, check_example, compact
from dnw_graph.compaction.programs import onnx_session
from dnw_graph.errors import InputError
from dnw_graph.model_card import CARD_ENTRY, CARD_FILE, ModelCard, written_card
from dnw_graph.usual import copied
from dnw_graph.whole_file import make_writable, write_whole

# Packages besides PyTorch that write each kind of file.
FORMATS = {".safetensors": ("safetensors",), ".pt2": (), ".onnx": ("onnx", "onnxscript")}
# Timed calls, whose median is taken, and warm-up calls before them.
CALLS, WARM_UP_CALLS = 15, 3


def check_export(path: Path) -> None:
    """Refuse, before any work, a file that cannot be written.

    Raises:
        InputError: If the kind of file is unknown, a package for it is missing, or its directory cannot be written to.
    """
    if path.suffix not in FORMATS:
        raise InputError(f"--export is {str(path)!r}: expected a file ending in {', '.join(FORMATS)}")
    missing = [name for name in FORMATS[path.suffix] if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"--export to {path.suffix} needs {' and '.join(missing)}: install the extra dnw-graph[export]"
        )
    if not os.path.isdir(path.parent):
        raise InputError(f"--export is {str(path)!r}: the directory {path.parent} does not exist")
    if os.path.isdir(path):
        raise InputError(f"--export is {str(path)!r}: expected a file; this is a directory")
    make_writable(path.parent, "--export")


class Shipped(nn.Module):
    """A model with an input named ``image``, optionally with normalisation in front.

    Args:
        model: The model.
        card: Has mean and standard deviation; None for a model that takes normalised images.
    """

    def __init__(self, model: nn.Module, card: ModelCard | None = None) -> None:
        super().__init__()
        self.model = model
        self.normalises = card is not None
        if card is not None:
            self.mean = nn.Buffer(torch.tensor(card.preprocess.mean, device="cpu").view(3, 1, 1))
            self.std = nn.Buffer(torch.tensor(card.preprocess.std, device="cpu").view(3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits ``[batch, classes]``."""
        if self.normalises:
            image = (image.float() / 255 - self.mean) / self.std
        logits: Tensor = self.model(image)
        return logits


@checked
def export(model: nn.Module, path: str | os.PathLike[str], example: Tensor, with_preprocessing: bool = False) -> str:
    """Write the compact form of a model atomically, and report its size and inference time.

    - ``.safetensors``: wiring and weights, for :func:`dnw_graph.load`;
    - ``.pt2``: a program of ``torch.export``, with sparse products over the edges of neural graphs and sparse layers;
      the card of the model is its extra file ``card.json``;
    - ``.onnx``: with dense products, which hold all zeros; the input is called ``image``, the output ``logits``, and
      the card is the entry ``dnw_graph.card`` of the metadata.

    Args:
        model: The model; what :func:`dnw_graph.load` returned has a card.
        path: The file; it is made and measured on the CPU, whatever the device of the model.
        example: A batch of inputs of the model; the file accepts any batch size.
        with_preprocessing: Normalise inside the file, ``.pt2`` or ``.onnx``, which then takes images of 0 to 255
            (uint8) in the size given by the card.

    Returns:
        One line: size of the file, and the median time for one image with the threads of this process.

    Raises:
        InputError: If the file cannot be written, the model cannot take the example, cannot be traced, or is compact
            already and the file ``.onnx``, if the file is ``.safetensors`` and ``compact`` does not return a
            ``CompactModel``, or if the preprocessing is requested but unknown.
    """
    path = Path(path)
    check_export(path)
    model, example = copied(unwrapped(model)).cpu(), example.cpu()  # A program is bound to the device it was made on.
    require(example.dim() > 0 and len(example) > 0, "example", "a batch of one or more inputs", example)
    check_example(model, example)
    card = written_card(model)
    if with_preprocessing and (card is None or path.suffix == ".safetensors"):
        raise InputError(
            "preprocessing can be part of .pt2 and .onnx files of models that store it, as those of dnw_graph.load do; "
            "a .safetensors file always stores it"
        )
    small = compact(model, products="dense" if path.suffix == ".onnx" else "sparse")
    if path.suffix == ".safetensors":
        if not isinstance(small, CompactModel):
            raise InputError(
                "--export to .safetensors is for models made of neural graphs and networks of sparse layers, not for a "
                f"{type(model).__name__}: give a file ending in .pt2 or .onnx"
            )
        save_compact(small, path)
        return _measured(path, load_compact(path), example)
    solvers = {graph.method for graph in small.modules() if isinstance(graph, ContinuousGraph)}
    if solvers:
        raise InputError(
            f"the solver {', '.join(sorted(solvers))} cannot be part of a {path.suffix} file: use one of "
            f"{', '.join(TABLEAUS)}, without options but step_size, or give a file ending in .safetensors"
        )
    if len(example) == 1:  # torch.export takes a size of 1 for a constant.
        example = torch.cat([example, example])
    if with_preprocessing:
        example = torch.zeros_like(example, dtype=torch.uint8)
    shipped = Shipped(small, card if with_preprocessing else None).eval()
    sizes = ({0: torch.export.Dim("batch")},)
    names: dict[str, Any] = {"input_names": ["image"], "output_names": ["logits"]}
    try:
        if path.suffix == ".pt2":
            program = torch.export.export(shipped, (example,), dynamic_shapes=sizes)
        else:
            written = torch.onnx.export(shipped, (example,), dynamo=True, dynamic_shapes=sizes, verbose=False, **names)
    except Exception as error:  # Tracing, and the conversion of what was traced, can fail anywhere.
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"torch.export cannot trace this {type(model).__name__}: {reason}") from error
    if path.suffix == ".pt2":
        buffer = io.BytesIO()
        extra = {} if card is None else {CARD_FILE: card.to_json()}
        torch.export.save(program, buffer, extra_files=extra)
        write_whole(path, buffer.getvalue(), "--export")
        return _measured(path, program.module(), example)
    assert written is not None
    proto = written.model_proto
    if card is not None:
        proto.metadata_props.add(key=CARD_ENTRY, value=card.to_json())
    write_whole(path, proto.SerializeToString(), "--export")
    session = onnx_session(path) if importlib.util.find_spec("onnxruntime") else None
    return _measured(path, session and (lambda image: session.run(None, {"image": image.numpy()})), example)


def _measured(path: Path, function: Callable[[Tensor], Any] | None, example: Tensor) -> str:
    size = f"written to {path}: {os.path.getsize(path) / 1e6:,.2f} MB"
    if path.suffix == ".onnx":
        size += " (dense, with all zeros: ONNX has no sparse products)"
    if function is None:
        return f"{size}; measuring its time needs onnxruntime"
    seconds = []
    with torch.no_grad():
        for _ in range(WARM_UP_CALLS + CALLS):
            start = time.perf_counter()
            function(example[:1])
            seconds.append(time.perf_counter() - start)
    threads = torch.get_num_threads()
    median = statistics.median(seconds[WARM_UP_CALLS:])
    return f"{size}, {median * 1e3:,.2f} ms for one image (median of {CALLS}, {threads} thread{'s' * (threads > 1)})"

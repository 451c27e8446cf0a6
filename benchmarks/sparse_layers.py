"""Compares sparse layers with dense layers and CSR products, and a sparse ResNet-50 with onnxruntime.

Three tables: a linear layer of 768 → 3,072 compared with SciPy's and PyTorch's products in CSR, whose inputs are
transposed as they need them; layers of ResNet-50 at several shares of weights, with the share at which dense and sparse
take equally long (the rule of ``compact`` comes from it); ResNet-50 with random weights at 224 px, one image, compared
with the dense network in onnxruntime and in PyTorch. CPU time on one core, which other work on the machine disturbs
little; all variants of a row take turns. Run with ``python benchmarks/sparse_layers.py``.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import scipy.sparse
import torch
import torch.nn.functional as F
import torchvision
from timing import arguments, median_times, report
from torch import Tensor

from dnw_graph import sparsify
from dnw_graph.compaction import compact
from dnw_graph.compaction.sparse_layers import DENSEST, SparseLinear
from dnw_graph.ops import sparse_conv2d

OUTPUTS, INPUTS = 3072, 768
# Inputs, outputs, kernel, stride, side of the maps.
LAYERS = (
    (3, 64, 7, 2, 224),
    (64, 64, 3, 1, 56),
    (64, 256, 1, 1, 56),
    (128, 128, 3, 2, 56),
    (512, 128, 1, 1, 28),
    (256, 256, 3, 1, 14),
    (1024, 256, 1, 1, 14),
    (1024, 2048, 1, 2, 14),
    (512, 512, 3, 1, 7),
    (2048, 512, 1, 1, 7),
)
SHARES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5)


def main() -> None:
    """Print the three tables."""
    parser = arguments(__doc__ or "", takes=("rounds",))
    parser.add_argument("--size", type=int, default=224, help="side of the images")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.no_grad():
        further = {
            "A linear layer, one core": linear_rows(options.rounds),
            f"Layers; compact() makes one sparse up to a share of {DENSEST:.0%}": layer_rows(options.rounds),
        }
        network = network_rows(options.rounds, options.size)
    title = f"ResNet-50 at {options.size} × {options.size} pixels, one image, one core"
    report(title, network, options, {"onnxruntime": onnxruntime.__version__, "scipy": scipy.__version__}, further)


def linear_rows(rounds: int) -> list[dict[str, Any]]:
    """Time a linear layer, and one with a single weight, whose time is that of the call."""
    rows = []
    one_weight = torch.arange(2).int(), torch.zeros(1).int(), torch.ones(1)
    for share in (0.1, 0.01):
        weight, csr = _sparse((OUTPUTS, INPUTS), share)
        arrays = [each.numpy() for each in csr]
        matrix = scipy.sparse.csr_matrix((arrays[2], arrays[1], arrays[0]), shape=(OUTPUTS, INPUTS))
        tensor = torch.sparse_csr_tensor(*csr, (OUTPUTS, INPUTS), check_invariants=False)
        for batch in (1, 32, 128):
            x, bias = torch.randn(batch, INPUTS), torch.randn(OUTPUTS)
            columns = x.t().contiguous()
            ways: dict[str, Callable[[], object]] = {
                "dense": partial(F.linear, x, weight, bias),
                "SciPy": partial(matrix.__matmul__, columns.numpy()),
                "PyTorch CSR": partial(tensor.__matmul__, columns),
                "ours": partial(SparseLinear(*csr, bias, INPUTS), x),
                "ours, one weight": partial(SparseLinear(*one_weight, bias[:1], 1), x[:, :1].contiguous()),
            }
            times = _times(ways, 10 * rounds)
            better = min(times["SciPy"], times["PyTorch CSR"])
            ratios = {"dense / ours": times["dense"] / times["ours"], "better CSR / ours": better / times["ours"]}
            rows.append({"share": share, "batch": batch, **_milliseconds(times), **ratios})
    return rows


def layer_rows(rounds: int) -> list[dict[str, Any]]:
    """Time layers of ResNet-50 at several shares of weights."""
    rows = []
    for inputs, outputs, side, stride, maps in LAYERS:
        x, bias = torch.randn(1, inputs, maps, maps), torch.randn(outputs)
        window: dict[str, Any] = {"kernel": (side, side), "stride": (stride, stride), "padding": (side // 2, side // 2)}
        ways: dict[str, Callable[[], object]] = {}
        for share in SHARES:
            weight, csr = _sparse((outputs, inputs, side, side), share)
            ways["dense"] = partial(F.conv2d, x, weight, bias, stride, side // 2)
            ways[f"{share:.0%}"] = partial(sparse_conv2d, x, *csr, bias, **window)
        times = _times(ways, rounds)
        ratios = {f"dense / {share:.0%}": times["dense"] / times[f"{share:.0%}"] for share in SHARES}
        kind = f"{inputs} → {outputs}, {side}×{side}, stride {stride}, {maps}²"
        even = _break_even({share: times[f"{share:.0%}"] for share in SHARES}, times["dense"])
        rows.append({"layer": kind, "dense, ms": times["dense"], **ratios, "break-even share": even})
    return rows


def network_rows(rounds: int, size: int) -> list[dict[str, Any]]:
    """Time ResNet-50."""
    image = torch.randn(1, 3, size, size)
    model = torchvision.models.resnet50().eval()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "model.onnx")
        torch.onnx.export(model, (image,), path, dynamo=True, verbose=False)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = settings.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    feed: dict[str, np.ndarray] = {session.get_inputs()[0].name: image.numpy()}
    ways: dict[str, Callable[[], object]] = {
        "onnxruntime": partial(session.run, None, feed),
        "PyTorch": partial(model, image),
    }
    for share in (0.02, 0.05, 0.1, 0.2):
        sparse = torchvision.models.resnet50().eval()
        sparsify(sparse, share)
        ways[f"{share:.0%}"] = partial(compact(sparse), image)
    times = _times(ways, rounds)
    shares = {float(name[:-1]) / 100: each for name, each in times.items() if name.endswith("%")}
    print(f"break-even share with onnxruntime: {_break_even(shares, times['onnxruntime'])}\n")
    return [{"way": name, "ms": each, "onnxruntime / way": times["onnxruntime"] / each} for name, each in times.items()]


def _sparse(shape: tuple[int, ...], share: float) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Return a random weight with zeros, and the same in CSR."""
    weight = torch.randn(shape) * (torch.rand(shape) < share)
    rows, columns = weight.flatten(1).nonzero(as_tuple=True)
    rowptr = torch.searchsorted(rows, torch.arange(len(weight) + 1)).int()
    return weight, (rowptr, columns.int(), weight.flatten(1)[rows, columns])


def _break_even(times: Mapping[float, float], dense: float) -> str:
    """Return the share at which the line through the times meets the dense time."""
    for (low, first), (high, second) in pairwise(sorted(times.items())):
        if first <= dense < second:
            return f"{low + (high - low) * (dense - first) / (second - first):.0%}"
    return f"over {max(times):.0%}" if max(times.values()) <= dense else f"under {min(times):.0%}"


def _times(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    return median_times(ways, rounds, torch.device("cpu"), time.process_time)


def _milliseconds(times: Mapping[str, float]) -> dict[str, float]:
    return {f"{name}, ms": each for name, each in times.items()}


if __name__ == "__main__":
    main()

"""FLOPs and bytes of a training step as PyTorch executes it, and the least time that they take on a given machine.

Nothing is computed and no accelerator is needed: the step runs on PyTorch's ``meta`` device. Each operator is assumed
    to
read its arguments from main memory and to write its results once, in at least max(FLOPs / peak, bytes / bandwidth); the
sum over the operators is a lower bound for the step without a compiler. The floor of ``roofline.py`` for the same
machine is shown for comparison. The figures do not include inefficiency of libraries or fusion by a compiler. In half
precision the whole model is cast, whereas autocast leaves norms and parameters in single precision.

The default machine is an NVIDIA H200 by its data sheet: 4.8 TB/s; 67 TFLOP/s in float32 without TF32, 989 in bfloat16.
Run with ``python benchmarks/counted_step.py --dtype bfloat16 --operators 10``.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from reference_formulation import from_ours
from roofline import Machine, floor, groups
from steps import DTYPES, OURS, REFERENCE
from timing import arguments, report
from torch import Tensor, nn
from train_step import MOBILENET, MODELS, make_model

from dnw_graph._compat import TorchDispatchMode, tree_leaves
from dnw_graph.analysis.multiply_adds import operations

H200 = {torch.float32: 67.0, torch.bfloat16: 989.0}
NOTHING = {"_unsafe_view", "empty", "empty_like", "new_empty", "empty_strided", "detach", "lift_fresh"}
WRITES_ONLY = {"zeros", "zeros_like", "new_zeros", "ones_like", "full", "full_like", "zero_", "fill_", "arange", "rand"}


@dataclass(frozen=True)
class Call:
    """One operator call: its name, its FLOPs, and the bytes that it reads and writes."""

    name: str
    operations: float
    moved: float

    def milliseconds(self, machine: Machine) -> float:
        """Return the least time that it takes."""
        return machine.milliseconds(self.operations, self.moved)


class Counter(TorchDispatchMode):
    """Collects the calls of all operators except views."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in NOTHING and not func.is_view:
            read = 0 if name in WRITES_ONLY else _bytes((args, kwargs))
            if name == "copy_":
                read = _bytes(args[1])
            self.calls.append(Call(name, operations(func, args, kwargs or {}, result), read + _bytes(result)))
        return result


def _bytes(arguments: Any) -> int:
    tensors = {id(leaf): leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def calls_of(model: nn.Module, images: Tensor) -> list[Call]:
    """Return the calls of a step with SGD, momentum and weight decay.

    Args:
        model: A model on the meta device, in training mode.
        images: A batch there.
    """
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    for _ in range(2):  # The first step creates the momentum.
        optimizer.zero_grad()
        with Counter() as counter:
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return counter.calls


def main() -> None:
    """Print a row for the reference formulation and for the block path of every model."""
    parser = arguments(__doc__ or "", takes=())
    # No solver runs on the meta device.
    parser.add_argument("--models", nargs="+", choices=MODELS[:-1], default=[MOBILENET], help="what to count")
    parser.add_argument("--batch", type=int, default=256, help="images per step")
    parser.add_argument("--size", type=int, default=224, help="side of the images")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the model")
    parser.add_argument("--peak", type=float, default=None, help="TFLOP/s of dense products (default: of an H200)")
    parser.add_argument("--bandwidth", type=float, default=4.8, help="TB/s of main memory")
    parser.add_argument("--operators", type=int, default=0, help="print this many of the slowest operators")
    options = parser.parse_args(namespace=Namespace(device=torch.device("meta")))
    dtype = DTYPES[options.dtype]
    machine = Machine(1e12 * (options.peak or H200[dtype]), 1e12 * options.bandwidth)
    images = torch.empty(options.batch, 3, options.size, options.size, device="meta", dtype=dtype)
    rows, found = [], {}
    for name in options.models:
        model = make_model(name, options.size, propagation="block")
        least = floor(groups(model, torch.randn(2, *images.shape[1:]), dtype, options.batch), machine)
        for way, step in ((REFERENCE, from_ours(model, torch.channels_last)), (f"{OURS}, block", model)):
            calls = found[f"{name}, {way}"] = calls_of(step.to("meta", dtype), images)
            milliseconds = sum(call.milliseconds(machine) for call in calls)
            rows.append(
                {
                    "model": name,
                    "step": way,
                    "operators": len(calls),
                    "GFLOP": sum(call.operations for call in calls) / 1e9,
                    "GB": sum(call.moved for call in calls) / 1e9,
                    "counted, ms": milliseconds,
                    "floor, ms": least,
                    "floor / counted": least / milliseconds,
                }
            )
    given = {
        "device": "none",
        "peak": f"{machine.peak / 1e12:,.0f} TFLOP/s",
        "bandwidth": f"{machine.bandwidth / 1e12:g} TB/s",
    }
    title = f"Training step, counted: batch {options.batch}, {options.size} × {options.size} pixels, {options.dtype}"
    slowest = {way: _by_operator(calls, machine)[: options.operators] for way, calls in found.items()}
    report(title, rows, options, given, slowest if options.operators else None)


def _by_operator(calls: list[Call], machine: Machine) -> list[dict[str, Any]]:
    """Return a row for each operator, the longest first."""
    rows = []
    for name in dict.fromkeys(call.name for call in calls):
        same = [call for call in calls if call.name == name]
        rows.append(
            {
                "operator": name,
                "calls": len(same),
                "GFLOP": sum(call.operations for call in same) / 1e9,
                "GB": sum(call.moved for call in same) / 1e9,
                "counted, ms": sum(call.milliseconds(machine) for call in same),
            }
        )
    return sorted(rows, key=lambda row: -row["counted, ms"])


if __name__ == "__main__":
    main()

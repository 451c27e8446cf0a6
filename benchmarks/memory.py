"""Memory of a training step per image: what the forward pass keeps for the backward pass, and the peak.

*Kept* is the memory that a forward pass with loss has allocated and not freed at its end: the activations for the
backward pass. *Peak* is the most memory that forward and backward pass have allocated at any time, including the
parameters' gradients, but not model and batch. On a CPU both come from the allocations that PyTorch's profiler records,
on a GPU from the allocator's statistics. With ``recompute=True`` the backward pass recomputes node functions.
Run with ``python benchmarks/memory.py``.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from reference_formulation import from_ours
from steps import DTYPES, LAYOUTS, OURS, REFERENCE
from timing import arguments, report
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from train_step import MOBILENET, MODELS, make_model

BACKWARD = "backward pass"


def kept_and_peak(
    model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[int, int]:
    """Return the bytes that are kept for the backward pass, and the peak.

    Args:
        model: A classifier, in training mode.
        images: A batch.
        labels: Its classes.
        dtype: ``torch.float32``, or the dtype for autocast.
    """

    def loss_of() -> Tensor:
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            return F.cross_entropy(model(images), labels)

    loss_of().backward()  # allocates permanent memory
    model.zero_grad()
    return (_on_cuda if images.device.type == "cuda" else _on_cpu)(loss_of)


def _on_cuda(loss_of: Callable[[], Tensor]) -> tuple[int, int]:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = loss_of()
    kept = torch.cuda.memory_allocated() - before
    loss.backward()
    return kept, torch.cuda.max_memory_allocated() - before


def _on_cpu(loss_of: Callable[[], Tensor]) -> tuple[int, int]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = loss_of()
        with record_function(BACKWARD):
            loss.backward()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    start = next(event["ts"] for event in events if event["name"] == BACKWARD)
    # In order of time; freed memory is negative.
    found = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    kept = sum(size for time, size in found if time < start)
    return kept, max(accumulate(size for _, size in found))


def main() -> None:
    """Print a row for every model and formulation."""
    parser = arguments(__doc__ or "", takes=("device",))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=None, help="default: by device")
    parser.add_argument("--batch", type=int, default=None, help="images (default: 32, 256 on a GPU)")
    parser.add_argument("--size", type=int, default=None, help="side of the images (default: 32, 224 on a GPU)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="bfloat16 runs under autocast")
    options = parser.parse_args()
    gpu = options.device.type == "cuda"
    batch, size = options.batch or (256 if gpu else 32), options.size or (224 if gpu else 32)
    rows: list[dict[str, Any]] = []
    for name in options.models or ((MOBILENET,) if gpu else MODELS):
        torch.manual_seed(0)
        model = make_model(name, size).to(options.device)
        images = torch.randn(batch, 3, size, size, device=options.device)
        labels = torch.randint(10, (batch,), device=options.device)
        ways: dict[str, nn.Module] = {
            f"{REFERENCE}, {layout}": from_ours(model, order) for layout, order in LAYOUTS.items()
        }
        for propagation in ("auto", "block"):
            for recompute in (False, True):
                other = make_model(name, size, propagation=propagation, recompute=recompute).to(options.device)
                other.load_state_dict(model.state_dict())  # The steps of a solver depend on the weights.
                ways[f"{OURS}, {propagation}{', recompute=True' if recompute else ''}"] = other
        kept = {way: kept_and_peak(trained, images, labels, DTYPES[options.dtype]) for way, trained in ways.items()}
        least = min(value for way, (value, _) in kept.items() if way.startswith(REFERENCE))
        rows += [
            {
                "model": name,
                "step": way,
                "kept, MB per image": value / batch / 1e6,
                "peak, MB per image": peak / batch / 1e6,
                "kept, reference / this": least / value,
            }
            for way, (value, peak) in kept.items()
        ]
    report(f"Memory of a training step, batch {batch}, {size} × {size} pixels, {options.dtype}", rows, options)


if __name__ == "__main__":
    main()

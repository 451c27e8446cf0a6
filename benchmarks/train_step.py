"""Compares a training step of the package's models with the reference formulation and with a roofline.

A step is the forward pass on random images, the loss, the backward pass, and SGD with momentum and weight decay. The
reference formulation (``reference_formulation.py``) starts from copies of the same weights, in its faster layout.
Before anything is timed, its loss and all gradients are compared with the model's, in float64 on four images and in
float32 on the batch, and with ``--compile`` also with those of the compiled model. The floor is that of
``roofline.py``; the share reached is floor / time.

On a CPU the default is all models, with images of 32 pixels; on a GPU only MobileNetV1-DNW, at 224 pixels. Run with
``python benchmarks/train_step.py``; ``--growth growth.png`` instead times graphs with growing numbers of candidates and
of real edges.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import growth
import torch
from reference_formulation import from_ours
from roofline import Group, Machine, floor, groups, measure, summary
from steps import DTYPES, OURS, REFERENCE, Case, check_case, steps_of
from timing import arguments, median_times, report, use_tf32
from torch import nn

from dnw_graph.models import MobileNetV1DNW, TinyClassifier
from dnw_graph.propagation import AutoPropagation, Propagation

MOBILENET = "mobilenet_v1_dnw"
MODELS = (MOBILENET, "tiny_static", "tiny_discrete", "tiny_continuous")
WAYS: dict[str, tuple[str, str | Propagation]] = {
    "auto": (OURS, "auto"),
    "bfloat16": (f"{OURS}, candidate gradient in bfloat16", AutoPropagation(candidate_gradient="bfloat16")),
    "block": (f"{OURS}, block", "block"),
    "message_passing": (f"{OURS}, message passing", "message_passing"),
}


def make_model(name: str, size: int, **options: Any) -> nn.Module:
    """Return a model, in training mode: for ten classes, or for 1,000 with images of 64 pixels or more.

    Args:
        name: One of :data:`MODELS`.
        size: Side of the images.
        options: Further options of the model.
    """
    if name != MOBILENET:
        return TinyClassifier(name.removeprefix("tiny_"), **options)
    large = size >= 64
    return MobileNetV1DNW(0.225, 1000 if large else 10, 2 if large else 1, **options)


def make_case(name: str, options: Namespace) -> Case:
    """Return a model with the requested propagations, and a batch."""
    torch.manual_seed(0)
    ways = {}
    for way in options.propagation:
        title, propagation = WAYS[way]
        ways[title] = make_model(name, options.size, propagation=propagation).to(options.device)
    images = torch.randn(options.batch, 3, options.size, options.size, device=options.device)
    return Case(name, ways, from_ours, images, torch.randint(10, (options.batch,), device=options.device))


def rows_of(case: Case, found: list[Group], times: dict[str, float], machine: Machine) -> list[dict[str, Any]]:
    """Return a row for the reference formulation and each variant of a model."""
    least = floor(found, machine)
    dense = floor([group for group in found if group.kind == "candidate gradient"], machine)
    return [
        {
            "model": case.name,
            "step": name,
            "ms": times[name],
            "reference / this": times[REFERENCE] / times[name],
            "floor, ms": least,
            "share of the floor reached": least / times[name],
            "candidate gradient at the peak, ms": dense,
        }
        for name in (REFERENCE, *case.ways)
    ]


def main() -> None:
    """Print a row for every model and variant."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=None, help="default: by device")
    parser.add_argument("--batch", type=int, default=None, help="images per step (default: 128, 256 on a GPU)")
    parser.add_argument("--size", type=int, default=None, help="side of the images (default: 32, 224 on a GPU)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="bfloat16 runs under autocast")
    parser.add_argument("--compile", action="store_true", help="compile all models, also the reference formulation")
    parser.add_argument("--cuda-graphs", action="store_true", help="record each step as one CUDA graph and replay it")
    parser.add_argument("--propagation", nargs="+", choices=WAYS, default=["auto"], help="propagations to time")
    parser.add_argument("--tf32", action="store_true", help="use TF32 for float32 products on a GPU")
    parser.add_argument("--roofline", action="store_true", help="print the groups of the floor")
    parser.add_argument("--growth", type=Path, metavar="PNG", default=None, help="plot the growth of the time instead")
    options = parser.parse_args()
    gpu = options.device.type == "cuda"
    options.batch = options.batch or (256 if gpu else 128)
    options.size = options.size or (224 if gpu else 32)
    options.models = options.models or (MODELS[:1] if gpu else MODELS)
    if options.threads:
        torch.set_num_threads(options.threads)
    use_tf32(options.tf32)
    if options.cuda_graphs and not gpu:
        parser.error("--cuda-graphs needs --device cuda")
    flags = {"compiled": options.compile, "CUDA graphs": options.cuda_graphs, "TF32": options.tf32}
    what = ", ".join([options.dtype, *(flag for flag, given in flags.items() if given)])
    if options.growth:
        rows = growth.rows(options)
        report(f"Training step of a graph like stage 4, batch {options.batch}, {what}", rows, options)
        growth.draw(rows, options.growth)
        return
    dtype = DTYPES[options.dtype]
    machines, cases = [measure(options.device, dtype)], []
    for name in options.models:
        case = make_case(name, options)
        check_case(case, dtype, options.compile)
        times = median_times(steps_of(case, dtype, options), options.rounds, options.device)
        cases.append((case, groups(case.first, case.images, dtype), times))
        # Other work on a shared machine makes it look slower: use the best measurement.
        machines.append(measure(options.device, dtype))
    machine = Machine(max(found.peak for found in machines), max(found.bandwidth for found in machines))
    rows = [row for case, found, times in cases for row in rows_of(case, found, times, machine)]
    measured = {"peak": f"{machine.peak / 1e9:,.0f} GFLOP/s", "copy": f"{machine.bandwidth / 1e9:,.0f} GB/s"}
    title = f"Training step, batch {options.batch}, {options.size} × {options.size} pixels, {what}"
    floors = {f"Floor of a step of {case.name}": summary(found, machine) for case, found, _ in cases}
    report(title, rows, options, measured, floors if options.roofline else None)
    print()
    for row in rows:
        least, ms = row["candidate gradient at the peak, ms"], row["ms"]
        if row["step"] != REFERENCE:
            bound = row["reference / this"] * ms / least
            print(
                f"{row['model']}, {row['step']}: the dense candidate gradient alone is {least:,.1f} of {ms:,.1f} ms at "
                f"the peak ({least / ms:.0%}), and bounds the ratio to {bound:.1f}"
            )


if __name__ == "__main__":
    main()

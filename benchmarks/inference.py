"""Times inference: MobileNetV1-DNW without dead nodes, by its edges and as dense products, beside MobileNetV1.

MobileNetV1-DNW ×0.225 has a random graph; all norms have random statistics, and are folded in every model but those
named "as trained" and in the reference formulation (``reference_formulation.py``), whose masked weights are made once
and whose outputs are made sure to be those of the compact models. All models of one batch size and number of threads
take turns in one run. Run with ``python benchmarks/inference.py``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from reference_formulation import from_ours
from steps import LAYOUTS, REFERENCE
from timing import arguments, median_times, report, use_tf32
from torch import Tensor, nn

from dnw_graph.analysis.multiply_adds import performed
from dnw_graph.compaction import compact
from dnw_graph.models import MobileNetV1, MobileNetV1DNW

DENSE, SPARSE = "random graph ×0.225, dense products", "random graph ×0.225, sparse products"
TOLERANCE = 1e-4
BASELINE = "MobileNetV1 ×0.25"


def models() -> dict[str, nn.Module]:
    """Return the models by name."""
    graph = _with_statistics(MobileNetV1DNW(0.225, wiring="random_graph"))
    found: dict[str, nn.Module] = {}
    for width in (0.25, 0.5, 1):
        mobilenet = _with_statistics(MobileNetV1(width))
        found[f"MobileNetV1 ×{width}, as trained"] = mobilenet
        found[f"MobileNetV1 ×{width}"] = compact(mobilenet)
    for layout, memory_format in LAYOUTS.items():
        found[f"random graph ×0.225, {REFERENCE}, {layout}"] = from_ours(graph, memory_format)
    found[DENSE] = compact(graph, products="dense")
    found[SPARSE] = compact(graph)
    return found


def main() -> None:
    """Print one row per batch size, number of threads and model."""
    shared = arguments(__doc__ or "")
    # Here several numbers of threads can be given.
    parser = argparse.ArgumentParser(
        description=shared.description,
        formatter_class=shared.formatter_class,
        parents=[shared],
        conflict_handler="resolve",
    )
    parser.add_argument("--size", type=int, default=224, help="side of the images")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="batch sizes")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of CPU threads")
    options = parser.parse_args()
    torch.manual_seed(0)
    use_tf32(False)
    found = {name: model.to(options.device) for name, model in models().items()}
    rows: list[dict[str, Any]] = []
    image = torch.randn(1, 3, options.size, options.size, device=options.device)
    _check(found, image)
    multiply_adds = {name: performed(partial(_run, model, image)) for name, model in found.items()}
    for threads in options.threads:
        torch.set_num_threads(threads)
        for batch in options.batch:
            x = torch.randn(batch, 3, options.size, options.size, device=options.device)
            calls: dict[str, Callable[[], object]] = {name: partial(_run, model, x) for name, model in found.items()}
            times = median_times(calls, options.rounds, options.device)
            reference = min(times[name] for name in times if REFERENCE in name)
            for name in found:
                rows.append(
                    {
                        "threads": threads,
                        "batch": batch,
                        "model": name,
                        "ms per image": times[name] / batch,
                        "multiply-adds, M": multiply_adds[name] / 1e6,
                        "GFLOP/s": 2 * multiply_adds[name] * batch / times[name] / 1e6,
                        "time / dense products": times[name] / times[DENSE],
                        "time / reference formulation": times[name] / reference,
                        f"time / {BASELINE}": times[name] / times[BASELINE],
                    }
                )
    report(f"Inference at {options.size} × {options.size} pixels", rows, options)


def _with_statistics(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.get_buffer("running_var"), 0.5, 2)
            nn.init.normal_(module.get_buffer("running_mean"))
    return model.eval()


def _check(found: dict[str, nn.Module], image: Tensor) -> None:
    """Make sure that the compact models have the outputs of the reference formulation."""
    with torch.no_grad():
        logits = {name: model(image) for name, model in found.items() if name.startswith("random graph")}
    expected = next(logits[name] for name in logits if REFERENCE in name)
    for name, found_logits in logits.items():
        error = float((found_logits - expected).norm() / expected.norm())
        if not error <= TOLERANCE:
            raise AssertionError(f"{name} differs from the reference formulation: relative error {error:.1e}")


def _run(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


if __name__ == "__main__":
    main()

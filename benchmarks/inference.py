"""Compares inference of MobileNetV1-DNW without dead nodes, with sparse and with dense products, with MobileNetV1.

MobileNetV1-DNW has a random graph. All norms have random statistics; they are folded except in models named "as
trained" and in the reference formulation (``reference_formulation.py``), whose masked weights are computed once and
whose outputs are compared with those of the compact models. Models without edges show how much of the time is not spent
on sums over edges. MobileNetV1 also runs in onnxruntime, also in int8 (``quantize_static``, and ``quantize_dynamic``,
which does not change convolutions), and in OpenVINO, if they are installed. All models of one batch size and number of
threads take turns in one run.

Accuracies are published ones (ImageNet, top-1, float32), not measured here. For a random graph the accuracy is that of
the learned wiring, which has fewer live nodes and costs less: the time is an upper bound. Run with ``python
benchmarks/inference.py``; ``--picture FILE`` plots the accuracies against the times.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from reference_formulation import from_ours
from steps import LAYOUTS, REFERENCE
from timing import arguments, median_times, report, use_tf32
from torch import Tensor, nn

from dnw_graph.analysis.multiply_adds import performed
from dnw_graph.compaction import compact
from dnw_graph.compaction.static_graphs import FusedGraph
from dnw_graph.models import MobileNetV1, MobileNetV1DNW

DENSE = "random graph ×0.225, dense products"
WITHOUT_EDGES = "no edges: "
TOLERANCES = {"int8": 0.1, "bfloat16": 0.05, "": 1e-4}
ORT, ORT_STATIC, ORT_DYNAMIC, OPENVINO = "onnxruntime", "onnxruntime int8", "onnxruntime dynamic int8", "OpenVINO"
PUBLISHED = {
    "MobileNetV1 ×0.25": 50.6,
    "MobileNetV1 ×0.5": 63.7,
    "MobileNetV1 ×1": 70.6,
    "random graph ×0.225": 60.9,
    "random graph ×0.49": 70.4,
}
"""Table 3 of the paper, for the wiring that was learned in place of the random graph; ×1: Howard et al. 2017."""


def models() -> dict[str, nn.Module]:
    """Return the models by name."""
    found: dict[str, nn.Module] = {}
    for width in (0.25, 0.5, 1):
        mobilenet = _with_statistics(MobileNetV1(width))
        found[f"MobileNetV1 ×{width}, as trained"] = mobilenet
        found[f"MobileNetV1 ×{width}"] = compact(mobilenet)
    for width in (0.225, 0.49):
        graph = _with_statistics(MobileNetV1DNW(width, wiring="random_graph"))
        if width == 0.225:
            for layout, memory_format in LAYOUTS.items():
                found[f"random graph ×{width}, {REFERENCE}, {layout}"] = from_ours(graph, memory_format)
            found[DENSE] = compact(graph, products="dense")
        images = torch.randn(2, 3, 224, 224)
        for dtype in (None, torch.bfloat16, torch.int8):
            name = f"random graph ×{width}, sparse products"
            if dtype is not None:
                name += f", {str(dtype).removeprefix('torch.')} states"
            found[name] = compact(graph, state_dtype=dtype, example=None if dtype is None else images)
            found[WITHOUT_EDGES + name] = _without_edges(copy.deepcopy(found[name]))
    return found


def _without_edges(model: nn.Module) -> nn.Module:
    """Remove the edges of a compact model: what remains are node functions and the layers around the graph."""
    for graph in (module for module in model.modules() if isinstance(module, FusedGraph)):
        graph.rowptr = torch.zeros_like(graph.rowptr)
        graph.columns, graph.values = graph.columns[:0], graph.values[:0]
    return model


def runtimes(found: Mapping[str, nn.Module], threads: int, size: int) -> dict[str, Callable[[Tensor], object]]:
    """Return MobileNetV1 in other installed runtimes for CPUs, by name."""
    calls: dict[str, Callable[[Tensor], object]] = {}
    mobilenets = [name for name in PUBLISHED if name.startswith("MobileNetV1")]
    with tempfile.TemporaryDirectory() as directory:
        for name in mobilenets if importlib.util.find_spec("onnxruntime") else []:
            file = Path(directory, "model.onnx")
            example = torch.zeros(2, 3, size, size)
            shapes = ({0: torch.export.Dim("batch")},)
            written = torch.onnx.export(found[name], (example,), dynamo=True, dynamic_shapes=shapes, verbose=False)
            assert written is not None
            written.save(str(file), external_data=False)
            calls[f"{name}, {ORT}"] = _onnxruntime(file, threads)
            for kind in (ORT_STATIC, ORT_DYNAMIC):
                calls[f"{name}, {kind}"] = _onnxruntime(_quantized(file, kind == ORT_STATIC, size), threads)
            if importlib.util.find_spec("openvino"):
                calls[f"{name}, {OPENVINO}"] = _openvino(file, threads)
    return calls


def _quantized(file: Path, static: bool, size: int) -> Path:
    """Return a file of the model with 8-bit integers; ranges of activations from random images if they are static."""
    import onnx
    from onnxruntime import quantization

    class Images(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = 4

        def get_next(self) -> dict[str, Any] | None:
            self.left -= 1
            return {name: torch.randn(2, 3, size, size).numpy()} if self.left >= 0 else None

    found = file.with_name("quantized.onnx")
    name = onnx.load(file).graph.input[0].name
    if static:
        prepared = file.with_name("prepared.onnx")
        quantization.shape_inference.quant_pre_process(str(file), str(prepared))
        quantization.quantize_static(str(prepared), str(found), Images(), per_channel=True)
    else:
        quantization.quantize_dynamic(str(file), str(found), op_types_to_quantize=["MatMul", "Gemm"])
    return found


def _onnxruntime(file: Path, threads: int) -> Callable[[Tensor], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x.numpy()})


def _openvino(file: Path, threads: int) -> Callable[[Tensor], object]:
    openvino: Any = importlib.import_module("openvino")
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(file), "CPU", options)
    return lambda x: compiled(x.numpy())


def main() -> None:
    """Print one row per batch size, number of threads and model."""
    shared = arguments(__doc__ or "")
    # This benchmark takes several numbers of threads.
    parser = argparse.ArgumentParser(
        description=shared.description,
        formatter_class=shared.formatter_class,
        parents=[shared],
        conflict_handler="resolve",
    )
    parser.add_argument("--size", type=int, default=224, help="side of the images")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="batch sizes")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of CPU threads")
    parser.add_argument("--models", nargs="+", default=[""], help="parts of names: only these models")
    parser.add_argument("--picture", type=Path, default=None, help="draw the published accuracies against the times")
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
        ways: dict[str, Callable[[Tensor], object]] = {name: partial(_run, model) for name, model in found.items()}
        if options.device.type == "cpu":
            ways |= runtimes(found, threads, options.size)
        ways = {name: way for name, way in ways.items() if any(part in name for part in options.models)}
        for batch in options.batch:
            x = torch.randn(batch, 3, options.size, options.size, device=options.device)
            clock = time.process_time if threads == 1 and options.device.type == "cpu" else time.perf_counter
            calls = {name: partial(way, x) for name, way in ways.items()}
            times = median_times(calls, options.rounds, options.device, clock)
            for name in ways:
                count = multiply_adds.get(name) or multiply_adds[name.split(",")[0]]
                rows.append(
                    {
                        "threads": threads,
                        "batch": batch,
                        "model": name,
                        "published accuracy in float32, %": _accuracy(name) or "",
                        "ms per image": times[name] / batch,
                        "multiply-adds, M": count / 1e6,
                        "GFLOP/s": 2 * count * batch / times[name] / 1e6,
                        "share of sums over edges": _share_of_sums(name, times),
                        **_ratios(name, times),
                    }
                )
    report(f"Inference at {options.size} × {options.size} pixels", rows, options)
    if options.picture is not None:
        draw(rows, options.picture)


def _share_of_sums(name: str, times: Mapping[str, float]) -> float | str:
    """Return the part of a model's time that it does not take without its edges."""
    rest = times.get(WITHOUT_EDGES + name)
    return "" if rest is None else 1 - rest / times[name]


def _ratios(name: str, times: Mapping[str, float]) -> dict[str, Any]:
    """Return the time of a model divided by those of others, if measured."""
    columns = (("dense products", DENSE), *((f"{REFERENCE}", each) for each in times if REFERENCE in each))
    best: dict[str, float] = {}
    for column, other in columns:
        if other in times:
            best[column] = min(times[other], best.get(column, times[other]))
    for width, runtime in (("0.25", ORT), ("1", ORT), ("0.25", ORT_STATIC)):
        other = f"MobileNetV1 ×{width}, {runtime}"
        if other in times:
            best[f"MobileNetV1 ×{width} in {runtime}"] = times[other]
    return {f"time / {column}": times[name] / time for column, time in best.items()}


def _accuracy(name: str) -> float | None:
    return next((figure for model, figure in PUBLISHED.items() if name.split(",")[0] == model), None)


def draw(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw the published accuracies against the measured times: a panel per batch size and number of threads."""
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    panels = list(dict.fromkeys((row["threads"], row["batch"]) for row in rows))
    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 4.5), squeeze=False, layout="constrained")
    lines = {
        f", {ORT}": "MobileNetV1, onnxruntime",
        f", {ORT_STATIC}": "MobileNetV1, onnxruntime, int8",
        f", {OPENVINO}": "MobileNetV1, OpenVINO",
        "sparse products": "DNW (random graph), float32",
        "bfloat16 states": "DNW (random graph), bfloat16 states",
        "int8 states": "DNW (random graph), int8 states",
    }
    for axis, (threads, batch) in zip(axes[0], panels, strict=True):
        for ending, label in lines.items():
            points = [
                (row["ms per image"], row["published accuracy in float32, %"])
                for row in rows
                if (row["threads"], row["batch"]) == (threads, batch)
                and row["model"].endswith(ending)
                and row["published accuracy in float32, %"]
            ]
            if points:
                axis.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
        axis.set(xscale="log", xlabel="ms per image", title=f"batch {batch}, {threads} thread{'s' * (threads > 1)}")
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(ticker.NullLocator())
    axes[0][0].set_ylabel("published accuracy in float32, %")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(panels) + 1, 3))
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _with_statistics(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.get_buffer("running_var"), 0.5, 2)
            nn.init.normal_(module.get_buffer("running_mean"))
    return model.eval()


def _check(found: dict[str, nn.Module], image: Tensor) -> None:
    """Check that the compact models have the outputs of the reference formulation."""
    with torch.no_grad():
        logits = {
            name: model(image)
            for name, model in found.items()
            if name.startswith("random graph") and "×0.49" not in name
        }
    expected = next(logits[name] for name in logits if REFERENCE in name)
    for name, found_logits in logits.items():
        error = float((found_logits - expected).norm() / expected.norm())
        if not error <= next(limit for part, limit in TOLERANCES.items() if part in name):
            raise AssertionError(f"{name} differs from the reference formulation: relative error {error:.1e}")


def _run(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


if __name__ == "__main__":
    main()

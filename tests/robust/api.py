"""Public callables with valid arguments, some of which are replaced by values that no user means.

A case is bad if it ends in a raw error, or if nonsense is accepted: every argument has a predicate that says which
values are possible for it, whatever the others are.
"""

from __future__ import annotations

import functools
import math
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzz import Bad, Case
from torch import nn
from torch_geometric.data import Data

from dnw_graph import (
    ACDC,
    GMP,
    NM,
    SET,
    STR,
    CandidateEdges,
    Continuous,
    Discrete,
    FineTune,
    Fixed,
    L1Anneal,
    LotteryTicket,
    NeuralGraph,
    RandomGraph,
    RigL,
    Schedule,
    SparseMomentum,
    TargetedDropout,
    TopKAST,
    Wiring,
    attach,
    create_wiring,
    equivalence,
    register_wiring,
    wiring_penalty,
)
from dnw_graph.analysis.cost import cost, live_nodes, neural_graphs
from dnw_graph.compaction import compact, load_compact, save_compact
from dnw_graph.dynamics import Dynamics
from dnw_graph.models import MobileNetV1, MobileNetV1DNW, TinyClassifier, create_model, edges_at_width
from dnw_graph.models.mobilenet import GraphClassifier
from dnw_graph.node_functions import Blockwise, NodeConv, NormReluConv, make_node_function, make_norm
from dnw_graph.ops import sparse_product, static_graph
from dnw_graph.propagation import MessagePassingPropagation, Propagation
from dnw_graph.selection import select_top_k
from dnw_graph.sparse_layers import (
    dense_state_dict,
    densify,
    load_optimizer_state,
    sparsify,
    to_data,
    weight_graphs,
)
from dnw_graph.training import Classifier, RunOptions, TrainingCost, WiringMonitor, WiringUpdates, cosine, step
from dnw_graph.visualize import (
    RecordedGraph,
    Recording,
    animate,
    plot,
    plot_adjacency,
    plot_change,
    plot_evolution,
    plot_layers,
    plot_training,
    save_page,
    to_networkx,
)
from dnw_graph.wirings import WIRINGS
from dnw_graph.wirings.two_stage import fine_tune, lottery_ticket

Possible = Callable[[Any], bool]


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def hostile_values() -> list[Any]:
    loop: list[Any] = []
    loop.append(loop)
    return [
        *(None, True, False, "", "False", "no", "x" * 2000, "a\nb", "\0", b"x", Path("nowhere")),
        *(-1, 0, 1, 2, 10**30, 10**5000, 2.0, 2.5, -0.5, 1e-9, math.nan, math.inf, -math.inf, 1 + 2j),
        *(np.int64(2), np.uint8(1), np.float32(0.5), np.float64(math.nan), np.bool_(True), np.array(2)),
        *(np.zeros(3), np.arange(1, 4), np.zeros((2, 3, 4, 4), np.float32), np.array(["a"])),
        *([], (), {}, set(), [1, 2.5], ["a"], [None], {"a": 1}, {1: "a"}, loop, range(3), range(1, 9, 2), slice(2)),
        *(object(), Unprintable(), lambda *_, **__: None, int, nn.Linear, NotImplemented, iter([1, 2])),
        *(torch.zeros(()), torch.zeros(0), torch.zeros(3), torch.zeros(2, 3), torch.zeros(3, 4, 4)),
        *(torch.zeros(2, 3, 0, 4), torch.zeros(2, 7, 4, 4), torch.zeros(1, 3, 1, 1), torch.zeros(2, 3, 4, 4, 4)),
        *(torch.zeros(2, 3, 4, 4, dtype=kind) for kind in (torch.float64, torch.float16, torch.int64, torch.bool)),
        *(torch.zeros(2, 3, 4, 4, dtype=torch.complex64), torch.zeros(2, 3, 4, 4, device="meta")),
        *(
            torch.zeros(2, 5, dtype=torch.int64),
            torch.full((3,), math.nan),
            torch.tensor(2),
            torch.tensor([True, False]),
        ),
        *(nn.Linear(3, 4), nn.Sequential(), nn.ReLU(), torch.float32, torch.device("meta"), RandomGraph, Discrete(2)),
    ]


def is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        return False
    return abs(value) < 2**1000 if isinstance(value, int) else math.isfinite(value)


def integer(low: int = 1, high: int = 2**63) -> Possible:
    def possible(value: Any) -> bool:
        scalar = isinstance(value, np.ndarray | torch.Tensor) and value.ndim == 0 and "int" in str(value.dtype)
        return (is_integer(value) or scalar) and low <= int(value) < high

    return possible


def number(low: float = -math.inf, high: float = math.inf) -> Possible:
    return lambda value: is_number(value) and low <= value <= high


def sequence(possible: Possible, least: int = 0) -> Possible:
    def of_all(value: Any) -> bool:
        if isinstance(value, np.ndarray) and value.ndim == 1:
            value = value.tolist()
        return (
            isinstance(value, list | tuple | range | set | dict) and len(value) >= least and all(map(possible, value))
        )

    return of_all


def text(value: Any) -> bool:
    return isinstance(value, str)


def truth(value: Any) -> bool:
    return isinstance(value, bool | np.bool_)


def anything(value: Any) -> bool:
    return True


def a(*kinds: type) -> Possible:
    return lambda value: isinstance(value, kinds)


def either(*possible: Possible) -> Possible:
    return lambda value: any(each(value) for each in possible)


def nothing(value: Any) -> bool:
    return value is None


def optional(possible: Possible) -> Possible:
    return either(nothing, possible)


def device(value: Any) -> bool:
    return isinstance(value, str | torch.device | int)


# What valid values are made of, anew for every case.
def graph() -> NeuralGraph:
    return NeuralGraph((3, 4, 2), 9)


def dynamic(dynamics: Dynamics) -> NeuralGraph:
    return NeuralGraph(None, 20, num_nodes=8, num_inputs=3, num_outputs=2, dynamics=dynamics, node_function=nn.Tanh())


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def sparse() -> nn.Sequential:
    model = perceptron()
    sparsify(model, 0.5)
    return model


def momentum() -> nn.Sequential:
    model = perceptron()
    sparsify(model, 0.5, SparseMomentum())
    return model


def complete() -> nn.Sequential:
    return nn.Sequential(NeuralGraph((3, 4, 2), 9, wiring="complete"))


def images(channels: int = 3, size: int = 4) -> torch.Tensor:
    return torch.randn(2, channels, size, size)


def attached(model: Any, num_steps: Any, steps_per_epoch: Any) -> None:
    parameters = model.parameters() if isinstance(model, nn.Module) else []
    optimizer = torch.optim.SGD([*parameters] or [torch.zeros(1)], 0.1, momentum=0.9)
    attach(model, optimizer, num_steps, steps_per_epoch=steps_per_epoch)


def trained(rule: type[Wiring], layers: bool, lr: float) -> Callable[..., object]:
    """Return what trains a small model for some steps, evaluates it and takes what is left of it."""

    def train(density: Any, num_edges: Any, num_steps: Any, steps_per_epoch: Any, **options: Any) -> None:
        model = perceptron() if layers else nn.Sequential(graph())
        wiring = rule(**options)
        if layers:
            sparsify(model, density, wiring, distribution="global" if rule is GMP else "uniform")
        else:
            model[0].rewire(wiring, num_edges)
        optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
        attach(model, optimizer, num_steps, steps_per_epoch=steps_per_epoch)
        x = torch.randn(4, 3) if layers else torch.randn(4, 3, 4, 4)
        for _ in range(5):
            optimizer.zero_grad()
            (model(x).square().mean() + wiring_penalty(model)).backward()
            optimizer.step()
        model.eval()(x)
        cost(model, (3,) if layers else (3, 4, 4))
        if layers:
            densify(model)
        else:
            compact(model)(x)

    train.__qualname__ = f"{rule.__name__} in {'layers' if layers else 'a graph'} with lr={lr:g}"
    return train


def registered(**arguments: Any) -> None:
    before = dict(WIRINGS)
    try:
        register_wiring(**arguments)
    finally:
        WIRINGS.clear()
        WIRINGS.update(before)


def saved() -> Path:
    save_compact(compact(graph()), "a.safetensors")
    return Path("a.safetensors")


def recording() -> Recording:
    model = graph()
    found = Recording(model)
    with torch.no_grad():
        model.candidates.weight.neg_()[:3] += 1
    found.add(1, 0.5)
    return found


def recorded() -> RecordedGraph:
    return recording()["graph"]


def recording_file() -> Path:
    recording().save("a.recording")
    return Path("a.recording")


def table() -> Path:
    Path("metrics.csv").write_text("step,train/loss,val/top1\n1,2.5,\n2,1.5,0.25\n")
    return Path("metrics.csv")


def middle(network: Any) -> dict[int, tuple[int, int]]:
    return dict.fromkeys(network, (0, 0))


def in_figure(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> None:
        import matplotlib.pyplot as plt

        try:
            function(*args, **kwargs)
        finally:
            plt.close("all")

    return call


Argument = tuple[Callable[[], Any], Possible]
Door = tuple[Callable[..., Any], dict[str, Argument]]

name, tensor, module = a(str), a(torch.Tensor), a(nn.Module)
size = (lambda: 4, integer())
on = (lambda: True, truth)
rule = (lambda: "dnw", a(str, Wiring))
function = (lambda: "norm_relu_conv", either(a(str, nn.Module), callable))
way = (lambda: "block", a(str, Propagation))
shares = either(number(0, 1), a(dict, Schedule))
num_steps = (lambda: 10, optional(integer()))
blocks = (lambda: (3, 4, 2), sequence(integer(), 2))
weights = (lambda: torch.randn(26), optional(tensor))
classes = (lambda: 10, integer())
width = (lambda: 0.5, number(1e-12))
model = (graph, module)
wiring_data = (lambda: graph().to_data(), a(NeuralGraph, Data))
data = (lambda: graph().to_data(), a(Data))
top = (lambda: 5, integer())
axes = (lambda: None, nothing)
epoch = (lambda: 1.5, optional(number()))
moments = (lambda: recorded(), a(RecordedGraph))
picture = (lambda: "a.gif", a(str, Path))
seconds = (lambda: 1.0, number(1e-300))


def moment(least: float = 0) -> Possible:
    """A step, or a fraction of training."""
    return lambda value: integer(1 if least else 0)(value) or (not is_integer(value) and number(least, 1)(value))


share = (lambda: 0.5, either(number(0, 1), a(dict, Schedule)))
every = (lambda: 2, optional(integer()))
strength = (lambda: 0.1, number(0))
RULES: dict[type[Wiring], dict[str, Argument]] = {
    SET: {"fraction": share, "every": every},
    RigL: {
        "alpha": (lambda: 0.5, number(0, 1)),
        "every": every,
        "until": (lambda: 0.75, moment()),
        "skip_update": on,
    },
    SparseMomentum: {"prune_rate": share, "every": every},
    GMP: {"begin": (lambda: 0, moment()), "until": (lambda: 3, moment()), "every": (lambda: 1, integer())},
    TopKAST: {"extra": (lambda: 0.1, moment()), "strength": strength},
    ACDC: {"switches": (lambda: (1, 2, 4), sequence(moment(), 1))},
    STR: {"start": (lambda: -5.0, number()), "weight_decay": strength},
    NM: {"n": (lambda: 1, integer()), "m": (lambda: 2, integer()), "strength": strength},
    L1Anneal: {
        "strength": (lambda: 0.1, either(number(0), a(dict, Schedule))),
        "removal": (lambda: Schedule(0.0, 1.0), a(dict, Schedule)),
    },
    TargetedDropout: {"rho": (lambda: 0.5, either(text, shares)), "variant": (lambda: "regular", text)},
}


def budget(rule: type[Wiring], layers: bool) -> dict[str, Argument]:
    """Return the arguments that say how many edges there are; the rule that decides that itself takes no other."""
    density = (lambda: None if rule is NM else 0.5, optional(number(1e-12, 1)))
    num_edges = (lambda: 11 if rule is NM else 9, integer())
    unused = (lambda: None, anything)
    return {"density": density if layers else unused, "num_edges": unused if layers else num_edges}


def is_rule(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Wiring)


def method(make: Callable[[], Any], which: str) -> Callable[..., Any]:
    def call(**arguments: Any) -> object:
        return getattr(make(), which)(**arguments)

    call.__qualname__ = f"….{which}"
    return call


def doors() -> list[tuple[int, str, Door]]:
    """Return what is called: a weight, a name, and the callable with its arguments."""
    dynamics = {
        "num_nodes": (lambda: 9, integer()),
        "num_inputs": (lambda: 3, integer()),
        "num_outputs": (lambda: 2, integer()),
    }
    ends = {"stride": (lambda: 1, integer()), "recompute": on, "name": (lambda: "g", text)}
    shared: dict[str, Argument] = {"wiring": rule, "node_function": function, "propagation": way, **ends}
    schedule: dict[str, Argument] = {
        "start": (lambda: 0.0, number()),
        "end": (lambda: 1.0, number()),
        "begin": (lambda: 0, number(0)),
        "until": (lambda: 9, number(0)),
        "shape": (lambda: "linear", text),
    }
    edges = {"num_edges": (lambda: 9, optional(integer()))}
    node = {"num_nodes": size, "stride": (lambda: 1, integer()), "kernel_size": (lambda: 3, integer())}
    norm: dict[str, Argument] = {"norm": (lambda: "batch", text), "eps": (lambda: 1e-5, number(1e-300))}
    csr = {
        "z": (lambda: torch.randn(3, 2), tensor),
        "rowptr": (lambda: torch.tensor([0, 1, 2]), tensor),
        "columns": (lambda: torch.tensor([0, 2]), tensor),
        "values": (lambda: torch.randn(2), tensor),
    }
    static = {
        "x": (lambda: images(), tensor),
        "sizes": (lambda: [3, 2], sequence(integer(0), 1)),
        "strides": (lambda: [1, 0], sequence(integer(0), 1)),
        "rowptr": csr["rowptr"],
        "columns": csr["columns"],
        "values": csr["values"],
        "scale": (lambda: torch.ones(3), tensor),
        "shift": (lambda: torch.ones(3), tensor),
        "kernel": (lambda: torch.ones(3, 3, 3), tensor),
        "bias": (lambda: None, optional(tensor)),
    }
    run: dict[str, Argument] = {
        name: (
            lambda value=value: value,  # type: ignore[misc]
            {
                bool: truth,
                int: integer(0),
                float: number(0),
                str: text,
                dict: a(dict),
                type(None): optional(either(text, integer(0))),
            }[type(value)],
        )
        for name, value in vars(RunOptions()).items()
    }
    steps: dict[str, Argument] = {"num_steps": num_steps, "steps_per_epoch": (lambda: 3, optional(integer()))}
    found: list[tuple[int, Callable[..., Any], dict[str, Argument]]] = [
        (9, NeuralGraph, {"blocks": blocks, **edges, **shared, "input_function": on, "output_function": on}),
        (5, NeuralGraph, {**dynamics, **edges, **shared, "dynamics": (lambda: Discrete(2), a(str, Dynamics))}),
        (9, method(graph, "forward"), {"x": (images, tensor)}),
        (5, method(lambda: dynamic(Discrete(2)), "forward"), {"x": (images, tensor), "return_states": on}),
        (
            5,
            method(lambda: dynamic(Continuous("euler")), "forward"),
            {"x": (images, tensor), "times": (lambda: [0.5, 1.0], optional(either(sequence(number()), tensor)))},
        ),
        (4, method(graph, "rewire"), {"wiring": rule, "num_edges": (lambda: 3, integer())}),
        (
            2,
            method(graph, "live_nodes"),
            {
                "live_outputs": (lambda: torch.ones(2).bool(), optional(tensor)),
                "real_index": (lambda: torch.arange(4), optional(tensor)),
            },
        ),
        (
            2,
            CandidateEdges,
            {"blocks": (lambda: [(range(2), range(2, 4))], anything), "num_nodes": (lambda: 4, optional(integer()))},
        ),
        (1, CandidateEdges.static, {"sizes": blocks}),
        (1, CandidateEdges.adjacent, {"sizes": blocks}),
        (1, CandidateEdges.dynamic, {"num_nodes": size}),
        (1, CandidateEdges.bipartite, {"num_sources": size, "num_targets": size}),
        (1, method(lambda: CandidateEdges.static((3, 4)), "pairs"), {"index": (lambda: torch.tensor([0, 3]), tensor)}),
        (
            1,
            method(lambda: CandidateEdges.static((3, 4)), "flat_index"),
            {"edge_index": (lambda: torch.tensor([[0], [3]]), tensor)},
        ),
        (2, select_top_k, {"weight": (lambda: torch.randn(9), tensor), "k": size}),
        (1, RandomGraph, {"separate_scores": on}),
        (2, Fixed, {"edge_index": (lambda: torch.tensor([[0], [3]]), tensor)}),
        (1, FineTune, {"trained": weights}),
        (1, LotteryTicket, {"trained": weights, "initial": weights}),
        *((2, rule, options) for rule, options in RULES.items()),
        *(
            (1, trained(rule, layers, lr), {**options, **(budget(rule, layers)), **steps})
            for rule, options in RULES.items()
            for layers in (True, False)
            for lr in (0.1, 1e20)
        ),
        (
            2,
            registered,
            {
                "name": (lambda: "mine", lambda value: text(value) and value.isprintable() and value != ""),
                "rule": (lambda: SET, is_rule),
            },
        ),
        (1, WiringUpdates, steps),
        (1, WiringMonitor, {"model": model}),
        (1, TrainingCost, {"model": model}),
        (2, method(graph, "load_weights"), {"state": (lambda: graph().state_dict(), a(dict, torch.Tensor))}),
        (
            2,
            method(lambda: weight_graphs(sparse())["0.weight"], "load_weights"),
            {"state": (lambda: perceptron().state_dict(), a(dict, torch.Tensor))},
        ),
        (3, Schedule, schedule),
        (2, create_wiring, {"name": (lambda: "targeted_dropout", text), "rho": (lambda: 0.5, either(text, shares))}),
        (
            3,
            Discrete,
            {"steps": (lambda: 2, optional(integer())), "input_mode": (lambda: "hold", text), "function_per_step": on},
        ),
        (
            6,
            Continuous,
            {
                "method": (lambda: "euler", text),
                "rtol": (lambda: 0.1, number(0)),
                "atol": (lambda: 0.1, number(0)),
                "options": (lambda: {"step_size": 0.5}, optional(a(dict))),
                "t_span": (lambda: (0.0, 1.0), sequence(number(), 2)),
                "adjoint": on,
                "adjoint_options": (lambda: None, optional(a(dict))),
            },
        ),
        (3, NormReluConv, {**node, **norm}),
        (1, NodeConv, node),
        (1, make_norm, {"norm": norm["norm"], "num_nodes": size, "eps": norm["eps"]}),
        (1, make_node_function, {"node_function": function, "num_nodes": size, "stride": (lambda: 1, integer())}),
        (
            1,
            Blockwise,
            {
                "functions": (lambda: [nn.ReLU(), nn.Tanh()], sequence(module)),
                "sizes": (lambda: [3, 4], sequence(integer())),
            },
        ),
        (2, method(lambda: NormReluConv(3), "forward"), {"z": (images, tensor)}),
        (
            1,
            MessagePassingPropagation,
            {"adjacency": (lambda: "csr", text), "max_message_bytes": (lambda: 99, integer(0))},
        ),
        (1, MobileNetV1, {"width": width, "num_classes": classes, "stem_stride": (lambda: 1, integer(1, 3))}),
        (
            1,
            MobileNetV1DNW,
            {
                "width": width,
                "num_classes": classes,
                "small": on,
                "wiring": rule,
                "layered": on,
                "propagation": way,
                "recompute": on,
            },
        ),
        (
            1,
            TinyClassifier,
            {
                "dynamics": (lambda: "static", text),
                "num_classes": classes,
                "wiring": rule,
                "adjoint": on,
                "propagation": way,
                "recompute": on,
            },
        ),
        (1, GraphClassifier, {"num_features": size, "num_classes": size, "num_edges": size, "wiring": rule}),
        (1, create_model, {"name": (lambda: "tiny_classifier", text), "num_classes": classes, "adjoint": on}),
        (1, edges_at_width, {"stage": blocks, "width": width}),
        (1, method(lambda: tiny_model(), "forward"), {"x": (lambda: images(3, 32), tensor)}),
        (
            6,
            sparsify,
            {
                "module": (perceptron, module),
                "density": (lambda: 0.5, optional(number(1e-12, 1))),
                "wiring": rule,
                "skip": (lambda: "0", either(text, sequence(anything), callable, a(set))),
                "distribution": (lambda: "uniform", a(str, dict)),
            },
        ),
        (2, densify, {"module": (sparse, module), "keep_hallucinated": on}),
        (2, dense_state_dict, {"module": (sparse, module), "keep_hallucinated": on}),
        (1, weight_graphs, {"module": (sparse, module)}),
        (1, to_data, {"module": (sparse, module), "name": (lambda: "0.weight", text)}),
        (2, method(lambda: weight_graphs(sparse())["0.weight"], "rewire"), {"wiring": rule, "num_edges": size}),
        (
            1,
            lambda **arguments: load_optimizer_state(**{"module": perceptron(), **arguments}),
            {
                "optimizer": (lambda: torch.optim.SGD(perceptron().parameters(), 0.1), a(torch.optim.Optimizer)),
                "state_dict": (lambda: torch.optim.SGD(perceptron().parameters(), 0.1).state_dict(), a(dict)),
            },
        ),
        (
            2,
            attached,
            {"model": (momentum, module), **steps},
        ),
        (
            1,
            attach,
            {
                "model": (momentum, module),
                "optimizer": (lambda: torch.optim.Adam(perceptron().parameters()), a(torch.optim.Optimizer)),
            },
        ),
        (1, fine_tune, {"complete": (complete, module)}),
        (1, lottery_ticket, {"complete": (complete, module), "initial": (lambda: complete().state_dict(), a(dict))}),
        (1, neural_graphs, {"model": model}),
        (1, live_nodes, {"model": model, "real_index": (lambda: None, optional(a(dict)))}),
        (1, wiring_penalty, {"model": model}),
        (3, cost, {"model": model, "input_size": (lambda: (3, 4, 4), sequence(integer(), 1)), "paper": on}),
        (3, compact, {"model": model, "products": (lambda: "dense", text), "example": (images, optional(tensor))}),
        (
            2,
            save_compact,
            {"module": (lambda: compact(graph()), module), "path": (lambda: "b.safetensors", a(str, Path))},
        ),
        (2, load_compact, {"path": (saved, a(str, Path)), "device": (lambda: "cpu", device)}),
        (1, equivalence.mlp_to_discrete, {"mlp": (perceptron, module)}),
        (1, equivalence.static_to_discrete, {"graph": model}),
        (1, equivalence.lstm_to_discrete, {"lstm": (lambda: nn.LSTM(3, 4), module)}),
        (1, in_figure(plot), {"graph": wiring_data, "top": top, "ax": axes, "epoch": epoch}),
        (1, in_figure(plot), {"graph": wiring_data, "top": top, "layout": (lambda: middle, callable)}),
        (1, in_figure(plot_change), {"before": data, "after": data, "top": top, "ax": axes}),
        (1, in_figure(plot_adjacency), {"graph": wiring_data, "ax": axes, "epoch": epoch}),
        (
            1,
            plot_layers,
            {"module": (sparse, module), "names": (lambda: ["0.weight"], optional(sequence(text))), "epoch": epoch},
        ),
        (1, plot_evolution, {"graph": moments}),
        (1, plot_training, {"path": (table, a(str, Path))}),
        (1, animate, {"graph": moments, "path": picture, "frames": (lambda: 2, integer()), "seconds": seconds}),
        (1, save_page, {"recording": (recording, a(Recording, RecordedGraph)), "path": picture}),
        (2, Recording, {"model": model, "every": (lambda: 1, integer()), "step": (lambda: 0, integer(0))}),
        (2, method(recording, "add"), {"step": (lambda: 2, integer(2)), "epoch": epoch}),
        (1, method(recording, "save"), {"path": picture}),
        (2, Recording.load, {"path": (recording_file, a(str, Path)), "model": (graph, optional(module))}),
        (1, Recording.from_bytes, {"content": (lambda: recording().to_bytes(), a(bytes))}),
        *(
            (1, method(recorded, name), {"moment": (lambda: 1, integer(-2, 2))})
            for name in ("born", "gone", "live", "weights", "edges", "to_data")
        ),
        (1, method(recorded, "pairs"), {"index": (lambda: np.array([0, 3]), a(np.ndarray))}),
        (1, to_networkx, {"graph": wiring_data}),
        (2, sparse_product, csr),
        (2, static_graph, static),
        (9, RunOptions, run),
        (
            2,
            Classifier,
            {
                "model": model,
                "num_classes": classes,
                "schedule": (lambda: cosine(9), callable),
                "lr": (lambda: 0.1, number(0)),
                "momentum": (lambda: 0.9, number(0)),
                "weight_decay": (lambda: 0.0, number(0)),
                "seed": (lambda: 0, integer(0)),
                "label_smoothing": (lambda: 0.0, number(0, 1)),
                "norm_weight_decay": on,
            },
        ),
        (1, cosine, {"num_steps": (lambda: 9, integer())}),
        (1, step, {"num_steps": (lambda: 9, integer())}),
    ]
    return [(weight, getattr(call, "__qualname__", "call"), (call, arguments)) for weight, call, arguments in found]


@functools.cache
def tiny_model() -> nn.Module:
    return TinyClassifier("static").eval()


def case(call: Callable[..., Any], arguments: dict[str, Argument], replaced: dict[str, Any]) -> Callable[[], object]:
    def run() -> object:
        torch.manual_seed(0)
        # Operators have a fuzz of their own for tensors.
        given = {key: replaced[key] if key in replaced else make() for key, (make, _) in arguments.items()}
        nonsense = [key for key, value in replaced.items() if not arguments[key][1](value)]
        result = call(**given)
        if nonsense:
            raise Bad(f"accepted nonsense for {nonsense[0]}")
        return result

    return run


def short(value: Any) -> str:
    if isinstance(value, torch.Tensor | np.ndarray):
        return f"{type(value).__name__} {value.dtype} {list(value.shape)}"
    try:
        return " ".join(repr(value).split())[:40]
    except Exception:
        return type(value).__name__


def cases(rng: random.Random, count: int) -> Iterator[Case]:
    """Yield calls: one to three arguments of a random door are replaced."""
    import matplotlib as mpl

    mpl.use("Agg")
    known = doors()
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # for what is written to strange names
        try:
            for _ in range(count):
                _, label, (call, arguments) = rng.choices(known, [weight for weight, *_ in known])[0]
                number_replaced = min(len(arguments), rng.choice([0, 1, 1, 1, 1, 2, 3]))
                replaced = {key: rng.choice(hostile_values()) for key in rng.sample(list(arguments), number_replaced)}
                if call in (sparse_product, static_graph):  # for their tensors there is a surface of its own
                    replaced = {key: value for key, value in replaced.items() if not isinstance(value, torch.Tensor)}
                shown = ", ".join(f"{key}={short(value)}" for key, value in replaced.items())
                yield f"{label}({shown})", case(call, arguments, replaced)
        finally:
            os.chdir(before)

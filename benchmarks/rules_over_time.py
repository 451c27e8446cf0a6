"""Shows the number of real edges of every rule while a small graph and a small perceptron train on random data.

For each step it is the number of edges that the step computes with; after the last step, that of evaluation. Rounds
follow every tenth of the steps. Lottery ticket and fine tune train the complete graph for the first half. Run with
``python benchmarks/rules_over_time.py``.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import torch
from timing import arguments, print_table
from torch import nn

from dnw_graph import NeuralGraph, attach, sparsify, wiring_penalty
from dnw_graph.ranking import rankings
from dnw_graph.whole_file import write_whole
from dnw_graph.wirings import WIRINGS, create_wiring
from dnw_graph.wirings.two_stage import fine_tune, lottery_ticket

STAGES = ("lottery_ticket", "fine_tune")
MODELS = ("graph", "perceptron")


def main() -> None:
    """Train both models with every rule and print one row for each."""
    parser = arguments(__doc__ or "", takes=())
    parser.add_argument("--steps", type=int, default=60, help="steps of training")
    options = parser.parse_args()
    rows = [row(rule, model, options.steps) for model in MODELS for rule in sorted(WIRINGS)]
    print_table(rows)
    if options.json is not None:
        write_whole(options.json, (json.dumps(rows, indent=1) + "\n").encode(), "--json")


def row(rule: str, kind: str, steps: int) -> dict[str, Any]:
    """Return the number of real edges at the start, at every sixth of training, and at the end."""
    torch.manual_seed(0)
    shown = range(0, steps + 1, max(steps // 6, 1))
    if rule in STAGES:
        model = make(kind, "complete")
        initial = copy.deepcopy(model.state_dict())
        counts = train(model, steps // 2)
        model = fine_tune(model) if rule == "fine_tune" else lottery_ticket(model, initial)
        counts = [*counts[:-1], *train(model, steps - steps // 2)]
    else:
        rounds = {"every": max(steps // 10, 1)}
        options: dict[str, dict[str, Any]] = {"gmp": rounds, "rigl": rounds, "str": {"start": -3.0}}
        model = make(kind, rule, options.get(rule))
        counts = train(model, steps)
    return {"rule": rule, "model": kind, **{str(step): counts[step] for step in shown}}


def make(kind: str, rule: str, options: Mapping[str, Any] | None = None) -> nn.Module:
    """Return a model whose graphs have a rule; a quarter of their candidates are real if the rule takes a k."""
    wiring = create_wiring(rule, **(options or {}))
    if kind == "graph":
        return NeuralGraph(blocks=(8, 16, 16), num_edges=None if rule == "nm" else 160, wiring=wiring)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    sparsify(model, None if rule == "nm" else 0.25, wiring)
    return model


def train(model: nn.Module, steps: int) -> list[int]:
    """Train a model, and return its number of real edges in every step and after the last one."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    attach(model, optimizer, num_steps=steps, steps_per_epoch=max(steps // 10, 1))
    graphs = [graph for _, graph in rankings(model)]
    counts = []
    for _ in range(steps):
        images = (8, 4, 4) if isinstance(model, NeuralGraph) else (32,)
        loss = model(torch.randn(16, *images)).square().mean() + wiring_penalty(model)
        counts.append(sum(len(graph.real_edges(graph.tensors())) for graph in graphs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return [*counts, sum(graph.num_real_edges for graph in graphs)]


if __name__ == "__main__":
    main()

"""How often graphs choose their real edges."""

import torch

from dnw_graph import DNW, Wiring
from dnw_graph.ranking import rankings


class CountingDNW(DNW):
    """Counts how often edges are chosen, to train and otherwise."""

    training_calls = 0
    calls = 0

    def choose(self, view):
        self.calls += 1
        return super().choose(view)

    def choose_to_train(self, view):
        self.training_calls += 1
        return DNW.choose(self, view)


class Restless(Wiring):
    """Other edges at every choice."""

    def choose(self, view):
        return torch.randperm(view.num_candidates)[: view.k].sort().values


def graphs(model):
    return [graph for _, graph in rankings(model)]


def counts(model):
    return [(graph.wiring.training_calls, graph.wiring.calls) for graph in graphs(model)]


def choices(model, run):
    """How often graphs were asked, to train and otherwise, while ``run`` ran; without those that were not."""
    before = counts(model)
    run()
    return {(a - c, b - d) for (a, b), (c, d) in zip(counts(model), before, strict=True)} - {(0, 0)}


def swap_order(weight):
    """Weights of which other ones are the largest."""
    return 1 / (0.1 + weight.detach().abs())

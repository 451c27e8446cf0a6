"""Draws are uniform and the same in every number format."""

import pytest
import torch
from reference import top_k
from torch import nn

from dnw_graph import NeuralGraph, RandomGraph, TargetedDropout, attach, sparsify
from dnw_graph.wirings import SET, RigL, SparseMomentum

SIDE, K = 1000, 100
HALF = [torch.bfloat16, torch.float16]


def half_layer(rule, dtype):
    layer = nn.Linear(SIDE, SIDE, bias=False).to(dtype)
    sparsify(layer, K / SIDE**2, rule)
    (graph,) = (module for module in layer.modules() if hasattr(module, "real_index"))
    return layer, graph


def assert_spread(index):
    """Places drawn uniformly from 0 … 1 have the mean 1/2 and the deviation 1/√12."""
    places = index.double() / SIDE**2
    assert abs(places.mean() - 1 / 2) < 4 / (12 * len(index)) ** 0.5


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rule", [SET(), RigL(), SparseMomentum(), RandomGraph(separate_scores=True)], ids=repr)
def test_first_edges_are_spread_over_all_candidates(rule, dtype):
    assert_spread(half_layer(rule, dtype)[1].real_index)


@pytest.mark.parametrize("dtype", HALF)
def test_edges_that_set_grows_are_spread_over_all_candidates(dtype):
    layer, graph = half_layer(SET(0.5, every=1), dtype)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    attach(layer, optimizer)
    layer(torch.ones(1, SIDE, dtype=dtype)).sum().backward()
    before = graph.real_index
    optimizer.step()
    grown = graph.real_index[~torch.isin(graph.real_index, before)]
    assert len(grown) == K // 2
    assert_spread(grown)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_single_and_double_precision_rank_numbers_of_their_own_format(dtype):
    graph = NeuralGraph((20, 30), 40).to(dtype)
    torch.manual_seed(5)
    graph.rewire(RandomGraph(separate_scores=True), 40)
    torch.manual_seed(5)
    assert graph.real_index.tolist() == top_k(torch.rand(600, dtype=dtype).tolist(), 40)


def test_what_is_dropped_does_not_depend_on_the_default_format():
    graph = NeuralGraph((20, 30), 40, wiring=TargetedDropout(0.9))
    expected = graph.wiring.choose_to_train(graph.view())
    graph.wiring.step = 0
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = graph.wiring.choose_to_train(graph.view())
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)

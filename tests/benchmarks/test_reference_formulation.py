"""The reference formulation: against plain loops, and against the package."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from pairs import rest_is_slow
from reference import batch_norm, convolve, instance_norm, plain_forward, relative_error, static_pairs, top_k
from torch import nn

from dnw_graph import Discrete, NeuralGraph
from dnw_graph.models import MobileNetV1DNW, TinyClassifier
from dnw_graph.node_functions import NormReluConv

BLOCKS = (3, 4, 5, 2)


def script(name: str) -> ModuleType:
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return __import__(name)
    finally:
        sys.path.remove(folder)


@pytest.fixture(scope="module")
def formulation() -> ModuleType:
    return script("reference_formulation")


@pytest.fixture(scope="module")
def agreement() -> ModuleType:
    return script("agreement")


def tied(graph: NeuralGraph) -> NeuralGraph:
    """A graph in float64 whose weights take few values, so that ties decide which edges are real."""
    weight = graph.candidates.weight
    weight.data = (weight.data * 5).round() / 5
    weight.data[weight.data == 0] = 0.2
    return graph.double()


MODELS = {
    "mobilenet": partial(MobileNetV1DNW, 0.225, 10, 1),
    "static": partial(TinyClassifier, "static"),
    "discrete": partial(TinyClassifier, "discrete"),
    "continuous": partial(TinyClassifier, "continuous"),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", rest_is_slow(["static", "discrete", "mobilenet", "continuous"]))
def test_loss_and_gradients_are_those_of_the_package(
    formulation: ModuleType, agreement: ModuleType, name: str, layout: torch.memory_format
):
    model = MODELS[name]().double()
    reference = formulation.from_ours(model, layout)
    images, labels = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([3, 7])
    for formulated in (model, reference):
        F.cross_entropy(formulated(images), labels).backward()
    pairs = list(agreement.gradients(model, reference))
    assert sorted(pair[0] for pair in pairs) == sorted(name for name, _ in model.named_parameters())
    # Gradients that are zero but for rounding have no relative error.
    assert max(relative_error(a, b) for _, a, b in pairs if b.norm() > 1e-8) < 1e-10
    assert max(((a - b).norm() for _, a, b in pairs if b.norm() <= 1e-8), default=0) < 1e-10
    model.zero_grad()
    reference.zero_grad()
    assert agreement.check(model, reference, images, labels, 1e-10) < 1e-10


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_a_static_graph_is_that_of_a_plain_loop(formulation: ModuleType, norm: str):
    graph = tied(NeuralGraph(BLOCKS, 20, stride=2, node_function=partial(NormReluConv, norm=norm)))
    dense = formulation.dense_graph(graph)
    x = torch.randn(3, BLOCKS[0], 6, 6, dtype=torch.float64)
    pairs, weights = static_pairs(BLOCKS), graph.candidates.weight.tolist()
    edges = {pairs[i]: weights[i] for i in top_k(weights, 20)}
    kernels = torch.cat([function.conv.weight for function in dense.functions if not isinstance(function, nn.Identity)])

    def function(v, received):
        if v >= sum(BLOCKS[:-1]):
            return received
        normalised = (batch_norm if norm == "batch" else instance_norm)(received, 1, 0)
        return convolve(normalised.relu(), kernels[v, 0], stride=2 if v < BLOCKS[0] else 1)

    # Received maps are smaller than the inputs: the loop has to start from the inputs' states.
    states = torch.stack([function(v, x[:, v]) for v in range(BLOCKS[0])], dim=1)
    expected, _ = plain_forward(states, BLOCKS, edges, lambda v, z: z if v < BLOCKS[0] else function(v, z))
    found = dense(x)
    assert relative_error(found, torch.stack(expected[-BLOCKS[-1] :], dim=1)) < 1e-12


def test_every_candidate_has_its_place(formulation: ModuleType):
    dense = formulation.dense_graph(NeuralGraph(BLOCKS, 20))
    flat = torch.arange(len(static_pairs(BLOCKS)))
    matrices = dense.matrices(flat)
    starts = [sum(BLOCKS[:place]) for place in range(len(BLOCKS))]
    for i, (u, v) in enumerate(static_pairs(BLOCKS)):
        source = max(place for place, start in enumerate(starts) if start <= u)
        assert matrices[source][v - starts[source + 1], u - starts[source]] == i
    assert torch.equal(dense.flat(matrices), flat)


def test_real_edges_are_those_of_one_sort_with_ties_to_the_lower_index(formulation: ModuleType):
    graph = tied(NeuralGraph(num_nodes=6, num_inputs=2, num_outputs=2, num_edges=9, dynamics=Discrete(steps=2)))
    (kernel,) = formulation.dense_graph(graph).real_weights()
    assert kernel.flatten().nonzero().flatten().tolist() == top_k(graph.candidates.weight.tolist(), 9)


def test_evaluation_keeps_the_weights_until_the_next_training(formulation: ModuleType):
    model = MODELS["static"]()
    reference = formulation.from_ours(model).eval()
    images = torch.randn(2, 3, 32, 32)
    model.eval()
    assert relative_error(reference(images), model(images)) < 1e-5
    assert reference.graphs[0].real_weights()[0] is reference.graphs[0].real_weights()[0]
    for weight in reference.graphs[0].weights:
        weight.data.neg_()
    model.graph.candidates.weight.data.neg_()
    reference.train().eval()
    model.train().eval()
    assert relative_error(reference(images), model(images)) < 1e-5


@pytest.mark.parametrize("part", ["graph.candidates.weight", "classifier.bias"])
def test_another_model_is_found_out(formulation: ModuleType, agreement: ModuleType, part: str):
    model = MODELS["static"]().double()
    reference = formulation.from_ours(model)
    model.get_parameter(part).data[0] += 0.5
    with pytest.raises(AssertionError, match="differs from the reference formulation"):
        agreement.check(model, reference, torch.randn(2, 3, 32, 32).double(), torch.tensor([3, 7]), 1e-10)

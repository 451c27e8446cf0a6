"""The solver with fused arithmetic against torchdiffeq, and its errors."""

import pytest
import torch
from reference import relative_error
from torch import nn
from torchdiffeq import odeint

from dnw_graph import Continuous, InputError, NeuralGraph
from dnw_graph.dynamics.dormand_prince import dormand_prince
from dnw_graph.propagation import BlockPropagation, SparsePropagation

TIMES = {"end": [0.0, 1.0], "several in a step": [0.0, 0.1, 0.11, 0.12, 0.5, 2.0]}


class Field:
    """A field that depends on time, on which some steps are rejected; counts its evaluations."""

    def __init__(self, matrix):
        self.matrix, self.evaluations = matrix, 0

    def __call__(self, t, y):
        self.evaluations += 1
        return torch.tanh(self.matrix @ y) * (1 + t) + 5 * torch.exp(-1e3 * (t - 0.6) ** 2)


@pytest.fixture
def leaves():
    """A matrix and a state with more values than one piece, the last of which is not full."""
    return [(1.2 * torch.randn(*shape, dtype=torch.float64)).requires_grad_() for shape in ((20, 20), (20, 70))]


@pytest.mark.parametrize("times", TIMES)
def test_makes_the_steps_of_torchdiffeq_and_has_its_gradients(times, leaves):
    matrix, y = leaves
    grid = torch.tensor(TIMES[times], dtype=torch.float64)
    theirs, ours = Field(matrix), Field(matrix)
    expected = odeint(theirs, y, grid, rtol=1e-3, atol=1e-3, method="dopri5")[1:]
    states = torch.stack(dormand_prince(ours, y, grid, 1e-3, 1e-3))
    assert ours.evaluations == theirs.evaluations > 14
    assert relative_error(states, expected) <= 1e-11
    for part in (slice(None), slice(1), slice(-1, None)):  # Also of some times only, and one pass after the other.
        grads = [torch.autograd.grad(each[part].sin().sum(), leaves, retain_graph=True) for each in (states, expected)]
        for found, wanted in zip(*grads, strict=True):
            assert relative_error(found, wanted) <= 1e-9


def test_the_default_device_does_not_matter(leaves):
    grid, found = torch.tensor(TIMES["several in a step"], dtype=torch.float64), []
    for default in ("cpu", "meta"):
        with torch.device(default):
            states = torch.stack(dormand_prince(Field(leaves[0]), leaves[1], grid, 1e-3, 1e-3))
            found.append((states, *torch.autograd.grad(states.sum(), leaves)))
    assert all(torch.equal(*each) for each in zip(*found, strict=True))


def test_float32_agrees_with_float64(leaves):
    grid = torch.tensor([0.0, 1.0])
    (exact,) = dormand_prince(Field(leaves[0]), leaves[1], grid.double(), 1e-3, 1e-3)
    single = [each.detach().float() for each in leaves]
    (state,) = dormand_prince(Field(single[0]), single[1], grid, 1e-3, 1e-3)
    assert state.dtype == torch.float32
    assert relative_error(state.double(), exact) <= 1e-4


def graph_with(propagation, **options):
    torch.manual_seed(0)
    sizes = {"num_nodes": 9, "num_inputs": 3, "num_outputs": 2, "num_edges": 30}
    return NeuralGraph(**sizes, dynamics="continuous", propagation=propagation, **options).double()


def test_a_graph_has_the_gradients_of_the_other_propagations():
    results = []
    for propagation in (SparsePropagation(), BlockPropagation()):
        graph = graph_with(propagation)
        outputs = graph(torch.randn(4, 3, 4, 4, dtype=torch.float64), times=[0.3, 1.0])
        outputs.square().sum().backward()
        results.append((graph.dynamics.num_evaluations, outputs, *(each.grad for each in graph.parameters())))
    (count, *found), (expected_count, *expected) = results
    assert count == expected_count
    for each, wanted in zip(found, expected, strict=True):
        assert relative_error(each, wanted) <= 1e-8


LAYOUTS = {
    "stride": {"stride": 2},
    "own convolution": {"node_function": lambda nodes: nn.Conv2d(nodes, nodes, 3, padding=1, groups=nodes)},
    "a hook": {},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_node_functions_with_any_memory_layout(layout):
    results = []
    for propagation in ("sparse", "block"):
        graph = graph_with(propagation, **LAYOUTS[layout])
        if layout == "a hook":
            graph.dynamics.node_function.conv.register_forward_hook(lambda *_: None)
        x = torch.randn(4, 3, 4, 4, dtype=torch.float64, requires_grad=True)
        outputs = graph(x)
        outputs.square().sum().backward()
        results.append((outputs, x.grad))
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) <= 1e-8


def test_what_has_no_solution_is_refused():
    graph = NeuralGraph(
        num_nodes=4,
        num_inputs=2,
        num_outputs=1,
        num_edges=10,
        dynamics=Continuous(),
        node_function=lambda nodes: Squares(),
        propagation="sparse",
    )
    with torch.no_grad():
        graph.candidates.weight.fill_(10)
    with pytest.raises(InputError, match=r"dopri5 failed at t = .* lower the learning rate"):
        graph(torch.ones(2, 2, 3, 3))
    with pytest.raises(InputError, match="the inputs of the graph are NaN or infinite"):
        graph(torch.full((2, 2, 3, 3), torch.nan))


class Squares(torch.nn.Module):
    def forward(self, z):
        return z.square() + 1

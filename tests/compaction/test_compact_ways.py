"""Models that are written in less usual ways: compacted right, or kept as they are."""

import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from reference import relative_error
from torch import nn

from dnw_graph import Discrete, InputError, NeuralGraph, sparsify
from dnw_graph.compaction import compact
from dnw_graph.node_functions import Biased, ReluConvSendNorm


def with_statistics(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
    return model.eval()


def assert_same(model, x, tolerance=1e-5):
    model = with_statistics(model)
    small = compact(model)
    with torch.no_grad():
        assert relative_error(small(x), model(x)) < tolerance
    return small


def test_a_head_of_several_linear_layers_and_norms():
    head = [nn.Linear(16, 32), nn.ReLU(), nn.BatchNorm1d(32), nn.Linear(32, 64), nn.BatchNorm1d(64), nn.Linear(64, 10)]
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)
    small = assert_same(model, torch.randn(4, 3, 8, 8))
    # The second norm is part of the linear layer before it; the first one follows a ReLU.
    kinds = [type(layer).__name__ for layer in small.layers]
    assert kinds.count("Affine") == 1


@pytest.mark.parametrize(("tokens", "sparse"), [(32, False), (64, False), (64, True)])
def test_a_norm_of_tokens_behind_a_linear_layer(tokens, sparse):
    model = nn.Sequential(
        nn.Linear(64, 64), nn.BatchNorm1d(tokens), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(tokens)
    )
    if sparse:
        sparsify(model, 0.1)
    assert_same(model, torch.randn(3, tokens, 64))


class Residual(nn.Module):
    """What the layers before a residual connection are is told by ``inner``."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.conv = inner, nn.Conv2d(64, 64, 3, padding=1)

    def forward(self, x):
        return self.conv(F.relu(self.inner(x) + x))


def test_an_addition_that_is_broadcast():
    model = Residual(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(64, 64, 3, padding=1)))
    sparsify(model, 0.1)
    assert_same(model, torch.randn(2, 64, 6, 6))


def test_a_replaced_forward_pass_of_a_model_with_sparse_layers():
    model = Residual(nn.Conv2d(64, 64, 3, padding=1))
    sparsify(model, 0.1)
    model.forward = types.MethodType(lambda self, x: 3 * self.conv(x), model)
    assert_same(model, torch.randn(2, 64, 6, 6))


class Joined(nn.Module):
    """Concatenates channels in one of the ways that PyTorch takes."""

    def __init__(self, join):
        super().__init__()
        self.one, self.two, self.join = nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3), join

    def forward(self, x):
        return self.join(self.one(x), self.two(x))


@pytest.mark.parametrize(
    "join",
    [
        lambda a, b: torch.cat([a, b], dim=1),
        lambda a, b: torch.cat([a, b], 1),
        lambda a, b: torch.cat([a, b], axis=1),
        lambda a, b: torch.cat(tensors=[a, b], dim=1),
    ],
    ids=["dim", "place", "axis", "tensors"],
)
def test_ways_of_concatenating(join):
    model = Joined(join)
    sparsify(model, 0.1)
    assert_same(model, torch.randn(2, 64, 6, 6))


def graph_with_silent_outputs(**options):
    graph = NeuralGraph(blocks=(16, 24, 24), num_edges=60, wiring="random_graph", **options)
    assert graph.silent_nodes()[-24:].any()
    return graph


class Shifted(NeuralGraph):
    """A graph whose outputs get a bias."""

    def forward(self, x, **options):
        return super().forward(x, **options) + 0.5


@pytest.mark.parametrize("way", ["hook", "subclass"])
def test_outputs_without_edges_of_a_graph_with_a_bias_of_its_own(way):
    torch.manual_seed(0)
    graph = graph_with_silent_outputs()
    if way == "hook":
        graph.register_forward_hook(lambda module, args, out: out + 0.5)
    else:
        shifted = Shifted(blocks=(16, 24, 24), num_edges=60, wiring="random_graph")
        shifted.load_state_dict(graph.state_dict())
        graph = shifted
    tail = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)]
    assert_same(nn.Sequential(nn.Conv2d(3, 16, 3), graph, *tail), torch.randn(2, 3, 8, 8))


class Doubled(Biased):
    """Twice the values."""

    def forward(self, z):
        return 2 * super().forward(z)


def doubled(num_nodes, stride=1):
    return Doubled(torch.randn(num_nodes), nn.ReLU())


def test_a_subclass_of_a_node_function_is_kept():
    graph = NeuralGraph(blocks=(4, 6, 3), num_edges=20, node_function=doubled)
    assert_same(graph, torch.randn(5, 4))


def test_a_transformer_of_pytorch():
    model = nn.TransformerEncoderLayer(64, 4, dim_feedforward=128, batch_first=True)
    sparsify(model, 0.1)
    assert_same(model, torch.randn(2, 7, 64))


def test_norms_in_float32_of_a_model_in_half_precision():
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3),
        nn.BatchNorm2d(64),
        nn.Conv2d(64, 64, 3),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.BatchNorm2d(64),
        NeuralGraph(blocks=(64, 64, 32), num_edges=400),
        nn.BatchNorm2d(32),
    )
    sparsify(model, 0.1, skip="0")
    model.bfloat16()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    x = torch.randn(2, 3, 9, 9).bfloat16()
    small = assert_same(model, x, tolerance=0.05)
    assert small(x).dtype == torch.bfloat16


class Several(nn.Module):
    """Returns what ``collect`` makes of two tensors."""

    def __init__(self, collect):
        super().__init__()
        self.conv, self.collect = nn.Conv2d(64, 64, 3), collect

    def forward(self, x):
        z = self.conv(x)
        return self.collect(z, z.mean((2, 3)))


@pytest.mark.parametrize("collect", [lambda a, b: (a, b), lambda a, b: {"out": a, "aux": b}], ids=["tuple", "dict"])
def test_the_difference_of_several_outputs(collect):
    model = Several(collect)
    sparsify(model, 0.1)
    small = compact(model, example=torch.randn(2, 64, 6, 6))
    assert 0 <= small.report.difference < 1e-5


def test_an_example_for_a_model_that_returns_no_tensor():
    model = Several(lambda a, b: str(a.shape))
    sparsify(model, 0.1)
    with pytest.raises(InputError, match=r"Several returns '.*: an example is for models that return tensors"):
        compact(model, example=torch.randn(2, 64, 6, 6))


def test_rows_of_transposed_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.ConvTranspose2d(64, 32, 2, stride=2))
    sparsify(model, 0.1, skip="0")
    report = compact(model, example=torch.randn(1, 3, 8, 8)).report
    rows = {row.name: row for row in report.layers}
    assert list(rows) == ["0", "2"]
    assert rows["2"].multiply_adds == rows["2"].kept * 6 * 6  # once per position of the input


class Branching(nn.Module):
    """Takes the way to the norm ``clean`` for a tensor alone, which tracing does not see."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(64, 64, 3, padding=1), nn.AdaptiveMaxPool2d(2)
        self.clean, self.other = nn.BatchNorm2d(64), nn.BatchNorm2d(64)


class Optional(Branching):
    def forward(self, x, aux=None):
        h = self.conv(x)
        return self.pool(self.clean(h) if aux is None else self.other(h) + aux)


class Named(Branching):
    def forward(self, x, **options):
        h, aux = self.conv(x), options.get("aux")
        return self.pool(self.clean(h) if aux is None else self.other(h) + aux)


class Typed(Branching):
    def forward(self, x):
        h = self.conv(x)
        return self.pool(self.clean(h) if isinstance(x, torch.Tensor) else self.other(h))


class TypedNetwork(Typed):
    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d(2)


@pytest.mark.parametrize("kind", [Optional, Named, Typed, TypedNetwork])
def test_a_way_that_depends_on_the_arguments(kind):
    model = kind()
    sparsify(model, 0.1)
    assert_same(model, torch.randn(2, 64, 6, 6))


def test_a_norm_is_folded_for_tensors():
    model = Typed()
    sparsify(model, 0.1)
    small = assert_same(model, torch.randn(2, 64, 6, 6))
    assert isinstance(small.clean, nn.Identity)


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("kind", ["own", "pytorch"])
@pytest.mark.parametrize("steps", [1, 3])
def test_silent_nodes_that_send_a_bias(norm, kind, steps):
    graph = NeuralGraph(
        num_nodes=12,
        num_inputs=3,
        num_outputs=3,
        num_edges=60,
        dynamics=Discrete(steps),
        node_function=partial(ReluConvSendNorm, norm=norm),
    )
    (function,) = graph.dynamics.node_functions
    if kind == "pytorch":
        function.conv = nn.Conv2d(12, 12, 3, padding=1, groups=12)
    function.conv.bias = nn.Parameter(torch.randn(12))
    x = torch.randn(2, 3, 6, 6)
    small = assert_same(graph, x)
    # Equation 11 by hand, all nodes in every step.
    z = F.pad(x, (0, 0, 0, 0, 0, 9))
    source, target = graph.edge_index
    matrix = torch.zeros(12, 12)
    matrix[target, source] = graph.edge_weight.detach()
    with torch.no_grad():
        for _ in range(steps):
            sent = F.conv2d(z.relu(), function.conv.weight, function.conv.bias, padding=1, groups=12)
            z = function.norm(torch.einsum("vu,buhw->bvhw", matrix, sent))
        assert relative_error(small(x), z[:, -3:]) < 1e-5

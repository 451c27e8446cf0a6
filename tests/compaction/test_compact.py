"""Compact models give the outputs of the original on real images, and cost what is left of it."""

import copy
import subprocess
import sys
from functools import partial
from itertools import product

import pytest
import torch
from dynamic_reference import Timed
from pairs import every_pair, rest_is_slow
from reference import relative_error
from torch import nn

from dnw_graph import Continuous, Discrete, Fixed, InputError, NeuralGraph, RandomGraph, Wiring
from dnw_graph.analysis.cost import cost, live_nodes
from dnw_graph.compaction import CompactModel, compact
from dnw_graph.compaction.plain_layers import Conv, InstanceNorm, Linear
from dnw_graph.compaction.products import DenseProduct, SparseProduct
from dnw_graph.equivalence import lstm_to_discrete, mlp_to_discrete, static_to_discrete
from dnw_graph.models import GraphClassifier, MobileNetV1, MobileNetV1DNW, TinyClassifier
from dnw_graph.node_functions import NormReluConv, NormReluConvNormRelu, ReluConvSendNorm

PRODUCTS = ["sparse", "dense"]


class EveryThird(Wiring):
    """Chooses another number of edges than k."""

    gradient = "real"

    def choose(self, view):
        return torch.arange(0, view.num_candidates, 3)


class NoEdges(Wiring):
    gradient = "real"

    def choose(self, view):
        return torch.arange(0)


class OverAllNodes(nn.Module):
    """A node function that mixes nodes."""

    def __init__(self, num_nodes, stride=1):
        super().__init__()
        self.share = nn.Parameter(torch.rand(num_nodes, 1, 1))
        self.stride = stride

    def forward(self, z):
        z = z[:, :, :: self.stride, :: self.stride]
        return self.share * (z - z.mean(dim=1, keepdim=True)) / (z.std(dim=1, keepdim=True) + 0.1)


def assert_same(model, compacted, x, tolerance=1e-10):
    with torch.no_grad():
        expected, got = model(x), compacted(x)
    assert expected.std(dim=0).norm() > 1e-4 * expected.norm()  # the images do matter
    assert got.shape == expected.shape
    assert relative_error(got, expected) < tolerance


MODELS = {
    "random graph": partial(MobileNetV1DNW, 0.12, 7, wiring="random_graph"),
    "dnw": partial(MobileNetV1DNW, 0.2, 7),
    "small": partial(MobileNetV1DNW, 0.15, 7, small=True),
    "layered": partial(MobileNetV1DNW, 0.3, 7, layered=True),
    "another number of edges": partial(MobileNetV1DNW, 0.2, 7, wiring=EveryThird()),
    "norm → ReLU → conv → norm → ReLU": partial(MobileNetV1DNW, 0.15, 7, node_function="norm_relu_conv_norm_relu"),
    "instance norm": partial(MobileNetV1DNW, 0.15, 7, node_function=partial(NormReluConv, norm="instance")),
    "large kernel": partial(MobileNetV1DNW, 0.15, 7, stem_stride=1, node_function=partial(NormReluConv, kernel_size=5)),
    "over all nodes": partial(MobileNetV1DNW, 0.15, 7, node_function=OverAllNodes),
    "mobilenet": partial(MobileNetV1, 0.25, 7),
}


@pytest.mark.parametrize(("kind", "products"), rest_is_slow(product(MODELS, PRODUCTS), quick=4))
def test_mobilenets_keep_their_outputs(kind, products, photos, trained):
    x = photos[:, :, ::2, ::2] if kind == "large kernel" else photos
    model = trained(MODELS[kind](), x)
    compacted = compact(model, products=products)
    assert_same(model, compacted, x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in compacted.modules())
    assert bool(compacted.report.kept) == (kind == "over all nodes")


class InOrder(nn.Module):
    """A user's own model of graphs one after the other."""

    def __init__(self):
        super().__init__()
        self.second = NeuralGraph((8, 6, 4), 12, name="second")
        self.first = NeuralGraph((3, 6, 8), 30, name="first")

    def modules_in_order(self):
        return [self.first, self.second]

    def forward(self, z):
        return self.second(self.first(z))


class TheFirstAlone(InOrder):
    def forward(self, z):
        return self.first(z)


def test_a_model_that_lists_its_modules_is_treated_like_a_sequence(photos, trained):
    model = trained(InOrder(), photos)
    sequence = nn.Sequential(model.first, model.second)
    assert not model.second.live_nodes()[:8].all()
    assert [int(live.sum()) for live in live_nodes(model).values()] == [
        int(live.sum()) for live in reversed(live_nodes(sequence).values())
    ]
    compacted = compact(model)
    assert type(compacted) is CompactModel
    assert compacted.report.after == compact(sequence).report.after
    assert_same(model, compacted, photos)
    inside = nn.ModuleDict({"model": model})
    assert type(compact(inside)["model"]) is CompactModel


def test_the_list_of_modules_of_a_parent_with_another_forward_pass_is_not_used(photos, trained):
    model = trained(TheFirstAlone(), photos)
    assert live_nodes(model)["first"][-8:].all()
    assert_same(model, compact(model), photos)


@pytest.mark.parametrize("products", PRODUCTS)
def test_single_precision(products, photos, trained):
    model = trained(MobileNetV1DNW(wiring="random_graph"), photos.float())
    assert_same(model, compact(model, products=products), photos.float(), 1e-5)


@pytest.mark.parametrize("products", PRODUCTS)
def test_under_autocast(products, photos, trained):
    model = trained(MobileNetV1DNW(0.12, 7, wiring="random_graph"), photos.float())
    compacted = compact(model, products=products)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        scores = compacted(photos.float())
        assert_same(model, compact(model, products=products, example=photos.float()), photos.float(), 0.05)
    assert scores.isfinite().all()
    assert relative_error(scores.float(), compacted(photos.float())) < 0.05


def test_synchronised_norms_are_folded(photos, trained):
    model = trained(MobileNetV1DNW(0.12, 7, wiring="random_graph"), photos)
    expected = compact(model)
    compacted = compact(nn.SyncBatchNorm.convert_sync_batchnorm(model))
    assert torch.equal(compacted(photos), expected(photos))
    assert compacted.report.after == expected.report.after
    assert not compacted.report.kept


@pytest.mark.parametrize(
    ("dynamics", "products"), rest_is_slow(product(["static", "discrete", "continuous"], PRODUCTS), quick=3)
)
def test_tiny_classifiers_keep_their_outputs(dynamics, products, photos, trained):
    x = photos[:, :, ::2, ::2]
    model = TinyClassifier(dynamics, wiring="random_graph")
    if dynamics == "continuous":
        model.graph.dynamics.rtol = model.graph.dynamics.atol = 1.0
    trained(model, x[:2])
    compacted = compact(model, products=products, example=x)
    dead = sum(int((~live).sum()) for live in live_nodes(model).values())
    tolerance = 1e-10
    if dynamics == "continuous" and dead:
        tolerance = 2 * compacted.report.tolerance_difference
    assert_same(model, compacted, x, tolerance)
    with pytest.raises(InputError, match="larger images"):
        compacted(x[:, :, :12, :12])


FIXED_STEP = [
    Continuous("euler", options={"step_size": 0.3}),
    Continuous("midpoint", t_span=(1.0, -0.5)),
    Continuous("heun2", options={"step_size": 0.25}, t_span=(2.0, 1.0)),
    Continuous("heun3", options={"step_size": 0.5}),
    Continuous("rk4", options={"step_size": 0.1}),
    Continuous("rk4", options={"step_size": 0.5, "perturb": True}),
    Continuous("explicit_adams", options={"step_size": 0.1}),
]
DISCRETE = [
    Discrete(steps=1),
    Discrete(steps=2),
    Discrete(steps=4),
    Discrete(steps=3, input_mode="hold"),
    Discrete(steps=3, function_per_step=True),
]
FUNCTIONS = {
    "batch": NormReluConv,
    "instance": partial(NormReluConv, norm="instance"),
    "two norms": NormReluConvNormRelu,
    "send": partial(ReluConvSendNorm, norm="instance"),
    "send, batch": ReluConvSendNorm,
    "timed": Timed,
    "over all nodes": OverAllNodes,
    "tanh": lambda num_nodes: nn.Tanh(),
}


@every_pair(rest=pytest.mark.slow, dynamics=[*DISCRETE, Continuous("rk4")], function=FUNCTIONS, products=PRODUCTS)
def test_dynamic_graphs_keep_their_outputs(dynamics, function, products, photos, trained):
    assert_dynamic_graphs_keep_their_outputs(dynamics, function, products, photos, trained)


@every_pair(rest=pytest.mark.slow, dynamics=FIXED_STEP, function=["batch", "timed"], products=PRODUCTS)
def test_graphs_solved_with_fixed_steps_keep_their_outputs(dynamics, function, products, photos, trained):
    assert_dynamic_graphs_keep_their_outputs(dynamics, function, products, photos, trained)


def assert_dynamic_graphs_keep_their_outputs(dynamics, function, products, photos, trained):
    graph = NeuralGraph(
        num_nodes=24, num_inputs=3, num_outputs=4, num_edges=60, dynamics=dynamics, node_function=FUNCTIONS[function]
    )
    x = photos[:, :, :9, :7]
    trained(graph, x)
    assert not graph.live_nodes().all()
    compacted = compact(graph, products=products)
    assert_same(graph, compacted, x)
    kept = function in ("timed", "over all nodes")
    assert bool(compacted.report.kept) == kept
    assert compacted.report.after.nodes == (24 if kept else int(graph.live_nodes().sum()))


@every_pair(
    dynamics=[Discrete(steps=3), Discrete(steps=2, input_mode="hold"), Continuous("rk4")],
    function=["batch", "send"],
    products=PRODUCTS,
)
def test_strided_functions_keep_their_outputs(dynamics, function, products, photos, trained):
    function = partial(FUNCTIONS[function], stride=2)
    graph = NeuralGraph(
        num_nodes=9, num_inputs=3, num_outputs=4, num_edges=30, dynamics=dynamics, node_function=function
    )
    x = photos[:, :, :9, :7]
    assert_same(trained(graph, x), compact(graph, products=products), x)


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("function", ["instance", "over all nodes"])
def test_sequences_keep_their_outputs(function, products, photos, trained):
    dynamics = Discrete(input_mode="sequence")
    graph = NeuralGraph(
        num_nodes=12, num_inputs=5, num_outputs=3, num_edges=14, dynamics=dynamics, node_function=FUNCTIONS[function]
    )
    x = photos[:, :2, :40, :8].reshape(4, 2, 5, 8, 8)
    trained(graph, x)
    compacted = compact(graph, products=products)
    for length in (1, 2):
        assert_same(graph, compacted, x[:, :length])
    assert function != "instance" or compacted.report.after.nodes < 12


@pytest.mark.parametrize("products", PRODUCTS)
def test_rewritten_networks_keep_their_outputs(products, photos):
    vectors = photos[:, 0, :2, :20].reshape(8, 20)
    perceptron = mlp_to_discrete(nn.Sequential(nn.Linear(20, 7), nn.ReLU(), nn.Linear(7, 5), nn.Tanh()).double())
    compacted = compact(perceptron, products=products)
    assert_same(perceptron, compacted, vectors)
    assert not compacted.report.kept
    lstm = lstm_to_discrete(nn.LSTM(20, 6, num_layers=2, batch_first=True).double()).graph
    assert_same(lstm, compact(lstm, products=products), photos[:, 0, :5, :20])
    static = NeuralGraph((3, 8, 8, 4), 50, node_function=partial(NormReluConv, norm="instance")).double()
    discrete = static_to_discrete(static).eval()
    compacted = compact(discrete, products=products)
    assert_same(static.eval(), compacted, photos)
    assert not compacted.report.kept


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"wiring": EveryThird()},
        {"wiring": NoEdges()},
        {"num_edges": 20},
        {"num_edges": 20, "wiring": RandomGraph(separate_scores=True), "stride": 2},
        {"num_edges": 30, "input_function": False, "output_function": True},
        {"num_edges": 25, "node_function": "norm_relu_conv_norm_relu", "output_function": True},
        {"num_edges": 25, "node_function": OverAllNodes},
        {"num_edges": 25, "node_function": nn.ReLU()},
        {"num_edges": 25, "node_function": "relu_conv_send_norm"},
    ],
    ids=str,
)
def test_static_graphs_keep_their_outputs(options, products, photos, trained):
    graph = trained(NeuralGraph((3, 6, 5, 4), **options), photos)
    compacted = compact(graph, products=products)
    with torch.no_grad():
        assert relative_error(compacted(photos), graph(photos)) < 1e-10


@pytest.mark.parametrize("products", PRODUCTS)
def test_a_function_over_all_outputs_of_which_few_are_wanted(products, photos, trained):
    first = NeuralGraph((3, 6, 8), 30, node_function=OverAllNodes, output_function=True)
    model = nn.Sequential(first, NeuralGraph((8, 5, 2), 9))
    assert not model[1].live_nodes()[:8].all()
    trained(model, photos)
    assert_same(model, compact(model, products=products), photos)


@pytest.mark.parametrize("products", PRODUCTS)
def test_vectors(products, photos, trained):
    x = photos[:, 0, 0, :24]
    model = GraphClassifier(24, 5, 20, "dnw").double().eval()
    assert_same(model, compact(model, products=products), x)
    norms = nn.Sequential(nn.Linear(24, 12), NeuralGraph((12, 9, 4), 15, node_function=nn.BatchNorm1d))
    assert_same(trained(norms, x), compact(norms, products=products), x)


def test_counts_are_those_of_the_live_part(photos, trained):
    model = trained(MobileNetV1DNW(0.15, 7, wiring="random_graph"), photos)
    compacted = compact(model, example=photos)
    report = compacted.report
    live = live_nodes(model)
    assert report.before.nodes == 2560 + 3328 + 640 + 320 + 96
    assert list(report.graphs) == list(live)
    assert {name: after.nodes for name, (_, after) in report.graphs.items()} == {
        n: int(m.sum()) for n, m in live.items()
    }
    assert report.before.edges == sum(graph.num_edges for graph in model.stages)
    assert report.after.nodes < report.before.nodes
    assert report.after.edges < report.before.edges
    assert report.difference < 1e-10
    # Every output of the last stage receives something, so that what is left is what ``cost`` counts.
    assert len(model.stages[-1].edge_index[1].unique().clamp(min=1536).unique()) >= 1024
    result = cost(model, (3, 64, 64))
    assert report.after.multiply_adds == result.multiply_adds
    whole = sum(p.numel() for name, p in model.named_parameters() if "candidates" not in name)
    assert report.before.parameters == whole + report.before.edges
    # What a compact model costs are the numbers that it stores, less the zeros of its matrices.
    dense = compact(model, products="dense", example=photos)
    for small in (compacted, dense):
        stored = sum(
            int(b.count_nonzero()) if b.dim() == 4 and isinstance(module, DenseProduct) else b.numel()
            for module in small.modules()
            for b in module.buffers(recurse=False)
            if b.is_floating_point()
        )
        found = cost(small, (3, 64, 64))
        assert small.report.after.parameters == found.parameters == stored < report.before.parameters
        assert small.report.after.multiply_adds == found.multiply_adds == result.multiply_adds
    text = str(report)
    assert f"{report.after.multiply_adds:,}" in text
    assert "stage4" in text


@pytest.mark.parametrize("products", PRODUCTS)
def test_an_untouched_network_keeps_its_size(products, photos, trained):
    model = trained(MobileNetV1(0.25, 7), photos)
    compacted = compact(model, products=products, example=photos)
    assert compacted.report.after.multiply_adds == compacted.report.before.multiply_adds
    assert compacted.report.after.multiply_adds == cost(model, (3, 64, 64)).multiply_adds
    # Of two parameters per norm one is left, the shift.
    norms = sum(module.num_features for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    assert compacted.report.before.parameters - compacted.report.after.parameters == norms


@pytest.mark.slow
def test_an_adaptive_solver_s_difference_is_reported(photos, trained):
    graph = NeuralGraph(num_nodes=24, num_inputs=3, num_outputs=4, num_edges=36, dynamics="continuous")
    x = photos[:, :, :9, :7]
    trained(graph, x)
    compacted = compact(graph, example=x)
    report = compacted.report
    assert report.adaptive == ["graph"]
    closer = copy.deepcopy(graph)
    closer.dynamics.rtol = closer.dynamics.atol = 1e-4
    with torch.no_grad():
        assert report.tolerance_difference == pytest.approx(relative_error(closer(x), graph(x)))
        assert report.difference == pytest.approx(relative_error(compacted(x), graph(x)), rel=1e-6)
    assert f"{report.tolerance_difference:.1e}" in str(report)
    assert "give an example" in str(compact(graph).report)
    # With narrow tolerances both come near the same solution.
    graph.dynamics.rtol = graph.dynamics.atol = 1e-10
    assert_same(graph, compact(graph), x, 1e-6)


class Own(nn.Module):
    """A user's module: two graphs side by side, one of them used twice, and a model of the package."""

    def __init__(self):
        super().__init__()
        self.left = NeuralGraph((3, 9, 4), 14)
        self.same = self.left
        self.right = nn.ModuleDict({"graph": NeuralGraph((3, 8, 4), 12, node_function="norm_relu_conv_norm_relu")})
        self.tiny = MobileNetV1DNW(0.12, 5)

    def forward(self, x, scale):
        mixed = self.left(x) + scale * self.same(x.flip(3)) - self.right["graph"](x)
        return torch.cat([mixed.mean((2, 3)), self.tiny(x)], dim=1)


@pytest.mark.parametrize("products", rest_is_slow(PRODUCTS))
def test_graphs_in_a_user_s_module_are_replaced(products, photos, trained):
    model = Own().double()
    with torch.no_grad():
        for _ in range(3):
            model(photos, 0.5)
    compacted = compact(model, products=products)
    assert type(compacted) is Own
    assert compacted.left is compacted.same
    assert not any(isinstance(module, NeuralGraph) for module in compacted.modules())
    assert len(compacted.report.graphs) == 7
    model.eval()
    with torch.no_grad():
        assert relative_error(compacted(photos, 0.5), model(photos, 0.5)) < 1e-10


def test_a_user_s_dynamics_is_left_alone_and_named(photos):
    class Twice(Discrete):
        def forward(self, x, propagate, **options):
            return 2 * super().forward(x, propagate, **options)

    graph = NeuralGraph(num_nodes=9, num_inputs=3, num_outputs=4, dynamics=Twice(steps=2)).double().eval()
    model = nn.Sequential(graph, nn.Conv2d(4, 2, 1).double())
    compacted = compact(model)
    assert_same(model, compacted, photos[:, :, :8, :8])
    assert "a NeuralGraph with Twice dynamics" in str(compacted.report)


def shift_output(module, *_):
    """As wrappers do: a partial function in the place of ``forward``."""
    forward = type(module).forward
    module.forward = partial(lambda own, *args, **options: forward(own, *args, **options) + 0.5, module)


def shift_by_hook(module):
    module.register_forward_hook(lambda module, args, out: out + 0.5)


PATCHED = {
    "convolution of nodes": lambda model: model[1].dynamics.node_functions[1].conv,
    "norm of nodes": lambda model: model[1].dynamics.node_functions[0].norm,
    "node function": lambda model: model[1].dynamics.node_functions[1],
    "dynamics": lambda model: model[1].dynamics,
    "graph": lambda model: model[1],
    "convolution": lambda model: model[0],
    "activation": lambda model: model[2],
    "pool": lambda model: model[3],
    "classifier": lambda model: model[5],
    "model": lambda model: model,
}


@pytest.mark.parametrize("change", [shift_output, shift_by_hook])
@pytest.mark.parametrize("part", PATCHED.values(), ids=PATCHED)
def test_what_somebody_has_patched_or_listens_to_is_kept(part, change, photos, trained):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        NeuralGraph((8, 9, 6), 20),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )
    trained(model, photos)
    before = model.eval()(photos)
    change(part(model))
    assert not torch.allclose(model(photos), before)
    assert_same(model, compact(model), photos)


def test_layers_between_graphs_are_cut_to_what_the_next_graph_needs(photos, trained):
    graph = NeuralGraph((16, 8, 3), 12)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same"),
        nn.MaxPool2d(2),
        NeuralGraph((8, 16), 30, input_function=False),
        nn.Dropout(0.5),
        nn.BatchNorm2d(16, affine=True),
        nn.Hardswish(),
        nn.Conv2d(16, 16, (3, 5), padding=(1, 2), groups=16),
        graph,
    )
    trained(model, photos)
    compacted = compact(model)
    assert_same(model, compacted, photos)
    live = int(graph.live_nodes()[:16].sum())
    assert live < 16
    depthwise = [layer for layer in compacted.layers if isinstance(layer, Conv) and layer.weight.shape[2:] == (3, 5)]
    assert [layer.num_outputs for layer in depthwise] == [live]


@pytest.mark.parametrize("products", PRODUCTS)
def test_dead_nodes_are_found_through_layers_that_keep_channels_apart(products, photos, trained):
    between = [nn.LeakyReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2)]
    graphs = [NeuralGraph((6, 8, 4), 12, name="first"), NeuralGraph((4, 5, 3), 6, name="second")]
    model = trained(nn.Sequential(nn.Conv2d(3, 6, 1), graphs[0], *between, graphs[1]), photos)
    compacted = compact(model, products=products)
    assert_same(model, compacted, photos)
    live = live_nodes(model)["first"]
    assert not live[-4:].all()
    assert compacted.report.graphs["first"][1].nodes == live.sum()


def test_sparse_models_hold_no_matrix_and_dense_ones_no_edge_list(photos, trained):
    model = trained(TinyClassifier("static"), photos)
    sparse = [type(module) for module in compact(model).modules()]
    dense = [type(module) for module in compact(model, products="dense").modules()]
    assert SparseProduct in sparse
    assert DenseProduct not in sparse
    assert DenseProduct in dense
    assert SparseProduct not in dense
    fused = compact(MobileNetV1DNW(0.1, 7, wiring="random_graph").eval())
    assert [type(layer).__name__ for layer in fused.layers] == ["Conv", "FusedGraph", "Activation", "MapMean", "Linear"]
    assert len(fused.layers[1].sizes) == 1 + sum(len(stage.blocks) - 1 for stage in MobileNetV1DNW(0.1).stages)
    tensors = fused.state_dict().values()
    assert all(type(tensor) is torch.Tensor and tensor.layout is torch.strided for tensor in tensors)


def test_the_original_stays_as_it_is(photos):
    model = MobileNetV1DNW(0.12, 7).double()
    model.head[0].eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    compacted = compact(model, example=photos)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module.training for module in compacted.modules())
    with torch.no_grad():
        for tensor in compacted.state_dict().values():
            tensor.zero_()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_constant_features_become_part_of_the_bias(photos, trained):
    model = MobileNetV1DNW(0.2, 7, wiring="random_graph")
    stage = model.stages[-1]
    edges = stage.edge_index[:, stage.edge_index[1] < stage.num_nodes - 40]
    stage.rewire(Fixed(edges), edges.size(1))
    fed = int((edges[1].unique() >= stage.num_nodes - stage.num_outputs).sum())
    trained(model, photos)
    compacted = compact(model)
    (linear,) = (layer for layer in compacted.layers if isinstance(layer, Linear))
    assert linear.weight.shape == (7, fed)
    assert fed <= 1024 - 40
    assert_same(model, compacted, photos)


def test_bad_arguments():
    with pytest.raises(InputError, match="did you mean 'sparse'"):
        compact(NeuralGraph((2, 3)), products="spars")


@pytest.mark.slow
def test_the_package_needs_nothing_that_only_export_needs():
    code = (
        "import sys, dnw_graph.compaction; "
        "print(sorted({'safetensors', 'onnx', 'lightning', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_compact_model_is_a_chain(photos):
    assert isinstance(compact(MobileNetV1(0.1, 7)), CompactModel)


@pytest.mark.parametrize("option", [{"times": [0.5]}, {"return_states": True}])
def test_options_of_a_graph_are_refused(option):
    compacted = compact(NeuralGraph((2, 4, 3), 5))
    with pytest.raises(InputError, match=f"a compact model takes no options; got {next(iter(option))}"):
        compacted(torch.zeros(1, 2, 3, 3), **option)


def test_outputs_that_are_all_zero_do_not_differ():
    compacted = compact(NeuralGraph((2, 4, 3), 5, node_function=nn.Tanh()), example=torch.zeros(2, 2, 3, 3))
    assert compacted.report.difference == 0
    assert "outputs differ by 0.0e+00" in str(compacted.report)


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("with_batch_norm", [True, False])
def test_norms_without_scale_and_shift(products, with_batch_norm, photos):
    def function(num_nodes):
        batch_norm = [nn.BatchNorm2d(num_nodes)] if with_batch_norm else []
        conv = nn.Conv2d(num_nodes, num_nodes, 3, padding=1, groups=num_nodes)
        return nn.Sequential(nn.InstanceNorm2d(num_nodes), *batch_norm, nn.ReLU(), conv)

    graph = NeuralGraph((3, 8, 4), 14, node_function=function).double().eval()
    for module in graph.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    x = photos[:, :, :9, :7]
    compacted = compact(graph, products=products)
    assert_same(graph, compacted, x)
    norms = [module for module in compacted.modules() if isinstance(module, InstanceNorm)]
    assert len(norms) == 2
    assert all((norm.scale is None) != with_batch_norm for norm in norms)
    assert compacted.report.before.parameters >= compacted.report.after.parameters


def test_norms_without_scale_and_shift_have_the_type_and_device_of_the_model(photos):
    graph = NeuralGraph(
        (3, 8, 4), 14, node_function=lambda n: nn.Sequential(nn.InstanceNorm2d(n), NormReluConv(n).conv)
    ).bfloat16()
    x = photos[:, :, :9, :7].bfloat16()
    compacted = compact(graph, products="dense", example=x)
    assert {tensor.dtype for tensor in compacted.buffers() if tensor.is_floating_point()} == {torch.bfloat16}
    assert compacted(x).dtype == torch.bfloat16
    assert compacted.report.difference < 0.05


class Pair(nn.Bilinear):
    """Computes with an operator of which nobody knows the multiply-adds."""

    def forward(self, x):
        return super().forward(x, x)


def test_a_model_with_an_operator_of_unknown_cost_is_compacted_without_that_figure():
    model = nn.Sequential(NeuralGraph((2, 3), 4, input_function=False), Pair(3, 3, 2))
    report = compact(model, example=torch.randn(2, 2)).report
    assert report.before.multiply_adds is report.after.multiply_adds is None
    assert report.before.parameters == 4 + 18 + 2
    assert "multiply-adds" not in str(report)


class MyDiscrete(Discrete):
    """A dynamics of one's own."""


def test_a_graph_with_a_dynamics_of_ones_own_is_kept_and_counted_by_its_edges():
    graph = NeuralGraph(num_nodes=20, num_inputs=4, num_outputs=3, num_edges=40, dynamics=MyDiscrete(2))
    model = nn.Sequential(graph, nn.Flatten(), nn.Linear(3 * 16, 2))
    report = compact(model).report
    own = sum(p.numel() for name, p in model.named_parameters() if "candidates" not in name)
    assert report.before.parameters == own + 40 == report.after.parameters

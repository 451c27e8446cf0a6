import math

import pytest
import torch
import torch.nn.functional as F
from reference import relative_error
from torch import nn

from dnw_graph import NM, InputError, NeuralGraph
from dnw_graph.models import MobileNetV1, MobileNetV1DNW, create_model, edges_at_width
from dnw_graph.models.tiny import TinyClassifier

# Counted by hand: edges at width 0.225, and map size at 224 pixels, of stages 1 … 5.
EDGES = [103, 1_244, 4_976, 72_990, 79_626]
MAPS = [112, 56, 28, 14, 7]


def test_a_node_of_mobilenet_has_one_norm_fewer_unless_asked_for():
    """Norms per channel between two products: MobileNetV1 has two, the paper's node function one."""
    counts = {}
    for node_function in ("norm_relu_conv", "norm_relu_conv_norm_relu"):
        model = MobileNetV1DNW(node_function=node_function, num_classes=10)
        counts[node_function] = sum(m.num_features for m in model.stages.modules() if isinstance(m, nn.BatchNorm2d))
    dense = MobileNetV1(num_classes=10).features.modules()
    assert 2 * counts["norm_relu_conv"] == counts["norm_relu_conv_norm_relu"]
    # All its norms but the one after the last product, and with the one of the stem, which the first node holds.
    assert (
        counts["norm_relu_conv_norm_relu"]
        == sum(m.num_features for m in dense if isinstance(m, nn.BatchNorm2d)) - 1024 + 32
    )


def paired_parameters(dense, graph_model):
    """Pairs (tensor of MobileNetV1, tensor of MobileNetV1-DNW) of the same meaning, buffers included.

    MobileNetV1 is stem conv → norm, ReLU → [depthwise conv → norm, ReLU → pointwise conv → norm, ReLU] × 13 → pool →
    classifier. A node holds the norm and ReLU after the product that reaches it, its depthwise convolution, and the
    norm and ReLU after that; the pointwise weights are its outgoing edges. The norm and ReLU after the last product
    are the head's.
    """
    pairs = [(dense.stem[0].weight, graph_model.stem.weight)]
    layers = iter(dense.features)
    incoming_norm = dense.stem[1]

    def pair_norms(norm, other):
        pairs.extend(zip(norm.state_dict().values(), other.state_dict().values(), strict=True))
        pairs.extend(zip(norm.parameters(), other.parameters(), strict=True))

    for stage in graph_model.stages:
        functions = [f for f, _ in stage.dynamics.functions() if not isinstance(f, nn.Identity)]
        for function, block in zip(functions, stage.candidates.blocks, strict=True):
            depthwise, norm, _, pointwise, outgoing_norm, _ = (next(layers) for _ in range(6))
            pair_norms(incoming_norm, function.norm)
            pairs.append((depthwise.weight, function.conv.weight))
            pair_norms(norm, function.norm2)
            pairs.append((pointwise.weight, (stage.candidates.weight, block)))
            incoming_norm = outgoing_norm
    pair_norms(incoming_norm, graph_model.head[0])
    pairs.append((dense.classifier.weight, graph_model.classifier.weight))
    pairs.append((dense.classifier.bias, graph_model.classifier.bias))
    return pairs


def part_of(tensor_or_block, of=lambda tensor: tensor):
    """A tensor, or the part [targets, sources, 1, 1] of a flat vector; of it or of its gradient."""
    if isinstance(tensor_or_block, torch.Tensor):
        return of(tensor_or_block)
    weight, block = tensor_or_block
    return of(weight)[block.flat].view(*block.shape, 1, 1)


@pytest.mark.parametrize("training", [True, False])
def test_mobilenet_v1_is_recovered_weight_for_weight(training, digits):
    dense = MobileNetV1(width=1.0, num_classes=10, stem_stride=1).double().train(training)
    model = MobileNetV1DNW(
        width=1.0, num_classes=10, stem_stride=1, layered=True, node_function="norm_relu_conv_norm_relu"
    )
    model = model.double().train(training)
    pairs = paired_parameters(dense, model)
    for norm in (m for m in dense.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.2, 0.6)
    with torch.no_grad():
        for ours, theirs in pairs:
            part_of(theirs).copy_(ours)
    # Nothing is left over: every number of one model has its place in the other.
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in dense.parameters())

    images, labels = digits
    x = F.interpolate(images[:24].view(8, 3, 8, 8), size=(16, 16), mode="bilinear")
    outputs, input_gradients = [], []
    for network in (dense, model):
        network_x = x.clone().requires_grad_()
        logits = network(network_x)
        F.cross_entropy(logits, labels[:8]).backward()
        outputs.append(logits)
        input_gradients.append(network_x.grad)
    assert outputs[0].std() > 1e-3
    assert relative_error(outputs[1], outputs[0]) < 1e-9
    assert relative_error(input_gradients[1], input_gradients[0]) < 1e-8
    for ours, theirs in pairs:
        if isinstance(ours, nn.Parameter):
            assert ours.grad.norm() > 0
            assert relative_error(part_of(theirs, lambda t: t.grad), ours.grad) < 1e-8
        assert relative_error(part_of(theirs), ours) < 1e-12  # running statistics after the pass


def test_stages_have_the_edges_counted_by_hand_and_the_maps_of_table_5():
    model = MobileNetV1DNW(width=0.225, num_classes=10).eval()
    shapes = []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape[1:])))
    model(torch.zeros(1, 3, 224, 224))
    assert [stage.num_edges for stage in model.stages] == EDGES
    assert [stage.edge_index.size(1) for stage in model.stages] == EDGES
    assert shapes == [(c, s, s) for c, s in zip((64, 128, 256, 512, 1024), MAPS, strict=True)]
    nodes = [32 + 64, 64 + 2 * 128, 128 + 2 * 256, 256 + 6 * 512, 512 + 2 * 1024]
    assert [stage.num_nodes for stage in model.stages] == nodes
    assert [len(stage.blocks) for stage in model.stages] == [2, 3, 3, 7, 3]


@pytest.mark.parametrize("node_function", ["norm_relu_conv", "norm_relu_conv_norm_relu"])
def test_there_is_no_operation_at_output_nodes(node_function):
    for stage in MobileNetV1DNW(node_function=node_function).stages:
        *others, (last, _) = stage.dynamics.functions()
        assert isinstance(last, nn.Identity)
        assert all(function.conv.groups == len(nodes) for function, nodes in others)


def test_the_small_model_learns_the_edges_of_its_classifier_too():
    model = MobileNetV1DNW(width=0.15, num_classes=10, small=True)
    graph = model.classifier.graph
    assert (graph.num_candidates, graph.num_edges) == (10_240, 1_536)
    x = torch.rand(2, 1024)
    dense = torch.zeros(10, 1024)
    source, target = graph.edge_index
    dense[target - 1024, source] = graph.edge_weight
    torch.testing.assert_close(model.classifier(x), x @ dense.T + model.classifier.bias)
    assert MobileNetV1DNW(num_classes=1000, small=True).classifier.graph.num_edges == math.floor(230_400)


def test_a_rule_that_decides_the_number_of_edges_does():
    model = create_model("mobilenet_v1_dnw", num_classes=8, small=True, wiring=NM(1, 4))
    graphs = [*model.stages, model.classifier.graph]
    assert [4 * graph.num_real_edges for graph in graphs] == [graph.num_candidates for graph in graphs]
    tiny = TinyClassifier("discrete", wiring="nm").graph
    assert tiny.num_real_edges == 800 * 800 // 2


def test_all_graphs_of_a_model_learn():
    model = MobileNetV1DNW(width=0.1, num_classes=5, small=True)
    F.cross_entropy(model(torch.rand(4, 3, 32, 32)), torch.tensor([0, 1, 2, 3])).backward()
    for name, graph in ((m.name, m) for m in model.modules() if isinstance(m, NeuralGraph)):
        assert graph.candidates.weight.grad.abs().sum() > 0, name


def test_edges_are_rounded_down_from_the_decimal_that_was_written():
    assert edges_at_width((10, 10), 0.1) == 1  # 0.1² · 100 is just above 1 in binary, 0.7² · 100 just below 49
    assert edges_at_width((10, 10), 0.7) == 49
    assert edges_at_width((32, 64), 1.0) == 2_048
    with pytest.raises(InputError, match="leaves no edge"):
        edges_at_width((10, 10), 0.05)


def test_channels_of_mobilenet_v1_are_scaled():
    model = MobileNetV1(width=0.25, num_classes=7)
    assert model.stem[0].out_channels == 8
    assert model.classifier.in_features == 256
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


def test_create_model_passes_its_options_on():
    model = create_model("mobilenet_v1_dnw", width=0.3, num_classes=4, stem_stride=1)
    assert isinstance(model, MobileNetV1DNW)
    assert model.stages[0].num_edges == math.floor(0.09 * 2_048)
    assert model.stem.stride == (1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0.0}, "width must be a positive number"),
        ({"width": -1.0}, "width must be a positive number"),
        ({"width": float("nan")}, "width must be a finite number"),
        ({"width": 0.001}, "leaves no edge"),
        ({"num_classes": 0}, "num_classes must be an integer >= 1"),
        ({"stem_stride": 3}, "stem_stride must be 2, or 1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        MobileNetV1DNW(**options)


def test_a_width_above_what_the_candidates_allow_is_refused():
    with pytest.raises(InputError, match="more than the 2,048 candidate edges"):
        MobileNetV1DNW(width=1.5)


def test_same_seed_same_model():
    def logits():
        torch.manual_seed(4)
        return MobileNetV1DNW(num_classes=3, stem_stride=1)(torch.rand(2, 3, 16, 16))

    assert torch.equal(logits(), logits())

"""The fused node function against PyTorch's own layers."""

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from pairs import every_pair
from torch import nn
from torch.func import functional_call

from dnw_graph import InputError, NeuralGraph
from dnw_graph.node_functions import NormReluConv, NormReluConvNormRelu, ReluConvSendNorm
from dnw_graph.ops.build import kernels
from dnw_graph.ops.layout import batch_last, is_batch_last
from dnw_graph.ops.node_function import fused_node_function

NODES = 5
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}

pytestmark = pytest.mark.skipif(kernels() is None, reason="no compiler for the kernels")


def make_norm(kind, **options):
    if kind is None:
        return None
    norm = nn.BatchNorm2d(NODES, **options) if kind == "batch" else nn.InstanceNorm2d(NODES, affine=True, **options)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    if norm.running_mean is not None:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm


def make_conv(stride):
    return None if stride is None else nn.Conv2d(NODES, NODES, 3, stride, 1, groups=NODES, bias=False)


def by_layers(z, norm, relu, conv):
    z = z if norm is None else norm(z)
    z = F.relu(z) if relu else z
    return z if conv is None else conv(z)


def difference(a, b):
    return ((a - b).norm() / b.norm().clamp(min=1e-3)).item()


def assert_same(function, z, norm, relu, conv):
    """Outputs, all gradients and running statistics are those of the layers one by one."""
    layers = copy.deepcopy((norm, conv))
    other = z.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    z = z.detach().requires_grad_()
    out, expected = function(z), by_layers(other, layers[0], relu, layers[1])
    assert out is not None
    assert out.shape == expected.shape
    assert difference(out, expected) < TOLERANCE[z.dtype]
    weights = torch.linspace(-1, 2, out.numel(), dtype=z.dtype).view(out.shape)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    assert difference(z.grad, other.grad) < TOLERANCE[z.dtype]
    for module, layer in zip((norm, conv), layers, strict=True):
        if module is None:
            continue
        for name, value in module.named_parameters():
            assert difference(value.grad, layer.get_parameter(name).grad) < TOLERANCE[z.dtype], name
        for name, value in module.named_buffers():
            assert difference(value.double(), layer.get_buffer(name).double()) < TOLERANCE[z.dtype], name


@every_pair(
    rest=pytest.mark.slow,
    layers=[layers for layers in product(["batch", "instance", None], [True, False], [None, 1, 2]) if any(layers)],
    size=[(2, 4, 4), (8, 5, 3), (16, 1, 3), (19, 6, 7)],  # Around a register's length.
    dtype=[torch.float64, torch.float32],
    training=[True, False],
)
def test_equals_the_layers(layers, size, dtype, training):
    norm, relu, stride = layers
    norm, conv = make_norm(norm), make_conv(stride)
    for module in (norm, conv):
        if module is not None:
            module.to(dtype).train(training)
    batch, *space = size
    z = batch_last(3 * torch.randn(batch, NODES, *space, dtype=dtype) + 1)
    assert_same(lambda z: fused_node_function(z, norm, relu, conv), z, norm, relu, conv)


@pytest.mark.parametrize("options", [{"momentum": None}, {"momentum": 0.3, "eps": 0.1}, {"track_running_stats": False}])
def test_batch_norms_of_all_kinds(options):
    norm, conv = make_norm("batch", **options).double(), make_conv(1).double()
    for seed in range(3):
        torch.manual_seed(seed)
        z = batch_last(torch.randn(6, NODES, 3, 4, dtype=torch.float64))
        assert_same(lambda z: fused_node_function(z, norm, True, conv), z, norm, True, conv)
        norm.zero_grad()
        conv.zero_grad()


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_against_differences(norm, stride):
    class Function(nn.Sequential):
        def forward(self, z):
            return fused_node_function(z, self[0], True, self[1])

    function = Function(make_norm(norm), make_conv(stride)).double()
    z = batch_last(torch.randn(3, NODES, 4, 3, dtype=torch.float64)).requires_grad_()
    names, parameters = zip(*function.named_parameters(), strict=True)

    def run(z, *parameters):
        return functional_call(function, dict(zip(names, parameters, strict=True)), (z,))

    assert torch.autograd.gradcheck(run, (z, *parameters), atol=1e-6)


def test_not_a_number_stays_one():
    z = torch.randn(4, NODES, 3, 3)
    z[1, 2, 0, 0] = torch.nan
    out = fused_node_function(batch_last(z), make_norm("instance"), True, make_conv(1))
    assert out[1, 2].isnan().any()
    assert not out[1, 3].isnan().any()
    assert not out[2].isnan().any()


def test_a_kept_graph_gives_the_same_gradients_twice():
    norm, conv = make_norm("batch"), make_conv(1)
    z = batch_last(torch.randn(4, NODES, 3, 3)).requires_grad_()
    loss = fused_node_function(z, norm, True, conv).square().sum()
    first = torch.autograd.grad(loss, (z, conv.weight), retain_graph=True)
    second = torch.autograd.grad(loss, (z, conv.weight))
    assert all(map(torch.equal, first, second))


def test_one_backward_pass_through_calls_of_which_some_are_fused():
    norm, conv = make_norm("batch"), make_conv(1)
    layers = copy.deepcopy((norm, conv))
    single, several = torch.randn(1, NODES, 3, 3), torch.randn(4, NODES, 3, 3)
    # The first call has saved the running statistics that the second one changes.
    losses = [by_layers(single, norm, True, conv), fused_node_function(batch_last(several), norm, True, conv)]
    sum(loss.square().sum() for loss in losses).backward()
    sum(by_layers(z, layers[0], True, layers[1]).square().sum() for z in (single, several)).backward()
    assert difference(conv.weight.grad, layers[1].weight.grad) < 1e-4
    assert difference(norm.running_var, layers[0].running_var) < 1e-5


def test_second_derivatives_are_refused():
    z = batch_last(torch.randn(4, NODES, 3, 3)).requires_grad_()
    with pytest.raises(InputError, match="propagation='block'"):
        torch.autograd.grad(fused_node_function(z, None, True, make_conv(1)).sum(), z, create_graph=True)


class OtherNorm(nn.BatchNorm2d):
    """A norm of the user's own."""


class Listening:
    """A convolution that somebody listens to."""

    def __new__(cls):
        conv = make_conv(1)
        conv.register_forward_hook(lambda *args: None)
        return conv


def patched(module, name):
    """A module of which somebody has replaced a method, as wrappers do."""
    method = getattr(module, name)
    setattr(module, name, lambda *args: method(*args))
    return module


@pytest.mark.parametrize(
    ("z", "norm", "conv"),
    [
        (batch_last(torch.randn(4, NODES, 3, 3)), None, patched(make_conv(1), "forward")),
        (batch_last(torch.randn(4, NODES, 3, 3)), None, patched(make_conv(1), "_conv_forward")),
        (batch_last(torch.randn(4, NODES, 3, 3)), patched(nn.BatchNorm2d(NODES), "forward"), None),
        (batch_last(torch.randn(4, NODES, 3, 3)), patched(nn.BatchNorm2d(NODES), "_check_input_dim"), None),
        (torch.randn(4, NODES, 3, 3), None, make_conv(1)),  # nodes are not first in memory
        (batch_last(torch.randn(4, NODES, 3, 3)).bfloat16(), None, make_conv(1).bfloat16()),
        (batch_last(torch.randn(4, NODES, 3, 3)), None, make_conv(1).double()),
        (batch_last(torch.randn(4, NODES, 3, 3)), OtherNorm(NODES), None),
        (batch_last(torch.randn(4, NODES, 3, 3)), nn.InstanceNorm2d(NODES, track_running_stats=True), None),
        (batch_last(torch.randn(4, NODES, 1, 1)), nn.InstanceNorm2d(NODES), None),
        (batch_last(torch.randn(4, NODES, 3, 3)), None, Listening()),
        (batch_last(torch.randn(4, NODES, 5, 5)), None, nn.Conv2d(NODES, NODES, 5, 1, 2, groups=NODES, bias=False)),
        (batch_last(torch.randn(4, NODES, 5, 5)), None, nn.Conv2d(NODES, NODES, 3, padding=1, bias=False)),
        (batch_last(torch.randn(4, NODES, 5, 5)), None, nn.Conv2d(NODES, NODES, 3, padding=1, groups=NODES)),
    ],
)
def test_what_the_kernel_cannot_do_is_left_to_pytorch(z, norm, conv):
    assert fused_node_function(z, norm, True, conv) is None


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("function", [NormReluConv, NormReluConvNormRelu, ReluConvSendNorm])
@pytest.mark.parametrize("stride", [1, 2])
def test_node_functions_are_the_same_in_both_layouts(function, norm, stride):
    module = function(NODES, stride, norm).double()
    other = copy.deepcopy(module)
    z = torch.randn(6, NODES, 5, 5, dtype=torch.float64)
    inputs = [batch_last(z).requires_grad_(), z.clone().requires_grad_()]
    outs = []
    for each, x in zip((module, other), inputs, strict=True):
        out = each(each.send(x) if hasattr(each, "send") else x)
        (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
        outs.append(out)
    assert is_batch_last(outs[0])
    assert not is_batch_last(outs[1])
    assert difference(*outs) < 1e-10
    assert difference(inputs[0].grad, inputs[1].grad) < 1e-10
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        assert difference(a.grad, b.grad) < 1e-10


def test_some_nodes_alone():
    module = NormReluConv(NODES, norm="instance").double()
    z = torch.randn(6, NODES, 4, 4, dtype=torch.float64)
    part = module(batch_last(z[:, 1:3]), nodes=range(1, 3))
    assert is_batch_last(part)
    assert difference(part, module(z)[:, 1:3]) < 1e-10


def of_other_nodes(kind):
    """A norm or a convolution for fewer nodes than the maps have."""
    if kind == "convolution":
        return None, nn.Conv2d(2, 2, 3, padding=1, groups=2, bias=False)
    if kind == "changed number":
        norm = make_norm("instance")
        norm.num_features = 2
        return norm, make_conv(1)
    return (nn.BatchNorm2d(2) if kind == "batch" else nn.InstanceNorm2d(2, affine=True)), make_conv(1)


@pytest.mark.parametrize("kind", ["batch", "instance", "changed number", "convolution"])
def test_modules_for_other_nodes_are_left_to_pytorch(kind):
    norm, conv = of_other_nodes(kind)
    z = batch_last(torch.randn(4, NODES, 3, 3))
    with pytest.raises((RuntimeError, ValueError)):
        by_layers(z, norm, True, conv)
    assert fused_node_function(z, norm, True, conv) is None


def test_a_ready_module_for_other_nodes_is_refused():
    with pytest.raises(InputError, match="64 nodes"):
        NeuralGraph((64, 512, 512), 5000, node_function=NormReluConv(64, norm="instance"))


def test_moved_dimensions():
    function = NormReluConv(2).eval()
    with pytest.raises(InputError, match="2 nodes"):
        function(torch.randn(400, 2, 2, 2).movedim(-1, 0))
    z = torch.randn(2, 4, 3, 9).movedim(-1, 0)  # Images last, as the kernel takes them.
    assert fused_node_function(z, function.norm, True, function.conv) is not None
    expected = by_layers(z.contiguous(), function.norm, True, function.conv)
    assert difference(function(z), expected) < TOLERANCE[z.dtype]


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_of_other_types_are_left_to_pytorch(name, training):
    function = NormReluConv(NODES).train(training)
    setattr(function.norm, name, getattr(function.norm, name).double())
    z = batch_last(torch.randn(4, NODES, 3, 3))
    assert fused_node_function(z, function.norm, True, function.conv) is None
    with pytest.raises(RuntimeError):
        function(z)


@pytest.mark.parametrize("training", [True, False])
def test_strided_running_statistics(training):
    function = NormReluConv(NODES).train(training)
    for name in ("running_mean", "running_var"):
        setattr(function.norm, name, torch.rand(NODES, 2)[:, 0])
    layers = copy.deepcopy(function)
    z = torch.randn(4, NODES, 3, 3)
    expected = by_layers(z, layers.norm, True, layers.conv)
    assert difference(function(batch_last(z)), expected) < TOLERANCE[z.dtype]
    for value, other in zip(function.buffers(), layers.buffers(), strict=True):
        torch.testing.assert_close(value, other)


@pytest.mark.parametrize("part", ["weight", "num_features"])
def test_some_nodes_of_parts_for_other_nodes_are_refused(part):
    function = NormReluConv(NODES, norm="instance")
    function.norm = nn.InstanceNorm2d(NODES + 1, affine=True)
    if part == "weight":
        function.norm.num_features = NODES
    with pytest.raises(InputError, match="InstanceNorm2d of this node function is not for its 5 nodes"):
        function(torch.randn(4, 2, 3, 3), nodes=range(2))


def test_some_nodes_of_another_convolution_are_refused():
    function = NormReluConv(NODES, norm="instance")
    function.conv = make_conv(1)
    with pytest.raises(InputError, match="NodeConv"):
        function(torch.randn(4, 2, 3, 3), nodes=range(2))


@pytest.mark.parametrize(
    "change", [{"dilation": (2, 2)}, {"padding_mode": "reflect"}, {"groups": 1}, {"bias": torch.ones(5)}]
)
def test_some_nodes_of_a_changed_convolution_are_refused_and_all_are_computed(change):
    function = NormReluConv(NODES, norm="instance")
    vars(function.conv).update(change)
    assert not function.node_wise
    with pytest.raises(InputError, match="unmodified NodeConv"):
        function(torch.randn(4, 2, 3, 3), nodes=range(2))


def test_hooks_of_a_norm_are_called_for_some_nodes_too():
    function = NormReluConv(NODES, norm="instance")
    z = torch.randn(4, NODES, 3, 3)
    function.norm.register_forward_hook(lambda module, args, out: 2 * out + torch.arange(NODES).view(-1, 1, 1))
    assert difference(function(z[:, 1:3], nodes=range(1, 3)), function(z)[:, 1:3]) < 1e-5


def test_an_expanded_running_statistic_is_left_to_pytorch():
    norm = make_norm("batch")
    norm.running_mean = torch.zeros(1).expand(NODES)
    z = batch_last(torch.randn(4, NODES, 3, 3))
    assert fused_node_function(z, norm, True, make_conv(1)) is None

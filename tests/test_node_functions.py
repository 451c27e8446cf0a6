import re

import pytest
import torch
import torch.nn.functional as F
from reference import batch_norm, convolve, instance_norm
from torch import nn

from dnw_graph import InputError, NeuralGraph
from dnw_graph.node_functions import NormReluConv, NormReluConvNormRelu, make_node_function

PLAIN_NORMS = {"batch": batch_norm, "instance": instance_norm}


def randomised(module):
    """Random parameters, so that no scale of one and no shift of zero hides a mistake."""
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.double()


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("stride", [1, 2])
def test_norm_relu_conv_node_by_node(norm, stride):
    function = randomised(NormReluConv(5, stride, norm=norm))
    z = torch.randn(3, 5, 7, 6, dtype=torch.float64)
    out = function(z)
    for v in range(5):
        normed = PLAIN_NORMS[norm](z[:, v], function.norm.weight[v], function.norm.bias[v])
        torch.testing.assert_close(out[:, v], convolve(normed.relu(), function.conv.weight[v, 0], stride))


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("stride", [1, 2])
def test_norm_relu_conv_norm_relu_node_by_node(norm, stride):
    function = randomised(NormReluConvNormRelu(5, stride, norm=norm))
    z = torch.randn(3, 5, 7, 6, dtype=torch.float64)
    out = function(z)
    for v in range(5):
        normed = PLAIN_NORMS[norm](z[:, v], function.norm.weight[v], function.norm.bias[v])
        convolved = convolve(normed.relu(), function.conv.weight[v, 0], stride)
        again = PLAIN_NORMS[norm](convolved, function.norm2.weight[v], function.norm2.bias[v])
        torch.testing.assert_close(out[:, v], again.relu())


def test_evaluation_uses_the_running_statistics():
    function = randomised(NormReluConv(2)).train()
    z = 3 + 2 * torch.randn(4, 2, 6, 6, dtype=torch.float64)
    for _ in range(200):
        function(z)
    # Unbiased variance is what batch norm keeps.
    mean, variance = z.mean(dim=(0, 2, 3), keepdim=True), z.var(dim=(0, 2, 3), keepdim=True)
    gamma, beta = (p.view(1, -1, 1, 1) for p in (function.norm.weight, function.norm.bias))
    normed = gamma * (z - mean) / (variance + 1e-5).sqrt() + beta
    expected = F.conv2d(normed.relu(), function.conv.weight, padding=1, groups=2)
    torch.testing.assert_close(function.eval()(z), expected)


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("function", [NormReluConv, NormReluConvNormRelu])
def test_eps_bounds_how_much_a_norm_scales_up(norm, function):
    # A map of tiny variance: the default eps would bring it to variance 1, a large one leaves it as it is.
    z = 1e-6 * torch.randn(2, 3, 8, 8, dtype=torch.float64)
    large = function(3, norm=norm, eps=1.0).double()
    torch.testing.assert_close(large.norm(z), z - z.mean((0, 2, 3) if norm == "batch" else (2, 3), keepdim=True))
    tiny = function(3, norm=norm, eps=1e-20).double()
    assert 0.9 < tiny.norm(z).std() < 1.1
    with pytest.raises(InputError, match="eps of a norm must be above 0"):
        function(3, norm=norm, eps=0.0)


def test_the_paper_s_function_has_eleven_parameters_per_node():
    assert sum(p.numel() for p in NormReluConv(7).parameters()) == 7 * (2 + 9)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
def test_stride_one_keeps_the_resolution(kernel_size, size):
    assert NormReluConv(3, kernel_size=kernel_size)(torch.randn(2, 3, *size)).shape == (2, 3, *size)


def test_even_kernels_are_refused():
    with pytest.raises(InputError, match="odd"):
        NormReluConv(3, kernel_size=4)


def test_inputs_are_not_changed():
    z = torch.randn(2, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    before = z.clone()
    for function in (NormReluConv(3), NormReluConvNormRelu(3), NormReluConv(3, norm="instance").eval()):
        function(z)
        assert torch.equal(z, before)


def test_a_factory_makes_one_module_per_block():
    made = []

    def factory(num_nodes, stride=1):
        made.append((num_nodes, stride))
        return nn.AvgPool2d(3, stride, 1)

    graph = NeuralGraph((3, 4, 2), 5, node_function=factory, stride=2)
    assert made == [(3, 2), (4, 1)]
    assert graph(torch.randn(1, 3, 8, 8)).shape == (1, 2, 4, 4)


def test_a_module_class_is_a_factory():
    assert isinstance(make_node_function(nn.BatchNorm2d, 4), nn.BatchNorm2d)


def test_a_ready_module_is_shared():
    shared = nn.PReLU()
    graph = NeuralGraph((3, 4, 2), 5, node_function=shared)
    functions = [function for function, _ in graph.dynamics.functions()]
    assert functions[0] is shared
    assert functions[1] is shared
    assert sum(p.numel() for p in graph.parameters()) == graph.num_candidates + 1


def test_a_stride_cannot_be_given_to_a_ready_module():
    with pytest.raises(InputError, match="module instance"):
        NeuralGraph((3, 4), 5, node_function=nn.ReLU(), stride=2)


def test_a_factory_must_return_a_module():
    with pytest.raises(InputError, match=r"must return an nn\.Module"):
        make_node_function(lambda num_nodes: F.relu, 3)


@pytest.mark.parametrize("kind", [nn.LeakyReLU, nn.ReLU, nn.SiLU, nn.Tanh, nn.Softplus, nn.ELU, nn.Dropout])
def test_activations_and_dropouts_know_no_nodes(kind):
    graph = NeuralGraph((3, 4, 2), 5, node_function=kind)
    first, second, _ = (function for function, _ in graph.dynamics.functions())
    assert repr(first) == repr(second) == repr(kind())
    assert first is not second


def test_a_prelu_has_a_slope_per_node():
    assert make_node_function(nn.PReLU, 4).weight.shape == (4,)


@pytest.mark.parametrize(
    ("factory", "stride", "why"),
    [
        (torch.relu, 1, "relu(): argument 'input' (position 1) must be Tensor, not int"),
        (lambda z: z.relu(), 1, "'int' object has no attribute 'relu'"),
        (nn.Linear, 1, "missing 1 required positional argument: 'out_features'"),
        (nn.Threshold, 1, "missing 2 required positional arguments: 'threshold' and 'value'"),
        (nn.BatchNorm2d, 2, "got an unexpected keyword argument 'stride'"),
        (nn.ReLU, 2, "got an unexpected keyword argument 'stride'"),
    ],
)
def test_what_is_no_factory_is_refused(factory, stride, why, unchecked):
    message = rf"^node_function must be a name, a module, or a factory .* failed for 4 nodes, stride {stride}: .*"
    with pytest.raises(InputError, match=message + re.escape(why)) as refused:
        make_node_function(factory, 4, stride)
    assert str(refused.value.__cause__) in str(refused.value)
    with pytest.raises(InputError, match="node_function must be a string, a Module or a callable; got 5"):
        make_node_function(5, 4, stride)

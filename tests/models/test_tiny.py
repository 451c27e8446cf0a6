from functools import partial

import pytest
import torch
import torch.nn.functional as F
from dynamic_reference import plain_discrete, product
from pairs import every_value, rest_is_slow
from reference import batch_norm, relative_error
from torch import nn
from torchdiffeq import odeint

from dnw_graph import InputError
from dnw_graph.models.tiny import TINY_NODE_FUNCTIONS, TinyClassifier
from dnw_graph.propagation import AutoPropagation
from dnw_graph.recipes.models import TinyOptions

DYNAMICS = ["static", "discrete", "continuous"]
BLOCKS = (32, 192, 192, 192, 192, 100)
EDGES = 32_000


@pytest.fixture(scope="module")
def images(digits):
    """Digits as 32×32 images of three channels, float32, and their labels."""
    gray = F.interpolate(digits[0][:8].unsqueeze(1).float(), size=32, mode="bilinear") - 0.3
    return torch.cat([gray, -gray, gray.flip(3)], dim=1), digits[1][:8]


def numbers(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_41_thousand_parameters(dynamics):
    model = TinyClassifier(dynamics)
    functions = [function for function, _ in model.graph.dynamics.functions()]
    convolutions = [m for function in functions for m in function.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for function in functions for m in function.modules() if isinstance(m, nn.InstanceNorm2d)]
    assert numbers(model.stem) == 1_184
    assert model.graph.num_edges == model.graph.edge_index.size(1) == 0.05 * 800**2 == EDGES
    assert sum(map(numbers, convolutions)) == 7_200
    assert sum(map(numbers, norms)) == 1_600
    assert numbers(model.classifier) == 1_010
    assert EDGES + 7_200 + 1_010 + 1_184 == 41_394
    assert numbers(model) - model.graph.num_candidates + EDGES == 42_994


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_nodes_and_candidates(dynamics):
    graph = TinyClassifier(dynamics).graph
    assert (graph.num_inputs, graph.num_outputs) == (32, 100)
    assert graph.num_nodes == (900 if dynamics == "static" else 800)
    earlier = [sum(BLOCKS[:i]) for i in range(6)]
    static = sum(size * before for size, before in zip(BLOCKS, earlier, strict=True))
    assert graph.num_candidates == (static if dynamics == "static" else 640_000)


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_another_node_function(dynamics):
    """Here another eps: the norms of all nodes have it, and those of the stem do not."""
    kind = TINY_NODE_FUNCTIONS[dynamics]
    models = [TinyClassifier(dynamics, node_function=partial(kind, norm="instance", eps=eps)) for eps in (1e-5, 1e-3)]
    for model, eps in zip([TinyClassifier(dynamics), *models], (1e-5, 1e-5, 1e-3), strict=True):
        norms = [m for m in model.graph.modules() if isinstance(m, nn.InstanceNorm2d)]
        assert sum(norm.num_features for norm in norms) == 800
        assert {norm.eps for norm in norms} == {eps}
        assert kind in {type(function) for function, _ in model.graph.dynamics.functions()}


def plain_stem(p, x):
    """3×3 convolution, batch norm, ReLU; 3×3 depthwise and 1×1 convolution, batch norm."""

    def norm(z, name):
        gamma, beta = p[f"stem.{name}.weight"], p[f"stem.{name}.bias"]
        return torch.stack([batch_norm(z[:, v], gamma[v], beta[v]) for v in range(z.size(1))], dim=1)

    z = norm(F.conv2d(x, p["stem.0.weight"], stride=2, padding=1), "1").relu()
    z = F.conv2d(z, p["stem.3.weight"], stride=2, padding=1, groups=16)
    return norm(F.conv2d(z, p["stem.4.weight"]), "5")


def plain_norm(p, prefix, z):
    mean = z.mean(dim=(2, 3), keepdim=True)
    variance = (z - mean).square().mean(dim=(2, 3), keepdim=True)
    gamma, beta = (p[f"{prefix}.norm.{name}"].view(-1, 1, 1) for name in ("weight", "bias"))
    return gamma * (z - mean) / torch.sqrt(variance + 1e-5) + beta


def plain_convolution(p, prefix, z):
    kernel, padded = p[f"{prefix}.conv.weight"], F.pad(z, (1, 1, 1, 1))
    places = [(i, j) for i in range(3) for j in range(3)]
    return sum(kernel[:, :, i, j].unsqueeze(2) * padded[:, :, i : i + 8, j : j + 8] for i, j in places)


def plain_static(p, matrix, z):
    starts = [0, *torch.tensor(BLOCKS).cumsum(0).tolist()]
    for number in range(len(BLOCKS)):
        start, stop = starts[number], starts[number + 1]
        received = z if number == 0 else product(matrix[start:stop, :start], z)
        if number == 5:  # outputs: no node function, fed by all blocks
            return received
        prefix = f"graph.dynamics.node_functions.{number}"
        new = plain_convolution(p, prefix, plain_norm(p, prefix, received).relu())
        z = new if number == 0 else torch.cat([z, new], dim=1)
    raise AssertionError


def plain_discrete_graph(p, matrix, z):
    prefix = "graph.dynamics.node_functions.0"
    states, _, _ = plain_discrete(
        z,
        matrix,
        5,
        lambda received, step: plain_norm(p, prefix, received),
        send=lambda states, step: plain_convolution(p, prefix, states.relu()),
    )
    return states[-1]


def plain_solution(field, z):
    start = torch.cat([z, z.new_zeros(z.size(0), 768, 8, 8)], dim=1)
    return odeint(field, start, torch.tensor([0, 1], dtype=z.dtype), method="dopri5", rtol=1e-3, atol=1e-3)[-1]


def plain_continuous(p, matrix, z):
    """As the authors computed it: Ż = norm(A conv(relu(Z)))."""
    f = "graph.dynamics.node_function"
    return plain_solution(lambda t, z: plain_norm(p, f, product(matrix, plain_convolution(p, f, z.relu()))), z)


def plain_equation_13(p, matrix, z):
    """Equation 13 read literally: Ż = conv(relu(norm(A Z)))."""
    f = "graph.dynamics.node_function"
    return plain_solution(lambda t, z: plain_convolution(p, f, plain_norm(p, f, product(matrix, z)).relu()), z)


def adjacency(weight, dynamics):
    """The dense adjacency [targets, sources] of the edges of largest |w|, and where there are candidates."""
    block_of = torch.arange(6).repeat_interleave(torch.tensor(BLOCKS))
    possible = block_of.view(-1, 1) > block_of if dynamics == "static" else torch.ones(800, 800, dtype=torch.bool)
    real = torch.zeros_like(weight)
    chosen = weight.abs().sort(descending=True, stable=True).indices[:EDGES]
    real[chosen] = weight[chosen]
    return torch.zeros(possible.shape, dtype=weight.dtype).masked_scatter_(possible, real).requires_grad_(), possible


PLAIN = {
    ("static", None): plain_static,
    ("discrete", None): plain_discrete_graph,
    ("continuous", None): plain_continuous,
    ("continuous", "norm_relu_conv"): plain_equation_13,
}


@pytest.mark.parametrize(("dynamics", "function"), rest_is_slow(PLAIN, quick=2))
def test_a_training_step_by_a_plain_implementation(dynamics, function, images):
    count = 2 if dynamics == "continuous" else 4
    x, labels = images[0][:count].double(), images[1][:count]
    options = TinyOptions(dynamics=dynamics, node_function=function, node_norm_eps=1e-5)
    model = options.create(10, 32).double()
    p = {name: tensor.detach().clone().requires_grad_() for name, tensor in model.named_parameters()}
    matrix, possible = adjacency(p["graph.candidates.weight"].detach(), dynamics)
    z = PLAIN[dynamics, function](p, matrix, plain_stem(p, x))[:, -100:]
    patch = (z[:, :, 2, 2] + z[:, :, 2, 3] + z[:, :, 3, 2] + z[:, :, 3, 3]) / 4
    logits = patch @ p["classifier.weight"].t() + p["classifier.bias"]
    (torch.logsumexp(logits, dim=1) - logits[range(count), labels]).mean().backward()
    p["graph.candidates.weight"].grad = matrix.grad[possible]

    lr, weight_decay = 0.1, 1e-4
    optimiser = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay)
    found = model(x)
    assert relative_error(found, logits) < 1e-9
    F.cross_entropy(found, labels).backward()
    optimiser.step()
    for name, tensor in model.named_parameters():
        gradient = p[name].grad
        # The instance norm that follows makes the gradient of the stem's last shift zero, up to rounding.
        assert (tensor.grad - gradient).norm() < 1e-7 * gradient.norm() + 1e-15, name
        expected = p[name] - lr * (gradient + weight_decay * p[name])
        assert (tensor - expected).norm() < 1e-9 * expected.norm() + 1e-15, name


def test_the_read_out_is_the_mean_of_rows_and_columns_2_and_3(images):
    model, maps = TinyClassifier(), []
    model.graph.register_forward_hook(lambda module, args, out: out.retain_grad() or maps.append(out))
    model(images[0]).sum().backward()
    assert maps[0].shape == (8, 100, 8, 8)
    expected = torch.zeros(8, 100, 8, 8)
    expected[:, :, 2:4, 2:4] = model.classifier.weight.detach().sum(0).view(-1, 1, 1) / 4
    torch.testing.assert_close(maps[0].grad, expected)


@every_value(rest=pytest.mark.slow, wiring=["dnw", "random_graph"], dynamics=["static", "discrete"])
def test_the_loss_falls(dynamics, wiring, images):
    model = TinyClassifier(dynamics, wiring=wiring)
    edges, weight = model.graph.edge_index, model.graph.candidates.weight.detach().clone()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(6):
        loss = F.cross_entropy(model(images[0]), images[1])
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.8 * losses[0]
    moved = (model.graph.candidates.weight != weight).sum()
    if wiring == "random_graph":
        assert torch.equal(model.graph.edge_index, edges)
        assert moved <= EDGES
    else:
        assert not torch.equal(model.graph.edge_index, edges)
        assert moved > 2 * EDGES


@pytest.mark.parametrize(("wiring", "adjoint"), rest_is_slow([("random_graph", False), ("dnw", True)]))
def test_one_step_of_the_continuous_one(wiring, adjoint, images):
    model = TinyClassifier("continuous", wiring=wiring, adjoint=adjoint)
    F.cross_entropy(model(images[0][:2]), images[1][:2]).backward()
    assert model.graph.dynamics.num_evaluations > 6
    assert (model.graph.dynamics.num_backward_evaluations > 0) == adjoint
    for name, p in model.named_parameters():
        assert torch.isfinite(p.grad).all(), name
        assert p.grad.any(), name
    gradient = model.graph.candidates.weight.grad
    assert int((gradient != 0).sum()) > 2 * EDGES if wiring == "dnw" else int((gradient != 0).sum()) <= EDGES


def test_other_numbers_of_classes_and_larger_images():
    assert TinyClassifier(num_classes=7)(torch.randn(2, 3, 48, 40)).shape == (2, 7)


def test_unknown_names_come_with_near_ones():
    with pytest.raises(InputError, match="unknown dynamics 'discret': did you mean 'discrete'"):
        TinyClassifier("discret")
    with pytest.raises(InputError, match="unknown wiring"):
        TinyClassifier(wiring="rg")
    with pytest.raises(InputError, match="unknown node function 'relu_conv': did you mean 'norm_relu_conv'"):
        TinyOptions(node_function="relu_conv").create(10, 32)


def test_the_adjoint_is_for_continuous_time():
    with pytest.raises(InputError, match="adjoint is for dynamics='continuous'; got 'discrete'"):
        TinyClassifier("discrete", adjoint=True)
    with pytest.raises(InputError, match="--adjoint goes with --dynamics continuous"):
        TinyOptions(adjoint=True).create(10, 32)


def test_a_propagation_with_options_is_copied():
    propagation = AutoPropagation(candidate_gradient="bfloat16")
    model = TinyClassifier("static", propagation=propagation)
    assert repr(model.graph.propagation) == "AutoPropagation(candidate_gradient='bfloat16')"
    assert model.graph.propagation is not propagation

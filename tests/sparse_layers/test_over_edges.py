"""Layers that compute over their real weights alone, beside the same layers with masked weights, in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from reference import relative_error
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from dnw_graph import attach
from dnw_graph.ops.build import kernels
from dnw_graph.ops.layer import turned
from dnw_graph.sparse_layers import densify, layer_edges, sparsify, weight_graphs
from dnw_graph.sparse_layers.layer_edges import DENSEST, LayerEdges
from dnw_graph.wirings import GMP, SET, STR, FineTune, RandomGraph, RigL, SparseMomentum

pytestmark = pytest.mark.skipif(kernels() is None, reason="no C++ compiler")


def make_model(dtype=torch.float64):
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(4, 48, 3, padding=1, bias=False),
        nn.BatchNorm2d(48),
        nn.Tanh(),
        nn.Conv2d(48, 48, 3, 2, padding=(2, 1), dilation=(2, 1), groups=2),
        nn.Tanh(),
        nn.Conv2d(48, 96, 1, 2),
        nn.Flatten(),
        nn.Linear(96 * 9, 64),
        nn.Tanh(),
        nn.Linear(64, 10),
    ]
    return nn.Sequential(*layers).to(dtype)


SPARSE = (3, 5, 7)  # those of 4,096 weights and more


def batch(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 4, 12, 12, generator=generator, dtype=dtype), torch.randint(10, (6,), generator=generator)


def pair(wiring="random_graph", density=0.05, dtype=torch.float64, **options):
    """The same sparse model over edges and with masks."""
    models = []
    for sparse_kernels in (True, False):
        model = make_model(dtype)
        torch.manual_seed(1)
        sparsify(model, density, wiring, sparse_kernels=sparse_kernels, **options)
        models.append(model)
    return models


@pytest.fixture
def computed(monkeypatch):
    """The layers that have computed over edges, in their order."""
    calls, compute = [], LayerEdges.compute

    def spy(self, *args):
        calls.append(self.weight.layer)
        return compute(self, *args)

    monkeypatch.setattr(LayerEdges, "compute", spy)
    return calls


def gradients(model, x, y):
    x = x.clone().requires_grad_()
    out = model(x)
    F.cross_entropy(out, y).backward()
    return [out.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]


def assert_close(found, expected, tolerance=1e-10):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert relative_error(a, b) <= tolerance


def rules():
    trained = make_model()[7].weight.detach().flatten()
    return {
        "random_graph": "random_graph",
        "no_update": "no_update",
        "set": SET(every=2),
        "rigl": RigL(every=2, until=100),
        "gmp": GMP(every=1, until=2),
        "str": STR(-2.8, 0.0),
        "fine_tune": FineTune(trained),
    }


@pytest.mark.parametrize("rule", rules())
def test_gradients_and_edges_are_those_of_masked_layers(rule, computed):
    skip = ["0", "3", "5", "9"] if rule == "fine_tune" else []
    both = pair(rules()[rule], None if rule == "str" else 0.05, skip=skip)
    optimisers = [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3) for model in both]
    for model, optimiser in zip(both, optimisers, strict=True):
        attach(model, optimiser, 100, steps_per_epoch=10)
    for step in range(6):
        found = []
        for model, optimiser in zip(both, optimisers, strict=True):
            optimiser.zero_grad()
            found.append(gradients(model, *batch(step)))
            optimiser.step()
        assert_close(*found, 1e-9 if step else 1e-10)
        for a, b in zip(*(weight_graphs(model).values() for model in both), strict=True):
            assert torch.equal(a.real_index, b.real_index)
    layers = [3, 7] if rule == "str" else [each for each in SPARSE if str(each) not in skip]
    assert {id(both[0][each]) for each in layers} == set(map(id, computed))


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_a_round_before_an_activation_in_place(kind):
    found = []
    for sparse_kernels in (True, False):
        torch.manual_seed(0)
        layers = {
            "linear": [nn.Linear(128, 128), nn.ReLU(inplace=True), nn.Linear(128, 10)],
            "convolution": [nn.Conv2d(32, 32, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(32 * 4, 10)],
        }[kind]
        model = nn.Sequential(*layers).double()
        sparsify(model, 0.05, RigL(every=1, until=100), sparse_kernels=sparse_kernels)
        optimiser = torch.optim.SGD(model.parameters(), 0.1)
        attach(model, optimiser, 100)
        x = torch.randn(4, *((128,) if kind == "linear" else (32, 4, 4)), dtype=torch.float64)
        gradients(model, x, torch.arange(4))
        optimiser.step()
        found.append([graph.real_index for graph in weight_graphs(model).values()])
    assert all(map(torch.equal, *found))


def test_one_dense_gradient_in_the_round_of_a_rule_that_grows_by_it():
    """The probe of RigL: all candidates beside a ``.grad`` that real ones alone have."""
    both = pair(RigL(every=1, until=100))
    for model in both:
        optimiser = torch.optim.SGD(model.parameters(), 0.1)
        attach(model, optimiser, 100)
        gradients(model, *batch())
    for layer in SPARSE:
        probes = [model[layer].parametrizations.weight[0].probe.grad for model in both]
        assert relative_error(*probes) <= 1e-10
        assert probes[0].count_nonzero() > 0.3 * probes[0].numel()
        assert both[0][layer].parametrizations.weight.original.grad.count_nonzero() <= 0.06 * probes[0].numel()


@pytest.mark.parametrize("wiring", ["dnw", SparseMomentum(0.3, every=2)])
def test_rules_whose_hallucinated_weights_get_gradients_compute_with_masks(wiring, computed):
    gradients(pair(wiring)[0], *batch())
    assert not computed


def test_too_many_real_weights_and_small_layers_compute_with_masks(computed):
    gradients(pair(density=DENSEST[nn.Conv2d] + 0.01)[0], *batch())
    assert not computed
    model = pair(density=DENSEST[nn.Linear] + 0.01)[0]
    gradients(model, *batch())
    assert computed == [model[3], model[5]]
    computed.clear()
    model = pair()[0]
    gradients(model, *batch())
    assert computed == [model[layer] for layer in SPARSE]


def test_one_budget_for_all_layers(computed):
    both = pair(SET(every=2), 0.1, distribution="global")
    assert_close(*(gradients(model, *batch()) for model in both))
    assert computed


def test_off_with_one_argument(computed):
    gradients(pair()[1], *batch())
    assert not computed


def test_a_weight_can_be_read_within_a_forward_pass():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 128).double()

        def forward(self, x):
            return self.layer(x) + self.layer.weight.square().sum()

    found = []
    for sparse_kernels in (True, False):
        torch.manual_seed(0)
        model = Reads()
        sparsify(model, 0.1, "random_graph", sparse_kernels=sparse_kernels)
        model(torch.ones(3, 64, dtype=torch.float64)).sum().backward()
        found.append([model.layer.parametrizations.weight.original.grad, model.layer.weight])
    assert_close(*found)


def test_evaluation_and_what_needs_no_gradient():
    both = pair()
    for model in both:
        model.eval()
    x, y = batch()
    with torch.no_grad():
        assert_close([both[0](x)], [both[1](x)])
    found = []
    for model in both:
        for layer in SPARSE:
            model[layer].parametrizations.weight.original.requires_grad_(False)
        F.cross_entropy(model(x), y).backward()  # x needs none either
        found.append([each.grad for each in model.parameters() if each.requires_grad])
        assert all(model[layer].parametrizations.weight.original.grad is None for layer in SPARSE)
    assert_close(*found)


def test_accumulated_gradients_hooks_and_channels_last():
    both, found = pair(), []
    for model in both:
        model.to(memory_format=torch.channels_last)
        seen = []
        model[7].register_forward_hook(lambda layer, args, output, seen=seen: seen.append(output.detach()))
        model[3].register_full_backward_hook(lambda layer, given, out, seen=seen: seen.extend((*given, *out)))
        for seed in (0, 1):
            x, y = batch(seed)
            F.cross_entropy(model(x.to(memory_format=torch.channels_last)), y).backward()
        found.append([*seen, *(parameter.grad for parameter in model.parameters())])
    assert_close(*found)


def test_edges_are_turned_once_and_outputs_may_be_changed_in_place(monkeypatch):
    calls = []
    monkeypatch.setattr(layer_edges, "turned", lambda *csr: (calls.append(csr), turned(*csr))[1])
    found = []
    for sparse_kernels in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(96, 64), nn.ReLU(inplace=True), nn.Linear(64, 96)).double()
        sparsify(model, 0.05, "random_graph", sparse_kernels=sparse_kernels)
        for seed in range(3):
            x = torch.randn(2, 4, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            model(x).square().sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert_close(*found)
    assert len(calls) == 2


def test_recomputation_takes_the_same_edges(computed):
    both = pair()
    x, y = batch()
    found = []
    for model in both:
        F.cross_entropy(checkpoint(model, x, use_reentrant=False), y).backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert_close(*found)
    assert len(computed) == 2 * len(SPARSE)


def test_gradients_of_gradients():
    found = []
    for model in pair():
        x, y = batch()
        x.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x), y), x, create_graph=True)
        grad.square().sum().backward()
        found.append([x.grad, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)])
    assert_close(*found)


def test_a_round_after_a_loss_with_gradients_in_it():
    """The gradient that edges grow by includes that through the gradients of a penalty."""
    found = []
    for model in pair(RigL(every=1, until=100)):
        attach(model, torch.optim.SGD(model.parameters(), 0.1), 100)
        x, y = batch()
        x.requires_grad_()
        loss = F.cross_entropy(model(x), y)
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + 10 * grad.square().sum()).backward()
        found.append([model[layer].parametrizations.weight[0].probe.grad for layer in SPARSE])
    assert_close(*found)


def test_several_gradients_at_once():
    found = []
    for model in pair():
        x, _ = batch()
        x.requires_grad_()
        out = model(x)[0]
        inputs = [x, *model.parameters()]
        found.append(torch.autograd.grad(out, inputs, torch.eye(10).double(), is_grads_batched=True))
    assert_close(*found)


@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_gives_the_directional_derivative(grad):
    model, _ = pair()
    model.eval()
    x, _ = batch()
    for name, weight in model.named_parameters():
        direction, step = torch.randn_like(weight), 1e-5
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            dual = {name: forward_ad.make_dual(weight.detach(), direction)}
            tangent = forward_ad.unpack_dual(functional_call(model, dual, x)).tangent
        ahead, back = (functional_call(model, {name: weight.detach() + h * direction}, x) for h in (step, -step))
        assert torch.allclose(tangent, (ahead - back) / (2 * step), rtol=1e-6, atol=1e-8), name


def test_autocast_computes_with_masks(computed):
    both = pair(dtype=torch.float32)
    x, y = batch(dtype=torch.float32)
    found = []
    for model in both:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        F.cross_entropy(out.float(), y).backward()
        found.append([out, *(parameter.grad for parameter in model.parameters())])
    assert not computed
    assert all(map(torch.equal, *found))


def test_sequences_of_several_lengths_in_an_encoder(computed):
    """In evaluation PyTorch's encoder computes with a nested tensor where some tokens are padding."""
    x, padding = torch.randn(3, 10, 64), torch.arange(10).repeat(3, 1) >= torch.tensor([[7], [10], [4]])
    found = []
    for sparse_kernels in (True, False):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        model = nn.TransformerEncoder(layer, 2)
        sparsify(model, 0.05, "random_graph", sparse_kernels=sparse_kernels)
        with torch.no_grad():
            found.append(model.eval()(x, src_key_padding_mask=padding))
            assert not computed
            model(x)
        assert bool(computed) is sparse_kernels
        computed.clear()
    torch.testing.assert_close(*found)


def test_copies_state_and_dense_layers(computed):
    model, _ = pair()
    x, y = batch()
    expected = gradients(model, x, y)
    torch.manual_seed(2)
    other = make_model()
    sparsify(other, 0.05, RandomGraph(separate_scores=True))
    gradients(other, x, y)  # over other edges
    other.load_state_dict(model.state_dict())
    for each in (copy.deepcopy(model), other):
        each.zero_grad()
        assert_close(gradients(each, x, y), expected, 1e-15)
    densify(model)
    computed.clear()
    model.zero_grad()
    assert type(model[3]) is nn.Conv2d
    assert_close(gradients(model, x, y)[:2], expected[:2])
    assert not computed


def test_a_layer_with_a_forward_pass_of_its_own_keeps_it(computed):
    class Doubled(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight, self.bias)

    model = nn.Sequential(Doubled(64, 128))
    sparsify(model, 0.05, "random_graph")
    model(torch.randn(2, 64)).sum().backward()
    assert not computed


def edge_padding(layer):
    """Replaces the private method that pads and convolves."""
    layer._conv_forward = lambda x, weight, bias: F.conv2d(F.pad(x, (1, 1, 1, 1), "replicate"), weight, bias)


def other_mode(layer):
    layer.padding_mode = "circular"


def named_padding(layer):
    layer.padding = "valid"


@pytest.mark.parametrize("later", [True, False])
@pytest.mark.parametrize("change", [edge_padding, other_mode, named_padding])
def test_a_convolution_that_pads_in_another_way_is_computed_as_it_says(change, later):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1))
    if not later:
        change(model[0])
    sparsify(model, 0.05, "random_graph")
    if later:
        change(model[0])
    x = torch.randn(2, 32, 6, 6)
    weight = model[0].weight.detach().clone()
    padded = F.pad(x, (1, 1, 1, 1), {edge_padding: "replicate", other_mode: "circular"}.get(change, "constant"))
    expected = F.conv2d(x if change is named_padding else padded, weight, model[0].bias)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_wrong_inputs_are_refused_as_by_the_layer_itself():
    model = nn.Sequential(nn.Linear(64, 128))
    sparsify(model, 0.05, "random_graph")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model(torch.randn(2, 63))


@pytest.mark.slow
def test_compiled():
    both = pair()
    x, y = batch()
    found = [gradients(torch.compile(both[0]), x, y), gradients(both[1], x, y)]
    assert_close(*found)

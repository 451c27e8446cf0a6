"""What is read from a sparse weight outside of a forward pass, written to, and assigned."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

from dnw_graph.errors import InputError
from dnw_graph.sparse_layers import densify, sparsify


@pytest.fixture
def model():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.MultiheadAttention(8, 2))
    sparsify(model, 0.25)
    return model.eval()


def candidates(model):
    return model[0].parametrizations.weight.original


def strongest(weight, k):
    order = weight.detach().abs().flatten().sort(descending=True, stable=True).indices[:k]
    return torch.zeros_like(weight).flatten().index_fill(0, order, 1).view(weight.shape) * weight.detach()


def merge_adapter(layer):
    """What libraries for low-rank adapters do."""
    layer.weight.data += torch.ones(8, 2) @ torch.ones(2, 6)


def merge_checked(layer):
    weight = layer.weight.data.clone()
    weight += torch.ones(8, 2) @ torch.ones(2, 6)
    layer.weight.data = weight


WRITES = {
    "adapter": merge_adapter,
    "adapter, checked": merge_checked,
    "nn.init": lambda layer: nn.init.zeros_(layer.weight),
    "nn.init by a view": lambda layer: nn.init.orthogonal_(layer.weight),
    "reset_parameters": lambda layer: layer.reset_parameters(),
    "an entry": lambda layer: layer.weight.detach().__setitem__((0, 0), 1.0),
    "a row": lambda layer: layer.weight.detach()[0].fill_(1),
    "a chunk of the transposed": lambda layer: layer.weight.data.t().chunk(2)[1].fill_(1),
    "out=": lambda layer: torch.ones(8, 6, out=layer.weight.detach()),
    "in a list": lambda layer: torch._foreach_mul_([layer.weight.detach()], 2.0),
    "in place by an argument": lambda layer: nn.functional.relu(layer.weight.detach(), inplace=True),
    "norms": lambda layer: setattr(layer.weight, "data", torch.renorm(layer.weight.data, 2, 0, 0.1)),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writes_that_would_be_lost_are_refused(model, write, mode):
    before = candidates(model).clone()
    where = r"0\.weight is sparse.* lost: densify.*0\.parametrizations\.weight\.original$"
    with mode(), pytest.raises(InputError, match=where):
        write(model[0])
    torch.testing.assert_close(candidates(model), before, rtol=0, atol=0)


def test_the_projections_of_attention_refuse_writes(model):
    where = r"2\.in_proj_weight is sparse.*2\.parametrizations\.in_proj_weight\.original$"
    with torch.no_grad(), pytest.raises(InputError, match=where):
        model[2].in_proj_weight[8:16] = 0


def test_an_adapter_merges_into_the_dense_model(model):
    layer, x = model[0], torch.randn(3, 6)
    expected = layer(x).detach() + x @ torch.full((6, 8), 2.0)
    densify(model)
    merge_adapter(layer)
    torch.testing.assert_close(layer(x), expected)


def test_gradient_and_hooks_are_those_of_the_candidates(model):
    layer, seen = model.train()[0], []
    layer.weight.register_hook(seen.append)
    layer.weight.register_post_accumulate_grad_hook(seen.append)
    x = torch.randn(3, 6)
    layer(x).sum().backward()
    dense = x.sum(0).expand(8, 6)
    torch.testing.assert_close(seen[0], dense)
    assert seen[1] is candidates(model)
    torch.testing.assert_close(layer.weight.grad, dense)
    nn.utils.clip_grad_norm_([layer.weight], 1e-3)
    torch.testing.assert_close(candidates(model).grad.norm(), torch.tensor(1e-3))
    layer.weight.grad = None
    assert candidates(model).grad is None
    with torch.no_grad():
        layer.weight.requires_grad_(False)
    assert not candidates(model).requires_grad


def test_what_is_computed_from_it_is_plain(model):
    weight = model[0].weight
    for made in (
        weight.clone(),
        weight * 1,
        weight.max(0).values,
        copy.deepcopy(weight.detach()),
        weight.detach() @ weight.T,
    ):
        assert type(made) is torch.Tensor
        made.detach().zero_()
    leaf = weight.detach().requires_grad_()
    (2 * leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, torch.full((8, 6), 2.0))
    assert candidates(model).grad is None


def test_it_is_saved_as_a_plain_tensor(model):
    file = io.BytesIO()
    torch.save(model[0].weight.detach(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert type(loaded) is torch.Tensor
    torch.testing.assert_close(loaded, strongest(candidates(model), 12))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_an_assigned_parameter_becomes_the_candidates(model, mode):
    layer, new = getattr(model, mode)()[0], nn.Parameter(torch.randn(8, 6))
    x = torch.randn(3, 6)
    layer(x)
    layer.weight = new
    assert candidates(model) is new
    assert [name for name, each in model.named_parameters() if each is new] == ["0.parametrizations.weight.original"]
    torch.testing.assert_close(layer(x), x @ strongest(new, 12).T + layer.bias)
    densify(model, keep_hallucinated=True)
    assert layer.weight is new


def test_an_assigned_tensor_is_copied_into_the_parameter(model):
    before, new, x = candidates(model), torch.randn(8, 6), torch.randn(3, 6)
    given = new.clone()
    model[0].weight = given
    given.zero_()
    assert candidates(model) is before
    torch.testing.assert_close(model[0](x), x @ strongest(new, 12).T + model[0].bias)


def test_a_weight_is_assigned_through_other_parametrizations(model):
    before = candidates(model)
    parametrizations.spectral_norm(model[0], n_power_iterations=50)
    new = torch.randn(8, 6)
    model[0].weight = nn.Parameter(new)
    assert candidates(model) is before
    model.train()[0](torch.randn(3, 6))  # the power iteration
    real = strongest(new, 12)
    torch.testing.assert_close(model.eval()[0].weight, real / torch.linalg.matrix_norm(real, 2))


@pytest.mark.parametrize("kind", [nn.Parameter, torch.Tensor.clone])
def test_an_assigned_weight_of_another_shape_is_refused(model, kind):
    with pytest.raises(InputError, match=r"0\.weight must be a weight of \[8, 6\], or densify"):
        model[0].weight = kind(torch.randn(8, 5))
    assert candidates(model).shape == (8, 6)


def test_a_parameter_of_the_values_read_is_refused(model):
    for values in (model[0].weight, model[0].weight.data):
        with pytest.raises(InputError, match=r"0\.weight is sparse, and a parameter cannot share.*clone\(\)"):
            nn.Parameter(values)
    copied = nn.Parameter(model[0].weight.clone())
    assert type(copied) is nn.Parameter
    assert not isinstance(model[0].weight, nn.Parameter)


def test_the_values_read_do_not_become_the_candidates(model):
    before = model[0].parametrizations.weight.original.clone()
    for value in (model[0].weight, model[0].weight.detach()):
        with pytest.raises(InputError, match=r"save and assign 0\.parametrizations\.weight\.original instead"):
            model[0].weight = value
    assert torch.equal(model[0].parametrizations.weight.original, before)


@pytest.mark.parametrize("parameter", [False, True])
def test_functional_call_takes_the_candidates_alone(model, parameter):
    original = model[0].parametrizations.weight.original
    before, given = original.clone(), torch.randn_like(original)
    if parameter:
        given = nn.Parameter(given)
    model, x = model[:2], torch.randn(2, original.shape[1])
    with pytest.raises(InputError, match=r"by the name 0\.parametrizations\.weight\.original"):
        functional_call(model, {"0.weight": given}, (x,))
    assert model[0].parametrizations.weight.original is original
    assert torch.equal(original, before)
    found = functional_call(model, {"0.parametrizations.weight.original": given}, (x,))
    with torch.no_grad():
        original.copy_(given)
    torch.testing.assert_close(found, model(x))

"""Layers of other libraries: taken for what they do, not for what they are called."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dnw_graph.errors import InputError
from dnw_graph.sparse_layers import dense_state_dict, layers, register_layer, sparsify, to_data
from dnw_graph.sparse_layers.layers import find_weights
from dnw_graph.sparse_layers.trying import refuse_other_values


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    monkeypatch.setattr(layers, "LAYERS", dict(layers.LAYERS))


class Standardised(nn.Conv2d):
    """As timm's StdConv2d."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5), self.bias)


class StandardisedBelow(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class Normed(nn.Linear):
    """As the last layer of cosine classifiers."""

    def forward(self, x):
        return F.linear(x, F.normalize(self.weight))


class MaxNorm(nn.Conv2d):
    """As EEGNet's Conv2dWithConstraint, for weights of any size."""

    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=1)
        return super().forward(x)


class Masked(nn.Conv2d):
    """As PixelCNN's masked convolution, linear in its weight."""

    def forward(self, x):
        self.weight.data[:, :, 1:] = 0
        return super().forward(x)


class Doubled(nn.Linear):
    def forward(self, x, scale):
        return super().forward(x) * scale


class Noisy(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight + 0.1, self.bias)


class Low(nn.Linear):
    """Computes with something else."""

    def forward(self, x):
        return x[:, :1].expand(-1, self.out_features)


REFUSED = {
    "standardised": (lambda: Standardised(4, 8, 3), "mean of its weight"),
    "standardised below": (lambda: StandardisedBelow(4, 8, 3), "mean of its weight"),
    "normed": (lambda: Normed(4, 8), "norm of its weight"),
    "max norm": (lambda: MaxNorm(4, 8, 3), "renorm of its weight"),
    "written to": (lambda: Masked(4, 8, 3), "fill_ of its weight"),
    "noisy": (lambda: Noisy(4, 8), "add of its weight"),
    "unused": (lambda: Low(4, 8), "it does not use it"),
    "takes more": (lambda: Doubled(4, 8), ".*missing 1 required"),
}


@pytest.mark.parametrize(("make", "why"), REFUSED.values(), ids=REFUSED)
def test_layers_with_other_values_than_their_weight_are_refused(make, why):
    model = nn.Sequential(make(), nn.Linear(8, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    name = type(model[0]).__name__
    message = rf"^0\.weight: a {name} may not use its weight unchanged.*{why}.*: skip={name} leaves"
    with pytest.raises(InputError, match=message):
        sparsify(model, 0.1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    table = sparsify(model, 0.1, skip=type(model[0]))
    assert [row.name for row in table.sparse] == ["1.weight"]


class Same(nn.Conv2d):
    """As timm's Conv2dSame: pads as TensorFlow does."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class InFloat32(nn.Linear):
    """As layers of transformers that multiply in float32."""

    def forward(self, x):
        return F.linear(x.float(), self.weight.float(), self.bias.float()).to(x.dtype)


class MultipliedByOnes(nn.Linear):
    """As autoregressive networks do."""

    def forward(self, x):
        return F.linear(x, torch.ones(8, 4) * self.weight, self.bias)


class Upsampling(nn.ConvTranspose2d):
    def forward(self, x, output_size=None):
        return super().forward(x, output_size).contiguous()


class SelfAttention(nn.MultiheadAttention):
    def forward(self, query, key, value, **options):
        return super().forward(query, key, value, need_weights=False)


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: Same(4, 8, 3, stride=2), torch.randn(2, 4, 7, 7)),
        (lambda: InFloat32(4, 8), torch.randn(2, 4)),
        (lambda: MultipliedByOnes(4, 8), torch.randn(2, 4)),
        (lambda: Upsampling(4, 8, 3, groups=2), torch.randn(2, 4, 5, 5)),
        (lambda: SelfAttention(8, 2), torch.randn(3, 2, 8)),
    ],
)
def test_layers_with_a_forward_pass_of_their_own_are_tried_and_taken(make, x):
    layer = make()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    sparsify(layer, 0.25)
    after = dense_state_dict(layer, keep_hallucinated=True)
    assert all(torch.equal(value, after[name]) for name, value in before.items())  # untouched by the trial
    inputs = (x, x, x) if isinstance(layer, nn.MultiheadAttention) else (x,)
    twin = make()
    twin.load_state_dict(dense_state_dict(layer))
    torch.testing.assert_close(layer(*inputs), twin(*inputs))
    weight = next(value for name, value in twin.named_parameters() if name.endswith("weight"))
    assert weight.count_nonzero() == weight.numel() / 4


@pytest.mark.parametrize("make", [lambda: MultipliedByOnes(4, 8), lambda: SelfAttention(8, 2)])
def test_layers_are_tried_on_the_cpu_whatever_the_default_device(make):
    weights = list(find_weights(make()))
    with torch.device("meta"):
        for weight in weights:
            refuse_other_values(weight)


def shifted(layer, x):
    return type(layer).forward(layer, x) + 1


def normed(layer, x):
    return F.linear(x, layer.weight / layer.weight.norm())


def test_a_patched_layer_is_tried_too():
    """Wrappers and offloaders put a partial function in the place of ``forward``."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    model[0].forward = functools.partial(shifted, model[0])
    sparsify(model, 0.5)
    layer, x = nn.Linear(4, 8), torch.randn(3, 4)
    layer.forward = functools.partial(normed, layer)
    with pytest.raises(InputError, match="norm of its weight"):
        sparsify(layer, 0.5)
    before = layer.weight
    layer.forward = lambda x: x @ before.T  # no copy of the layer gets that one
    with pytest.raises(InputError, match="it does not use it"):
        sparsify(layer, 0.5)
    assert torch.equal(layer(x), x @ before.T)


class Conv1D(nn.Module):
    """As that of Hugging Face's GPT-2."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


def test_a_registered_layer_is_what_a_linear_one_is():
    with pytest.raises(InputError, match=r"no weight to make sparse: .* or other layer of register_layer"):
        sparsify(Conv1D(6, 5), 0.2)
    register_layer(Conv1D, inputs_first=True)
    own, linear, x = Conv1D(6, 5), nn.Linear(5, 6), torch.randn(7, 5)
    linear.load_state_dict({"weight": own.weight.T, "bias": own.bias})
    for layer in (own, linear):
        sparsify(layer, 0.2)
    torch.testing.assert_close(own(x), linear(x))
    assert torch.equal(to_data(own, "weight").edge_index, to_data(linear, "weight").edge_index)
    for layer in (own, linear):
        layer(x).square().sum().backward()
    torch.testing.assert_close(own.weight.grad.T, linear.weight.grad)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        return torch.sigmoid(x @ self.gate.T) * (x @ self.up.T)


def test_a_layer_may_have_several_weights_and_subclasses_are_tried():
    register_layer(Gated, ("gate", "up"))

    class Scaled(Gated):
        def forward(self, x):
            return super().forward(x * 2)

    class Squashed(Gated):
        def forward(self, x):
            return x @ torch.tanh(self.up).T

    for kind in (Gated, Scaled):
        assert [row.name for row in sparsify(kind(), 0.5).sparse] == ["gate", "up"]
    with pytest.raises(InputError, match=r"up: a Squashed .*tanh of its weight"):
        sparsify(Squashed(), 0.5, skip="gate")


def test_what_is_no_type_of_module_is_not_registered():
    with pytest.raises(InputError, match="register_layer: kind"):
        register_layer(Conv1D(1, 1))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.body = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.head, self.tail = nn.Linear(4, 7), nn.Linear(4, 7)
        self.head.weight = self.tail.weight = self.embedding.weight


@pytest.mark.parametrize("skip", ["embedding", "embedding.weight", "head", "tail.weight"])
def test_a_tied_weight_has_all_its_names(skip):
    names = "embedding.weight and head.weight and tail.weight"
    with pytest.raises(InputError, match=f"^{names} are one shared weight"):
        sparsify(Tied(), 0.5)
    first, second = sparsify(Tied(), 0.5, skip=skip).rows
    assert (first.name, first.dense_because) == (names, f"skip '{skip}'")
    assert (second.name, second.dense_because) == ("body.weight", "")

"""What becomes sparse, by how much, and what is refused."""

import copy
import math
import pickle
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from torchvision.models import resnet18, resnet50

from dnw_graph import STR, InputError, LotteryTicket, TopKAST
from dnw_graph.sparse_layers import densify, sparsify, weight_graphs
from dnw_graph.sparse_layers.budget import kept


def make_model():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 10), nn.Linear(10, 20))


@example(10, 900)  # (1 - 0.9) * 10 is a little under 1
@given(st.integers(1, 10**7), st.integers(1, 1000))
def test_kept_is_exact_for_decimal_densities(numel, thousandths):
    density = thousandths / 1000
    dropped = (1000 - thousandths) * numel // 1000
    assert kept(numel, density) == max(1, numel - dropped)


@pytest.mark.slow
def test_resnet50_keeps_what_the_paper_says():
    model = resnet50()
    table = sparsify(model, 0.1)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(table.sparse) == len(table.rows) == len(layers) == 54
    for layer, row in zip(layers, table.sparse, strict=True):
        n = layer.weight.numel()
        assert int(layer.weight.ne(0).sum()) == row.kept == n - math.floor(Fraction(9, 10) * n)
    assert int(model.fc.bias.ne(0).sum()) == 1000


def test_every_kind_of_layer():
    layers = {
        "linear": nn.Linear(8, 12),
        "conv1": nn.Conv1d(4, 6, 3, groups=2),
        "conv2": nn.Conv2d(4, 6, (3, 5)),
        "conv3": nn.Conv3d(2, 3, 2),
        "up1": nn.ConvTranspose1d(4, 6, 3, groups=2),
        "up2": nn.ConvTranspose2d(4, 6, 3),
        "up3": nn.ConvTranspose3d(2, 3, 2),
        "attention": nn.MultiheadAttention(4, 2, add_bias_kv=True),
        "embedding": nn.Embedding(5, 4),
        "lstm": nn.LSTM(3, 4),
        "norm": nn.LayerNorm((2, 3)),
    }
    model = nn.ModuleDict(layers)
    model.place = nn.Parameter(torch.zeros(1, 7, 4))
    table = sparsify(model, 0.25)
    dense = {row.name: row.dense_because for row in table.rows if row.dense_because}
    assert dense == {
        "place": "parameter of ModuleDict",
        "attention.bias_k": "parameter of MultiheadAttention",
        "attention.bias_v": "parameter of MultiheadAttention",
        "embedding.weight": "parameter of Embedding",
        "lstm.weight_ih_l0": "parameter of LSTM",
        "lstm.weight_hh_l0": "parameter of LSTM",
        "norm.weight": "parameter of LayerNorm",
        "norm.bias": "parameter of LayerNorm",
    }
    for name in ("linear", "conv1", "conv2", "conv3", "up1", "up2", "up3"):
        weight = layers[name].weight
        assert int(weight.ne(0).sum()) == math.ceil(weight.numel() / 4), name
        original = layers[name].parametrizations.weight.original.abs()
        assert original[weight.ne(0)].min() >= original[weight.eq(0)].max(), name
    assert [int(third.ne(0).sum()) for third in layers["attention"].in_proj_weight.chunk(3)] == [4, 4, 4]


@pytest.mark.parametrize(
    ("skip", "dense"),
    [
        ("conv1", {"conv1.weight"}),
        ("layer1.*", {f"layer1.{i}.conv{j}.weight" for i in (0, 1) for j in (1, 2)}),
        ("layer1", {f"layer1.{i}.conv{j}.weight" for i in (0, 1) for j in (1, 2)}),
        (["fc.weight", "conv?"], {"fc.weight", "conv1.weight"}),
        (nn.Linear, {"fc.weight"}),
        ([nn.Linear, "conv1"], {"fc.weight", "conv1.weight"}),
    ],
)
def test_skip(skip, dense):
    model = resnet18()
    table = sparsify(model, 0.2, skip=skip)
    assert {row.name for row in table.rows if row.dense_because.startswith("skip ")} == dense
    assert {name for name, p in model.named_parameters() if p.dim() > 1 and "parametrizations" not in name} == dense
    assert all(row.kept == row.weights for row in table.rows if row.name in dense)
    assert int(model.fc.weight.ne(0).sum()) == (512_000 if "fc.weight" in dense else 102_400)


def test_a_type_skips_what_lies_in_it():
    model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 1))
    assert [row.name for row in sparsify(model, 0.5, skip=nn.MultiheadAttention).sparse] == ["0.weight"]


def test_the_table_says_what_and_why():
    text = str(sparsify(make_model(), 0.25, skip="0"))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[1:] == [
        "0.weight 8×3×3×3 216 216 100.00% dense: skip '0'",
        "3.weight 10×32 320 80 25.00%",
        "4.weight 20×10 200 50 25.00%",
        "total, sparse layers 520 130 25.00%",
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_are_exact_for_short_number_formats(dtype):
    """150,001 has more digits than either format, and more than float16 can hold."""
    table = sparsify(nn.Linear(300, 1000).to(dtype), 0.500001)
    assert table.kept == 300_000 - math.floor(Fraction("0.499999") * 300_000) == 150_001


def test_projections_are_those_of_attention_whatever_a_parameter_is_called():
    class Own(nn.Linear):
        def __init__(self):
            super().__init__(3, 2)
            self.in_proj_weight = nn.Parameter(torch.zeros(4, 3))

    table = sparsify(Own(), 0.5)
    rows = [(row.name, row.shape, row.dense_because) for row in table.rows]
    assert sorted(rows) == [("in_proj_weight", (4, 3), "parameter of Own"), ("weight", (2, 3), "")]


def test_parameters_stay_the_same_objects():
    model = make_model()
    before = set(model.parameters())
    sparsify(model, 0.5)
    assert set(model.parameters()) == before
    densify(model)
    assert set(model.parameters()) == before


def test_a_foreign_parametrization_is_left_alone():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    table = sparsify(model, 0.5)
    assert [row.name for row in table.sparse] == ["1.weight"]
    densify(model)
    assert model[0].weight.shape == (4, 4)
    assert type(model[1]) is nn.Linear


def test_a_foreign_parametrization_on_the_same_layer_survives_densify():
    class Doubled(nn.Module):
        def forward(self, bias):
            return 2 * bias

    layer = nn.Linear(4, 4)
    torch.nn.utils.parametrize.register_parametrization(layer, "bias", Doubled())
    bias = layer.bias.detach().clone()
    sparsify(layer, 0.5)
    twin = copy.deepcopy(layer)
    densify(layer)
    assert torch.equal(layer.bias, bias)
    assert isinstance(layer.weight, nn.Parameter)
    x = torch.randn(2, 4)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, bias))
    assert type(layer).forward is nn.Linear.forward
    assert type(layer).__setattr__ is nn.Module.__setattr__
    with pytest.raises(RuntimeError, match="parametrized modules"):  # by PyTorch
        pickle.dumps(layer)
    assert int(twin.weight.ne(0).sum()) == 8
    assert torch.equal(twin(x), nn.functional.linear(x, twin.weight, bias))
    torch.nn.utils.parametrize.remove_parametrizations(layer, "bias")
    assert type(layer) is nn.Linear


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 0}, "density must be"),
        ({"density": 1.5}, "density must be"),
        ({"density": -0.1}, "density must be"),
        ({"density": True}, "density must be"),
        ({"density": "0.1"}, "density must be"),
        ({"density": float("nan")}, "density must be"),
        ({"skip": "conv1"}, "unknown module or parameter to skip 'conv1'.*'0.weight'"),
        ({"skip": ["0", "nothing*"]}, "unknown module or parameter to skip 'nothing"),
        ({"skip": nn.Conv3d}, "no module to skip is a Conv3d: there are BatchNorm2d, Conv2d"),
        ({"skip": 3}, "skip must be a string, a subclass of Module or a sequence"),
        ({"skip": "*"}, "no weight to make sparse"),
        ({"wiring": "dnww"}, "unknown wiring 'dnww'"),
        ({"wiring": 3}, "wiring must be a string or a Wiring"),
        ({"distribution": "evenly"}, "unknown distribution 'evenly'"),
        ({"distribution": {"9.*": 0.1}}, "unknown weight in distribution '9"),
        ({"distribution": {"0.*": 2.0}}, "density of '0.*' must be the share"),
        ({"density": 0.001, "distribution": "erdos_renyi"}, "leaves 1 weights for 3 layers"),
    ],
)
def test_bad_arguments_change_nothing(arguments, message, unchecked):
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    types = [type(each) for each in model.modules()]
    with pytest.raises(InputError, match=message) as error:
        sparsify(model, **arguments)
    assert "\n" not in str(error.value)
    assert [type(each) for each in model.modules()] == types
    assert not any(each._forward_pre_hooks or each._forward_hooks for each in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def tied():
    model = nn.ModuleDict({"embedding": nn.Embedding(6, 4), "head": nn.Linear(4, 6)})
    model["head"].weight = model["embedding"].weight
    return model


def bad_value():
    model = make_model()
    with torch.no_grad():
        model[3].weight[0, 0] = torch.nan
    return model


def quantised():
    return nn.Sequential(nn.Linear(2, 2), torch.ao.nn.quantized.Linear(4, 4))


def sparse():
    model = make_model()
    sparsify(model)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tied, "embedding.weight and head.weight are one shared weight"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)), "1 is lazy"),
        (quantised, "1 is quantised"),
        (sparse, "0.weight is already sparse"),
        (lambda: nn.ReLU(), "ReLU has no weight"),
        (lambda: torch.jit.script(nn.Linear(2, 2)), "scripted"),
        (lambda: nn.Linear(2, 2, device="meta"), "meta device"),
        (lambda: nn.Linear(2, 2, dtype=torch.complex64), "of torch.complex64"),
        (bad_value, "3.weight: 1 of 320 candidate weights are NaN"),
        (lambda: [nn.Linear(2, 2)], r"module must be a Module; got \[Linear"),
    ],
)
def test_bad_modules_are_refused(make, message, unchecked):
    with pytest.raises(InputError, match=message):
        sparsify(make(), 0.1)


def test_bad_modules_can_be_skipped():
    model = tied()
    model["other"] = nn.Linear(4, 4)
    assert [row.name for row in sparsify(model, 0.5, skip=["embedding", "head"]).sparse] == ["other.weight"]
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    assert [row.name for row in sparsify(model, 0.5, skip="1").sparse] == ["0.weight"]


def test_a_rule_that_refuses_leaves_the_module_as_it_was():
    """The first layer fits the rule's weights, the second does not."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    before = model[0].weight.detach().clone()
    with pytest.raises(InputError, match="given \\[12\\] weights for 16"):
        sparsify(model, 0.5, LotteryTicket(torch.rand(12), torch.rand(12)))
    assert torch.equal(model[0].weight, before)
    assert type(model[0]) is nn.Linear


def test_nothing_to_densify():
    with pytest.raises(InputError, match="no sparse weight"):
        densify(make_model())


def test_the_random_state_is_left_alone():
    model = make_model()
    state = torch.get_rng_state()
    sparsify(model, 0.5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("rule", "distribution", "number"),
    [
        ("no_update", "uniform", 100),
        (TopKAST(extra=0.1), "uniform", 100),
        (STR(-5.0), "uniform", 0),
        ("no_update", "global", 0),
        ("random_graph", "global", 0),
    ],
)
def test_a_layer_that_can_never_leave_its_zeros_is_named(rule, distribution, number):
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    nn.init.zeros_(model[1].weight)
    with pytest.warns(UserWarning, match=rf"^1\.weight is zero: .* {number} of its 400 weights .* skip it"):
        sparsify(model, None if isinstance(rule, STR) else 0.25, rule, distribution=distribution)


@pytest.mark.parametrize(
    "rule", ["dnw", "random_graph", "set", "rigl", "gmp", "ac_dc", "targeted_dropout", "l1_anneal"]
)
def test_rules_that_can_leave_zeros_do_not_warn(rule, recwarn):
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    nn.init.zeros_(model[1].weight)
    sparsify(model, 0.25, rule)
    assert not recwarn.list


@pytest.mark.parametrize("keep", [False, True])
def test_densify(keep):
    model = resnet18().eval()
    originals = {name: value.clone() for name, value in model.state_dict().items()}
    order = [name for name, _ in model.named_parameters()]
    types = [type(each) for each in model.modules()]
    sparsify(model, 0.3)
    x = torch.randn(1, 3, 32, 32)
    expected, effective = model(x), model.fc.weight.detach().clone()
    densify(model, keep_hallucinated=keep)
    assert [type(each) for each in model.modules()] == types
    assert [name for name, _ in model.named_parameters()] == order
    assert not any(m._forward_pre_hooks or m._forward_hooks or m._load_state_dict_pre_hooks for m in model.modules())
    if keep:
        assert all(torch.equal(value, originals[name]) for name, value in model.state_dict().items())
    else:
        assert torch.equal(model(x), expected)
        assert torch.equal(model.fc.weight, effective)


def test_densify_a_copy_and_a_part():
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)), nn.Linear(4, 2))
    sparsify(model, 0.5)
    x = torch.randn(2, 3)
    expected = model(x)
    twin = copy.deepcopy(model)
    densify(twin)
    assert torch.equal(twin(x), expected)
    assert torch.equal(model(x), expected)
    densify(model[0])
    assert torch.equal(model(x), expected)
    assert list(weight_graphs(model)) == ["1.weight"]
    model[0](x).sum().backward()
    sparsify(model, 0.5, skip="1")
    assert torch.equal(model(x), expected)


def test_a_weight_can_be_assigned():
    layer = nn.Linear(3, 2)
    sparsify(layer, 0.5)
    layer.weight = torch.tensor([[1.0, 2, 3], [-4, -5, 0]])
    assert layer.weight.tolist() == [[0, 0, 3], [-4, -5, 0]]

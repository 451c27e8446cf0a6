"""Dense checkpoints for sparse models and back, optimisers, pickles."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from pairs import rest_is_slow
from torch import nn
from torchvision.models import resnet18, resnet50, vit_b_16
from torchvision.models.vision_transformer import VisionTransformer

from dnw_graph import InputError, NeuralGraph
from dnw_graph.ranking import rankings
from dnw_graph.sparse_layers import dense_state_dict, densify, load_optimizer_state, sparsify, weight_graphs


def small_vit():
    model = VisionTransformer(
        image_size=8, patch_size=4, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=10
    )
    nn.init.normal_(model.heads.head.weight)  # torchvision starts from zeros
    return model


def saved(state):
    """The state as it comes back from a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("make", rest_is_slow([small_vit, resnet18]))
@pytest.mark.parametrize("wiring", ["dnw", "random_graph", "l1_anneal"])
def test_a_dense_checkpoint_loads_and_comes_back(make, wiring):
    dense, model = make(), make()
    table = sparsify(model, 0.2, wiring)
    state = saved(dense.state_dict())
    assert model.load_state_dict(state).missing_keys == []
    back = dense_state_dict(model, keep_hallucinated=True)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], value) for name, value in state.items())
    effective = dense_state_dict(model)
    dense.load_state_dict(effective)
    kept = {"dnw": table.kept, "random_graph": table.kept, "l1_anneal": table.weights}[wiring]
    names = {row.name.removesuffix(".q").removesuffix(".k").removesuffix(".v") for row in table.sparse}
    assert sum(int(effective[name].count_nonzero()) for name in names) <= kept
    image = torch.randn(1, 3, 8, 8) if make is small_vit else torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(dense.eval()(image), model.eval()(image))


@pytest.mark.slow
@pytest.mark.parametrize("make", [resnet50, pytest.param(vit_b_16, marks=pytest.mark.slow)])
def test_the_names_are_those_of_torchvision(make):
    with torch.device("meta"):
        names = list(make().state_dict())
    model = make()
    sparsify(model, 0.1)
    state = dense_state_dict(model)
    assert sorted(state) == sorted(names)
    missing, unexpected = model.load_state_dict(state)
    assert not missing
    assert not unexpected


def test_a_sparse_checkpoint_restores_weights_and_rule():
    model, other = small_vit(), small_vit()
    for each in (model, other):
        sparsify(each, 0.3, "random_graph")
    image = torch.randn(1, 3, 8, 8)
    assert not torch.equal(model.eval()(image), other.eval()(image))
    other.load_state_dict(saved(model.state_dict()))
    assert torch.equal(model(image), other(image))


@pytest.mark.parametrize("wiring", ["dnw", "random_graph", "rigl", "str"])
def test_a_distributed_checkpoint_restores_weights_and_rule(wiring, tmp_path):
    checkpoints = pytest.importorskip("torch.distributed.checkpoint")
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        graph = NeuralGraph((8, 6, 4), 20, wiring="dnw" if wiring == "str" else wiring)
        model = nn.ModuleList([small_vit(), graph])
        sparsify(model[0], None if wiring == "str" else 0.3, wiring)
        models.append(model)
    for _, each in rankings(models[0]):
        each.wiring.step = 3
    checkpoints.save(get_model_state_dict(models[0]), checkpoint_id=tmp_path, no_dist=True)
    state = get_model_state_dict(models[1])
    checkpoints.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_model_state_dict(models[1], state)
    found = [model.state_dict() for model in models]
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
    image = torch.randn(1, 3, 8, 8)
    assert torch.equal(*(model[0].eval()(image) for model in models))


def test_missing_and_unexpected_keys_are_still_found():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    state = model.state_dict()
    sparsify(model, 0.5)
    del state["0.weight"]
    state["2.weight"] = torch.zeros(1)
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(state)
    assert "0.parametrizations.weight.original" in str(error.value)
    assert '"2.weight"' in str(error.value)


def test_nothing_sparse():
    with pytest.raises(InputError, match="no sparse weight"):
        dense_state_dict(nn.Linear(2, 2))


def test_a_layer_under_two_names():
    layer = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": layer, "b": layer, "c": nn.Linear(3, 3)})
    names = set(model.state_dict())
    table = sparsify(model, 0.5)
    assert [row.name for row in table.sparse] == ["a.weight", "c.weight"]
    assert set(dense_state_dict(model)) == names
    densify(model)
    assert set(model.state_dict()) == names


def step(model, optimiser, x, y):
    optimiser.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimiser.step()


X, Y = torch.rand(8, 6, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 4


def make_mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def groups(model):
    """Weight decay for matrices only, each group in the order of the model."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 1e-2},
        {"params": [p for p in parameters if p.dim() == 1]},
    ]


MAKE = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
    "adam": lambda model: torch.optim.Adam(model.parameters(), 0.01),
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters(), 0.01),
    "groups": lambda model: torch.optim.SGD(groups(model), 0.1, momentum=0.9),
    "named": lambda model: torch.optim.AdamW(model.named_parameters(), 0.01),
    "reversed": lambda model: torch.optim.AdamW(reversed(list(model.named_parameters())), 0.01),
}


# Only names say in which order the optimiser of a sparse model had its parameters.
@pytest.mark.parametrize(("make", "back"), [*((name, False) for name in MAKE), ("named", True), ("reversed", True)])
def test_the_state_of_an_earlier_optimiser(make, back):
    """A run whose optimiser is made anew and loaded goes on exactly as one that keeps its optimiser."""
    kept = make_mlp()
    if back:
        sparsify(kept, 0.3)
    optimiser = MAKE[make](kept)
    step(kept, optimiser, X, Y)
    state, loaded = saved(optimiser.state_dict()), copy.deepcopy(kept)
    for model in (kept, loaded):
        densify(model) if back else sparsify(model, 0.3)
    other = MAKE[make](loaded)
    load_optimizer_state(other, state, loaded)
    for _ in range(3):
        step(kept, optimiser, X, Y)
        step(loaded, other, X, Y)
    assert not torch.equal(loaded.state_dict()["0.bias"], make_mlp()[0].bias)
    for name, value in kept.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_a_plain_load_would_mix_up_the_state():
    """Why :func:`load_optimizer_state` exists: a sparse layer lists its bias first."""
    model = make_mlp()
    optimiser = MAKE["sgd"](model)
    step(model, optimiser, X, Y)
    state = optimiser.state_dict()
    sparsify(model, 0.3)
    other = MAKE["sgd"](model)
    other.load_state_dict(state)
    shapes = [other.state[p]["momentum_buffer"].shape == p.shape for p in model.parameters()]
    assert not any(shapes)


@pytest.mark.parametrize("other", [nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm])
def test_names_of_other_parametrizations_stay(other):
    def make():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), other(nn.Linear(8, 4)))

    def make_optimiser(model):
        return torch.optim.SGD(model.named_parameters(), 0.1, momentum=0.9)

    kept = make()
    optimiser = make_optimiser(kept)
    step(kept, optimiser, X, Y)
    state, loaded = saved(optimiser.state_dict()), copy.deepcopy(kept)
    for model in (kept, loaded):
        sparsify(model, 0.3, skip="2")
    new = make_optimiser(loaded)
    load_optimizer_state(new, state, loaded)
    for _ in range(2):
        step(kept, optimiser, X, Y)
        step(loaded, new, X, Y)
    for name, value in kept.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def grow(model):
    return torch.optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(2))], 0.1)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (MAKE["groups"], MAKE["sgd"], "has 1 groups of parameters, the state has 2"),
        (lambda model: torch.optim.SGD(model[0].parameters(), 0.1, momentum=0.9), MAKE["sgd"], "group 0"),
        (MAKE["sgd"], grow, "parameters that the module lacks"),
        (
            lambda model: torch.optim.SGD(list(model.parameters())[::-1], 0.1, momentum=0.9),
            MAKE["sgd"],
            "momentum_buffer of 0.bias has shape \\[4, 8\\], the parameter \\[8\\]",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused(old, new, message):
    model = make_mlp()
    optimiser = old(model)
    step(model, optimiser, X, Y)
    sparsify(model, 0.3)
    other = new(model)
    with pytest.raises(InputError, match=message):
        load_optimizer_state(other, optimiser.state_dict(), model)
    assert not other.state


@pytest.mark.parametrize("nested", [False, True])
def test_pickling_is_refused_and_says_what_to_do(nested):
    model = nn.Linear(3, 4)
    model = nn.Sequential(model) if nested else model
    sparsify(model, 0.5)
    for write in (pickle.dumps, lambda each: torch.save(each, io.BytesIO())):
        with pytest.raises(InputError, match=r"cannot be pickled .*: save its state_dict\(\), or densify"):
            write(model)
    densify(model)
    torch.save(model, io.BytesIO())


def test_weights_move_with_the_module():
    model = make_mlp()
    sparsify(model, 0.3, "random_graph")
    model = model.eval().double()
    assert model(X.double()).dtype == torch.float64
    assert model[0].weight.dtype == torch.float64
    assert int(model[0].weight.count_nonzero()) == weight_graphs(model)["0.weight"].num_edges


def test_a_dense_state_has_plain_tensors_that_can_be_changed():
    def sparse():
        model = nn.Sequential(nn.Linear(8, 4))
        sparsify(model, 0.5)
        return model

    state, other = dense_state_dict(sparse()), dense_state_dict(sparse())
    expected = state["0.weight"] + other["0.weight"]
    for name, value in other.items():
        assert type(value) is torch.Tensor
        state[name] += value
    dense = nn.Sequential(nn.Linear(8, 4))
    dense.load_state_dict(state, assign=True)
    assert torch.equal(dense[0].weight, expected)
    optimiser = torch.optim.SGD(dense.parameters(), 0.1)
    dense(torch.randn(2, 8)).sum().backward()
    optimiser.step()
    assert not torch.equal(dense[0].weight, expected)

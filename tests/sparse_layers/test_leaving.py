"""Layers leave the ranking that they share with others: replaced, or made dense."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from dnw_graph import NM, InputError, compact
from dnw_graph.sparse_layers import densify, sparsify, weight_graphs
from dnw_graph.usual import keeps_methods

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
LEFT = pytest.mark.filterwarnings("ignore:.* left the ranking of all layers")


def make(wiring="random_graph"):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
    sparsify(model, 0.4, wiring, distribution="global")
    return model.eval()


def numbers(model):
    return [int(layer.weight.count_nonzero()) for layer in model if isinstance(layer, nn.Linear)]


@pytest.mark.parametrize("wiring", ["dnw", "random_graph", "set"])
@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_layer_that_is_replaced_leaves_the_others_their_edges(wiring, place):
    model = make(wiring)
    model(X)
    before = numbers(model)
    old, shape = model[place], model[place].parametrizations.weight.original.shape
    kept = [model[each].weight.detach() for each in (0, 2, 4)]
    model[place] = nn.Linear(shape[1], shape[0])
    stay = sum(before) - before[place // 2]
    sizes = 48 + 32 + 12 - shape.numel()
    message = (
        rf"^{place}\.weight left the ranking of all layers: of the {sizes} weights that stay in it {stay} are real$"
    )
    with pytest.warns(UserWarning, match=message):
        model(X)
    (graph,) = set(weight_graphs(model).values())
    assert (graph.num_candidates, graph.num_edges, graph.num_real_edges) == (sizes, stay, stay)
    for each, weight in zip((0, 2, 4), kept, strict=True):
        torch.testing.assert_close((old if each == place else model[each]).weight, weight)
    torch.testing.assert_close(old(torch.eye(shape[1])), kept[place // 2].T + old.bias)


@LEFT
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("wiring", ["dnw", "random_graph", "set"])
def test_the_edges_of_the_rest_are_saved_and_loaded(wiring, called):
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(make(wiring))
        models[-1][0] = nn.Linear(6, 8)
    first, second = models
    if called:
        first(X)
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second(X), first(X))
    assert numbers(second) == numbers(first)


@LEFT
def test_what_is_left_becomes_dense_and_compact():
    model = make()
    model[4] = nn.Linear(4, 7)
    expected = model(X).detach()
    torch.testing.assert_close(compact(model)(X), expected)
    densify(model)
    torch.testing.assert_close(model(X), expected)
    assert [name for name, _ in model.named_parameters()] == [
        f"{i}.{name}" for i in (0, 2, 4) for name in ("weight", "bias")
    ]
    sparsify(model, 0.3, distribution="global")


@pytest.mark.parametrize(
    ("layer", "wiring", "reason"),
    [
        (nn.Linear(64, 64).half(), "nm", "device= cpu is not supported"),
        (nn.Linear(64, 64), "nm", "no linear layer in float16 or bfloat16 has wiring='nm' with 2 of 4"),
        (nn.Linear(64, 64).half(), NM(1, 4), "no linear layer in float16 or bfloat16 has wiring='nm' with 2 of 4"),
        (nn.Conv2d(64, 64, 1).half(), "nm", "no linear layer in float16 or bfloat16 has wiring='nm' with 2 of 4"),
    ],
)
def test_what_cannot_become_semi_structured_is_refused_and_stays_sparse(layer, wiring, reason):
    model = nn.Sequential(layer)
    sparsify(model, wiring=wiring)
    with pytest.raises(InputError, match=f"no weight can become semi-structured: .*{reason}"):
        densify(model, semi_structured=True)
    assert [*weight_graphs(model)] == ["0.weight"]


@LEFT
@pytest.mark.parametrize("wiring", ["dnw", "set"])
def test_a_part_becomes_dense_and_the_rest_trains_on(wiring):
    model = make(wiring)
    expected, before = model(X).detach(), numbers(model)
    densify(model[2])
    torch.testing.assert_close(model(X), expected)
    assert numbers(model) == before
    model.train()(X).square().sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    after = numbers(model.eval())
    assert after[0] + after[2] == before[0] + before[2]


@LEFT
def test_a_copy_leaves_by_itself():
    model = make()
    twin = copy.deepcopy(model)
    twin[0] = nn.Linear(6, 8)
    twin(X)
    model(X)
    assert next(iter(weight_graphs(model).values())).num_candidates == 92
    assert next(iter(weight_graphs(twin).values())).num_candidates == 44


@LEFT
@pytest.mark.parametrize("wiring", ["dnw", "random_graph"])
def test_a_layer_without_a_real_weight_may_leave(wiring):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    sparsify(model, 0.2, wiring, distribution="global")
    assert numbers(model.eval())[0] == 0
    expected = model(X).detach()
    densify(model[0])
    torch.testing.assert_close(model(X), expected)


@pytest.mark.parametrize("place", [0, 1])
def test_a_layer_with_a_ranking_of_its_own_is_let_go(place):
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8)), nn.Linear(8, 3))
    sparsify(model, 0.4, "random_graph")
    layer, kind = weakref.ref(model[0][place]), weakref.ref(type(model[0][place]))
    assert keeps_methods(model[0][place])
    model[0][place] = nn.Linear(model[0][place].in_features, 8)
    model(X)
    gc.collect()
    assert (layer(), kind()) == (None, None)

"""Edges in a state dict are those of the graph, or nothing is loaded."""

import copy
import hashlib

import pytest
import torch
from torch import nn

from dnw_graph import InputError, L1Anneal, NeuralGraph, RandomGraph, SparseMomentum, TargetedDropout, TopKAST
from dnw_graph.ranking import rankings, rule_hash
from dnw_graph.sparse_layers import sparsify, weight_graphs
from dnw_graph.wirings import WIRINGS, Fixed

LAYER = "0.parametrizations.weight.0.owned.0.wiring."


def graph(wiring="random_graph", k=11):
    return NeuralGraph((3, 5, 4), k, wiring=wiring, name="stage3")


def layers(wiring="random_graph", **options):
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    sparsify(model, 0.4, wiring, **options)
    return model


def fixed():
    return graph(Fixed(graph().edge_index))


# The module, the place of its edges in its state, their names in messages, and the number of candidates.
KEEPERS = {
    "random graph": (graph, "wiring.index", "stage3: wiring.index", 47),
    "fixed": (fixed, "wiring.index", "stage3: wiring.index", 47),
    "lottery ticket": (lambda: graph("lottery_ticket"), "wiring.index", "stage3: wiring.index", 47),
    "within a model": (lambda: nn.Sequential(nn.ReLU(), graph()), "1.wiring.index", "stage3: wiring.index", 47),
    "layer": (layers, LAYER + "index", "0.weight: wiring.index", 48),
    "layers with one budget": (lambda: layers(distribution="global"), LAYER + "index", "all layers: wiring.index", 60),
}


def put(index, place, *values):
    index = index.clone()
    index[place : place + len(values)] = torch.tensor(values)
    return index


WRONG = {
    "reversed": lambda index, n: index.flip(0),
    "two exchanged": lambda index, n: put(index, 3, index[4], index[3]),
    "one twice": lambda index, n: put(index, 3, index[4]),
    "one past the end": lambda index, n: put(index, len(index) - 1, n),
    "negative": lambda index, n: put(index, 0, -1),
    "negative throughout": lambda index, n: index - n,
    "of another k": lambda index, n: index[:-1],
    "of another shape": lambda index, n: index[None],
    "int32": lambda index, n: index.int(),
    "float": lambda index, n: index.float(),
    "bool": lambda index, n: index.bool(),
    "no tensor": lambda index, n: index.tolist(),
}


@pytest.mark.parametrize(("strict", "assign"), [(True, False), (False, True)])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("kind", KEEPERS)
def test_wrong_edges_are_refused_and_nothing_is_changed(kind, wrong, strict, assign):
    make, key, name, candidates = KEEPERS[kind]
    model, other = make(), make()
    state = other.state_dict()
    del state[key.replace("index", "checksum")]  # as in a file from before there was one
    edges = torch.arange(candidates)[:: candidates // len(state[key])][: len(state[key])]
    state[key] = WRONG[wrong](edges, candidates)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=f"^{name} must be ") as error:
        model.load_state_dict(state, strict=strict, assign=assign)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    found = model.state_dict()
    assert all(torch.equal(value, before[each]) for each, value in found.items())
    state[key] = edges
    model.load_state_dict(state, strict=strict, assign=assign)
    assert torch.equal(model.state_dict()[key], edges)


def test_edges_alone_are_checked_and_a_state_without_them_is_loaded():
    model = graph()
    with pytest.raises(InputError, match="11 edges"):
        model.load_state_dict({"wiring.index": torch.arange(10)}, strict=False)
    weights = {"candidates.weight": torch.zeros(47)}
    model.load_state_dict(weights, strict=False)
    assert torch.equal(model.candidates.weight, torch.zeros(47))


def test_the_message_says_what_is_wrong():
    index = torch.tensor([0, 1, 1, 5, 3, 6, 7, 8, 9, 47, -2])
    expected = "distinct candidates in 0 … 46, ascending; got 2 outside, 1 repeated, 2 out of order"
    with pytest.raises(InputError, match=expected):
        graph().load_state_dict({"wiring.index": index}, strict=False)


def test_the_graph_of_a_sparse_layer_by_itself():
    (each, *_) = weight_graphs(layers()).values()
    with pytest.raises(InputError, match=r"^0\.weight: wiring\.index"):
        each.load_state_dict({"wiring.index": each.real_index.flip(0)})


def test_edges_that_are_not_known_yet():
    waiting, other = graph("lottery_ticket"), graph("lottery_ticket")
    waiting.load_state_dict(other.state_dict())
    with pytest.raises(InputError, match="needs a trained complete graph"):
        waiting.edge_index  # noqa: B018
    half = {"wiring.index": torch.tensor([-1] * 10 + [3])}
    with pytest.raises(InputError, match="10 outside"):
        waiting.load_state_dict(half, strict=False)


def test_a_state_without_values():
    with torch.device("meta"):
        state = graph("dnw").state_dict() | {"wiring.index": torch.empty(11, dtype=torch.long)}
    graph().load_state_dict({"wiring.index": state["wiring.index"]}, strict=False, assign=True)


MASKS = {
    "annealed": (lambda: graph(L1Anneal()), "wiring.real", 47, 1, 47),
    "annealed of a layer": (lambda: layers(L1Anneal()), LAYER + "real", 48, 1, 48),
    "kept": (lambda: layers(SparseMomentum()), LAYER + "real", 48, 1, 48),
    "kept of a graph": (lambda: graph(SparseMomentum()), "wiring.real", 47, 1, 47),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind):
    make, key, candidates, fewest, most = MASKS[kind]
    model = make()

    def mask(count):
        return torch.arange(candidates) < count

    for count in (fewest, most):
        model.load_state_dict({key: mask(count)}, strict=False)
        assert int(model.state_dict()[key].sum()) == count
    wrong = [mask(most).int(), mask(most).float(), mask(most)[:-1], mask(most)[None], mask(0)[:0]]
    wrong += [mask(most + 1)] * (most < candidates) + [mask(fewest - 1)] * (fewest > 0)
    for each in wrong:
        with pytest.raises(InputError, match=r"wiring\.real must"):
            model.load_state_dict({key: each}, strict=False)
        assert int(model.state_dict()[key].sum()) == most


def test_a_mask_of_truth_values_without_a_checksum_is_loaded():
    model, other = graph(SparseMomentum()), graph(SparseMomentum())
    state = other.state_dict()
    del state["wiring.checksum"]
    model.load_state_dict({**state, "wiring.real": state["wiring.real"].bool()})
    assert model.eval().real_index.tolist() == other.real_index.tolist()
    assert model.state_dict()["wiring.real"].dtype == torch.uint8


@pytest.mark.parametrize("key", ["wiring.step", "wiring.num_steps", "wiring.seed"])
@pytest.mark.parametrize(
    "value", [torch.tensor(-1), torch.tensor(1.5), torch.tensor([1]), torch.tensor(True), 3, torch.tensor(1).int()]
)
def test_numbers_of_steps(key, value):
    model = graph(TargetedDropout())
    model.load_state_dict({key: torch.tensor(5)}, strict=False)
    with pytest.raises(InputError, match=f"^stage3: {key} must be"):
        model.load_state_dict({key: value}, strict=False)
    assert model.state_dict()[key] == 5


def test_a_rule_of_ones_own():
    class Own(RandomGraph):
        def check_saved(self, saved, num_candidates, num_edges, name):
            assert saved.keys() == {"index"}
            assert (num_candidates, num_edges) == (47, 11)
            raise InputError(f"{name} says no")

    with pytest.raises(InputError, match=r"^stage3 says no"):
        graph(Own()).load_state_dict({"wiring.index": graph().wiring.index}, strict=False)


class Stored(RandomGraph):
    """A rule of one's own."""


@pytest.mark.parametrize("names", [((), ("mine",)), (("mine",), ()), (("mine",), ("other",))])
def test_a_rule_is_the_same_registered_or_not(names, monkeypatch):
    states = []
    for registered in names:
        with monkeypatch.context() as patch:
            for name in registered:
                patch.setitem(WIRINGS, name, Stored)
            model = graph(Stored())
            states.append(model.state_dict())
            model.load_state_dict(states[0])
    assert torch.equal(model.wiring.index, states[0]["wiring.index"])
    with pytest.raises(InputError, match="chosen by 'random_graph', not by"):
        model.load_state_dict(graph().state_dict())


def digest(name):
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


def test_a_rule_of_a_script_goes_by_its_registered_name(monkeypatch):
    monkeypatch.setattr(Stored, "__module__", "__main__")
    monkeypatch.setitem(WIRINGS, "mine", Stored)
    state = graph("mine").state_dict()
    monkeypatch.setattr(Stored, "__module__", "package")
    graph("mine").load_state_dict(state)


def test_a_longer_identifier_of_the_same_rule_is_loaded():
    model, state = graph(), graph().state_dict()
    state["rule"] = torch.tensor(digest("random_graph"))
    model.load_state_dict(state)
    own, path = graph(Stored()), f"{Stored.__module__}.Stored"
    own.load_state_dict({**state, "rule": torch.tensor(digest(path))})
    with pytest.raises(InputError, match="chosen by 'random_graph', not by"):
        own.load_state_dict(state)


def test_an_average_in_float32_keeps_the_rule():
    models = [graph() for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    states = [model.state_dict() for model in models]
    soup = {name: (sum(s[name].float() for s in states) / 3).to(value.dtype) for name, value in states[0].items()}
    models[0].load_state_dict(soup)
    assert models[0].eval().real_index.tolist() == models[1].real_index.tolist()
    hashes = [rule_hash(rule) for rule in WIRINGS.values()]
    assert len(set(hashes)) == len(hashes)
    assert max(hashes) < 2**20


@pytest.mark.parametrize("other", ["dnw", "no_update", "complete"])
@pytest.mark.parametrize("counting", [TopKAST(), TargetedDropout()])
def test_another_rule_is_loaded_where_no_saved_state_decides_the_edges(counting, other):
    for make in (graph, layers):
        counts, plain = make(counting), make(other)
        for _, each in rankings(counts):
            each.wiring.step, each.wiring.seed = 3, 5
        state = counts.state_dict()
        plain.load_state_dict(state)
        assert all(torch.equal(value, state[name]) for name, value in plain.named_parameters())
        counts.load_state_dict(make(other).state_dict())
        assert {(each.wiring.step, each.wiring.seed) for _, each in rankings(counts)} == {(3, 5)}

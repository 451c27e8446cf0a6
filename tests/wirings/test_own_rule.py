"""A user's own rule: a short subclass, without touching the package."""

import pytest
import torch
from reference import top_k

from dnw_graph import (
    InputError,
    NeuralGraph,
    NoUpdate,
    RandomGraph,
    RigL,
    Wiring,
    attach,
    create_wiring,
    register_wiring,
)
from dnw_graph.wirings import WIRINGS, wiring_name


class StrongestPositive(Wiring):
    def choose(self, view):
        return view.weight.topk(view.k).indices.sort().values


class OneEdgeLess(Wiring):
    """Keeps state: the number of choices; gives only real edges a gradient."""

    gradient = "real"

    def setup(self, view):
        self.register_buffer("count", torch.tensor(0))

    def choose(self, view):
        self.count += 1
        return torch.arange(view.k - 1)


@pytest.mark.parametrize("propagation", ["block", "message_passing"])
def test_own_rule_chooses_the_edges(propagation):
    graph = NeuralGraph((3, 4, 2), 6, wiring=StrongestPositive(), propagation=propagation)
    x = torch.rand(2, 3, 5, 5)
    (graph(x) ** 2).sum().backward()
    weights = graph.candidates.weight.tolist()
    assert graph.real_index.tolist() == sorted(sorted(range(26), key=lambda i: -weights[i])[:6])
    assert graph.real_index.tolist() != top_k(weights, 6)
    assert (graph.edge_weight > 0).all()


@pytest.mark.parametrize("propagation", ["block", "message_passing"])
def test_own_rule_may_choose_fewer_edges_and_keep_state(propagation):
    graph = NeuralGraph((3, 4, 2), 6, wiring=OneEdgeLess(), propagation=propagation)
    (graph(torch.rand(2, 3, 5, 5)) ** 2).sum().backward()
    assert (graph.candidates.weight.grad[5:] == 0).all()
    assert graph.state_dict()["wiring.count"] == 1


class Doubled(RigL):
    """The same edges as those of RigL."""

    def scores(self, view):
        return super().scores(view) * 2


def test_own_scores_may_be_a_function_of_the_gradient():
    sets = []
    for rule in (RigL, Doubled):
        torch.manual_seed(0)
        graph = NeuralGraph((3, 4, 2), 6, wiring=rule(0.5, 2, 9))
        optimiser = torch.optim.SGD(graph.parameters(), 0.1)
        attach(graph, optimiser)
        sets.append([graph.real_index.tolist()])
        for _ in range(6):
            optimiser.zero_grad()
            (graph(torch.rand(2, 3, 5, 5)) ** 2).sum().backward()
            optimiser.step()
            sets[-1].append(graph.real_index.tolist())
    assert sets[0] == sets[1]
    assert len({str(edges) for edges in sets[0]}) > 1


class Wider(Wiring):
    """Trains with one edge more than it evaluates with."""

    trained = "real"

    def choose(self, view):
        return torch.arange(view.k)

    def choose_to_train(self, view):
        return torch.arange(view.k + 1)


class WiderOwn(Wider):
    trained = "own"

    def trained_edges(self, view):
        return self.choose_to_train(view)


def test_a_rule_with_other_edges_in_training_says_which_are_trained():
    message = r"graph: Wider has choose_to_train, so trained = 'real' is ambiguous: set trained = 'own' and"
    with pytest.raises(InputError, match=message) as error:
        NeuralGraph((3, 4, 2), 6, wiring=Wider())
    assert "\n" not in str(error.value)
    graph = NeuralGraph((3, 4, 2), 25, wiring=WiderOwn())
    before = graph.candidates.weight.detach().clone()
    optimiser = torch.optim.SGD(graph.parameters(), 0.1)
    attach(graph, optimiser)
    (graph(torch.rand(2, 3, 5, 5)) ** 2).sum().backward()
    moved = graph.candidates.weight.grad.ne(0)
    optimiser.step()
    assert moved[25]
    assert torch.equal(graph.candidates.weight.ne(before), moved)


class FrozenRandomGraph(RandomGraph):
    trained = "real"


def test_constant_edges_may_be_all_that_is_trained():
    graph = NeuralGraph((3, 4, 2), 6, wiring=FrozenRandomGraph())
    before, real = graph.candidates.weight.detach().clone(), graph.real_index
    optimiser = torch.optim.SGD(graph.parameters(), 0.1, weight_decay=0.1)
    attach(graph, optimiser)
    (graph(torch.rand(2, 3, 5, 5)) ** 2).sum().backward()
    optimiser.step()
    assert graph.candidates.weight.ne(before).nonzero().flatten().tolist() == real.tolist()


@pytest.mark.parametrize("wiring", [None, 3, StrongestPositive])
def test_what_is_no_rule_is_refused(wiring, unchecked):
    with pytest.raises(InputError, match="wiring must be a string or a Wiring; got"):
        NeuralGraph((3, 4), 2, wiring=wiring)


def test_a_rule_goes_by_its_class_path_or_by_a_name_that_it_was_given():
    path = "dnw_graph.wirings.no_update.NoUpdate"
    assert type(create_wiring(path)) is NoUpdate
    assert type(NeuralGraph((3, 4), 2, wiring=path).wiring) is NoUpdate
    with pytest.raises(InputError, match="has no options; got 'k'"):
        create_wiring(path, k=3)
    register_wiring("strongest_positive", StrongestPositive)
    try:
        register_wiring("strongest_positive", StrongestPositive)
        graph = NeuralGraph((3, 4), 2, wiring="strongest_positive")
        assert (graph.edge_weight > 0).all()
        assert wiring_name(StrongestPositive) == "strongest_positive"
        with pytest.raises(InputError, match="'strongest_positive' is StrongestPositive already"):
            register_wiring("strongest_positive", OneEdgeLess)
        for name in ("", " ", "two\nlines"):
            with pytest.raises(InputError, match="name must be a name on one line"):
                register_wiring(name, OneEdgeLess)
        with pytest.raises(InputError, match="did you mean 'strongest_positive'"):
            create_wiring("strongest_positiv")
    finally:
        del WIRINGS["strongest_positive"]
    assert wiring_name(StrongestPositive) == f"{StrongestPositive.__module__}.StrongestPositive"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("dnw_graph.wirings.dnw.DNV", r"did you mean .*'dnw_graph\.wirings\.dnw\.DNW'"),
        ("collections.Ordered", "unknown wiring 'collections.Ordered': known are 'ac_dc'"),
        (".foo.Bar", r"wiring '\.foo\.Bar' cannot be imported as package\.module\.Class: .* relative"),
        ("no_such_package.Rule", "cannot be imported as package.module.Class: No module named"),
        ("collections.OrderedDict", "is not a subclass of dnw_graph.Wiring"),
    ],
)
def test_what_a_path_does_not_lead_to_is_said(path, message):
    with pytest.raises(InputError, match=message) as error:
        create_wiring(path)
    assert "\n" not in str(error.value)


class Returns(Wiring):
    def __init__(self, chosen):
        super().__init__()
        self.chosen = chosen

    def choose(self, view):
        return self.chosen(view.weight)


@pytest.mark.parametrize("make", [create_wiring, lambda name: NeuralGraph((3, 4), 2, wiring=name)])
def test_a_required_option_is_asked_for(make):
    path = f"{Returns.__module__}.Returns"
    with pytest.raises(InputError, match=f"^wiring '{path}' needs the option 'chosen', .*: use create_wiring") as error:
        make(path)
    assert "\n" not in str(error.value)
    assert create_wiring(path, chosen=len).chosen is len


WRONG = {
    "descending": (lambda w: torch.tensor([7, 3, 1]), "0 outside, 0 repeated, 2 out of order"),
    "repeated": (lambda w: torch.tensor([1, 3, 3, 7]), "0 outside, 1 repeated, 0 out of order"),
    "negative": (lambda w: torch.arange(4) - 1, "1 outside, 0 repeated, 0 out of order"),
    "too large": (lambda w: torch.tensor([1, 26]), "1 outside, 0 repeated, 0 out of order"),
    "mask": (lambda w: w > 0, r"a tensor of bool \[26\]"),
    "int32": (lambda w: torch.arange(3, dtype=torch.int32), r"a tensor of int32 \[3\]"),
    "matrix": (lambda w: torch.arange(4).view(2, 2), r"a tensor of int64 \[2, 2\]"),
    "list": (lambda w: [1, 3, 7], r"\[1, 3, 7\]"),
    "nothing": (lambda w: None, "None"),
}


@pytest.mark.parametrize("use", ["train", "eval", "update_wiring", "real_index"])
@pytest.mark.parametrize("kind", WRONG)
def test_anything_but_ascending_indices_is_refused(kind, use, unchecked):
    chosen, found = WRONG[kind]
    graph = NeuralGraph((3, 4, 2), 6, wiring=Returns(chosen), name="stage3").train(use != "eval")
    expected = r"^stage3: the choice of Returns must be an int64 vector of distinct candidates in 0 … 25, ascending; "
    with pytest.raises(InputError, match=f"{expected}got {found}:"):
        {"update_wiring": graph.update_wiring, "real_index": lambda: graph.real_index}.get(
            use, lambda: graph(torch.rand(20, 3, 5, 5))
        )()


class Trains(Returns):
    trained = "own"

    def choose(self, view):
        return torch.arange(view.k)

    def trained_edges(self, view):
        return self.chosen(view.weight)


@pytest.mark.parametrize("use", ["train", "eval", "step"])
@pytest.mark.parametrize("kind", WRONG)
def test_trained_edges_that_are_not_ascending_indices_are_refused(kind, use, unchecked):
    chosen, found = WRONG[kind]
    graph = NeuralGraph((3, 4, 2), 6, wiring=Trains(chosen), name="stage3").train(use != "eval")
    optimizer = torch.optim.SGD(graph.parameters(), 0.1)
    attach(graph, optimizer)
    expected = (
        r"^stage3: the trained edges of Trains must be an int64 vector of distinct candidates in 0 … 25, ascending; "
    )
    with pytest.raises(InputError, match=f"{expected}got {found}:"):
        optimizer.step() if use == "step" else graph(torch.rand(20, 3, 5, 5))


@pytest.mark.parametrize("edges", [[], [0], [25], [0, 25], list(range(26))])
def test_any_ascending_indices_will_do(edges):
    graph = NeuralGraph((3, 4, 2), 6, wiring=Returns(lambda w: torch.tensor(edges, dtype=torch.long)))
    assert graph(torch.rand(20, 3, 5, 5)).shape == (20, 2, 5, 5)
    assert graph.real_index.tolist() == edges


def test_a_step_on_a_device_does_not_read_what_a_rule_of_ones_own_chose():
    rule = Returns(lambda w: torch.arange(6, device=w.device))
    graph = NeuralGraph((3, 4, 2), 6, wiring=rule, propagation="block").to("meta")  # where nothing can be read
    graph(torch.rand(2, 3, 5, 5, device="meta")).sum().backward()
    assert graph.eval()(torch.rand(2, 3, 5, 5, device="meta")).shape == (2, 2, 5, 5)


def test_on_a_device_values_are_read_where_the_host_may_wait(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)  # as on a GPU
    graph = NeuralGraph((3, 4, 2), 6, wiring=Returns(lambda w: torch.tensor([7, 3, 1])), propagation="block")
    graph(torch.rand(2, 3, 5, 5))
    for read in (lambda: graph.real_index, graph.update_wiring, lambda: graph.eval()(torch.rand(2, 3, 5, 5))):
        with pytest.raises(InputError, match="2 out of order"):
            read()

"""Averages of models whose rules keep their edges: with the set of the model, or refused by name."""

import copy

import pytest
import torch
from reference import top_k
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_avg_fn

from dnw_graph import ACDC, GMP, SET, InputError, L1Anneal, RandomGraph, RigL, Schedule, SparseMomentum, attach
from dnw_graph.sparse_layers import sparsify, weight_graphs

X = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
STEPS = 9
STORING = {
    "set": SET(every=2),
    "rigl": RigL(every=2),
    "gmp": GMP(every=2),
    "sparse_momentum": SparseMomentum(every=2),
    "ac_dc": ACDC((2, 4, 6)),
    "l1_anneal": L1Anneal(removal=Schedule(0.0, 1.0, 0, 6)),
    "random_graph": RandomGraph(),
}


class Copied:
    """An average of the parameters alone, into a copy of the model whose buffers stay what they were."""

    def __init__(self, model):
        self.module = copy.deepcopy(model)

    def update(self, model):
        for mine, other in zip(self.module.parameters(), model.parameters(), strict=True):
            mine.data.lerp_(other.data, 0.1)

    def eval(self):
        self.module.eval()
        return self

    def __call__(self, x):
        return self.module(x)


class Swapped(Copied):
    """torch_ema's: the averaged parameters take the place of the model's in evaluation."""

    def __init__(self, model):
        self.module, self.shadow = model, [parameter.detach().clone() for parameter in model.parameters()]

    def update(self, model):
        for mine, other in zip(self.shadow, model.parameters(), strict=True):
            mine.lerp_(other.detach(), 0.1)

    def eval(self):
        self.before = [parameter.detach().clone() for parameter in self.module.parameters()]
        for parameter, average in zip(self.module.parameters(), self.shadow, strict=True):
            parameter.data.copy_(average)
        return super().eval()

    def restore(self):
        for parameter, before in zip(self.module.parameters(), self.before, strict=True):
            parameter.data.copy_(before)
        self.module.train()


class OfStates(Copied):
    """timm's second version: an average of all that the state holds, written in place."""

    def update(self, model):
        for mine, other in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            mine.copy_(0.9 * mine + 0.1 * other)


def timm_average(model):
    return pytest.importorskip("timm.utils").ModelEmaV3(model, decay=0.9)


def of_buffers(**options):
    return lambda model: AveragedModel(model, use_buffers=True, **options)


COPYING = {"AveragedModel": AveragedModel, "timm": timm_average}
AVERAGING = {
    "default": of_buffers(),
    "swa": of_buffers(avg_fn=get_swa_avg_fn()),
    "ema": of_buffers(avg_fn=get_ema_avg_fn(0.9)),
    "ema of many": of_buffers(multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "states": OfStates,
}


def averaged(rule, make):
    """Return a model after training, and its average in evaluation."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))
    sparsify(model, 0.25, STORING.get(rule, rule))
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    attach(model, optimiser, num_steps=STEPS)
    average = make(model)
    update = average.update_parameters if isinstance(average, AveragedModel) else average.update
    for _ in range(STEPS):
        optimiser.zero_grad()
        model(X).square().mean().backward()
        optimiser.step()
        update(model)
    return model, average.eval()


def edges(model):
    return [graph.real_index.tolist() for graph in weight_graphs(model).values()]


@pytest.mark.parametrize("kind", [pytest.param(each, marks=[pytest.mark.slow] * (each == "timm")) for each in COPYING])
@pytest.mark.parametrize("rule", STORING)
def test_an_average_that_copies_buffers_has_the_edges_of_the_model(rule, kind):
    model, average = averaged(rule, COPYING[kind])
    average(X)
    assert edges(average.module) == edges(model)
    for mine, other in zip(weight_graphs(model).values(), weight_graphs(average.module).values(), strict=True):
        assert other.num_edges == mine.num_edges
        assert not torch.equal(other.edge_weight, mine.edge_weight)


@pytest.mark.parametrize("rule", STORING)
def test_averaged_parameters_may_take_the_place_of_the_model_s(rule):
    model, average = averaged(rule, Swapped)
    outputs, of_average = model(X), edges(model)
    average.restore()
    assert edges(model) == of_average  # these rules store them
    assert not torch.equal(model.eval()(X), outputs)


@pytest.mark.parametrize("kind", AVERAGING)
@pytest.mark.parametrize("rule", sorted(STORING.keys() - {"random_graph"}))
def test_an_average_that_averages_them_is_refused_by_name(rule, kind):
    _, average = averaged(rule, AVERAGING[kind])
    expected = r"^0\.weight: wiring\.real are not the edges that the rule stored: an average of models must copy"
    with pytest.raises(InputError, match=expected) as error:
        average(X)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("kind", ["AveragedModel", *AVERAGING])
def test_edges_that_follow_from_the_weights_are_those_of_the_averaged_ones(kind):
    _, average = averaged("dnw", {**COPYING, **AVERAGING}[kind])
    average(X)
    for graph in weight_graphs(average.module).values():
        assert graph.real_index.tolist() == top_k(graph.candidate_weight.tolist(), graph.num_edges)


@pytest.mark.parametrize("kind", AVERAGING)
def test_edges_that_stay_are_whole_in_an_average_or_refused_by_name(kind):
    model, average = averaged("random_graph", AVERAGING[kind])
    found = [graph.wiring.index.tolist() for graph in weight_graphs(average.module).values()]
    if found == edges(model):  # means of equal numbers, without rounding
        average(X)
        assert edges(average.module) == found
        return
    assert kind not in ("default", "swa")
    with pytest.raises(
        InputError, match=r"weight: wiring\.index are not the edges that the rule stored: an average of"
    ):
        average(X)


def test_edges_that_are_distinct_and_ascending_and_yet_others_are_refused():
    torch.manual_seed(0)
    model = nn.Linear(300, 400)
    sparsify(model, 0.1, "random_graph")
    (graph,) = weight_graphs(model).values()
    index = graph.eval().wiring.index
    for place in (index.diff() > 1).nonzero().flatten()[:50] + 1:
        index[place] -= 1  # as an average in float32 that is cut off
        with pytest.raises(InputError, match=r"wiring\.index are not the edges that the rule stored"):
            graph.update_wiring()
        with pytest.raises(InputError, match=r"wiring\.index are not the edges that the rule stored"):
            copy.deepcopy(model).load_state_dict(model.state_dict())
        index[place] += 1
        graph.update_wiring()

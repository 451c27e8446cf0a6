"""Averages of models whose rules keep their edges: with the set of the model, or refused by name."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from dnw_graph import ACDC, GMP, SET, InputError, L1Anneal, RigL, Schedule, SparseMomentum, attach
from dnw_graph.sparse_layers import sparsify, weight_graphs

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
STEPS = 9
RULES = {
    "set": SET(every=2),
    "rigl": RigL(every=2),
    "gmp": GMP(every=2),
    "sparse_momentum": SparseMomentum(every=2),
    "ac_dc": ACDC((2, 4, 6)),
    "l1_anneal": L1Anneal(removal=Schedule(0.0, 1.0, 0, 6)),
}


def averaged(rule, make):
    """Return a model after training, and its average in evaluation."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    sparsify(model, 0.25, RULES[rule])
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


def timm_average(model):
    return pytest.importorskip("timm.utils").ModelEmaV3(model, decay=0.9)


@pytest.mark.parametrize("make", [AveragedModel, pytest.param(timm_average, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rule", RULES)
def test_an_average_that_copies_buffers_has_the_edges_of_the_model(rule, make):
    model, average = averaged(rule, make)
    average(X)
    for mine, other in zip(weight_graphs(model).values(), weight_graphs(average.module).values(), strict=True):
        real = mine.wiring.real.nonzero().flatten().tolist()
        assert other.real_index.tolist() == real
        assert other.num_edges == mine.num_edges == len(real)
        assert not torch.equal(other.edge_weight, mine.edge_weight)


@pytest.mark.parametrize("rule", RULES)
def test_an_average_that_averages_them_is_refused(rule):
    _, average = averaged(rule, lambda model: AveragedModel(model, avg_fn=get_ema_avg_fn(0.9), use_buffers=True))
    with pytest.raises(
        InputError, match=r"0\.weight: wiring\.real holds \d+ edges instead of \d+: an average"
    ) as error:
        average(X)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500

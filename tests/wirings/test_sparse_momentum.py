"""Sparse momentum against plain loops over lists of numbers, and by hand."""

import copy
import math

import pytest
import torch
from torch import nn
from waits import Waits

from dnw_graph import InputError, NeuralGraph, Schedule, SparseMomentum, attach
from dnw_graph.sparse_layers import dense_state_dict, sparsify, weight_graphs
from dnw_graph.wirings.proportion import allot

LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 0.01
STEPS, EVERY = 24, 4


def two_layers(density=0.25, rule=None, sizes=(6, 8, 3)):
    torch.manual_seed(1)
    first, second, third = sizes
    model = nn.Sequential(nn.Linear(first, second), nn.Tanh(), nn.Linear(second, third)).double()
    sparsify(model, density=density, wiring=rule or SparseMomentum(every=EVERY))
    return model


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def batches(steps=STEPS, size=6):
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        x = torch.randn(5, size, dtype=torch.float64, generator=generator)
        yield x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x.sum(1) / 3], dim=1)


def train_step(model, optimizer, batch):
    optimizer.zero_grad()
    nn.functional.mse_loss(model(batch[0]), batch[1]).backward()
    optimizer.step()


def masks(model):
    return {name: graph.wiring.real.bool() for name, graph in weight_graphs(model).items()}


def test_the_host_waits_once_per_round():
    model = two_layers()
    attach(model, optimizer := sgd(model), STEPS)
    looks = []
    for batch in batches(2 * EVERY):
        with Waits() as waits:
            train_step(model, optimizer, batch)
        looks.append(waits.found.count("aten.nonzero.default"))
    assert looks == [0, 0, 0, 2, 2, 0, 0, 2]  # a round looks for what is not kept, the step after it for what is real
    # A copy whose edges are changed in place.
    before = {name: graph.real_index.tolist() for name, graph in weight_graphs(model).items()}
    for name, graph in weight_graphs(copy.deepcopy(model)).items():
        kept = graph.wiring.real
        assert graph.real_index.tolist() == before[name]
        kept.copy_(kept.roll(1))
        assert graph.real_index.tolist() == kept.nonzero().flatten().tolist() != before[name]


def plain_round(weights, momenta, real, rate):
    """One round on lists: the real places of each layer, new."""
    means = [sum(abs(m[i]) for i in places) / len(places) for m, places in zip(momenta, real, strict=True)]
    pruned_in_all, kept = 0, []
    for w, places in zip(weights, real, strict=True):
        drop = min(math.ceil(rate * len(places)), len(places) - 1)
        pruned_in_all += drop
        kept.append(sorted(places, key=lambda i: (-abs(w[i]), i))[: len(places) - drop])
    # Two layers: the first one's share, within what there is room for.
    room = [len(w) - len(places) for w, places in zip(weights, kept, strict=True)]
    exact = pruned_in_all * means[0] / sum(means)
    first = math.floor(exact) + (exact % 1 > 0.5)
    first = min(max(first, pruned_in_all - room[1]), room[0])
    for m, places, number in zip(momenta, kept, (first, pruned_in_all - first), strict=True):
        free = [i for i in range(len(m)) if i not in places]
        places += sorted(free, key=lambda i: (-abs(m[i]), i))[:number]
    return kept


@pytest.mark.parametrize("density", [0.25, 0.8])
@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_several_rounds_against_a_plain_loop(density, shape):
    """Weights, momenta and masks as lists of numbers; PyTorch gives the loop its dense gradients alone."""
    model = two_layers(density, SparseMomentum(Schedule(0.5, 0.0, shape=shape), EVERY))
    optimizer = sgd(model)
    attach(model, optimizer, STEPS)

    plain = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    plain.load_state_dict(dense_state_dict(model))
    matrices = [plain[0].weight, plain[2].weight]
    real = [kept.nonzero().flatten().tolist() for kept in masks(model).values()]
    momenta = [[0.0] * matrix.numel() for matrix in matrices]
    biases = [(bias, torch.zeros_like(bias)) for bias in (plain[0].bias, plain[2].bias)]
    total, moved = sum(map(len, real)), 0
    for step, (x, y) in enumerate(batches(), start=1):
        train_step(model, optimizer, (x, y))

        plain.zero_grad()
        nn.functional.mse_loss(plain(x), y).backward()
        with torch.no_grad():
            for bias, buffer in biases:
                buffer.mul_(MOMENTUM).add_(bias.grad + WEIGHT_DECAY * bias)
                bias -= LR * buffer
        weights = []
        for layer, matrix in enumerate(matrices):
            w, gradient = matrix.detach().flatten().tolist(), matrix.grad.flatten().tolist()
            momenta[layer] = [
                MOMENTUM * m + g + WEIGHT_DECAY * v for m, g, v in zip(momenta[layer], gradient, w, strict=True)
            ]
            weights.append(
                [
                    v - LR * m if i in real[layer] else 0.0
                    for i, (v, m) in enumerate(zip(w, momenta[layer], strict=True))
                ]
            )
        if step % EVERY == 0:
            t = step / STEPS
            rate = 0.5 * (1 - t) if shape == "linear" else 0.25 * (1 + math.cos(math.pi * t))
            before = [set(places) for places in real]
            real = plain_round(weights, momenta, real, 0.0 if step == STEPS else rate)
            moved += sum(len(set(places) - was) for places, was in zip(real, before, strict=True))
        with torch.no_grad():
            for layer, matrix in enumerate(matrices):
                values = [v if i in real[layer] else 0.0 for i, v in enumerate(weights[layer])]
                matrix.copy_(torch.tensor(values, dtype=torch.float64).view_as(matrix))
        found = [kept.nonzero().flatten().tolist() for kept in masks(model).values()]
        assert found == [sorted(places) for places in real]
        assert sum(map(len, found)) == total
    assert moved > 5
    assert len({len(places) for places in real}) == 2
    for name, value in dense_state_dict(model).items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-10, atol=1e-12)
    for name, buffer in zip(("0", "2"), momenta, strict=True):
        original = model.get_parameter(f"{name}.parametrizations.weight.original")
        found = optimizer.state[original]["momentum_buffer"]
        torch.testing.assert_close(found.flatten(), torch.tensor(buffer, dtype=torch.float64), msg=name)


def test_only_real_weights_are_trained_and_all_get_momentum():
    model = two_layers(0.9, SparseMomentum(every=10))  # every hidden unit has an output
    optimizer = sgd(model)
    attach(model, optimizer, 10)
    before = dense_state_dict(model)
    for batch in batches(3):
        train_step(model, optimizer, batch)
    after = dense_state_dict(model)
    for name, kept in masks(model).items():
        weight = after[name].flatten()
        assert not weight[~kept].any()
        assert (weight != before[name].flatten())[kept].all()
        original = model.get_parameter(name.replace("weight", "parametrizations.weight.original"))
        assert optimizer.state[original]["momentum_buffer"].count_nonzero() == kept.numel()


def test_a_resumed_training_is_the_unbroken_one():
    def start():
        model = two_layers()
        optimizer = sgd(model)
        attach(model, optimizer, STEPS)
        return model, optimizer

    unbroken, broken = start(), start()
    saved = None
    for step, batch in enumerate(batches()):
        train_step(unbroken[0], unbroken[1], batch)
        if step == 9:
            saved = copy.deepcopy([part.state_dict() for part in unbroken])
    for part, state in zip(broken, saved, strict=True):
        part.load_state_dict(state)
    for batch in list(batches())[10:]:
        train_step(broken[0], broken[1], batch)
    assert all(torch.equal(a, b) for a, b in zip(masks(unbroken[0]).values(), masks(broken[0]).values(), strict=True))
    states = [dense_state_dict(each[0]) for each in (unbroken, broken)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_evaluation_uses_the_weights_of_the_last_round():
    model = two_layers(rule=SparseMomentum(every=1))
    optimizer = sgd(model)
    attach(model, optimizer, 100)
    for batch in batches(6):
        train_step(model, optimizer, batch)
        x = expected = batch[0]
        for layer, kept in zip((model[0], model[2]), masks(model).values(), strict=True):
            weight = layer.parametrizations.weight.original.detach()
            expected = expected @ (weight * kept.view_as(weight)).T + layer.bias
            expected = expected.tanh() if layer is model[0] else expected
        torch.testing.assert_close(model.eval()(x), expected)
        model.train()


class Untold:
    """Stands for an attached optimiser that tells rules of no steps."""

    def steps_parameters(self, rule):
        return True


def test_convolutions_with_adam_keep_their_number():
    """Adam's momentum is m / (sqrt(v) + 1e-8), taken from the optimiser's own state."""
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 2, 3, groups=2)).double()
    sparsify(model, density=0.2, wiring=SparseMomentum(0.5, every=3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    attach(model, optimizer, 50)
    before = masks(model)
    twin = copy.deepcopy(model)
    twin_optimizer, untold = torch.optim.AdamW(twin.parameters(), lr=0.01), Untold()
    for graph in weight_graphs(twin).values():
        graph.attached(untold, graph.name)
    for _ in range(3):
        x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
        for each, own in ((model, optimizer), (twin, twin_optimizer)):
            own.zero_grad()
            each(x).square().mean().backward()
            own.step()
        for graph in weight_graphs(twin).values():  # as it must be after every step
            view = graph.view(optimizer=twin_optimizer)
            with torch.no_grad():
                view.weight.mul_(graph.wiring.real)
                view.write_back()
    weights, momenta = [], []
    for graph in weight_graphs(twin).values():
        state = twin_optimizer.state[graph.weights[0].parameter]
        momenta.append(graph.weights[0].flat(state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)).tolist())
        weights.append(graph.candidate_weight.tolist())
    real = [kept.nonzero().flatten().tolist() for kept in before.values()]
    expected = plain_round(weights, momenta, real, 0.5)
    assert [kept.nonzero().flatten().tolist() for kept in masks(model).values()] == [sorted(each) for each in expected]
    assert sum(map(len, expected)) == sum(map(len, real))
    assert any((masks(model)[name] != before[name]).any() for name in before)


def test_neural_graphs_share_their_edges():
    model = nn.Sequential(
        NeuralGraph(blocks=(4, 6, 5), num_edges=20, wiring=SparseMomentum(every=2), name="one"),
        NeuralGraph(blocks=(5, 6, 3), num_edges=12, wiring=SparseMomentum(every=2), name="two"),
    )
    optimizer = sgd(model)
    attach(model, optimizer, 20)
    before = model[0].real_index
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(3, 4, 5, 5)).square().mean().backward()
        optimizer.step()
    assert [graph.num_edges for graph in model] == [graph.num_real_edges for graph in model] != [20, 12]
    assert sum(graph.num_edges for graph in model) == 32
    assert model.state_dict()["0.num_edges"] == 20  # what was asked for
    assert not torch.equal(model[0].real_index, before)


def test_first_weights_are_random_and_keep_their_values():
    weight = nn.Linear(40, 50).weight.detach().clone()
    drawn = []
    for seed in (11, 12):
        model = nn.Sequential(nn.Linear(40, 50))
        with torch.no_grad():
            model[0].weight.copy_(weight)
        torch.manual_seed(seed)
        sparsify(model, density=0.3, wiring=SparseMomentum())
        drawn.append(masks(model)["0.weight"].view(50, 40))
        assert torch.equal(model[0].parametrizations.weight.original, weight * drawn[-1])
    assert drawn[0].sum() == drawn[1].sum() == 600
    # Two independent draws share 0.3 · 600 = 180 weights, give or take 11 (hypergeometric).
    assert 130 < (drawn[0] & drawn[1]).sum() < 230
    # The mean |w| of those chosen is that of all; the largest ones would have 1.7 times as much.
    assert weight.abs()[drawn[0]].mean() == pytest.approx(weight.abs().mean().item(), rel=0.15)


@pytest.mark.parametrize(
    ("total", "shares", "room", "expected"),
    [
        (10, [3.0, 1.0], [100, 100], [8, 2]),  # 7.5 and 2.5: the earlier layer takes the half
        (10, [1.0, 1.0, 2.0], [100, 100, 100], [3, 2, 5]),
        (10, [8.0, 1.0, 1.0], [4, 100, 100], [4, 3, 3]),
        (10, [8.0, 2.0, 1.0], [4, 4, 100], [4, 4, 2]),
        (10, [1.0, 0.0], [6, 100], [6, 4]),
        (6, [0.0, 0.0, 0.0], [1, 10, 10], [1, 3, 2]),
        (0, [1.0, 2.0], [0, 5], [0, 0]),
        (7, [1.0, 1.0], [3, 4], [3, 4]),
    ],
)
def test_what_is_pruned_goes_to_layers_in_proportion(total, shares, room, expected):
    assert allot(total, shares, [(0, each) for each in room]) == expected


def test_a_layer_never_loses_its_last_weight():
    model = two_layers(rule=SparseMomentum(1.0, every=1))
    optimizer = sgd(model)
    attach(model, optimizer, 10)
    total = sum(int(kept.sum()) for kept in masks(model).values())
    for batch in batches(6):
        train_step(model, optimizer, batch)
        counts = [int(kept.sum()) for kept in masks(model).values()]
        assert min(counts) >= 1
        assert sum(counts) == total


@pytest.mark.usefixtures("unchecked")
def test_bad_input():
    with pytest.raises(InputError, match=r"prune_rate must be a share .* got 1.5"):
        SparseMomentum(1.5)
    for value in (0, 1.5, True):
        with pytest.raises(InputError, match=f"every must be an integer( or None| >= 1)?; got {value!r}"):
            SparseMomentum(every=value)
    model = two_layers(rule=SparseMomentum())
    with pytest.raises(InputError, match=r"SGD has no momentum for 0.weight, .* give SGD momentum=0.9, or use Adam"):
        attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    half = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(InputError, match=r"2.weight is not among the parameters of the optimiser"):
        attach(model, half)
    with pytest.raises(InputError, match=r"0.weight: SparseMomentum does not know how many steps training has"):
        attach(model, sgd(model))
    with pytest.raises(InputError, match=r"0.weight: SparseMomentum does not know how many steps an epoch has"):
        attach(model, sgd(model), 2)
    attach(model, optimizer := sgd(model), 2, steps_per_epoch=1)
    before = masks(model)
    with pytest.raises(InputError, match=r"0.weight: the momentum is NaN or infinite"):
        train_step(
            model,
            optimizer,
            (torch.full((1, 6), torch.inf, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)),
        )
    assert all(torch.equal(before[name], kept) for name, kept in masks(model).items())

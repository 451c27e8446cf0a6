"""When the real weights are chosen anew, and when they must not be."""

import copy

import pytest
import torch
from counting import CountingDNW, Restless, choices, counts, swap_order
from reference import top_k
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from dnw_graph.sparse_layers import densify, sparsify, weight_graphs

X = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """Attention, a layer that is used twice, and a weight that is read without a call of its layer."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.shared = nn.Linear(4, 4)
        self.read = nn.Linear(4, 4)

    def forward(self, x):
        x = self.attention(x, x, x)[0]
        x = self.shared(self.shared(x).relu())
        return x @ self.read.weight @ self.read.weight


def make_model(wiring=None, **options):
    torch.manual_seed(2)
    model = nn.Sequential(Block(), nn.Linear(4, 4), Block())
    sparsify(model, 0.5, wiring or CountingDNW(), **options)
    return model


def assert_edges_fit_weights(model):
    for graph in weight_graphs(model).values():
        assert graph.real_index.tolist() == top_k(graph.candidate_weight.detach().flatten().tolist(), graph.num_edges)
    layer = model[1]
    assert layer.weight.flatten().nonzero().flatten().tolist() == top_k(
        layer.parametrizations.weight.original.flatten().tolist(), 8
    )


def test_once_per_call_of_a_part():
    model = make_model()
    part = weight_graphs(model[0])
    before = counts(model)
    model[0](X).sum().backward()
    changed = [a != b for a, b in zip(counts(model), before, strict=True)]
    assert sum(changed) == len(part) == 6
    assert all(graph.wiring.training_calls == 1 for graph in part.values())


def test_a_look_in_training_changes_nothing():
    model = make_model()
    model(X)
    with torch.no_grad():
        model[1].parametrizations.weight.original.copy_(swap_order(model[1].parametrizations.weight.original))
    look = model[1].weight
    assert weight_graphs(model)["1.weight"].wiring.training_calls == 1
    assert look.flatten().nonzero().flatten().tolist() == top_k(
        model[1].parametrizations.weight.original.flatten().tolist(), 8
    )


def test_a_failed_forward_pass_ends():
    model = make_model()
    with pytest.raises(AssertionError, match="embedding dimension"):
        model(torch.rand(2, 3, 5))
    assert choices(model, lambda: model(X)) == {(1, 0)}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_recomputation_sees_the_same_edges(use_reentrant, whole):
    gradients = []
    for recompute in (False, True):
        model = make_model(Restless())
        x = X.clone().requires_grad_()

        def run(part, x, recompute=recompute):
            return checkpoint(part, x, use_reentrant=use_reentrant) if recompute else part(x)

        torch.manual_seed(5)
        out = run(model, x) if whole else model[2](model[1](run(model[0], x)))
        out.square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(gradients[0]) == len(gradients[1]) > 10
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def change_in_place(weight, layer):
    with torch.no_grad():
        weight.copy_(swap_order(weight))


def assign(weight, layer):
    layer.weight = swap_order(weight)


def load(weight, layer):
    layer.load_state_dict({"weight": swap_order(weight), "bias": layer.bias})


def load_assigned(weight, layer):
    layer.load_state_dict({"weight": swap_order(weight), "bias": layer.bias}, assign=True)


@pytest.mark.parametrize(
    "change",
    [assign, load, load_assigned],
)
def test_anew_in_evaluation_after(change):
    model = make_model().eval()
    model(X)
    before = model[1].weight
    layer = model[1]
    change(layer.parametrizations.weight.original, layer)
    model(X)
    assert_edges_fit_weights(model)
    assert not torch.equal(model[1].weight, before)
    calls = counts(model)
    model(X)
    assert counts(model) == calls


@pytest.mark.parametrize("distribution", ["uniform", "global"])
@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Linear(64, 48),
        lambda: nn.Conv2d(16, 32, 3).to(memory_format=torch.channels_last),
        lambda: nn.ConvTranspose2d(32, 16, 3, groups=2),
        lambda: nn.MultiheadAttention(48, 2),
    ],
)
def test_large_layers_notice_averages_that_are_copied_in(layer, distribution):
    model = nn.ModuleList([layer(), layer()])
    sparsify(model, 0.1, distribution=distribution)
    model.eval()
    graphs = set(weight_graphs(model).values())
    for graph in graphs:
        before = graph.real_index
        for parameter in dict.fromkeys(graph.tensors()):
            parameter.data.copy_(swap_order(parameter))
        index = graph.real_index
        assert not torch.equal(index, before)
        assert torch.equal(
            graph.candidate_weight[index].abs().sort().values, graph.candidate_weight.abs().sort().values[-len(index) :]
        )


def test_gradients_per_sample():
    model = nn.Linear(4, 3)
    sparsify(model, 0.5)
    name = "parametrizations.weight.original"
    parameters = dict(model.named_parameters())

    def loss(weight, x):
        return functional_call(model, {**parameters, name: weight}, (x,)).square().sum()

    weight = parameters[name].detach()
    xs = X[0]
    gradients = vmap(grad(loss), (None, 0))(weight, xs)
    for x, gradient in zip(xs, gradients, strict=True):
        model.zero_grad()
        model(x).square().sum().backward()
        torch.testing.assert_close(gradient, parameters[name].grad)


@pytest.mark.parametrize("distribution", ["uniform", "global"])
def test_copies_have_weights_of_their_own(distribution):
    model = make_model(distribution=distribution).eval()
    expected = model(X)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), expected)
    change_in_place(twin[1].parametrizations.weight.original, None)
    changed = twin(X)
    assert not torch.equal(changed, expected)
    assert choices(model, lambda: model(X)) == set()
    assert torch.equal(model(X), expected)
    densify(twin)
    torch.testing.assert_close(twin(X), changed)
    assert torch.equal(model(X), expected)


def test_a_copy_of_a_part_trains():
    model = make_model()
    part, before = copy.deepcopy(model[0]), counts(model)
    assert choices(part, lambda: part(X).sum().backward()) == {(1, 0)}
    assert counts(model) == before


@pytest.mark.parametrize("stem", [0, 2])
def test_layers_that_share_a_ranking_train_while_one_is_in_evaluation(stem):
    """As in fine-tuning with a frozen stem: the mode of no single layer decides."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    sparsify(model, 0.25, "targeted_dropout", distribution="global")
    (graph,) = weight_graphs(model).values()
    x = torch.randn(2, 16)
    model[stem].eval()
    used = []
    for _ in range(2):
        used.append(set(model(x).square().sum().backward() or graph._chosen.index.tolist()))
    assert used[0] != used[1]  # dropped at random in every pass
    model.eval()
    expected = top_k(graph.candidate_weight.tolist(), 128)
    assert graph.real_index.tolist() == expected
    model(x)
    assert torch.cat([model[each].weight.flatten() for each in (0, 2)]).nonzero().flatten().tolist() == expected
    model.train()
    model(x)
    assert graph._chosen.index.tolist() != expected


def test_a_stem_that_stays_in_evaluation_does_not_keep_edges_of_training():
    class Stem(nn.Linear):
        def train(self, mode=True):
            return super().train(False)

    torch.manual_seed(0)
    model = nn.Sequential(Stem(16, 16), nn.Linear(16, 16))
    sparsify(model, 0.25, "targeted_dropout", distribution="global")
    (graph,) = weight_graphs(model).values()
    model.train()(torch.randn(2, 16))
    model.eval()(torch.randn(2, 16))
    assert graph._chosen.index.tolist() == top_k(graph.candidate_weight.tolist(), 128)

"""Sparse training against a plain loop with masks: sorted magnitudes, products with masked weights, SGD by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dnw_graph.sparse_layers import sparsify

LR, MOMENTUM, WEIGHT_DECAY, DENSITY = 0.2, 0.9, 1e-2, 0.3


def make_model():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 3, bias=False),
        nn.Flatten(),
        nn.Linear(256, 10),
    ).double()


def forward(weights, bias, x):
    first, second, third = weights
    return F.linear(F.conv_transpose2d(F.relu(F.conv2d(x, first)), second).flatten(1), third, bias)


def strongest(weight, k):
    """Mask of the k largest |w|, by sorting them in Python."""
    values = weight.flatten().tolist()
    order = sorted(range(len(values)), key=lambda i: -abs(values[i]))
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[order[:k]] = True
    return mask.view(weight.shape)


def train_by_hand(model, batches, rule):
    """Every step: weights and masks; then the weights at the end."""
    weights = [model[i].weight.detach().clone() for i in (0, 2, 4)]
    bias = model[4].bias.detach().clone()
    keep = [w.numel() - int(0.7 * w.numel() + 1e-9) for w in weights]
    buffers, masks = [torch.zeros_like(w) for w in (*weights, bias)], []
    for images, labels in batches:
        masks.append([strongest(w, k) for w, k in zip(weights, keep, strict=True)])
        leaves = [(w * mask).requires_grad_() for w, mask in zip(weights, masks[-1], strict=True)]
        leaf_bias = bias.clone().requires_grad_()
        loss = F.cross_entropy(forward(leaves, leaf_bias, images), labels)
        *gradients, bias_gradient = torch.autograd.grad(loss, [*leaves, leaf_bias])
        if rule == "no_update":
            gradients = [gradient * mask for gradient, mask in zip(gradients, masks[-1], strict=True)]
        for value, gradient, buffer in zip([*weights, bias], [*gradients, bias_gradient], buffers, strict=True):
            buffer.mul_(MOMENTUM).add_(gradient.add(value, alpha=WEIGHT_DECAY))
            value.add_(buffer, alpha=-LR)
    return weights, bias, masks


@pytest.mark.parametrize("rule", ["dnw", "no_update"])
def test_equals_a_plain_loop_exactly(rule, digits):
    images, labels = digits
    batches = [(images[i : i + 16, None], labels[i : i + 16]) for i in range(0, 160, 16)]
    model = make_model()
    weights, bias, masks = train_by_hand(copy.deepcopy(model), batches, rule)
    assert not all(torch.equal(a, b) for a, b in zip(masks[0], masks[-1], strict=True))  # weights were swapped

    optimiser = torch.optim.SGD(model.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY)
    sparsify(model, DENSITY, rule)
    for step, (x, y) in enumerate(batches):
        seen = [model[i].weight.ne(0) for i in (0, 2, 4)]
        assert all(torch.equal(a, b) for a, b in zip(seen, masks[step], strict=True))
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimiser.step()
    for i, expected in zip((0, 2, 4), weights, strict=True):
        assert torch.equal(model[i].parametrizations.weight.original, expected)
    assert torch.equal(model[4].bias, bias)


def test_attention_projections_are_ranked_separately_and_get_the_dense_gradient():
    """Against attention written out, with three masks."""
    torch.manual_seed(1)
    attention = nn.MultiheadAttention(6, 1, bias=False, batch_first=True).double()
    with torch.no_grad():
        attention.in_proj_weight[:6] *= 100  # one ranking of all would take these alone
    dense = copy.deepcopy(attention)
    sparsify(attention, 0.25)
    leaves = [
        (w * strongest(w, 9)).detach().requires_grad_() for w in (*dense.in_proj_weight.chunk(3), dense.out_proj.weight)
    ]
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    q, k, v = (x @ w.T for w in leaves[:3])
    expected = ((q @ k.transpose(1, 2) / 6**0.5).softmax(-1) @ v) @ leaves[3].T
    out, _ = attention(x, x, x)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    out.square().sum().backward()
    expected.square().sum().backward()
    original = attention.parametrizations.in_proj_weight.original
    torch.testing.assert_close(original.grad, torch.cat([leaf.grad for leaf in leaves[:3]]), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        attention.out_proj.parametrizations.weight.original.grad, leaves[3].grad, rtol=1e-10, atol=1e-12
    )


def test_separate_projections():
    attention = nn.MultiheadAttention(6, 2, kdim=4, vdim=5)
    table = sparsify(attention, 0.5)
    assert {row.name: row.kept for row in table.sparse} == {
        "q_proj_weight": 18,
        "k_proj_weight": 12,
        "v_proj_weight": 15,
        "out_proj.weight": 18,
    }
    for name, kept in (("q", 18), ("k", 12), ("v", 15)):
        assert int(getattr(attention, f"{name}_proj_weight").ne(0).sum()) == kept
    attention(torch.randn(3, 1, 6), torch.randn(3, 1, 4), torch.randn(3, 1, 5))[0].sum().backward()


def test_projections_of_one_parameter_can_have_their_own_rules():
    """Only the values' hallucinated weights are left without a gradient."""
    from dnw_graph.sparse_layers import weight_graphs

    attention = nn.MultiheadAttention(4, 1, bias=False).double()
    sparsify(attention, 0.5, skip="in_proj_weight.k")
    weight_graphs(attention)["in_proj_weight.v"].rewire("no_update", 5)
    attention(*(torch.randn(3, 1, 4).double() for _ in range(3)))[0].square().sum().backward()
    assert [int(third.ne(0).sum()) for third in attention.in_proj_weight.chunk(3)] == [8, 16, 5]
    gradient = attention.parametrizations.in_proj_weight.original.grad
    assert [int(third.ne(0).sum()) for third in gradient.chunk(3)] == [16, 16, 5]

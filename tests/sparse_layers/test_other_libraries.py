"""What other libraries do with a model: trace it, save it, transform it."""

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace

from dnw_graph.errors import InputError
from dnw_graph.sparse_layers import dense_state_dict, sparsify


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return x + self.second(torch.relu(self.first(x)))


class Reads(Block):
    def forward(self, x):
        return x @ self.first.weight.t() + self.second(x)


@pytest.mark.parametrize("distribution", ["uniform", "global"])
@pytest.mark.parametrize("block", [Block, Reads])
def test_what_torch_fx_has_traced_computes_the_same(block, distribution):
    model, x = nn.Sequential(block(), nn.ReLU(), block()), torch.randn(4, 6)
    sparsify(model, 0.3, distribution=distribution)
    model.eval()
    expected = model(x)
    traced = symbolic_trace(model)
    torch.testing.assert_close(traced(x), expected)
    torch.testing.assert_close(model(x), expected)
    if block is Block:
        with torch.no_grad():
            model[2].first.parametrizations.weight.original.uniform_(1, 2)
        torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize("transform", ["jacrev", "jacfwd", "grad", "hessian", "vjp", "vmap"])
def test_a_transform_in_evaluation_leaves_no_tensors_of_its_own(transform):
    model, x = nn.Sequential(nn.Linear(6, 3)), torch.randn(6)
    sparsify(model, 0.5)
    model.eval()
    function = model if transform in ("jacrev", "jacfwd", "vjp") else lambda x: model(x).square().sum()
    inputs = x.expand(2, 6) if transform == "vmap" else x
    made = getattr(torch.func, transform)(function, *([x] if transform == "vjp" else []))
    if transform != "vjp":
        made(inputs)
    real = model[0].weight.detach()
    torch.testing.assert_close(model(x), real @ x + model[0].bias)
    if transform in ("jacrev", "jacfwd"):
        torch.testing.assert_close(made(x), real)


class Pretrained(nn.Module):
    """As classes of Hugging Face's libraries."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x):
        return self.body(x)

    def save_pretrained(self, path, state_dict=None):
        torch.save(self.state_dict() if state_dict is None else state_dict, path)

    @classmethod
    def from_pretrained(cls, path):
        model = cls()
        model.load_state_dict(torch.load(path), strict=False)
        return model.eval()


@pytest.mark.parametrize("part", ["the model", "its body"])
def test_what_from_pretrained_would_not_find_is_not_saved(tmp_path, part):
    model, x = Pretrained(), torch.randn(3, 6)
    sparsify(model if part == "the model" else model.body, 0.3)
    with pytest.raises(InputError, match=r"0\.weight is sparse.*save_pretrained\(…, state_dict=dense_state_dict"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    model.save_pretrained(tmp_path / "model", state_dict=dense_state_dict(model))
    loaded = Pretrained.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(loaded(x), model.eval()(x))
    torch.save(model.state_dict(), tmp_path / "sparse")  # saved in other ways, as ever

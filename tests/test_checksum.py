"""The checksum of nested content: the same for the same, another for anything else."""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from dnw_graph import InputError
from dnw_graph.checksum import checksum

PLAIN: tuple[Any, ...] = (
    None, True, False, 0, 1, 1.0, 0.0, -0.0, "", "1", "None", [], [1], [[1]], [1, 1], (), (1,), {}, {"a": 1}, {1: "a"},
    {"1": 1}, {1: 1}, {"a": {"b": 1}}, {"a": [1, 2]}, {"a": [2, 1]}, {"a": 1, "b": 2}, {"a": 2, "b": 1}, ["ab"],
    ["a", "b"], float("inf"), float("nan"), "\ud800",
)  # fmt: skip
TENSORS = (
    torch.zeros(2), torch.zeros(1, 2), torch.zeros(2, 1), torch.zeros(2).double(), torch.zeros(2).int(), torch.zeros(0),
    torch.zeros(0, 2), torch.tensor(0.0), torch.tensor(-0.0), torch.tensor(0), torch.tensor([True]),
    torch.tensor([1.0]), torch.tensor([1.0]).bfloat16(), torch.tensor([1.0]).half(), torch.tensor([1, 2]),
    torch.tensor([2, 1]),
)  # fmt: skip


def test_no_two_contents_have_one_sum():
    sums = [checksum(each) for each in (*PLAIN, *TENSORS)]
    assert len(set(sums)) == len(sums)


def test_a_single_bit_anywhere_counts():
    tensor = torch.randn(5, dtype=torch.float64)
    sums = {checksum(tensor)}
    for bit in range(8 * tensor.nbytes):
        other = tensor.clone()
        other.view(torch.uint8)[bit // 8] ^= 1 << bit % 8
        sums.add(checksum({"x": [other]}))
    assert len(sums) == 1 + 8 * tensor.nbytes


def test_what_does_not_count():
    x = torch.randn(4, 3)
    state = nn.BatchNorm1d(3).state_dict()
    assert checksum(x) == checksum(x.t().contiguous().t()) == checksum(nn.Parameter(x)) == checksum(x.clone())
    assert checksum({"a": 1, 2: x}) == checksum(OrderedDict([(2, x), ("a", 1)]))
    assert checksum(state) == checksum(copy.deepcopy(state))
    assert checksum(state) != checksum(dict(state))  # which lacks the versions of the modules


@pytest.mark.parametrize(
    "strange", [object(), b"bytes", {1, 2}, 1j, torch.float32, type, itertools.count(), {"a": [object()]}]
)
def test_other_content_is_refused(strange):
    with pytest.raises(InputError, match="a file can hold tensors, numbers, strings") as error:
        checksum(strange)
    assert len(str(error.value)) < 500

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import top_k

from dnw_graph import InputError, NeuralGraph
from dnw_graph.selection import select_top_k

LARGE = 70_000  # beyond the size from which the threshold is guessed by sampling


def assert_like_plain_sort(weight, k):
    assert select_top_k(weight, k).tolist() == top_k(weight.tolist(), k)


@given(st.data())
def test_chooses_the_largest_magnitudes(data):
    weights = data.draw(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=60))
    k = data.draw(st.integers(1, len(weights)))
    assert_like_plain_sort(torch.tensor(weights), k)


@given(st.data(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
def test_ties_go_to_the_lower_index(data, dtype):
    few = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0])
    weights = data.draw(st.lists(few, min_size=1, max_size=60))
    k = data.draw(st.integers(1, len(weights)))
    assert_like_plain_sort(torch.tensor(weights, dtype=dtype), k)


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 5, 1000]), st.sampled_from([1, 7, 2_000, 35_000, LARGE - 1]))
def test_many_candidates_with_many_ties(seed, num_values, k):
    rng = np.random.default_rng(seed)
    weight = rng.choice([-1.0, 1.0], LARGE) * rng.integers(0, num_values, LARGE)
    assert_like_plain_sort(torch.tensor(weight, dtype=torch.float32), k)


ADVERSARIAL = {
    "ascending": lambda i: i,
    "descending": lambda i: LARGE - i,
    "all equal": lambda i: 0 * i + 3,
    "all zero": lambda i: 0 * i,
    "large at the end": lambda i: i > LARGE - 500,
    "large at the start": lambda i: i < 500,
    **{f"large at multiples of {p}": lambda i, p=p: i % p == 0 for p in (2, 61, 64, 127)},
    **{f"large off multiples of {p}": lambda i, p=p: i % p != 0 for p in (2, 61, 64, 127)},
}


@pytest.mark.parametrize("order", ADVERSARIAL)
@pytest.mark.parametrize("k", [1, 300, 1_500, 34_000, 69_999])
def test_many_candidates_in_an_adversarial_order(order, k):
    index = torch.arange(LARGE)
    weight = ADVERSARIAL[order](index).float() * torch.where(index % 3 == 0, -1.0, 1.0)
    assert_like_plain_sort(weight, k)


def test_all_candidates_may_be_chosen():
    assert select_top_k(torch.zeros(5), 5).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("size", [5, LARGE])
@pytest.mark.parametrize("whole", [False, True])
def test_weights_that_are_not_finite_are_refused(bad, size, whole):
    weight = torch.zeros(size)
    weight[[1, 3]] = bad
    with pytest.raises(InputError, match=rf"^stage4: 2 of {size} candidate weights are NaN or infinite"):
        select_top_k(weight, size if whole else 2, "stage4")


def test_a_graph_with_weights_that_are_not_finite_is_named():
    graph = NeuralGraph((2, 3), 2, name="stage3")
    graph.candidates.weight.data[4] = float("nan")
    with pytest.raises(InputError, match="stage3"):
        graph(torch.zeros(1, 2, 4, 4))


@pytest.mark.parametrize("k", [0, -1, 6])
def test_impossible_numbers_of_edges_are_refused(k):
    with pytest.raises(InputError, match=f"cannot choose {k} edges among 5"):
        select_top_k(torch.zeros(5), k)

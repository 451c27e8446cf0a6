"""Exact selection: cold and carried, with the kernel, with NumPy, and in the way of a GPU; against full sorts."""

import copy
import pickle
import shutil
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pairs import every_pair
from reference import top_k
from torch._subclasses import FakeTensorMode
from torch.func import grad, vmap

from dnw_graph import InputError, NeuralGraph, selection
from dnw_graph.ops.build import kernels
from dnw_graph.selection import Selector, new_flag, select_top_k

LARGE = 70_000  # beyond the size from which the threshold is guessed by sampling
FEW_EXAMPLES = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


WAYS = ["kernel", "plain", "device"]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """With the compiled kernel, with NumPy, and as on a GPU."""
    if request.param == "kernel":
        if not any(map(shutil.which, ("c++", "g++", "clang++"))):
            pytest.skip("no C++ compiler")
        monkeypatch.delenv("DNW_GRAPH_KERNELS", raising=False)
        assert kernels() is not None
    else:
        monkeypatch.setenv("DNW_GRAPH_KERNELS", "0")
    if request.param == "device":
        monkeypatch.setattr(selection, "_on_host", lambda weight: False)
    return request.param


def full_sort(weight, k):
    """One stable sort in NumPy."""
    return np.sort(np.argsort(-weight.abs().double().numpy(), kind="stable")[:k]).tolist()


def assert_like_plain_sort(weight, k):
    assert select_top_k(weight, k).tolist() == top_k(weight.tolist(), k)


@FEW_EXAMPLES
@given(st.data())
def test_chooses_the_largest_magnitudes(way, data):
    weights = data.draw(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=60))
    k = data.draw(st.integers(1, len(weights)))
    assert_like_plain_sort(torch.tensor(weights), k)


@FEW_EXAMPLES
@given(st.data(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
def test_ties_go_to_the_lower_index(way, data, dtype):
    few = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0])
    weights = data.draw(st.lists(few, min_size=1, max_size=60))
    k = data.draw(st.integers(1, len(weights)))
    assert_like_plain_sort(torch.tensor(weights, dtype=dtype), k)


@every_pair(way=WAYS, dtype=[torch.float64, torch.float32, torch.bfloat16, torch.float16], indirect=["way"])
def test_the_whole_range_of_a_type(way, dtype):
    numbers = torch.finfo(dtype)
    weight = torch.tensor([numbers.max, -numbers.tiny, numbers.tiny / 2, 0.0, -1.0, numbers.min, 1.0], dtype=dtype)
    for k in range(1, 8):
        assert_like_plain_sort(weight, k)


@every_pair(
    rest=pytest.mark.slow,
    way=WAYS,
    num_values=[1, 2, 5, 1000],
    k=[1, 7, 2_000, 35_000, LARGE - 1],
    indirect=["way"],
)
def test_many_candidates_with_many_ties(way, num_values, k):
    rng = np.random.default_rng(num_values + k)
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


@every_pair(rest=pytest.mark.slow, way=WAYS, order=ADVERSARIAL, k=[1, 1_500, 34_000, 69_999], indirect=["way"])
def test_many_candidates_in_an_adversarial_order(way, order, k):
    index = torch.arange(LARGE)
    weight = ADVERSARIAL[order](index).float() * torch.where(index % 3 == 0, -1.0, 1.0)
    assert select_top_k(weight, k).tolist() == full_sort(weight, k)


@pytest.mark.parametrize("threads", [2, 5])
def test_any_number_of_threads(way, threads):
    weight = torch.randn(300_001).round(decimals=3)
    torch.set_num_threads(threads)
    try:
        chosen = select_top_k(weight, 20_000)
    finally:
        torch.set_num_threads(1)
    assert chosen.tolist() == full_sort(weight, 20_000)


def test_weights_that_are_not_contiguous(way):
    weight = torch.randn(2 * LARGE)[::2]
    assert select_top_k(weight, 300).tolist() == full_sort(weight, 300)


# What may happen to weights between two selections.
UPDATES = {
    "nothing": lambda w, g: w,
    "a step": lambda w, g: w + 0.01 * w.abs().mean() * torch.randn(w.shape, generator=g),
    "weight decay": lambda w, g: 0.98 * w,
    "other signs": lambda w, g: -w,
    "another order": lambda w, g: w[torch.randperm(len(w), generator=g)],
    "ties": lambda w, g: (w / w.abs().max().clamp(min=1e-30) * 3).round(),
    "all equal": lambda w, g: torch.full_like(w, 0.25),
    "all zero": lambda w, g: torch.zeros_like(w),
    "far larger": lambda w, g: 1e4 * w,
    "far smaller": lambda w, g: 1e-4 * w,
    "drawn anew": lambda w, g: torch.randn(w.shape, generator=g),
    "one large": lambda w, g: w.index_fill(0, torch.tensor([len(w) // 2]), 10.0),
}


@FEW_EXAMPLES
@given(st.data())
def test_a_sequence_of_selections_has_no_memory(way, data):
    size = data.draw(st.sampled_from([1, 2, 3, 40, 2_000, 70_001]))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    weight, k = torch.randn(size, generator=g), data.draw(st.integers(1, size))
    carried, flag = Selector(), new_flag()
    for update in data.draw(st.lists(st.sampled_from(list(UPDATES)), min_size=1, max_size=6)):
        weight = UPDATES[update](weight, g).clamp(-1e30, 1e30)
        k = data.draw(st.sampled_from([k, k, k, 1, size, max(1, size // 7)]))
        dtype = data.draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16]))
        expected = full_sort(weight.to(dtype), k)
        assert carried.select(weight.to(dtype), k, "graph", flag).tolist() == expected
        assert select_top_k(weight.to(dtype), k).tolist() == expected
        carried.raise_non_finite(flag)


@pytest.fixture
def reached(monkeypatch):
    """How many weights reached the lower guess, and how many the upper one, in every try so far."""
    numbers, largest = [], selection._largest

    def counting(*args):
        found = largest(*args)
        numbers.append(found[2:])
        return found

    monkeypatch.setattr(selection, "_largest", counting)
    return numbers


# A thousandth of the weights' size at random, as in training; and weights that move faster than the first margins.
@pytest.mark.parametrize(
    "step", [lambda w: w, lambda w: w + 1e-3 * torch.randn(LARGE), lambda w: 0.97 * w, lambda w: 1.03 * w]
)
@pytest.mark.parametrize("kernel", ["0", "1"])
def test_in_training_only_a_few_more_than_k_are_ranked(step, kernel, reached, monkeypatch):
    monkeypatch.setenv("DNW_GRAPH_KERNELS", kernel)
    weight, k, carried = torch.randn(LARGE), 3_000, Selector()
    for turn in range(12):
        if turn == 4:
            reached.clear()
        assert carried.select(weight, k, "graph", new_flag()).tolist() == full_sort(weight, k)
        weight = step(weight)
    assert len(reached) == 8  # the first guesses are good
    assert max(low for low, _ in reached) < 1.5 * k
    if kernel == "1":
        assert min(high for _, high in reached) > 0.5 * k


def test_all_candidates_may_be_chosen(way):
    assert select_top_k(torch.zeros(5), 5).tolist() == [0, 1, 2, 3, 4]


@every_pair(way=WAYS, bad=[torch.nan, torch.inf, -torch.inf], size=[5, LARGE], k=["2", "size"], indirect=["way"])
def test_weights_that_are_not_finite_are_refused(way, bad, size, k):
    weight = torch.zeros(size)
    weight[[1, 3]] = bad
    with pytest.raises(InputError, match=rf"^stage4: 2 of {size} candidate weights are NaN or infinite"):
        select_top_k(weight, size if k == "size" else 2, "stage4")


@FEW_EXAMPLES
@given(st.data(), st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
def test_wherever_they_are_and_whatever_was_carried(way, data, dtype):
    size = data.draw(st.sampled_from([1, 3, 50, LARGE]))
    k = data.draw(st.integers(1, size))
    weight, selector, flag = torch.randn(size).to(dtype), Selector(), new_flag()
    for _ in range(data.draw(st.integers(0, 2))):
        selector.select(weight, k, "stage4", flag)
    wrong = weight.clone()
    wrong[data.draw(st.integers(0, size - 1))] = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    with pytest.raises(InputError, match=f"^stage4: 1 of {size} candidate weights are NaN or infinite"):
        (selector.select(wrong, k, "stage4", flag), selector.raise_non_finite(flag))
    assert selector.select(weight, k, "stage4", flag).tolist() == full_sort(weight, k)
    selector.raise_non_finite(flag)


def test_a_graph_with_weights_that_are_not_finite_is_named():
    graph = NeuralGraph((2, 3), 2, name="stage3")
    graph.candidates.weight.data[4] = float("nan")
    with pytest.raises(InputError, match="stage3"):
        graph(torch.zeros(1, 2, 4, 4))


@pytest.mark.parametrize("k", [0, -1, 6])
def test_impossible_numbers_of_edges_are_refused(way, k):
    with pytest.raises(InputError, match=f"cannot choose {k} edges among 5"):
        select_top_k(torch.zeros(5), k)
    with pytest.raises(InputError, match=f"cannot choose {k} edges among 5"):
        torch.ops.dnw_graph.select(torch.zeros(5), k, "graph", torch.tensor([-1, 14, 14]))


@pytest.mark.parametrize("weight", [torch.ones(5).to_sparse(), torch.ones(1).expand(2**61), torch.ones(5, 1)])
def test_what_is_no_vector_in_memory_is_refused(way, weight):
    with pytest.raises(InputError):
        torch.ops.dnw_graph.select(weight, 2, "graph", torch.tensor([-1, 14, 14]))


@pytest.mark.parametrize("size", [50, LARGE])
def test_within_transforms_of_functions(way, size):
    weight, x = torch.randn(size), torch.randn(3, size)
    selector, flag = Selector(), new_flag()

    def loss(weight, x):
        chosen = selector.select(weight, 20, "graph", flag)
        return (weight[chosen] * x[chosen]).sum()

    gradients = vmap(grad(loss), (None, 0))(weight, x)
    expected = torch.zeros_like(x)
    for i in full_sort(weight, 20):
        expected[:, i] = x[:, i]
    assert torch.equal(gradients, expected)
    selector.raise_non_finite(flag)


@pytest.mark.filterwarnings("ignore:torch.searchsorted")
@pytest.mark.parametrize("shared", [True, False])
def test_several_graphs_at_once_keep_their_numbers(shared, monkeypatch):
    monkeypatch.setattr(selection, "_on_host", lambda weight: False)
    weights, flag, selector = torch.randn(3, 50), new_flag(), Selector()
    weights[1, :2], weights[2, 0] = torch.nan, torch.inf
    flags = flag if shared else flag.repeat(3)
    select = vmap(lambda weight, flag: selector.select(weight, 20, "graph", flag), (0, None if shared else 0))
    assert select(weights, flags)[0].tolist() == full_sort(weights[0], 20)
    assert flags.tolist() == (2 if shared else [0, 2, 1])


def test_shapes_are_known_without_values(way):
    with FakeTensorMode():
        assert Selector().select(torch.randn(LARGE), 30, "graph", new_flag()).shape == (30,)


def test_the_operators_keep_their_word():
    weight, carried = torch.randn(300), torch.tensor([-1, 14, 14])
    torch.library.opcheck(torch.ops.dnw_graph.select, (weight, 20, "graph", carried))
    torch.library.opcheck(torch.ops.dnw_graph.raise_flag, (torch.tensor(2), new_flag()))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda selector: pickle.loads(pickle.dumps(selector))])
def test_copies_start_without_what_was_carried(way, duplicate):
    selector = Selector()
    size = len(pickle.dumps(selector))
    weight = torch.randn(100)
    expected = selector.select(weight, 10, "graph", new_flag())
    assert len(pickle.dumps(selector)) == size
    assert torch.equal(duplicate(selector).select(weight, 10, "graph", new_flag()), expected)


def test_made_in_inference_mode_and_used_in_training(way):
    with torch.inference_mode():
        selector, flag = Selector(), new_flag()
        selector.select(torch.randn(100), 10, "graph", flag)
    weight = torch.randn(100, requires_grad=True)
    assert selector.select(weight, 10, "graph", flag).tolist() == full_sort(weight.detach(), 10)


def test_weights_that_another_thread_changes_do_not_make_more_than_k_pass():
    number, k = 60_000, 30_000
    weight, others, stop = torch.randn(number), [torch.randn(number) for _ in range(8)], threading.Event()

    def change():
        while not stop.is_set():
            for other in others:
                weight.copy_(other)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(500):
            index = select_top_k(weight, k)
            assert len(index) == k
            assert index[0] >= 0
            assert index[-1] < number
            assert bool((index.diff() > 0).all())
    finally:
        stop.set()
        thread.join()

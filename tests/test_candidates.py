import math
import tracemalloc
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import static_pairs
from torch.utils._python_dispatch import TorchDispatchMode

from dnw_graph import CandidateEdges, InputError, NeuralGraph
from dnw_graph.models import edges_at_width

SIZES = st.lists(st.integers(1, 6), min_size=2, max_size=5)

# MobileNetV1-DNW, counted by hand: blocks, candidates, edges at width 0.225.
STAGES = [
    ((32, 64), 2_048, 103),
    ((64, 128, 128), 32_768, 1_244),
    ((128, 256, 256), 131_072, 4_976),
    ((256, 512, 512, 512, 512, 512, 512), 4_718_592, 72_990),
    ((512, 1024, 1024), 2_097_152, 79_626),
]


def assert_round_trip(candidates, expected):
    """The candidates are exactly the expected pairs in the expected order, both ways."""
    assert candidates.num_candidates == len(expected)
    index = torch.arange(len(expected))
    pairs = candidates.pairs(index)
    assert list(zip(*pairs.tolist(), strict=True)) == expected
    assert torch.equal(candidates.flat_index(pairs), index)
    mixed = torch.randperm(len(expected), generator=torch.Generator().manual_seed(0)).repeat(2)
    assert torch.equal(candidates.pairs(mixed), pairs[:, mixed])


@given(SIZES)
def test_static_candidates_are_all_pairs_from_earlier_to_later_blocks(sizes):
    candidates = CandidateEdges.static(sizes)
    assert_round_trip(candidates, static_pairs(sizes))
    assert candidates.num_nodes == sum(sizes)


@given(SIZES)
def test_adjacent_candidates_are_the_pairs_of_neighbouring_blocks(sizes):
    layers = [list(range(sum(sizes[:i]), sum(sizes[: i + 1]))) for i in range(len(sizes))]
    expected = [(u, v) for before, after in pairwise(layers) for v in after for u in before]
    assert_round_trip(CandidateEdges.adjacent(sizes), expected)


@given(st.integers(1, 12))
def test_dynamic_candidates_are_all_ordered_pairs(num_nodes):
    expected = [(u, v) for v in range(num_nodes) for u in range(num_nodes)]
    assert_round_trip(CandidateEdges.dynamic(num_nodes), expected)


@given(st.integers(1, 8), st.integers(1, 8))
def test_bipartite_candidates_lead_from_every_source_to_every_target(num_sources, num_targets):
    expected = [(u, num_sources + v) for v in range(num_targets) for u in range(num_sources)]
    assert_round_trip(CandidateEdges.bipartite(num_sources, num_targets), expected)


@st.composite
def mixed_blocks(draw):
    """Blocks anywhere among 10 nodes, in any order, that share no pair."""
    node_range = st.tuples(st.integers(0, 9), st.integers(1, 5)).map(lambda t: range(t[0], min(10, t[0] + t[1])))
    blocks, taken = [], set()
    for sources, targets in draw(st.lists(st.tuples(node_range, node_range), min_size=1, max_size=6)):
        pairs = {(u, v) for u in sources for v in targets}
        if not pairs & taken:
            blocks.append((sources, targets))
            taken |= pairs
    return blocks


@given(mixed_blocks(), st.integers(0, 9), st.integers(0, 9))
def test_mixed_blocks_follow_the_order_block_target_source(blocks, u, v):
    expected = [(u, v) for sources, targets in blocks for v in targets for u in sources]
    candidates = CandidateEdges(blocks, num_nodes=10)
    assert_round_trip(candidates, expected)
    assert candidates.num_sources == len({u for u, _ in expected})
    if (u, v) not in expected:
        with pytest.raises(InputError, match=rf"\({u}, {v}\) is not a candidate"):
            candidates.flat_index(torch.tensor([[u], [v]]))


@given(mixed_blocks())
def test_block_weights_are_views_of_the_flat_weights(blocks):
    candidates = CandidateEdges(blocks)
    weights = iter(candidates.weight.tolist())
    for block in candidates.blocks:
        matrix = candidates.block_weight(block)
        assert matrix.untyped_storage().data_ptr() == candidates.weight.untyped_storage().data_ptr()
        assert matrix.tolist() == [[next(weights) for _ in block.sources] for _ in block.targets]
    assert next(weights, None) is None


class AllocatedBytes(TorchDispatchMode):
    """Adds up the bytes of every tensor storage that PyTorch makes."""

    def __init__(self):
        super().__init__()
        self.total = 0
        self._seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not any(
                tensor.data_ptr() == seen.data_ptr() for seen in self._seen
            ):
                self.total += tensor.untyped_storage().nbytes()
                self._seen.append(tensor)
        return out


def test_ten_million_candidates_need_no_table_of_pairs():
    with AllocatedBytes():  # its first use imports modules
        CandidateEdges.static((1, 1))
    tracemalloc.start()
    try:
        with AllocatedBytes() as allocated:
            candidates = CandidateEdges.static((400, *[800] * 5, 600))
        python_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # 800 · (400 + 1200 + 2000 + 2800 + 3600) + 600 · 4400
    assert candidates.num_candidates == 10_640_000
    weight_bytes = 4 * candidates.num_candidates
    assert weight_bytes <= allocated.total < 1.01 * weight_bytes
    assert python_bytes < 2**20

    index = torch.randint(candidates.num_candidates, (1_000,))
    with AllocatedBytes() as allocated:
        assert torch.equal(candidates.flat_index(candidates.pairs(index)), index)
    assert allocated.total < 2**20


@pytest.mark.parametrize(("blocks", "num_candidates", "num_edges"), STAGES)
def test_stages_of_mobilenet_have_the_candidates_and_edges_counted_by_hand(blocks, num_candidates, num_edges):
    assert CandidateEdges.static(blocks).num_candidates == num_candidates
    assert edges_at_width(blocks, 0.225) == num_edges


@pytest.mark.parametrize(
    ("candidates", "num_sources"),
    [
        (CandidateEdges.static((256, *[512] * 6)), 2_816),
        (CandidateEdges.static((32, 192, 192, 192, 192, 100)), 800),
        (CandidateEdges.dynamic(800), 800),
        (CandidateEdges.bipartite(1024, 10), 1024),
    ],
    ids=["stage 4", "tiny static", "tiny dynamic", "classifier"],
)
def test_initial_weights_are_uniform_with_one_bound_for_the_whole_graph(candidates, num_sources):
    assert candidates.num_sources == num_sources
    bound = 1 / math.sqrt(num_sources)
    for block in candidates.blocks:
        weight = candidates.block_weight(block).detach().double() / bound
        n = weight.numel()
        assert weight.abs().max() <= 1 + 1e-6
        # Of n values in -1 … 1 the largest |w| is below 1 - 20/n with probability e^-20.
        assert weight.abs().max() > 1 - 20 / n
        # Standard deviation of the mean is √(1/3n), that of the mean square √(4/45n).
        assert abs(weight.mean()) < 5 * math.sqrt(1 / (3 * n))
        assert abs((weight**2).mean() - 1 / 3) < 5 * math.sqrt(4 / (45 * n))


def test_edges_per_block_start_in_proportion_to_their_candidates():
    blocks, num_candidates, k = STAGES[3]
    graph = NeuralGraph(blocks, k)
    for block in graph.candidates.blocks:
        inside = (graph.real_index >= block.flat.start) & (graph.real_index < block.flat.stop)
        share = (block.flat.stop - block.flat.start) / num_candidates
        # i.i.d. weights: the number of edges in a block is hypergeometric.
        variance = k * share * (1 - share) * (num_candidates - k) / (num_candidates - 1)
        assert abs(int(inside.sum()) - k * share) < 5 * math.sqrt(variance)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CandidateEdges([]), "at least one block"),
        (lambda: CandidateEdges([(range(0), range(2))]), "non-empty"),
        (lambda: CandidateEdges([(range(0, 4, 2), range(4, 6))]), "step 1"),
        (lambda: CandidateEdges([(range(-1, 2), range(2, 4))]), "within the 4 nodes"),
        (lambda: CandidateEdges([(range(2), range(2, 6))], num_nodes=5), "within the 5 nodes"),
        (lambda: CandidateEdges([(range(3), range(3, 6)), (range(2, 4), range(5, 7))]), "share candidate edges"),
        (lambda: CandidateEdges.static((3,)), "two or more"),
        (lambda: CandidateEdges.static((3, 0, 2)), "positive"),
        (lambda: CandidateEdges.adjacent((3, -1)), "positive"),
        (lambda: CandidateEdges.dynamic(0), "at least one node"),
        (lambda: CandidateEdges.bipartite(0, 3), "positive"),
        (lambda: CandidateEdges.static((2, 2)).pairs(torch.tensor([0, 4])), "0 … 3"),
        (lambda: CandidateEdges.static((2, 2)).pairs(torch.tensor([-1])), "0 … 3"),
        (lambda: CandidateEdges.static((2, 2)).flat_index(torch.tensor([[0, 2], [2, 0]])), r"\(2, 0\)"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_sizes_that_are_no_integers_are_refused(unchecked):
    with pytest.raises(InputError, match="sizes must be a sequence of integers; got"):
        CandidateEdges.static((3, 1.5))


def test_no_edges_map_to_no_pairs():
    candidates = CandidateEdges.static((2, 2))
    none = torch.empty(0, dtype=torch.long)
    assert candidates.pairs(none).shape == (2, 0)
    assert candidates.flat_index(candidates.pairs(none)).shape == (0,)

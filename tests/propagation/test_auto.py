import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dnw_graph import CandidateEdges, NeuralGraph
from dnw_graph.propagation import BlockPropagation, RealEdges, SparsePropagation
from dnw_graph.propagation.auto import AutoPropagation


def choice(share, dtype=torch.float32, batch=32, states=None, sizes=(16, 32, 32)):
    candidates = CandidateEdges.static(sizes).to(dtype)
    index = torch.arange(int(share * candidates.num_candidates))
    x = torch.zeros(batch, sizes[0], 4, 4, dtype=states or dtype)
    return AutoPropagation().choose(RealEdges(candidates, index, candidates.weight), x)


@pytest.fixture(autouse=True)
def needs_kernels(monkeypatch):
    monkeypatch.setattr("dnw_graph.propagation.auto.kernels", lambda: "some kernels")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{"batch": 32}, {"batch": 1, "sizes": (1024, 512)}])
def test_sparse_graphs_with_many_images_or_large_blocks_go_by_sparse_products(dtype, options):
    assert isinstance(choice(0.05, dtype, **options), SparsePropagation)


@pytest.mark.parametrize(
    "options",
    [
        {"share": 0.5},
        {"share": 0.05, "batch": 2},
        {"share": 0.05, "dtype": torch.bfloat16},  # no kernel
    ],
)
def test_all_others_go_block_by_block(options):
    assert isinstance(choice(**options), BlockPropagation)


def test_autocast_changes_no_choice():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert isinstance(choice(0.05), SparsePropagation)
        assert isinstance(choice(0.05, states=torch.bfloat16), SparsePropagation)


def test_without_kernels_everything_goes_block_by_block(monkeypatch):
    monkeypatch.setattr("dnw_graph.propagation.auto.kernels", lambda: None)
    assert isinstance(choice(0.05), BlockPropagation)


def test_the_choice_is_made_for_every_forward_pass():
    torch.manual_seed(0)
    graph = NeuralGraph((4, 8, 8), 10)
    layouts = []
    for function in graph.dynamics.node_functions[:2]:
        function.register_forward_pre_hook(lambda module, args: layouts.append(args[0].stride(0) == 1))
    graph(torch.randn(32, 4, 5, 5))
    graph(torch.randn(3, 4, 5, 5))
    assert layouts == [True, True, False, False]


def test_what_traces_or_counts_sees_every_operator(monkeypatch):
    monkeypatch.undo()
    torch.manual_seed(0)
    graph, x = NeuralGraph((4, 8, 8), 10).eval(), torch.randn(32, 4, 5, 5)
    program = torch.export.export(graph, (x,)).module()
    other = torch.randn(32, 4, 5, 5)
    torch.testing.assert_close(program(other), graph(other))
    with FlopCounterMode(display=False) as counter:
        graph(x)
    by_hand = 2 * 32 * 25 * (4 * 8 + 12 * 8 + 9 * (4 + 8))  # dense products and 3×3 convolutions
    assert counter.get_total_flops() == by_hand

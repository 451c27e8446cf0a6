import pytest
import torch

from dnw_graph import CandidateEdges
from dnw_graph.propagation import BlockPropagation, RealEdges
from dnw_graph.propagation.auto import AutoPropagation


def choice(sizes, share, dtype=torch.float32):
    candidates = CandidateEdges.static(sizes).to(dtype)
    index = torch.arange(int(share * candidates.num_candidates))
    return AutoPropagation().choose(RealEdges(candidates, index, True))


def test_large_and_very_sparse_graphs_go_by_sparse_products():
    assert choice((1024, 1024), 0.05).adjacency == "csr"
    assert choice((1024, 1024), 0.05, torch.float64).adjacency == "csr"


@pytest.mark.parametrize(
    ("sizes", "share", "dtype"),
    [
        ((1024, 1024), 0.5, torch.float32),  # dense
        ((64, 128, 128), 0.05, torch.float32),  # small
        ((1024, 1024), 0.05, torch.bfloat16),  # no sparse kernel
    ],
)
def test_all_others_go_block_by_block(sizes, share, dtype):
    assert isinstance(choice(sizes, share, dtype), BlockPropagation)


def test_under_autocast_everything_goes_block_by_block():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert isinstance(choice((1024, 1024), 0.05), BlockPropagation)

import pytest
import torch
import torch_geometric.typing
from torch import nn
from torch_geometric.nn import SimpleConv

from dnw_graph import InputError, NeuralGraph
from dnw_graph.propagation import MessagePassingPropagation, WeightedSum, message_passing


def node_major(z):
    """[batch, nodes, *space] to PyG's [nodes, features]."""
    return z.transpose(0, 1).flatten(1)


@pytest.mark.parametrize("propagation", ["block", "message_passing", MessagePassingPropagation("csr")])
def test_equals_the_message_passing_of_pyg(propagation):
    # In a graph of three blocks every path has at most two edges: two rounds of messages, the inputs held.
    graph = NeuralGraph((4, 5, 3), 20, node_function=nn.Identity(), propagation=propagation).double()
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    data = graph.to_data()
    conv = SimpleConv(aggr="sum")
    held = torch.cat([node_major(x), torch.zeros(8, 60, dtype=torch.float64)])
    z = held
    for _ in range(2):
        z = held + conv(z, data.edge_index, data.edge_weight)
    torch.testing.assert_close(node_major(graph(x)), z[-3:], rtol=1e-12, atol=1e-12)


def test_equals_a_sparse_product():
    graph = NeuralGraph((6, 5), 11, input_function=False, propagation="message_passing").double()
    source, target = graph.edge_index
    matrix = torch.sparse_coo_tensor(
        torch.stack([target - 6, source]), graph.edge_weight, (5, 6), check_invariants=True
    )
    z = torch.randn(6, 7, dtype=torch.float64)
    torch.testing.assert_close(graph(z.T), torch.sparse.mm(matrix, z).T, rtol=1e-12, atol=1e-12)


def test_messages_and_fused_product_are_one_operator():
    edge_index = torch.tensor([[0, 2, 1, 0], [0, 0, 1, 3]])
    weight = torch.randn(4)
    z = torch.randn(3, 6)
    adj_t = torch.sparse_coo_tensor(edge_index.flip(0), weight, (4, 3), check_invariants=True).to_sparse_csr()
    conv = WeightedSum()
    by_messages = conv(z, edge_index, weight, num_targets=4)
    torch.testing.assert_close(by_messages, conv(z, adj_t))
    assert torch.equal(by_messages[2], torch.zeros(6))  # nothing arrives there


def test_messages_above_the_stated_size_are_refused():
    x = torch.randn(2, 4, 8, 8)
    needed = 10 * (2 * 8 * 8) * 4  # edges · values per node · bytes
    NeuralGraph((4, 5), 10, propagation=MessagePassingPropagation(max_message_bytes=needed))(x)
    graph = NeuralGraph((4, 5), 10, propagation=MessagePassingPropagation(max_message_bytes=needed - 1))
    with pytest.raises(InputError, match=r"10 messages of 128 values .*block.*csr"):
        graph(x)


def test_the_limit_is_for_messages_only():
    x = torch.randn(2, 4, 8, 8)
    NeuralGraph((4, 5), 10, propagation=MessagePassingPropagation("csr", max_message_bytes=1))(x)


@pytest.mark.parametrize(("device", "tiles"), [("cpu", 3), ("meta", 1)])
def test_states_go_in_tiles_where_there_is_a_cache_to_fit(device, tiles):
    seen, weighted_sum = [], WeightedSum()

    def product(z, adjacency):
        seen.append(z.size(1))
        return 2 * z

    weighted_sum.forward = product
    z = torch.randn(3, 2 * message_passing.TILE + 5).to(device)
    out = message_passing._in_tiles(weighted_sum, z, torch.empty(0))
    assert (len(seen), sum(seen), out.shape) == (tiles, z.size(1), z.shape)
    if device == "cpu":
        assert torch.equal(out, 2 * z)


@pytest.mark.skipif(torch_geometric.typing.WITH_TORCH_SPARSE, reason="torch-sparse is installed")
def test_missing_extension_is_named():
    with pytest.raises(InputError, match="not installed"):
        MessagePassingPropagation("torch_sparse")

"""Walk through three networks that are discrete-time neural graphs (Section 2.3 and Figure 1 of the paper).

A perceptron, a static graph and an LSTM are rewritten as graphs, fed with real images (scikit-learn's digits), and
compared with the originals, outputs and gradients:

    python examples/equivalences.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from dnw_graph import Fixed, NeuralGraph
from dnw_graph.equivalence import lstm_to_discrete, mlp_to_discrete, static_to_discrete
from dnw_graph.node_functions import NormReluConv


def main() -> None:
    """Print each rewritten network and its distance from the original."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    images = torch.tensor(load_digits().images[:16]) / 16  # [16, 8, 8]

    perceptron = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10))
    graph = mlp_to_discrete(perceptron)
    print("1. A perceptron is a graph whose layers are nodes and whose weights are edges; 3 layers take 3 steps.")
    print(f"   {graph}")
    layers = [layer.weight for layer in perceptron if isinstance(layer, nn.Linear)]
    compare(perceptron(images.flatten(1)), graph(images.flatten(1)), layers, [graph.candidates.weight])

    static = NeuralGraph((1, 16, 16, 10), 200, node_function=partial(NormReluConv, norm="instance"), name="static")
    recurrent = static_to_discrete(static)
    print("2. A static graph is a discrete one with held inputs; 4 blocks take 3 steps.")
    print(f"   {recurrent[1]}")
    maps = images.unsqueeze(1)
    weight = recurrent[1].get_parameter("candidates.weight")
    compare(static(maps), recurrent(maps), [static.candidates.weight], [weight])

    lstm = nn.LSTM(8, 12, num_layers=2, batch_first=True)
    unrolled = lstm_to_discrete(lstm)
    print("3. An LSTM that reads an image row by row is a graph with input at every step; W_ih and W_hh are edges.")
    print(f"   {unrolled.graph}")
    candidates = unrolled.graph.candidates
    edges = [block for block in candidates.blocks if block.sources != block.targets]
    output, unrolled_output = lstm(images)[0], unrolled(images)[0]
    originals = [weight for name, weight in lstm.named_parameters() if name.startswith("weight")]
    compare(output, unrolled_output, originals, [candidates.weight], lambda g: [g[b.flat] for b in edges])

    source, target = 3, 8  # the fourth pixel of a row to the input gate of the first hidden unit: W_ih[0, 3]
    remaining = unrolled.graph.edge_index
    remaining = remaining[:, (remaining[0] != source) | (remaining[1] != target)]
    unrolled.graph.rewire(Fixed(remaining), remaining.size(1))
    with torch.no_grad():
        lstm.get_parameter("weight_ih_l0")[target - 8, source] = 0.0
        removed, zeroed = unrolled(images)[0], lstm(images)[0]
    print(f"   Without the edge {(source, target)} the output moves by {distance(removed, output):.1e} and becomes")
    print(f"   that of the LSTM with W_ih[0, 3] = 0, up to {distance(removed, zeroed):.1e}.")


def distance(a: Tensor, b: Tensor) -> float:
    """Return ‖a - b‖ / ‖b‖."""
    return ((a - b).norm() / b.norm()).item()


def compare(
    output: Tensor,
    graph_output: Tensor,
    weights: Iterable[Tensor],
    graph_weights: Iterable[Tensor],
    part: Callable[[Tensor], list[Tensor]] = lambda gradient: [gradient],
) -> None:
    """Print the distance of outputs, and of the gradients of a loss with respect to the weights."""
    gradients = torch.autograd.grad(output.square().sum(), list(weights))
    (graph_gradient,) = torch.autograd.grad(graph_output.square().sum(), list(graph_weights))
    expected = torch.cat([gradient.flatten() for gradient in gradients])
    found = torch.cat([gradient.flatten() for gradient in part(graph_gradient)])
    print(f"   outputs differ by {distance(graph_output, output):.1e}, gradients by {distance(found, expected):.1e}\n")


if __name__ == "__main__":
    main()

"""Draws the gallery: trains small models on scikit-learn's digits and writes ``docs/gallery.md`` with its pictures.

The numbers below the README's first picture are written too.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import networkx as nx
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from dnw_graph import Discrete, NeuralGraph, RigL, attach, sparsify
from dnw_graph.models import MobileNetV1DNW
from dnw_graph.node_functions import ReluConvSendNorm
from dnw_graph.visualize import (
    RecordedGraph,
    Recording,
    animate,
    plot,
    plot_adjacency,
    plot_change,
    plot_evolution,
    plot_layers,
    save_page,
)

ROOT = Path(__file__).parent.parent
DIRECTORY = ROOT / "docs" / "images" / "gallery"
TRAIN = 1437


class Reader(nn.Module):
    """A convolution and one graph, with an output node per class."""

    def __init__(self, inputs: int, body: NeuralGraph) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, inputs, 3, padding=1)
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the scores of images."""
        out: torch.Tensor = self.body(self.stem(x))
        # Where the nodes end in a norm over their maps, the mean of a whole map says nothing.
        return out.mean(dim=(2, 3)) if self.body.dynamics.in_blocks else out[..., 2:4, 2:4].mean(dim=(2, 3))


def digits(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images ``[1797, 3, size, size]`` and their classes."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return F.interpolate(images, size=size, mode="nearest").expand(-1, 3, -1, -1), torch.tensor(labels)


def train(model: nn.Module, epochs: int, size: int = 8, lr: float = 0.1, every: int = 6) -> tuple[Recording, float]:
    """Train on digits; return what became of the wirings, and the accuracy on the last 360 images."""
    images, labels = digits(size)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-3)
    steps = (TRAIN + 63) // 64
    attach(model, optimizer, epochs * steps, steps_per_epoch=steps)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    recording, step = Recording(model), 0
    for _ in range(epochs):
        for batch in torch.randperm(TRAIN).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
            step += 1
            # Most happens at first.
            if step % steps == 0 or (step % every == 0 and step <= 6 * steps):
                recording.add(step, step / steps)
    model.eval()
    with torch.no_grad():
        right = model(images[TRAIN:]).argmax(1) == labels[TRAIN:]
    return recording, float(right.float().mean())


def save(picture: Any, name: str) -> None:
    """Write a figure, or that of axes."""
    getattr(picture, "figure", picture).savefig(DIRECTORY / f"{name}.png", dpi=100)


def shown(text: str, name: str) -> str:
    """Return Markdown for a picture that leads to the whole of it, for small screens."""
    return f"[![{text}](images/gallery/{name}.png)](images/gallery/{name}.png)"


def after(graph: RecordedGraph, moment: int = -1) -> Any:
    """Return a wiring as it was at a moment."""
    return graph.to_data(moment)


def static() -> str:
    """Draw a static graph."""
    torch.manual_seed(0)
    model = Reader(16, NeuralGraph((16, 24, 24, 10), 240, name="reader"))
    recording, accuracy = train(model, 30)
    graph = recording["reader"]
    animate(graph, ROOT / "docs" / "images" / "learning.gif", frames=36)
    save(plot(after(graph)), "static")
    save(plot_change(after(graph, 0), after(graph)), "change")
    save(plot_evolution(graph), "evolution")
    save_page(graph, DIRECTORY / "page.html")
    by_block = partial(nx.multipartite_layout, subset_key="block")
    save(plot(after(graph), top=30, layout=by_block), "networkx")
    born, dead = int(graph.swaps()[:, 0].sum()), int((~graph.live(-1)).sum())
    readme = ROOT / "README.md"
    caption = f"{born} are born on the\nway, and {dead} nodes are dead"
    text, count = re.subn(r"\d+ are born on the\nway, and \d+ nodes are dead", caption, readme.read_text())
    if count != 1:
        raise SystemExit("README.md lacks the sentence on its first picture")
    readme.write_text(text)
    return f"""## A static graph

A graph of 74 nodes with 240 of 1,984 candidate edges learns to read digits: {accuracy:.1%} of 360 test images after 30
epochs. {born} edges are born on the way; {dead} nodes are dead at the end.

![A wiring being learned](images/learning.gif)

[The same as an interactive page](images/gallery/page.html): a slider through time, and what lies under the mouse.

{shown("The wiring at the end", "static")}

{shown("Edges kept, born and gone between the first and the last epoch", "change")}

{shown("How the wiring changed, as six curves", "evolution")}

{shown("The 30 strongest edges, by block in a layout of networkx", "networkx")}
"""


def cycles() -> str:
    """Draw graphs with cycles."""
    # Norms of their own image: the statistics of a batch differ from step to step, and their running mean fits none.
    # With a smaller eps, maps that are nearly constant make gradients large and weights burst.
    node_function = partial(ReluConvSendNorm, norm="instance", eps=1e-3)
    options: dict[str, Any] = {"dynamics": Discrete(steps=5), "num_outputs": 10, "node_function": node_function}
    torch.manual_seed(0)
    large = Reader(8, NeuralGraph(num_nodes=80, num_inputs=8, num_edges=320, name="cycles", **options))
    recording, accuracy = train(large, 12)
    save(plot(after(recording["cycles"])), "cycles")
    small = Reader(6, NeuralGraph(num_nodes=28, num_inputs=6, num_edges=80, name="small cycles", **options))
    learned = after(train(small, 12)[0]["small cycles"])
    save(plot(learned), "small-cycles")
    save(plot(learned, layout=nx.kamada_kawai_layout), "small-cycles-networkx")
    return f"""## Graphs with cycles

Columns are distances from the inputs; feedback is dashed.

{shown("A small graph with cycles", "small-cycles")}

The same graph in a layout of networkx, `plot(graph, layout=nx.kamada_kawai_layout)`:

{shown("A small graph with cycles, laid out by networkx", "small-cycles-networkx")}

A larger one is an ordered matrix: forward edges lie below the diagonal blocks, feedback on and above them. This graph
of 80 nodes, five steps in discrete time, reads {accuracy:.1%} of the test images after 12 epochs.

{shown("A larger graph with cycles, as a matrix", "cycles")}
"""


def stages() -> str:
    """Draw graphs of thousands of nodes."""
    torch.manual_seed(0)
    model = MobileNetV1DNW(width=0.225, num_classes=10, stem_stride=1)
    recording, accuracy = train(model, 4, size=16, lr=0.05)
    save(plot_adjacency(after(recording["stage4"])), "stage4")
    save(plot(after(recording["stage2"])), "stage2")
    save(plot_evolution(recording["stage4"]), "stage4-evolution")
    size = len(recording.to_bytes())
    return f"""## MobileNetV1-DNW

Width 0.225, trained for 4 epochs on digits at 16 pixels ({accuracy:.1%} of the test images): five graphs with 159,000
of 7.0 million candidates. The recording of {len(recording)} moments takes {size / 1e6:.1f} MB. Stage 4 as a matrix
whose cells never reach over a block, with the share of the candidates that is real in numbers:

{shown("Stage 4 as a matrix", "stage4")}

Stage 2, with the same share of the edges between any two blocks:

{shown("Stage 2 as nodes and edges", "stage2")}

{shown("How stage 4 changed", "stage4-evolution")}
"""


def layers() -> str:
    """Draw sparse layers."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10)),
    )
    sparsify(model, 0.1, RigL(every=10), skip="0", distribution="erdos_renyi_kernel")
    recording, accuracy = train(model, 12)
    save(plot_layers(model, epoch=12), "layers")
    save(plot_evolution(recording["7.weight"]), "layer-evolution")
    return f"""## Sparse layers

A small network with 10% of its weights, by RigL with a round every 10 steps: {accuracy:.1%} of the test images. Each
layer is a block.

{shown("Sparse layers as blocks", "layers")}

{shown("How the largest layer changed", "layer-evolution")}
"""


def main() -> None:
    """Draw everything."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    parts = [static(), cycles(), stages(), layers()]
    head = """# Gallery

Pictures of real runs on scikit-learn's digits, all made by `make gallery`. [Looking at wirings](wirings.md) shows how
to draw them and explains the colours.
"""
    (ROOT / "docs" / "gallery.md").write_text("\n".join([head, *parts]))


if __name__ == "__main__":
    main()

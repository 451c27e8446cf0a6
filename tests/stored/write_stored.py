"""Writes the files of this directory: those of a short run, and what they must give when they are read again.

Run once for a format, by hand: ``PYTHONPATH=. python tests/stored/write_stored.py``. Later versions read these files as
they are; files of a new format stand beside them.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import dnw_graph
from dnw_graph import NeuralGraph, RigL, compact, sparsify
from dnw_graph.checkpoint import model_weights
from dnw_graph.compaction import save_compact
from dnw_graph.models import create_model
from dnw_graph.training import RunOptions, read_checkpoint, run
from dnw_graph.visualize import Recording

HERE = Path(__file__).parent


def create(num_classes: int, image_size: int) -> nn.Module:
    graph = NeuralGraph((3, 5, 4), 17, wiring=RigL(every=2), node_function=nn.Tanh(), name="graph")
    model = nn.Sequential(graph, nn.Conv2d(4, num_classes, 2, dilation=7), nn.Flatten())
    sparsify(model[1], 0.25, "dnw")
    return model


def images(image_size: int) -> Tensor:
    """Two images, the same everywhere."""
    return torch.arange(2 * 3 * image_size**2).sin().view(2, 3, image_size, image_size)


def scores(model: nn.Module, image_size: int) -> list[list[float]]:
    with torch.inference_mode():
        return [[round(score, 4) for score in each] for each in model.eval()(images(image_size)).flatten(1).tolist()]


def edges(recording: Recording) -> dict[str, list[list[int]]]:
    """The real edges of every graph at every moment."""
    return {
        name: [graph.edges(moment).tolist() for moment in range(len(recording))]
        for name, graph in recording.graphs.items()
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        fixed = {"image_size": 8, "batch_size": 256, "epochs": 1, "accelerator": "cpu", "workers": 0}
        run(create, {}, RunOptions(**fixed, lr=0.1, record_every=1, output=name))
        for file in ("last.ckpt", "wiring.recording"):
            shutil.copy(Path(name, file), HERE)
    model = create(10, 8)
    model.load_state_dict(model_weights(read_checkpoint(HERE / "last.ckpt")))
    torch.save(model.state_dict(), HERE / "state.pt")
    save_compact(compact(model[:2].eval()), HERE / "compact.safetensors")
    pretrained = {}
    for each in dnw_graph.pretrained():
        shipped = create_model(each.name, pretrained=True)
        pretrained[each.name] = scores(shipped, shipped.preprocess.image_size)
    expected = {
        "scores": scores(model, 8),
        "edges": edges(Recording.load(HERE / "wiring.recording")),
        "pretrained": pretrained,
    }
    (HERE / "expected.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main()

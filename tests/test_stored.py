"""Files of earlier versions, in ``stored``, and shipped models: they are read, and give what they gave.

``stored/write_stored.py`` wrote them, at version 0.1.0: checkpoint format 2, compact files 3, recordings 1.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).with_name("stored")))
from write_stored import create, edges, images, scores

import dnw_graph
from dnw_graph.checkpoint import model_weights
from dnw_graph.compaction import load_compact
from dnw_graph.models import create_model
from dnw_graph.ranking import rankings
from dnw_graph.training import read_checkpoint
from dnw_graph.visualize import Recording

STORED = Path(__file__).with_name("stored")
EXPECTED = json.loads((STORED / "expected.json").read_text())


def same_scores(model, image_size, expected):
    found = torch.tensor(scores(model, image_size))
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("file", ["last.ckpt", "state.pt"])
def test_weights(file):
    model = create(10, 8)
    path = STORED / file
    checkpoint = file == "last.ckpt"
    model.load_state_dict(model_weights(read_checkpoint(path)) if checkpoint else torch.load(path, weights_only=True))
    same_scores(model, 8, EXPECTED["scores"])
    now = [graph.real_index.tolist() for _, graph in rankings(model)]
    assert now == [moments[-1] for moments in EXPECTED["edges"].values()]


def test_a_compact_file():
    same_scores(load_compact(STORED / "compact.safetensors"), 8, EXPECTED["scores"])


def test_a_recording():
    recording = Recording.load(STORED / "wiring.recording", create(10, 8))
    assert [moment.step for moment in recording.moments] == [0, 1, 2, 3, 4, 5]
    assert edges(recording) == EXPECTED["edges"]
    first, *_, last = EXPECTED["edges"]["graph"]
    assert first != last


@pytest.mark.parametrize("name", [each.name for each in dnw_graph.pretrained()])
def test_a_shipped_model(name):
    model = create_model(name, pretrained=True)
    size = model.preprocess.image_size
    assert model(images(size)).std() > 0.1
    same_scores(model, size, EXPECTED["pretrained"][name])


def test_files_are_small():
    assert all(path.stat().st_size < 20_000 for path in STORED.iterdir() if path.is_file())

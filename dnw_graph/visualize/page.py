"""An interactive page on how wirings changed, one self-contained file."""

from __future__ import annotations

import base64
import json
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnw_graph.arguments import checked
from dnw_graph.visualize import style
from dnw_graph.visualize.matrices import Cells, arrange
from dnw_graph.visualize.recorded_graph import RecordedGraph
from dnw_graph.visualize.recording import Recording
from dnw_graph.whole_file import write_whole


@checked
def save_page(recording: Recording | RecordedGraph, path: str | Path) -> None:
    """Write an interactive page on a recording, one self-contained HTML file.

    A slider, arrow keys and a button move through time. Graphs with few edges are drawn as nodes and edges, others as
    matrices; you can switch between both. The page describes what is under the mouse: for a node its block, its degrees
    and whether it is live; for an edge its weight, if known, and its birth; for a cell how many of its candidates are
    real. Edges born and gone at the moment have their own colours. Nodes of graphs with cycles are ordered by their
    distance from the inputs at the last moment.

    Args:
        recording: A recording, or one graph of it.
        path: The file.

    Raises:
        InputError: If the file cannot be written.
    """
    write_whole(Path(path), page(recording).encode(), "path")


def page(recording: Recording | RecordedGraph) -> str:
    """Return the page that :func:`save_page` writes."""
    graphs = [recording] if isinstance(recording, RecordedGraph) else list(recording.graphs.values())
    colours = {name: getattr(style, name) for name in ("POSITIVE", "NEGATIVE", "BORN", "GONE", "KEPT", "LIVE", "DEAD")}
    colours |= {"IMPOSSIBLE": style.IMPOSSIBLE, "FEEDBACK": style.FEEDBACK, "DENSITY": style.DENSITY}
    content = json.dumps({"colours": colours, "graphs": [_content(graph) for graph in graphs]}, separators=(",", ":"))
    template = resources.files("dnw_graph.visualize").joinpath("page.html").read_text("utf-8")
    # A name must not end the script.
    return template.replace("/*DATA*/", content.replace("<", "\\u003c"))


def _content(graph: RecordedGraph) -> dict[str, Any]:
    data = graph.to_data()
    arrangement = arrange(data)
    cells = Cells(data, arrangement)
    place = torch.empty(data.num_nodes, dtype=torch.long)
    place[arrangement.order] = torch.arange(data.num_nodes)
    edge, birth, death = graph.lives()
    source, target = graph.pairs(edge)
    weights = [graph.weights(moment) for moment in range(len(graph))]
    largest = [None if weight is None else float(np.abs(weight).max(initial=1e-12)) for weight in weights]
    known = [weight for weight in weights if weight is not None]
    return {
        "name": graph.name,
        "rule": graph.rule,
        "dynamic": style.is_dynamic(data),
        "lines": data.num_edges <= 1500 and graph.dynamics != "layers",
        "moments": [[moment.step, moment.epoch] for moment in graph.moments],
        "candidates": style.num_candidates(data),
        "groups": list(zip(arrangement.names, arrangement.sizes, strict=True)),
        "numNodes": data.num_nodes,
        "bounds": cells.bounds,
        "place": _base64(place, np.uint32),
        "cell": _base64(cells.cell, np.uint32),
        "cellCandidates": _base64(cells.candidates, np.float32),
        "source": _base64(source, np.uint32),
        "target": _base64(target, np.uint32),
        "birth": _base64(birth, np.uint32),
        "death": _base64(death, np.uint32),
        "live": _base64(np.array([graph.live(moment) for moment in range(len(graph))]), np.uint8),
        "largest": largest,
        "weights": _base64(np.concatenate([*known, np.empty(0)]), np.float16),
    }


def _base64(values: Any, kind: Any) -> str:
    return base64.b64encode(np.ascontiguousarray(np.asarray(values), dtype=kind).tobytes()).decode()

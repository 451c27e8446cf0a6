"""Recordings of wirings over time: which edges were born and which are gone, from one moment to the next."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from dnw_graph._compat import unwrapped
from dnw_graph.analysis.cost import live_nodes, neural_graphs
from dnw_graph.arguments import check, checked, require, shown
from dnw_graph.errors import InputError, unknown_name
from dnw_graph.neural_graph import NeuralGraph
from dnw_graph.nodes import Nodes
from dnw_graph.ranking import Ranking
from dnw_graph.sparse_layers import weight_graphs
from dnw_graph.structure import match
from dnw_graph.visualize.recorded_graph import QUANTILES, Change, Moment, RecordedGraph
from dnw_graph.whole_file import write_whole
from dnw_graph.wirings import wiring_name

MAGIC = b"dnw_graph recording 1\n"
_DIGEST, _LENGTH = 16, 8
_HEAD = {"every": int, "moments": list, "graphs": list}
_GRAPH = {"name": str, "rule": str, "dynamics": str, "nodes": list, "candidate_blocks": list, "changes": list}


class Recording:
    """Records how the wirings of a model change during training, with two lines in a training loop.

    For every neural graph and sparse layer it stores the edges born and gone since the previous moment, quantiles of
    |w|, the live nodes, and in graphs with up to 4,096 edges the weights. A recording takes one to two bytes for every
    edge that is born or gone; per moment, up to two bytes for every edge of a graph with up to 4,096 edges, and up to a
    bit for every node of a neural graph. It does not change the training.

    Args:
        model: The model, as it is before the first step.
        every: Interval of moments in steps; :meth:`add` skips other steps.
        step: Number of optimiser steps so far.

    Attributes:
        graphs: The graphs by name.
        moments: The recorded moments.

    Raises:
        InputError: If the model has neither a neural graph nor a sparse layer.

    Examples:
        >>> import torch
        >>> from dnw_graph import NeuralGraph
        >>> from dnw_graph.visualize import Recording
        >>> model = NeuralGraph((4, 8, 2), 20, name="body")
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> recording = Recording(model)
        >>> for step in range(3):
        ...     model(torch.randn(8, 4, 5, 5)).square().mean().backward()
        ...     optimizer.step()
        ...     recording.add(step + 1)
        >>> len(recording), len(recording.graphs["body"].edges(0))
        (4, 20)
    """

    @checked
    def __init__(self, model: nn.Module, every: int = 1, step: int = 0) -> None:
        require(every >= 1, "Recording: every", "an integer >= 1", every)
        require(step >= 0, "Recording: step", "an integer >= 0", step)
        self.every = every
        self.moments: list[Moment] = []
        self.graphs = {name: _recorded(name, graph, self.moments) for name, graph in _graphs_of(model).items()}
        if not self.graphs:
            raise InputError(f"{type(model).__name__} has neither a neural graph nor a sparse layer to record")
        self.model: nn.Module | None = model
        self._add(Moment(step, 0.0 if not step else None))

    def __len__(self) -> int:
        return len(self.moments)

    def __getitem__(self, name: str) -> RecordedGraph:
        if name not in self.graphs:
            raise unknown_name("graph", name, self.graphs)
        return self.graphs[name]

    @checked
    def add(self, step: int, epoch: float | None = None) -> None:
        """Record the changes since the previous moment, if the step is a multiple of ``every``.

        Args:
            step: Number of optimiser steps so far; more than at the previous moment.
            epoch: Number of epochs so far, for titles.

        Raises:
            InputError: If the step is not after the previous moment, the model no longer has the recorded graphs, or
                the recording was loaded without a model.
        """
        last = self.moments[-1].step
        require(step > last, "Recording.add: step", f"a number of steps above that of the last moment, {last}", step)
        if step % self.every == 0:
            self._add(Moment(step, epoch))

    @torch.no_grad()
    def _add(self, moment: Moment) -> None:
        if self.model is None:
            raise InputError("this recording was loaded without a model: Recording.load(path, model) continues one")
        graphs = _graphs_of(self.model)
        _check_same(self, graphs, "the graphs of the model have changed (Recording(model) begins another recording)")
        real = {name: graph.real_index for name, graph in graphs.items()}
        live = live_nodes(unwrapped(self.model), real)
        changes = []
        for name, graph in graphs.items():
            weight = graph.wiring.values(graph.view().weight)[real[name]].float().cpu().numpy()
            nodes = live[name].cpu().numpy() if name in live else None
            now = real[name].cpu().numpy()
            changes.append((self.graphs[name], self.graphs[name].change_to(now, weight, nodes), now))
        # Append only now, so that nothing is recorded if a graph fails.
        self.moments.append(moment)
        for recorded, change, now in changes:
            recorded.add(change, now)

    @checked
    def save(self, path: str | Path) -> None:
        """Write the recording to a file atomically.

        Raises:
            InputError: If the file cannot be written.
        """
        write_whole(Path(path), self.to_bytes(), "path")

    @classmethod
    @checked
    def load(cls, path: str | Path, model: nn.Module | None = None) -> Recording:
        """Read a recording. The file contains no code; a checksum detects damage.

        Args:
            path: The file.
            model: The model, to continue the recording; None to only look at it.

        Raises:
            InputError: If the file cannot be read, is damaged, is not a recording, or has other graphs than the model.
        """
        try:
            content = Path(path).read_bytes()
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({error}): give a file that Recording.save wrote") from error
        return cls.from_bytes(content, model, str(path))

    def to_bytes(self) -> bytes:
        """Return the content of the file that :meth:`save` writes."""
        graphs = [
            {
                "name": graph.name,
                "rule": graph.rule,
                "dynamics": graph.dynamics,
                "nodes": [graph.nodes.blocks, graph.nodes.num_inputs, graph.nodes.num_outputs],
                "candidate_blocks": graph.candidate_blocks,
                "changes": [[c.born, c.gone, len(c.content), *c.magnitudes] for c in graph.changes],
            }
            for graph in self.graphs.values()
        ]
        moments = [[moment.step, moment.epoch] for moment in self.moments]
        head = json.dumps({"every": self.every, "moments": moments, "graphs": graphs}, separators=(",", ":")).encode()
        content = [change.content for graph in self.graphs.values() for change in graph.changes]
        rest = b"".join([len(head).to_bytes(_LENGTH, "little"), head, *content])
        return MAGIC + _digest(rest) + rest

    @classmethod
    @checked
    def from_bytes(cls, content: bytes, model: nn.Module | None = None, name: str = "the recording") -> Recording:
        """Return a recording from the result of :meth:`to_bytes`.

        Args:
            content: The bytes.
            model: As in :meth:`load`.
            name: Name of the recording in messages.
        """
        start = len(MAGIC) + _DIGEST
        rest = content[start:]
        if content[: len(MAGIC)] != MAGIC:
            raise InputError(f"{name} is not a recording: give a file that Recording.save wrote")
        if content[len(MAGIC) : start] != _digest(rest):
            raise InputError(f"{name} is damaged: its checksum does not match its content")
        recording = cls.__new__(cls)
        recording.model = model
        recording._read(rest, name)
        if model is not None:
            _check_same(recording, _graphs_of(model), f"{name} is of another model")
        return recording

    def _read(self, rest: bytes, name: str) -> None:
        at = _LENGTH + int.from_bytes(rest[:_LENGTH], "little")
        try:
            head = json.loads(rest[_LENGTH:at])
        except (ValueError, RecursionError) as error:
            raise InputError(f"{name} is damaged: its header is not JSON ({error})") from error
        match(head, _HEAD, name)
        require(head["every"] >= 1, f"{name}: every", "an integer >= 1", head["every"])
        for moment in head["moments"]:
            match(moment, [int, float | int | None], f"{name}: a moment")
        self.every = head["every"]
        self.moments = [Moment(*moment) for moment in head["moments"]]
        steps = [moment.step for moment in self.moments]
        require(
            bool(steps) and steps == sorted({*steps}), f"{name}: moments", "at least one, in ascending order", steps
        )
        self.graphs = {}
        for each in head["graphs"]:
            graph, lengths = _read_graph(each, self.moments, name)
            for number, length in enumerate(lengths):
                graph.changes[number] = replace(graph.changes[number], content=rest[at : at + length])
                at += length
            self.graphs[graph.name] = graph
        if at != len(rest) or len(self.graphs) != len(head["graphs"]):
            raise InputError(f"{name} is damaged: its length does not match its header, or a graph occurs twice")


def _read_graph(head: object, moments: list[Moment], file: str) -> tuple[RecordedGraph, list[int]]:
    """Return a graph without the content of its changes, and the length of each content.

    Args:
        head: The graph's entry in the header of the file.
        moments: The moments of the recording.
        file: The file, for messages.
    """
    match(head, _GRAPH, f"{file}: a graph")
    assert isinstance(head, dict)
    name = f"{file}: {head['name']}"
    match(head["nodes"], [list, int, int], f"{name}: nodes")
    for block in head["candidate_blocks"]:
        match(block, [int] * 4, f"{name}: a block of candidates")
    blocks, inputs, outputs = head["nodes"]
    candidate_blocks = tuple(map(tuple, head["candidate_blocks"]))
    try:
        nodes = Nodes(check("nodes", tuple(blocks), tuple[int, ...]), inputs, outputs)
        graph = RecordedGraph(head["name"], head["rule"], head["dynamics"], nodes, candidate_blocks, moments)
        most = graph.candidates.num_candidates
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    lengths, real = [], 0
    require(len(head["changes"]) == len(moments), f"{name}: changes", f"{len(moments)}, one a moment", head["changes"])
    for change in head["changes"]:
        match(change, [*[int] * 3, *[float | int] * len(QUANTILES)], f"{name}: a change")
        born, gone, length, *magnitudes = change
        real += born - gone
        fits = min(change[:3]) >= 0 and max(born, gone) <= most and 0 <= real <= most
        require(fits, f"{name}: a change", f"up to {most} edges", change)
        require(magnitudes == sorted(map(abs, magnitudes)), f"{name}: |w|", "ascending quantiles", magnitudes)
        graph.changes.append(Change(born, gone, real, tuple(magnitudes), b""))
        lengths.append(length)
    return graph, lengths


def _graphs_of(model: nn.Module) -> dict[str, Ranking]:
    """Return the neural graphs and the graphs of sparse layers of a model, each once."""
    model = unwrapped(model)
    names: dict[Ranking, str] = {}
    for name, graph in [*neural_graphs(model).items(), *weight_graphs(model).items()]:
        names.setdefault(graph, name)
    return {name: graph for graph, name in names.items()}


def _recorded(name: str, graph: Ranking, moments: list[Moment]) -> RecordedGraph:
    blocks = [(b.sources.start, b.sources.stop, b.targets.start, b.targets.stop) for b in graph.candidates.blocks]
    if isinstance(graph, NeuralGraph):
        nodes, dynamics = graph.nodes, type(graph.dynamics).__name__
    else:
        nodes, dynamics = Nodes.in_blocks([n for a, b, c, d in blocks for n in (b - a, d - c)]), "layers"
    return RecordedGraph(name, wiring_name(type(graph.wiring)), dynamics, nodes, tuple(blocks), moments)


def _check_same(recording: Recording, graphs: dict[str, Ranking], fault: str) -> None:
    """Refuse graphs of a model that are not those of a recording; the message begins with the fault."""
    given = [_recorded(name, graph, recording.moments) for name, graph in graphs.items()]
    for graph, recorded in zip(given, recording.graphs.values(), strict=False):
        for attribute in ("name", "dynamics", "nodes", "candidate_blocks"):
            if (own := getattr(graph, attribute)) != (other := getattr(recorded, attribute)):
                there = f"{attribute} is {shown(other)} in the recording"
                raise InputError(f"{fault}: {there}, {shown(own)} in the model")
    if len(given) != len(recording.graphs):
        raise InputError(f"{fault}: the recording has {len(recording.graphs)} graphs, the model {len(given)}")


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST).digest()

"""Recordings of wirings over time: which edges were born and which are gone, from one moment to the next."""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import nn

from dnw_graph._compat import import_pyg, unwrapped
from dnw_graph.analysis.cost import live_nodes, neural_graphs
from dnw_graph.arguments import checked, require
from dnw_graph.candidates import CandidateEdges
from dnw_graph.errors import InputError, unknown_name
from dnw_graph.neural_graph import NeuralGraph
from dnw_graph.nodes import Nodes
from dnw_graph.ranking import Ranking
from dnw_graph.sparse_layers import weight_graphs
from dnw_graph.whole_file import write_whole
from dnw_graph.wirings import wiring_name

if TYPE_CHECKING:
    import torch_geometric.data

MAGIC = b"dnw_graph recording 1\n"
_DIGEST, _LENGTH = 16, 8
# The weights of all real edges are kept of graphs with at most this many.
MOST_WEIGHTS = 4096
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Which quantiles of |w| over the real edges are recorded."""


@dataclass(frozen=True)
class Moment:
    """When something was recorded.

    Attributes:
        step: Optimiser steps done.
        epoch: Epochs done, or None if nobody said.
    """

    step: int
    epoch: float | None


@dataclass(frozen=True)
class _Change:
    """What became of a graph between two moments.

    Attributes:
        born: Number of edges that are real now and were not before.
        gone: Number of edges that were real.
        magnitudes: Quantiles of |w| over the real edges.
        content: Both lists of edges, live nodes and weights, compressed.
    """

    born: int
    gone: int
    magnitudes: tuple[float, ...]
    content: bytes


@dataclass
class RecordedGraph:
    """How one wiring changed over time.

    Attributes:
        name: Name of the graph, or of the layer's weight.
        rule: Name of the rule.
        dynamics: ``"Static"``, ``"Discrete"``, ``"Continuous"``, or ``"layers"`` for the weights of sparse layers.
        nodes: The nodes. Of a layer the inputs are pairs of an input channel and a position in the kernel.
        candidate_blocks: The candidates as blocks: first source, end of the sources, first target, end of the targets.
        moments: When something was recorded, the same for all graphs of a recording.
    """

    name: str
    rule: str
    dynamics: str
    nodes: Nodes
    candidate_blocks: tuple[tuple[int, int, int, int], ...]
    moments: list[Moment]
    _changes: list[_Change] = field(default_factory=list, repr=False)
    _last: tuple[int, np.ndarray] = field(default=(-1, np.empty(0, np.int64)), repr=False)

    @cached_property
    def candidates(self) -> CandidateEdges:
        """The candidates without their weights."""
        with torch.device("meta"):
            return CandidateEdges(
                [(range(a, b), range(c, d)) for a, b, c, d in self.candidate_blocks], self.nodes.num_nodes
            )

    def __len__(self) -> int:
        return len(self._changes)

    def born(self, moment: int) -> Int[np.ndarray, " born"]:
        """Return the flat indices of the edges that are real at a moment and were not at the one before."""
        return self._parts(moment)[0]

    def gone(self, moment: int) -> Int[np.ndarray, " gone"]:
        """Return the flat indices of the edges that were real at the moment before and are not at this one."""
        return self._parts(moment)[1]

    def live(self, moment: int) -> Bool[np.ndarray, " nodes"]:
        """Return which nodes were live: a path of real edges led to an output of the model.

        In a layer, outputs and inputs with an edge are.
        """
        if self.dynamics != "layers":
            return self._parts(moment)[2]
        live = np.zeros(self.nodes.num_nodes, bool)
        for _, _, first, end in self.candidate_blocks:
            live[first:end] = True
        live[self.pairs(self.edges(moment))[0]] = True
        return live

    def weights(self, moment: int) -> Float[np.ndarray, " edges"] | None:
        """Return the weights of the real edges, rounded to half precision; None in a graph of more than 4,096 edges."""
        return self._parts(moment)[3]

    def magnitudes(self) -> Float[np.ndarray, "moments quantiles"]:
        """Return the 5th, 25th, 50th, 75th and 95th percentile of |w| over the real edges, at every moment."""
        return np.array([change.magnitudes for change in self._changes])

    def swaps(self) -> Int[np.ndarray, "moments 2"]:
        """Return how many edges were born and are gone at every moment; at the first one none."""
        return np.array([(0, 0), *((change.born, change.gone) for change in self._changes[1:])])

    def edges(self, moment: int) -> Int[np.ndarray, " edges"]:
        """Return the flat indices of the real edges, ascending."""
        moment = self._number(moment)
        at, edges = self._last
        if moment < at:
            at, edges = -1, np.empty(0, np.int64)
        for number in range(at + 1, moment + 1):
            born, gone = self._parts(number)[:2]
            edges = _differences(gone, np.sort(np.concatenate([edges, born]), kind="stable"))[0]
        self._last = moment, edges
        return edges

    def pairs(self, index: Int[np.ndarray, " edges"]) -> Int[np.ndarray, "2 edges"]:
        """Return the nodes (u, v) of flat indices: row 0 the sources, row 1 the targets."""
        pairs: np.ndarray = self.candidates.pairs(torch.from_numpy(index)).numpy()
        return pairs

    def life_spans(self) -> tuple[Int[np.ndarray, " edges"], Bool[np.ndarray, " edges"]]:
        """Return for how many steps every edge was real, once per life, and whether it ended before the recording."""
        steps = np.array([moment.step for moment in self.moments])
        _, birth, death = self.lives()
        ended = death < len(self)
        return steps[np.minimum(death, len(self) - 1)] - steps[birth], ended

    def lives(self) -> tuple[Int[np.ndarray, " lives"], Int[np.ndarray, " lives"], Int[np.ndarray, " lives"]]:
        """Return every life of an edge: its flat index, the moment of its birth, and the moment at which it was gone.

        They are in the order of the flat indices, so that those that are real at a moment are in the order of
        :meth:`edges`. The last moment of an edge that is real at the end is ``len(graph)``.
        """
        (edge, birth), (gone, death) = (
            _in_order([part(moment) for moment in range(len(self))]) for part in (self.born, self.gone)
        )
        first, rank = np.searchsorted(gone, edge), np.arange(len(edge)) - np.searchsorted(edge, edge)
        ended = rank < np.searchsorted(gone, edge, side="right") - first
        found = np.full(len(edge), len(self))
        found[ended] = death[(first + rank)[ended]]
        return edge, birth, found

    def to_data(self, moment: int = -1) -> torch_geometric.data.Data:
        """Return the wiring at a moment as a PyG graph, as :meth:`~dnw_graph.NeuralGraph.to_data` does for now.

        It holds ``step`` and ``epoch`` besides; ``edge_weight`` is missing where no weights were recorded.
        """
        moment = self._number(moment)
        weights, when = self.weights(moment), self.moments[moment]
        known = {"edge_weight": None if weights is None else torch.from_numpy(weights), "epoch": when.epoch}
        return import_pyg().data.Data(
            edge_index=torch.from_numpy(self.pairs(self.edges(moment))),
            num_nodes=self.nodes.num_nodes,
            **self.nodes.attributes(),
            live_mask=torch.from_numpy(self.live(moment)),
            candidate_blocks=torch.tensor([self.candidate_blocks]),
            name=self.name,
            rule=self.rule,
            dynamics=self.dynamics,
            step=when.step,
            **{key: value for key, value in known.items() if value is not None},
        )

    def _number(self, moment: int) -> int:
        if not -len(self) <= moment < len(self):
            raise InputError(f"{self.name}: moments are 0 … {len(self) - 1}, or -1 for the last one; got {moment}")
        return moment % len(self)

    def _parts(self, moment: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        change = self._changes[self._number(moment)]
        sizes = 4 * change.born, 4 * change.gone, self._live_bytes
        content = zlib.decompress(change.content)
        at = np.cumsum((0, *sizes))
        born, gone, live = (content[a:b] for a, b in pairwise(at))
        weights = _planes_back(content[at[-1] :], "<f2").astype(np.float32) if at[-1] < len(content) else None
        mask = np.unpackbits(np.frombuffer(live, np.uint8), count=8 * len(live))[: self.nodes.num_nodes].astype(bool)
        return _indices(born), _indices(gone), mask, weights

    @property
    def _live_bytes(self) -> int:
        return 0 if self.dynamics == "layers" else (self.nodes.num_nodes + 7) // 8

    def _change_to(self, now: np.ndarray, weight: np.ndarray, live: np.ndarray | None) -> _Change:
        before = self.edges(-1) if self._changes else now[:0]
        born, gone = _differences(before, now)
        content = _planes(_steps(born)) + _planes(_steps(gone))
        if live is not None:
            content += np.packbits(live).tobytes()
        if len(now) <= MOST_WEIGHTS:
            content += _planes(weight.astype("<f2"))
        magnitudes = tuple(float(f"{each:.4g}") for each in _quantiles(np.sort(np.abs(weight))))
        return _Change(len(born), len(gone), magnitudes, zlib.compress(content))


class Recording:
    """How the wirings of a model change while it trains: two lines in a loop of one's own.

    The neural graphs and the sparse layers of a model are recorded, each with the edges born and gone since the moment
    before, quantiles of |w|, and the live nodes. Weights are kept of graphs with up to 4,096 edges. So a recording
    takes one to two bytes for every edge that is born or gone. Nothing of training is changed.

    Args:
        model: The model, as it is before the first step.
        every: Steps from one moment to the next; :meth:`add` leaves others out.
        step: Optimiser steps done so far.

    Attributes:
        graphs: The graphs by name.
        moments: When something was recorded.

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
        require(every >= 1, "Recording: every", "an integer from 1 up", every)
        require(step >= 0, "Recording: step", "an integer from 0 up", step)
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
        """Record what has changed, if it is time.

        Args:
            step: Optimiser steps done; more than at the moment before.
            epoch: Epochs done, for titles.

        Raises:
            InputError: If the step is none, or the recording was loaded without a model.
        """
        last = self.moments[-1].step
        require(step > last, "Recording.add: step", f"a number of steps above that of the last moment, {last}", step)
        if step % self.every == 0:
            self._add(Moment(step, epoch))

    @torch.no_grad()
    def _add(self, moment: Moment) -> None:
        if self.model is None:
            raise InputError("this recording was loaded without a model: Recording.load(path, model) goes on with one")
        graphs = _graphs_of(self.model)
        real = {name: graph.real_index for name, graph in graphs.items()}
        live = live_nodes(unwrapped(self.model), real)
        changes = []
        for name, graph in graphs.items():
            weight = graph.wiring.values(graph.view().weight)[real[name]].float().cpu().numpy()
            nodes = live[name].cpu().numpy() if name in live else None
            now = real[name].cpu().numpy()
            changes.append((self.graphs[name], self.graphs[name]._change_to(now, weight, nodes), now))
        # Only now: nothing is recorded where one of them fails.
        self.moments.append(moment)
        for recorded, change, now in changes:
            recorded._changes.append(change)
            recorded._last = len(recorded) - 1, now

    @checked
    def save(self, path: str | Path) -> None:
        """Write the recording to a file, whole or not at all.

        Raises:
            InputError: If the file cannot be written.
        """
        write_whole(Path(path), self.to_bytes(), "path")

    @classmethod
    @checked
    def load(cls, path: str | Path, model: nn.Module | None = None) -> Recording:
        """Read a recording. The file has no code in it, and a checksum that tells damage.

        Args:
            path: The file.
            model: The model, to go on recording; None to look at what is there.

        Raises:
            InputError: If the file cannot be read, is damaged or no recording, or has other graphs than the model.
        """
        try:
            content = Path(path).read_bytes()
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({error}): give a file that Recording.save wrote") from error
        return cls.from_bytes(content, model, str(path))

    def to_bytes(self) -> bytes:
        """Return what :meth:`save` writes; a function of what was recorded."""
        graphs = [
            {
                "name": graph.name,
                "rule": graph.rule,
                "dynamics": graph.dynamics,
                "nodes": [graph.nodes.blocks, graph.nodes.num_inputs, graph.nodes.num_outputs],
                "candidate_blocks": graph.candidate_blocks,
                "changes": [[c.born, c.gone, len(c.content), *c.magnitudes] for c in graph._changes],
            }
            for graph in self.graphs.values()
        ]
        moments = [[moment.step, moment.epoch] for moment in self.moments]
        head = json.dumps({"every": self.every, "moments": moments, "graphs": graphs}, separators=(",", ":")).encode()
        content = [change.content for graph in self.graphs.values() for change in graph._changes]
        rest = b"".join([len(head).to_bytes(_LENGTH, "little"), head, *content])
        return MAGIC + _digest(rest) + rest

    @classmethod
    def from_bytes(cls, content: bytes, model: nn.Module | None = None, name: str = "the recording") -> Recording:
        """Return a recording from what :meth:`to_bytes` returned.

        Args:
            content: The bytes.
            model: As in :meth:`load`.
            name: What messages call it.
        """
        start = len(MAGIC) + _DIGEST
        rest = content[start:]
        if content[: len(MAGIC)] != MAGIC:
            raise InputError(f"{name} is no recording: give a file that Recording.save wrote")
        if content[len(MAGIC) : start] != _digest(rest):
            raise InputError(f"{name} is damaged: its checksum is not that of its content")
        try:
            recording = cls._read(rest, model)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{name} is damaged ({type(error).__name__}): it lacks a part") from error
        if model is not None:
            _check_same(recording, model, name)
        return recording

    @classmethod
    def _read(cls, rest: bytes, model: nn.Module | None) -> Recording:
        size = int.from_bytes(rest[:_LENGTH], "little")
        head = json.loads(rest[_LENGTH : _LENGTH + size])
        recording = cls.__new__(cls)
        recording.every, recording.model = head["every"], model
        recording.moments = [Moment(*moment) for moment in head["moments"]]
        recording.graphs, at = {}, _LENGTH + size
        for each in head["graphs"]:
            blocks, inputs, outputs = each["nodes"]
            graph = RecordedGraph(
                each["name"],
                each["rule"],
                each["dynamics"],
                Nodes(tuple(blocks), inputs, outputs),
                tuple(map(tuple, each["candidate_blocks"])),
                recording.moments,
            )
            for born, gone, length, *magnitudes in each["changes"]:
                graph._changes.append(_Change(born, gone, tuple(magnitudes), rest[at : at + length]))
                at += length
            recording.graphs[graph.name] = graph
        return recording


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


def _check_same(recording: Recording, model: nn.Module, name: str) -> None:
    given = [_recorded(each, graph, recording.moments) for each, graph in _graphs_of(model).items()]
    for graph, recorded in zip(given, recording.graphs.values(), strict=False):
        for attribute in ("name", "dynamics", "nodes", "candidate_blocks"):
            if (own := getattr(graph, attribute)) != (other := getattr(recorded, attribute)):
                raise InputError(f"{name} is of another model: {attribute} is {other!r} there, {own!r} in the model")
    if len(given) != len(recording.graphs):
        raise InputError(f"{name} has {len(recording.graphs)} graphs, the model {len(given)}")


def _differences(before: np.ndarray, now: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what is in the second of two ascending lists alone, and what is in the first alone."""
    # The lowest bit tells the lists apart. A stable sort merges two ascending parts in linear time.
    both = np.sort(np.concatenate([2 * before, 2 * now + 1]), kind="stable")
    twice = np.diff(both >> 1) == 0
    alone = both[~(np.append(twice, False) | np.append(False, twice))]
    return alone[alone & 1 == 1] >> 1, alone[alone & 1 == 0] >> 1


def _quantiles(ascending: np.ndarray) -> np.ndarray:
    """Return ``QUANTILES``, as ``np.quantile`` does, of what is in order already."""
    if not len(ascending):
        return np.zeros(len(QUANTILES))
    return np.interp(np.multiply(QUANTILES, len(ascending) - 1), np.arange(len(ascending)), ascending)


def _in_order(lists: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return edges of several moments in their order, each with its moment."""
    edge = np.concatenate(lists)
    moment = np.repeat(np.arange(len(lists)), [len(each) for each in lists])
    order = np.argsort(edge, kind="stable")
    return edge[order], moment[order]


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST).digest()


def _steps(index: np.ndarray) -> np.ndarray:
    return np.diff(index, prepend=0).astype("<u4")


def _indices(content: bytes) -> np.ndarray:
    return np.cumsum(_planes_back(content, "<u4"), dtype=np.int64)


def _planes(values: np.ndarray) -> bytes:
    """Return numbers with their lowest bytes first, then the next ones: the upper ones, nearly all zero, compress."""
    return values.view(np.uint8).reshape(len(values), values.itemsize).T.tobytes()


def _planes_back(content: bytes, kind: str) -> np.ndarray:
    planes = np.frombuffer(content, np.uint8).reshape(np.dtype(kind).itemsize, -1)
    return np.ascontiguousarray(planes.T).reshape(-1).view(kind)

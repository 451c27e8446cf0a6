"""One wiring over time: its edges at every moment, and how long they lived."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from dnw_graph._compat import import_pyg
from dnw_graph.arguments import checked
from dnw_graph.candidates import CandidateEdges
from dnw_graph.errors import InputError
from dnw_graph.nodes import Nodes

if TYPE_CHECKING:
    import torch_geometric.data

# The weights of all real edges are stored for graphs with at most this many edges.
MOST_WEIGHTS = 4096
# They are stored in half precision.
LARGEST = float(np.finfo(np.float16).max)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Which quantiles of |w| over the real edges are recorded."""


@dataclass(frozen=True)
class Moment:
    """A moment of training at which wirings were recorded.

    Attributes:
        step: Number of optimiser steps so far.
        epoch: Number of epochs so far, or None if unknown.
    """

    step: int
    epoch: float | None


@dataclass(frozen=True)
class Change:
    """The change of a graph from one moment to the next, as it is stored.

    Attributes:
        born: Number of edges that are real now and were not before.
        gone: Number of edges that were real.
        real: Number of edges that are real now.
        magnitudes: Quantiles of |w| over the real edges.
        content: Both lists of edges, live nodes and weights, compressed.
    """

    born: int
    gone: int
    real: int
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
        moments: The recorded moments, the same for all graphs of a recording.
        changes: The change at every moment, compressed.
    """

    name: str
    rule: str
    dynamics: str
    nodes: Nodes
    candidate_blocks: tuple[tuple[int, int, int, int], ...]
    moments: list[Moment]
    changes: list[Change] = field(default_factory=list, repr=False)
    _last: tuple[int, np.ndarray] = field(default=(-1, np.empty(0, np.int64)), repr=False)

    @cached_property
    def candidates(self) -> CandidateEdges:
        """The candidates without their weights."""
        with torch.device("meta"):
            return CandidateEdges(
                [(range(a, b), range(c, d)) for a, b, c, d in self.candidate_blocks], self.nodes.num_nodes
            )

    def __len__(self) -> int:
        return len(self.changes)

    @checked
    def born(self, moment: int) -> Int[np.ndarray, " born"]:
        """Return the flat indices of the edges that are real at a moment and were not at the one before."""
        return self._parts(moment)[0]

    @checked
    def gone(self, moment: int) -> Int[np.ndarray, " gone"]:
        """Return the flat indices of the edges that were real at the moment before and are not at this one."""
        return self._parts(moment)[1]

    @checked
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

    @checked
    def weights(self, moment: int) -> Float[np.ndarray, " edges"] | None:
        """Return the weights of the real edges, rounded to half precision; None in a graph of more than 4,096 edges."""
        return self._parts(moment)[3]

    def magnitudes(self) -> Float[np.ndarray, "moments quantiles"]:
        """Return the 5th, 25th, 50th, 75th and 95th percentile of |w| over the real edges, at every moment."""
        return np.array([change.magnitudes for change in self.changes])

    def swaps(self) -> Int[np.ndarray, "moments 2"]:
        """Return how many edges were born and are gone at every moment; at the first one none."""
        return np.array([(0, 0), *((change.born, change.gone) for change in self.changes[1:])])

    @checked
    def edges(self, moment: int) -> Int[np.ndarray, " edges"]:
        """Return the flat indices of the real edges, ascending."""
        moment = self._number(moment)
        at, edges = self._last
        if moment < at:
            at, edges = -1, np.empty(0, np.int64)
        for number in range(at + 1, moment + 1):
            born, gone = self._parts(number)[:2]
            kept = _differences(gone, edges)[0]
            if len(kept) != len(edges) - len(gone):
                raise self._damaged(number)
            edges = np.sort(np.concatenate([kept, born]), kind="stable")
            if not (np.diff(edges) > 0).all():
                raise self._damaged(number)
        self._last = moment, edges
        return edges

    @checked
    def pairs(self, index: Int[np.ndarray, " edges"]) -> Int[np.ndarray, "2 edges"]:
        """Return the nodes (u, v) of flat indices: row 0 the sources, row 1 the targets."""
        pairs: np.ndarray = self.candidates.pairs(torch.from_numpy(index)).numpy()
        return pairs

    def life_spans(self) -> tuple[Int[np.ndarray, " edges"], Bool[np.ndarray, " edges"]]:
        """Return the number of steps for which each edge was real, once per life, and whether that life has ended."""
        steps = np.array([moment.step for moment in self.moments])
        _, birth, death = self.lives()
        ended = death < len(self)
        return steps[np.minimum(death, len(self) - 1)] - steps[birth], ended

    def lives(self) -> tuple[Int[np.ndarray, " lives"], Int[np.ndarray, " lives"], Int[np.ndarray, " lives"]]:
        """Return every life of an edge: its flat index, the moment of its birth, and the moment at which it was gone.

        Lives are ordered by flat index, so that those of the real edges of a moment have the order of :meth:`edges`.
        For an edge that is real at the end, the last number is ``len(graph)``.
        """
        self.edges(-1)  # refuses inconsistent changes
        (edge, birth), (gone, death) = (
            _in_order([part(moment) for moment in range(len(self))]) for part in (self.born, self.gone)
        )
        first, rank = np.searchsorted(gone, edge), np.arange(len(edge)) - np.searchsorted(edge, edge)
        ended = rank < np.searchsorted(gone, edge, side="right") - first
        found = np.full(len(edge), len(self))
        found[ended] = death[(first + rank)[ended]]
        return edge, birth, found

    @checked
    def to_data(self, moment: int = -1) -> torch_geometric.data.Data:
        """Return the wiring at a moment as a PyG graph, with the content of :meth:`~dnw_graph.NeuralGraph.to_data`.

        It also holds ``step`` and ``epoch``; ``edge_weight`` is missing if weights were not recorded.
        """
        moment = self._number(moment)
        weights, when = self.weights(moment), self.moments[moment]
        known = {"edge_weight": None if weights is None else torch.from_numpy(weights), "epoch": when.epoch}
        return import_pyg().data.Data(
            edge_index=torch.from_numpy(self.pairs(self.edges(moment))),
            num_nodes=self.nodes.num_nodes,
            **self.nodes.attributes(),
            live_mask=torch.from_numpy(self.live(moment)),
            candidate_blocks=[list(self.candidate_blocks)],
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
        change = self.changes[self._number(moment)]
        known = change.real <= MOST_WEIGHTS
        at = np.cumsum((0, 4 * change.born, 4 * change.gone, self._live_bytes, 2 * change.real * known))
        content = _decompressed(change.content, int(at[-1]))
        if len(content) != at[-1]:
            raise self._damaged(moment)
        born, gone, live, planes = (content[a:b] for a, b in pairwise(at))
        edges = _indices(born), _indices(gone)
        weights = _planes_back(planes, "<f2").astype(np.float32) if known else None
        most = self.candidates.num_candidates
        ascending = all((np.diff(each, prepend=-1, append=most) > 0).all() for each in edges)
        if not ascending or not (weights is None or np.isfinite(weights).all()):
            raise self._damaged(moment)
        mask = np.unpackbits(np.frombuffer(live, np.uint8), count=8 * len(live))[: self.nodes.num_nodes].astype(bool)
        return *edges, mask, weights

    def _damaged(self, moment: int) -> InputError:
        return InputError(f"{self.name}: moment {moment} of the recording is damaged: its content and header differ")

    @property
    def _live_bytes(self) -> int:
        return 0 if self.dynamics == "layers" else (self.nodes.num_nodes + 7) // 8

    def change_to(
        self,
        now: Int[np.ndarray, " edges"],
        weight: Float[np.ndarray, " edges"],
        live: Bool[np.ndarray, " nodes"] | None,
    ) -> Change:
        """Return the change of the graph since the last moment; :meth:`add` appends it.

        Args:
            now: The real edges, ascending.
            weight: Their weights.
            live: Which nodes are live; None for a layer.
        """
        before = self.edges(-1) if self.changes else now[:0]
        born, gone = _differences(before, now)
        content = _planes(_steps(born)) + _planes(_steps(gone))
        if live is not None:
            content += np.packbits(live).tobytes()
        if len(now) <= MOST_WEIGHTS:
            content += _planes(weight.clip(-LARGEST, LARGEST).astype("<f2"))
        magnitudes = tuple(float(f"{each:.4g}") for each in _quantiles(np.sort(np.abs(weight))))
        return Change(len(born), len(gone), len(now), magnitudes, zlib.compress(content))

    def add(self, change: Change, now: Int[np.ndarray, " edges"]) -> None:
        """Append what :meth:`change_to` returned for these edges."""
        self.changes.append(change)
        self._last = len(self) - 1, now


def _differences(before: np.ndarray, now: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the elements that are only in the second of two ascending lists, and those only in the first."""
    # The lowest bit identifies the list. A stable sort merges two ascending parts in linear time.
    both = np.sort(np.concatenate([2 * before, 2 * now + 1]), kind="stable")
    new, once = np.diff(both >> 1) != 0, np.ones(len(both), bool)
    once[1:] &= new
    once[:-1] &= new
    alone = both[once]
    return alone[alone & 1 == 1] >> 1, alone[alone & 1 == 0] >> 1


def _quantiles(ascending: np.ndarray) -> np.ndarray:
    """Return ``QUANTILES`` of sorted values, as ``np.quantile`` does."""
    if not len(ascending):
        return np.zeros(len(QUANTILES))
    return np.interp(np.multiply(QUANTILES, len(ascending) - 1), np.arange(len(ascending)), ascending)


def _in_order(lists: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the edges of several moments in ascending order, each with its moment."""
    edge = np.concatenate(lists)
    moment = np.repeat(np.arange(len(lists)), [len(each) for each in lists])
    order = np.argsort(edge, kind="stable")
    return edge[order], moment[order]


def _steps(index: np.ndarray) -> np.ndarray:
    return np.diff(index, prepend=0).astype("<u4")


def _indices(content: bytes) -> np.ndarray:
    return np.cumsum(_planes_back(content, "<u4"), dtype=np.int64)


def _planes(values: np.ndarray) -> bytes:
    """Return the lowest bytes of all numbers, then the next ones: the upper bytes are nearly all zero and compress."""
    return values.view(np.uint8).reshape(len(values), values.itemsize).T.tobytes()


def _planes_back(content: bytes, kind: str) -> np.ndarray:
    planes = np.frombuffer(content, np.uint8).reshape(np.dtype(kind).itemsize, -1)
    return np.ascontiguousarray(planes.T).reshape(-1).view(kind)


def _decompressed(content: bytes, most: int) -> bytes:
    """Decompress content; return nothing if it is longer than ``most`` or invalid."""
    try:
        found = zlib.decompressobj().decompress(content, most + 1)
    except zlib.error:
        return b""
    return found if len(found) <= most else b""

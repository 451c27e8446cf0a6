"""WeightGraph: weights of layers that are ranked together, and the wiring that chooses the real ones."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dnw_graph._compat import version
from dnw_graph.candidates import CandidateEdges, split_index
from dnw_graph.errors import InputError
from dnw_graph.ranking import Ranking
from dnw_graph.sparse_layers.layer_edges import LayerEdges, pays
from dnw_graph.sparse_layers.layers import LayerWeight, candidate_edges, weight_name

Masks = tuple[Tensor | LayerEdges, Tensor | None]


class WeightGraph(Ranking):
    """The weights of one layer, or of several that share a budget, as a graph with a wiring.

    The counterpart of :class:`~dnw_graph.NeuralGraph` for layers: the candidates are the weights, the real edges are
    the weights that the layer uses. :func:`sparsify` makes such graphs, :func:`weight_graphs` finds them.

    Args:
        name: Name in messages: that of the weight.
        weights: The weights that are ranked together.

    Attributes:
        weights: The weights, without those that have left the ranking.
        has_parted: Whether any has left.
    """

    weights: tuple[LayerWeight, ...]

    def __init__(self, name: str, weights: Sequence[LayerWeight]) -> None:
        super().__init__(name)
        self.weights = tuple(weights)
        self.has_parted = False
        self._edges: tuple[Tensor, object, list[Tensor | LayerEdges]] | None = None

    @property
    def training(self) -> bool:
        """Whether any of the layers is in training mode."""
        return any(weight.layer.training for weight in self.weights)

    @training.setter
    def training(self, mode: bool) -> None:
        """Do nothing: the layers decide."""

    def real_edges_per_weight(self) -> dict[LayerWeight, int]:
        """Return the number of real edges now in each of ``weights``."""
        parts = split_index(self.real_index, self.weights)
        return {weight: len(own) for weight, own in zip(self.weights, parts, strict=True)}

    @torch.no_grad()
    def edges_in_pass(self) -> Int[Tensor, "2 weights"]:
        """Return, for each weight, the number of real edges and of edges with a gradient in the last forward pass.

        Does not synchronise. After an optimiser step they are those of the next forward pass.
        """
        real = self._chosen.index if self._chosen else self.real_index
        learning = self._chosen.learning if self._chosen else self.learning_edges(real, self.tensors())
        sizes = torch.tensor([weight.numel for weight in self.weights])
        if len(sizes) > 1:
            sizes = sizes.to(real.device, non_blocking=True)
        if any(weight.holder.probe is not None for weight in self.weights):
            learning = None
        return torch.stack([sizes if index is None else _number_each(index, sizes) for index in (real, learning)])

    @property
    def candidate_weight(self) -> Float[Tensor, " candidates"]:
        """All weights as one vector, in the order of the candidates; hallucinated ones with their values."""
        return self.view().weight

    @property
    def candidates(self) -> CandidateEdges:  # type: ignore[override]
        """The candidates with their weights: blocks of (input channel, position in the kernel) × output channel."""
        return candidate_edges(self.weights, torch.cat([each.flat(each.parameter.detach()) for each in self.weights]))

    def full_name_at(self, path: str) -> str:
        """Return the names of the weights in the model."""
        layer = f".{path}".rpartition(".parametrizations.")[0] + "."
        name = layer[1:] + weight_name(self.weights[0].parameter_name, self.weights[0].third)
        return name if len(self.weights) == 1 else f"{name} and {len(self.weights) - 1} more"

    def view(self, tensors: Sequence[Tensor] | None = None, **options: Any) -> Any:
        """Return the rule's view of the graph."""
        for weight, parameter in zip(self.weights, self.tensors() if tensors is None else tensors, strict=True):
            if hasattr(parameter, "full_tensor"):
                raise InputError(
                    f"{weight.name} is sharded but ranked as a whole: call fully_shard on the whole model only, "
                    "and unshard() before reading its weights"
                )
        return super().view(tensors, **options)

    @torch.inference_mode(False)  # Training uses cached masks of an evaluation, see ``real_edges``.
    @torch.no_grad()
    def masks(self, tensors: Sequence[Tensor], begins_pass: bool, as_edges: bool = False) -> list[Masks]:
        """Return, in the shape of each of ``weights``, 1 for real weights and 1 for those that get a gradient.

        All others are 0. The second is None if all get a gradient, or if the first are edges.

        Args:
            tensors: The parameters of the weights as the forward pass sees them.
            begins_pass: Whether a forward pass begins: in training its edges are chosen again, by the rule for
                training. Otherwise a weight is being read: the edges are those of evaluation, and no state changes.
            as_edges: Whether real weights may be returned as edges for layers that compute over them alone.
        """
        if self.wiring.training != self.training:  # Another layer than the first one was switched.
            self.wiring.train(self.training)
        reads = self.training and not begins_pass and not self.recomputes
        index = self.real_index if reads else self.real_edges(tensors)
        learning = self.learning_edges(index, tensors)
        if reads:
            real = self._shaped(index, tensors)
        else:
            if self._chosen is not None and self._chosen.index is index:
                self._chosen.learning = learning
            if as_edges and index.is_cpu and learning is index:
                some = self._as_edges(index, tensors)
                return [(each, each if isinstance(each, Tensor) else None) for each in some]
            real = self.derived(index, lambda: self._shaped(index, tensors))
        if learning is None:
            return [(mask, None) for mask in real]
        return list(zip(real, real if learning is index else self._shaped(learning, tensors), strict=True))

    def part(self, leaving: Collection[LayerWeight]) -> WeightGraph:
        """Remove weights and their edges from the ranking, and return a new graph for them.

        k is divided in proportion to the real edges of both; a warning says how many remain.
        """
        index = self.real_index
        stay = torch.cat(
            [index.new_full((each.numel,), each not in leaving, dtype=torch.bool) for each in self.weights]
        )
        share = int(stay[index].count_nonzero()) / max(1, index.numel())
        other = WeightGraph(" and ".join(each.name for each in leaving), tuple(leaving))
        other.wiring, other._needs_attach = copy.deepcopy(self.wiring), self._needs_attach
        before = self._num_edges
        for graph, candidates, part in ((self, stay, share), (other, ~stay, 1 - share)):
            graph._num_edges = round(before * part)
            graph.wiring.leave(candidates)
            graph.forget()
        self.weights = tuple(each for each in self.weights if each not in leaving)
        self.has_parted = True
        if self.updates is not None:
            self.updates.adopt(other)
        warnings.warn(
            f"{other.name} left the ranking of {self.name}: of the {self.num_candidates:,} weights that stay in it "
            f"{self.num_edges:,} are real",
            stacklevel=2,
        )
        return other

    def _as_edges(self, index: Int[Tensor, " edges"], tensors: Sequence[Tensor]) -> list[Tensor | LayerEdges]:
        """Return the real weights of each layer, as edges or as a mask; cached while the edges stay the same."""
        key = version(index), tensors[0].dtype, len(tensors)
        if self._edges is None or self._edges[0] is not index or self._edges[1] != key or key[0] == -1:
            self._edges = index, key, self._made_edges(index, tensors)
        return self._edges[2]

    def _made_edges(self, index: Int[Tensor, " edges"], tensors: Sequence[Tensor]) -> list[Tensor | LayerEdges]:
        found: list[Tensor | LayerEdges] = []
        for weight, own, like in zip(self.weights, split_index(index, self.weights), tensors, strict=True):
            edges = weight.holder.over_edges and pays(weight, len(own))
            found.append(LayerEdges(weight, own) if edges else weight.mask(own, like))
        return found

    def _shaped(self, index: Int[Tensor, " edges"], tensors: Sequence[Tensor]) -> list[Tensor]:
        # In the dtype of the weights: on a CPU, multiplying by a mask is several times faster than torch.where.
        real = self.weights[0].parameter.new_zeros(self.num_candidates).index_fill_(0, index, 1)
        triples = zip(self.weights, real.split([weight.numel for weight in self.weights]), tensors, strict=True)
        return [weight.shaped(part).to(parameter.dtype) for weight, part, parameter in triples]

    def _weights_in(self, state: Mapping[str, Any]) -> Tensor | None:
        flats = []
        for weight in self.weights:
            dense = [name if weight.third is None else name.rpartition(".")[0] for name in weight.names]
            own = weight.parameter_name
            sparse = [f"{name.removesuffix(own)}parametrizations.{own}.original" for name in dense]
            found = next((state[name] for name in (*dense, *sparse) if name in state), None)
            if not isinstance(found, Tensor) or found.shape != weight.parameter.shape:
                return None
            flats.append(weight.flat(found))
        return torch.cat(flats)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_edges": None}

    def extra_repr(self) -> str:
        """Name and sizes, for ``repr``."""
        return f"{self.name!r}, candidates={self.num_candidates:,}, k={self.num_edges:,}"


def _number_each(index: Int[Tensor, " edges"], sizes: Int[Tensor, " weights"]) -> Int[Tensor, " weights"]:
    """Return how many of some edges each of several weights has."""
    if len(sizes) == 1:
        return sizes.new_tensor([index.numel()])
    return torch.searchsorted(index.contiguous(), sizes.cumsum(0)).diff(prepend=sizes.new_zeros(1))

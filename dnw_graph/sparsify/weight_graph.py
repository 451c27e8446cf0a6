"""WeightGraph: weights of layers that are ranked together, and the wiring that chooses the real ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dnw_graph._compat import in_backward_pass, version
from dnw_graph.arguments import checked, require
from dnw_graph.candidates import CandidateEdges
from dnw_graph.errors import InputError
from dnw_graph.sparsify.layers import LayerWeight, candidate_edges
from dnw_graph.wirings import Wiring, make_wiring
from dnw_graph.wirings.checks import check_index
from dnw_graph.wirings.saved import check_saved_wiring


class WeightGraph(nn.Module):
    """The weights of one layer, or of several that share a budget, as a graph with a wiring.

    What a :class:`~dnw_graph.NeuralGraph` is for channels: the candidates are the weights, the real edges are those
    that the layer computes with. :func:`sparsify` makes them, :func:`weight_graphs` finds them.

    Args:
        name: Name in messages: that of the weight.
        weights: The weights that are ranked together.
        wiring: The rule, already set up.
        num_edges: Number of real edges k.
    """

    def __init__(self, name: str, weights: Sequence[LayerWeight], wiring: Wiring, num_edges: int) -> None:
        super().__init__()
        self.name = name
        self.weights = tuple(weights)
        self.wiring = wiring.train(self.weights[0].layer.training)
        self.training = self.wiring.training
        self._num_edges = num_edges
        self._chosen: _Chosen | None = None
        self.register_load_state_dict_pre_hook(check_saved_wiring)
        self.register_load_state_dict_post_hook(_forget_wiring)

    @property
    def num_candidates(self) -> int:
        """Number of weights."""
        return sum(weight.numel for weight in self.weights)

    @property
    def num_edges(self) -> int:
        """Number of real edges asked for, k."""
        return self._num_edges

    @property
    def num_real_edges(self) -> int:
        """Number of real edges now: that of :attr:`real_index`."""
        return self.real_index.numel()

    def real_edges_per_weight(self) -> dict[LayerWeight, int]:
        """Return the number of real edges now in each of ``weights``."""
        masks = self.masks([weight.parameter for weight in self.weights], begins_pass=False)
        return {weight: int(mask.count_nonzero()) for weight, mask in zip(self.weights, masks, strict=True)}

    @property
    def candidate_weight(self) -> Float[Tensor, " candidates"]:
        """All weights as one vector, the order that wirings see; hallucinated ones keep their values."""
        return self._flat([weight.parameter for weight in self.weights])

    @property
    def candidates(self) -> CandidateEdges:
        """The candidates with their weights: blocks of (input channel, place in the kernel) × output channel."""
        return candidate_edges(self.weights, self.candidate_weight.detach())

    @property
    def real_index(self) -> Int[Tensor, " edges"]:
        """Indices of the real edges in :attr:`candidate_weight`, ascending, as evaluation would use them now."""
        if self.training:
            return self._choose(self.candidate_weight).clone()
        self.masks([weight.parameter for weight in self.weights], begins_pass=False)
        assert self._chosen is not None
        return self._chosen.index.clone()

    @property
    def edge_weight(self) -> Float[Tensor, " edges"]:
        """The weights of the real edges now, in the order of :attr:`real_index`."""
        return self.candidate_weight.detach()[self.real_index]

    @checked
    def rewire(self, wiring: str | Wiring, num_edges: int) -> None:
        """Give the weights another wiring, or another number of real edges.

        Args:
            wiring: Rule that chooses the real edges; an object is copied.
            num_edges: Number of real edges k.

        Raises:
            InputError: If k is not in 1 … number of weights, the name is unknown, or the rule refuses.
        """
        rule, start = set_up(self.name, self.weights, wiring, num_edges)
        self.wiring = rule.train(self.training)
        self._num_edges = num_edges
        self.write(start)

    def write(self, flat: Float[Tensor, " candidates"]) -> None:
        """Set the weights, hallucinated ones included, from one vector."""
        parts = flat.split([weight.numel for weight in self.weights])
        with torch.no_grad():
            for weight, part in zip(self.weights, parts, strict=True):
                rows = weight.parameter if weight.third is None else weight.parameter.chunk(3)[weight.third]
                rows.copy_(weight.shaped(part))
        _forget_wiring(self)

    def update_wiring(self) -> None:
        """Choose the real edges anew from the weights as they are now."""
        parameters = [weight.parameter for weight in self.weights]
        self._keep(parameters, self._choose(self._flat(parameters)))

    def penalty(self) -> Float[Tensor, ""] | None:
        """Return what the wiring adds to the loss, or None; see :func:`dnw_graph.wiring_penalty`."""
        return self.wiring.penalty(self.candidate_weight)

    def masks(self, parameters: Sequence[Tensor], begins_pass: bool) -> list[Float[Tensor, "rows ..."]]:
        """Return 1 for real weights and 0 for hallucinated ones, in the shape of each of ``weights``.

        Args:
            parameters: The parameters of the weights as the forward pass sees them.
            begins_pass: Whether a forward pass begins: in training its edges are chosen anew, by the rule for training.
                Otherwise somebody looks at a weight: training shows the edges of evaluation and keeps nothing.
        """
        # Inside a backward pass a training forward is a recomputation: it must see the same edges.
        recomputed = self.training and in_backward_pass()
        if self._chosen is not None and (recomputed or (not self.training and self._chosen.fits(parameters))):
            return self._chosen.masks
        flat = self._flat(parameters).detach()
        if self.training and not begins_pass:
            return self._masks(parameters, self._choose(flat))
        choose = self.wiring.choose_to_train if self.training else self.wiring.choose
        index = choose(flat, self._num_edges, self.name)
        if not self.training:
            self.wiring.raise_non_finite()
        if not torch.compiler.is_compiling():
            check_index(index, self.wiring, self.num_candidates, self.name, wait=not self.training)
        return self._keep(parameters, index)

    def _choose(self, flat: Tensor) -> Tensor:
        index = self.wiring.choose(flat.detach(), self._num_edges, self.name)
        self.wiring.raise_non_finite()
        check_index(index, self.wiring, self.num_candidates, self.name, wait=True)
        return index

    def _flat(self, parameters: Sequence[Tensor]) -> Tensor:
        for weight, parameter in zip(self.weights, parameters, strict=True):
            if hasattr(parameter, "full_tensor"):
                raise InputError(
                    f"{weight.name} is sharded, and is ranked as a whole: call fully_shard on the whole model alone, "
                    "and unshard() on it before you look at its weights"
                )
        flats = [weight.flat(parameter) for weight, parameter in zip(self.weights, parameters, strict=True)]
        return flats[0] if len(flats) == 1 else torch.cat(flats)

    def _masks(self, parameters: Sequence[Tensor], index: Tensor) -> list[Tensor]:
        # In the type of the weights: on a CPU their product with it is several times faster than torch.where.
        real = parameters[0].new_zeros(self.num_candidates).index_fill_(0, index, 1)
        parts = real.split([weight.numel for weight in self.weights])
        triples = zip(self.weights, parts, parameters, strict=True)
        return [weight.shaped(part).to(parameter.dtype) for weight, part, parameter in triples]

    def _keep(self, parameters: Sequence[Tensor], index: Tensor) -> list[Tensor]:
        self._chosen = _Chosen(parameters, index, self._masks(parameters, index))
        return self._chosen.masks

    def train(self, mode: bool = True) -> WeightGraph:
        """Switch between training and evaluation; a switch to evaluation chooses the real edges anew."""
        if self.training and not mode:
            self._chosen = None
        super().train(mode)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_chosen": None}

    def extra_repr(self) -> str:
        """Name and sizes, for ``repr``."""
        return f"{self.name!r}, candidates={self.num_candidates:,}, k={self.num_edges:,}"


class _Chosen:
    """Real edges, together with the weights that they were chosen for."""

    def __init__(self, parameters: Sequence[Tensor], index: Tensor, masks: list[Tensor]) -> None:
        self.index = index
        self.masks = masks
        # The detached aliases keep the storage alive: no other storage can come to lie at the same address.
        self.chosen_for = [(weight, weight.detach(), version(weight)) for weight in parameters]

    def fits(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these are the same weights, as far as object, storage and version tell."""
        return all(
            # Inference tensors keep no version: nothing tells whether they have changed.
            now is weight and alias.data_ptr() == now.data_ptr() and changes == version(now) != -1
            for now, (weight, alias, changes) in zip(parameters, self.chosen_for, strict=True)
        )


def set_up(
    name: str, weights: Sequence[LayerWeight], wiring: str | Wiring, num_edges: int
) -> tuple[Wiring, Float[Tensor, " candidates"]]:
    """Return a rule that is ready for these weights, and the weights that it has them start from; changes nothing.

    Raises:
        InputError: If k is not in 1 … number of weights, the name is unknown, or the rule refuses.
    """
    count = sum(weight.numel for weight in weights)
    require(1 <= num_edges <= count, f"{name}: num_edges", f"an integer in 1 … {count:,}", num_edges)
    flat = torch.cat([weight.flat(weight.parameter.detach()) for weight in weights])
    rule = make_wiring(wiring).to(flat.device)
    rule.setup(candidate_edges(tuple(weights), flat), num_edges, name)
    return rule, flat


def _forget_wiring(graph: WeightGraph, *_: Any) -> None:
    """Have a graph choose its edges anew, after its weights were loaded or written."""
    graph._chosen = None
    graph.wiring.forget_weights()

"""Once per forward pass: when the real weights are chosen, and what layers compute with."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dnw_graph._compat import is_replica
from dnw_graph.errors import InputError
from dnw_graph.sparsify.layers import LayerWeight
from dnw_graph.sparsify.weight_graph import WeightGraph


class RealWeights(nn.Module):
    """Parametrization of one parameter: its real weights, and zero for the hallucinated ones.

    Args:
        weights: What of the parameter is sparse: all of it, or some of the three projections of ``in_proj_weight``.
        graphs: The graph of each.
        owned: Those of the graphs that are registered here; a graph of many layers is registered in the first.
        order: Names of the layer's own parameters before any became sparse.
    """

    def __init__(
        self,
        weights: Sequence[LayerWeight],
        graphs: Sequence[WeightGraph],
        owned: Sequence[WeightGraph],
        order: tuple[str, ...],
    ) -> None:
        super().__init__()
        self.owned = nn.ModuleList(owned)
        self.parts = tuple(zip(weights, graphs, strict=True))
        self.order = order
        self.mask: Tensor | None = None  # during a forward pass
        self.active = True  # until densify
        self.look = ForwardPass([self])

    def forward(self, weight: Float[Tensor, "rows ..."]) -> Float[Tensor, "rows ..."]:
        """Return the weight that the layer computes with.

        With a rule that updates hallucinated weights, the gradient of the result passes to all of them.
        """
        mask = self.current_mask()
        updated = [graph.wiring.updates_hallucinated for _, graph in self.parts]
        if all(updated):
            return _Masked.apply(weight, mask)
        if any(updated):  # projections of one parameter whose rules differ
            all_of = {part: mask.new_full(part.shape, yes) for (part, _), yes in zip(self.parts, updated, strict=True)}
            learns = mask.maximum(self.assemble(all_of)).bool()
            return _Masked.apply(torch.where(learns, weight, weight.detach()), mask)
        return weight * mask

    def current_mask(self) -> Float[Tensor, "rows ..."]:
        """Return 1 for real weights and 0 for hallucinated ones: of the forward pass in progress, or a look."""
        return self.look.masks(begins_pass=False)[0] if self.mask is None else self.mask

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Take an assigned weight as the candidates."""
        return weight

    def assemble(self, masks: dict[LayerWeight, Tensor]) -> Float[Tensor, "rows ..."]:
        """Put together the parameter's mask from those of its parts; projections that stay dense are real."""
        first = self.parts[0][0]
        if first.third is None:
            return masks[first]
        thirds = {weight.third: masks[weight] for weight, _ in self.parts}
        dense = torch.ones_like(masks[first])
        return torch.cat([thirds.get(third, dense) for third in range(3)])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "mask": None}


class _Masked(torch.autograd.Function):
    """The real weights and zeros; the gradient passes to every weight."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor) -> Tensor:
        return weight * mask

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class ForwardPass:
    """Chooses the real weights below a module when its forward pass begins, unless one around it has begun.

    Args:
        weights: The sparse parameters below the module.
    """

    def __init__(self, weights: Sequence[RealWeights]) -> None:
        self._weights = tuple(weights)
        self.begun = False
        self._register()

    def _register(self) -> None:
        self.token = str(next(_TOKENS))
        _PASSES[self.token] = self

    @property
    def weights(self) -> list[RealWeights]:
        """The sparse parameters below the module, without those that are dense again."""
        return [weight for weight in self._weights if weight.active]

    def begin(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of the module.

        Raises:
            InputError: If the module is a copy that ``nn.DataParallel`` made on another device.
        """
        if is_replica(module):
            raise InputError(
                "nn.DataParallel on several devices copies a module for every forward pass, and sparse weights are not "
                "copied with it: use nn.parallel.DistributedDataParallel"
            )
        weights = self.weights
        if not weights or weights[0].mask is not None:
            return
        for weight, mask in zip(weights, self.masks(begins_pass=True), strict=True):
            weight.mask = mask
        self.begun = True

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the module."""
        if self.begun:
            for weight in self.weights:
                weight.mask = None
            self.begun = False

    def masks(self, begins_pass: bool) -> list[Tensor]:
        """Return the mask of each parameter; a compiler sees one operator."""
        parameters = [weight.parameter for graph in self.graphs() for weight in graph.weights]
        if torch.compiler.is_compiling():
            like = [weight.parts[0][0].parameter.detach() for weight in self.weights]
            detached = [parameter.detach() for parameter in parameters]
            return torch.ops.dnw_graph.real_masks(detached, like, self.token, begins_pass)
        return self.choose(parameters, begins_pass)

    def graphs(self) -> list[WeightGraph]:
        """Return the graphs of the parameters, each once."""
        return list(dict.fromkeys(graph for each in self.weights for _, graph in each.parts))

    def choose(self, parameters: Sequence[Tensor], begins_pass: bool) -> list[Tensor]:
        """Ask every graph for its masks, once."""
        masks: dict[LayerWeight, Tensor] = {}
        rest = iter(parameters)
        for graph in self.graphs():
            own = list(itertools.islice(rest, len(graph.weights)))
            masks |= zip(graph.weights, graph.masks(own, begins_pass), strict=True)
        return [weight.assemble(masks) for weight in self.weights]

    def __getstate__(self) -> dict[str, Any]:
        return {"weights": self._weights}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._weights = state["weights"]
        self.begun = False
        self._register()


_TOKENS = itertools.count()
_PASSES: weakref.WeakValueDictionary[str, ForwardPass] = weakref.WeakValueDictionary()


# What it makes and keeps must not lie in the memory of a CUDA graph: the compiler records the parts around it.
_UNSAFE: Any = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


@torch.library.custom_op(
    "dnw_graph::real_masks",
    mutates_args=(),
    schema="(Tensor[] parameters, Tensor[] like, str token, bool begins_pass) -> Tensor[]",
    **_UNSAFE,
)
def _real_masks(parameters: Sequence[Tensor], like: Sequence[Tensor], token: str, begins_pass: bool) -> list[Tensor]:
    """The choice inside a compiled forward pass."""
    if token not in _PASSES:
        raise InputError("the model that was compiled or exported here is gone: call densify(…) before exporting one")
    current = _PASSES[token]
    owned = [weight.parameter for graph in current.graphs() for weight in graph.weights]
    # Compiled code hands over aliases; the parameters themselves tell whether they have changed.
    same = all(a.data_ptr() == b.data_ptr() for a, b in zip(owned, parameters, strict=True))
    masks = current.choose(owned if same else parameters, begins_pass)
    # Copies: compiled code may reuse the memory of what an operator returns.
    return [torch.empty_like(weight).copy_(mask) for weight, mask in zip(like, masks, strict=True)]


@_real_masks.register_fake
def _(parameters: Sequence[Tensor], like: Sequence[Tensor], token: str, begins_pass: bool) -> list[Tensor]:
    # The exported program could not call the object that chooses. Refused here, where no compiler traces the question.
    if torch.compiler.is_exporting():
        raise InputError("a module with sparse weights cannot be exported: densify(…) it first, or a copy of it")
    return [torch.empty_like(weight) for weight in like]

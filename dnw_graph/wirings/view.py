"""A rule's view of its graph: flat vectors in the order of the candidates."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.optim import Optimizer

from dnw_graph.candidates import CandidateEdges
from dnw_graph.errors import InputError
from dnw_graph.seeding import mix

if TYPE_CHECKING:
    from dnw_graph.wirings.base import Wiring

MOMENTA = ("momentum_buffer", "exp_avg", "momentum")
"""The names of the momentum in optimisers: SGD and Muon, Adam and its variants, SGDP."""


class View:
    """The candidates of one graph as its rule sees them.

    Weights, gradients and optimiser states are flat vectors ``[num_candidates]``, each gathered when it is first read.
    In-place changes by ``setup`` and ``after_step`` are written back.

    Args:
        graph: The graph; see :class:`dnw_graph.ranking.Ranking`.
        wiring: Its rule.
        k: Number of edges requested.
        tensors: The parameters as the forward pass sees them. Default: the parameters themselves.
        optimizer: The optimiser, after a step of it.
        copy: Whether ``weight`` is a copy even where the parameter is one vector.

    Attributes:
        graph: The graph.
        wiring: Its rule.
        name: The graph's name, for messages.
        k: Number of edges requested.
    """

    def __init__(
        self,
        graph: Any,
        wiring: Wiring,
        k: int,
        tensors: Sequence[Tensor] | None = None,
        *,
        optimizer: Optimizer | None = None,
        copy: bool = False,
    ) -> None:
        self.graph, self.wiring, self.name, self.k = graph, wiring, graph.name, k
        self._tensors, self._optimizer, self._copy = tensors, optimizer, copy
        self._weight: Tensor | None = None
        self._gathered: list[tuple[Tensor, Sequence[Tensor]]] = []

    @property
    def num_candidates(self) -> int:
        """Number of candidates, n."""
        return self.graph.num_candidates

    @property
    def candidates(self) -> CandidateEdges:
        """The candidates as blocks of sources × targets, which turns flat indices into pairs and back."""
        return self.graph.candidates

    @property
    def step(self) -> int:
        """Number of optimiser steps so far."""
        return self.wiring.step

    @property
    def num_steps(self) -> int:
        """Number of steps of the whole training.

        Raises:
            InputError: If it is not known.
        """
        return self._known("num_steps", "how many steps training has")

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps per epoch.

        Raises:
            InputError: If it is not known.
        """
        return self._known("steps_per_epoch", "how many steps an epoch has, its default for every=…")

    def _known(self, argument: str, what: str) -> int:
        if value := getattr(self.wiring, argument):
            return value
        raise InputError(
            f"{self.name}: {type(self.wiring).__name__} does not know {what}: "
            f"give it to dnw_graph.attach(model, optimizer, {argument}=…) or WiringUpdates({argument}=…)"
        )

    @property
    def weight(self) -> Float[Tensor, " candidates"]:
        """The weights. In a forward pass gradients flow through them; after a step they can be changed in place."""
        if self._weight is None:  # Not a cached_property, which the compiler cannot trace.
            tensors = self.graph.tensors() if self._tensors is None else self._tensors
            self._weight = self._gather([each.detach().clone() for each in tensors] if self._copy else tensors, tensors)
        return self._weight

    @cached_property
    def gradient(self) -> Float[Tensor, " candidates"]:
        """∂L/∂w of the last step, summed over micro-batches and averaged over ranks; after a step only.

        For all candidates if the rule requested it (:meth:`Wiring.needs_gradient`), otherwise the content of ``.grad``.

        Raises:
            InputError: If the rule requested it, but ``.grad`` was not computed by ``loss.backward()``.
        """
        parts, updates = [], self.graph.updates
        for weight in self.graph.weights:
            probe, like = weight.holder.probe, weight.parameter
            grad = like.grad if probe is None else probe.grad
            missing = grad is None and like.grad is not None and bool(like.grad.any())
            # A layer that was not called has none, but others have.
            if missing and not (updates is not None and updates.has_gradients_of_all()):
                raise InputError(
                    f"{self.name}: {type(self.wiring).__name__} needs the gradient of all candidates, which only "
                    "loss.backward() collects: call it, without inputs=…, before the step, instead of setting .grad to "
                    "what torch.autograd.grad or torch.func returns"
                )
            parts.append(weight.flat(torch.zeros_like(like) if grad is None else grad.view(like.shape)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @cached_property
    def state(self) -> dict[str, Float[Tensor, " candidates"]]:
        """The floating-point states of the optimiser by name; after a step only.

        Includes only states with the shape of their parameter. They are 0 in layers that have had no gradient yet.
        """
        assert self._optimizer is not None
        states = [tensor_state(self._optimizer, weight.parameter) for weight in self.graph.weights]
        flats = {}
        for name in dict.fromkeys(name for state in states for name in state):
            tensors = [
                state.get(name, torch.zeros_like(weight.parameter))
                for state, weight in zip(states, self.graph.weights, strict=True)
            ]
            flats[name] = self._gather(tensors, tensors)
        return flats

    @property
    def momentum(self) -> Float[Tensor, " candidates"]:
        """The momentum of the optimiser; after a step only.

        Raises:
            InputError: If there is none.
        """
        for name in MOMENTA:
            if name in self.state:
                return self.state[name]
        found = ", ".join(sorted(self.state)) or "no state"
        raise InputError(f"{self.name}: the optimiser has no momentum, but {found}: give SGD momentum=0.9, or use Adam")

    def clear(self, chosen: Shaped[Tensor, " chosen"], *, state: bool = True) -> None:
        """Set the weight and, by default, the optimiser state of some candidates to zero.

        Args:
            chosen: Indices, or a mask.
            state: Whether the optimiser state becomes zero too.
        """
        for vector in (self.weight, *(self.state.values() if state else ())):
            vector[chosen] = 0

    def generator(self) -> torch.Generator:
        """Return a generator that is a function of (seed, step, full name of the graph): the same on every rank.

        Before ``attach`` the seed is a function of PyTorch's seed and of the numbers drawn before the graph was made.
        """
        seed = self.wiring.seed or mix(new_seed(), self.graph.origin)
        seed = mix(seed, self.step, zlib.crc32(self.graph.full_name.encode()))
        return torch.Generator(self.graph.weights[0].parameter.device).manual_seed(seed)

    def random_scores(self, generator: torch.Generator | None = None) -> Float[Tensor, " candidates"]:
        """Return a uniform random number in 0 … 1 per candidate.

        In float32 for weights in half precision: bfloat16 has 256 such numbers, so that most candidates would tie.

        Args:
            generator: The generator. Default: PyTorch's.
        """
        like = self.weight
        dtype = torch.promote_types(like.dtype, torch.float32)
        return torch.rand(len(like), generator=generator, dtype=dtype, device=like.device)

    def reset_momentum(self) -> None:
        """Set the momentum of all parameters of the optimiser to zero; after a step only."""
        assert self._optimizer is not None
        for state in (*self._optimizer.state.values(), vars(self).get("state", {})):  # what was gathered, too
            for name in MOMENTA:
                if isinstance(state.get(name), Tensor):
                    state[name].zero_()

    def write_back(self) -> None:
        """Write what was copied on access back into parameters and optimiser state. Called by the engine."""
        for flat, tensors in self._gathered:
            parts = flat.split([weight.numel for weight in self.graph.weights])
            for weight, tensor, part in zip(self.graph.weights, tensors, parts, strict=True):
                if weight.flat(tensor).data_ptr() != part.data_ptr():
                    weight.write(part, tensor.detach())

    def _gather(self, read: Sequence[Tensor], written: Sequence[Tensor]) -> Tensor:
        parts = [weight.flat(tensor) for weight, tensor in zip(self.graph.weights, read, strict=True)]
        flat = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self._copy or self._optimizer is not None:
            self._gathered.append((flat, written))
        return flat


def tensor_state(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Return the floating-point states of a parameter that have its shape, by name."""
    return {
        name: value
        for name, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point()
    }


def new_seed() -> int:
    """Return a seed derived from PyTorch's; never 0, which means no seed."""
    return mix(torch.initial_seed()) >> 1 | 1

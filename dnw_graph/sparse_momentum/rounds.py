"""The rounds of sparse momentum: prune, redistribute, grow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dnw_graph.arguments import checked, require
from dnw_graph.errors import InputError
from dnw_graph.sparse_momentum.layers import MomentumLayer, allot, momentum_layers


class SparseMomentumRounds:
    r"""Moves the real weights of a model whose rule is :class:`SparseMomentum`; ``step()`` follows the optimiser's.

    Every ``every`` steps (the published method: once per epoch) a round

    1. takes of each layer i the mean magnitude m_i of the momentum of its real weights;
    2. prunes the ⌈p · n_i⌉ of smallest magnitude of its n_i real weights;
    3. gives the pruned number R of all layers back to them in proportion to m_i;
    4. grows, in each layer, so many weights among those that are zero now, by the largest magnitude of momentum.

    A grown weight starts at zero, unless the same round pruned it. The momentum is that of SGD, or
    m / (√v + 1e-8) of Adam, as in the published code.

    As published (arXiv 1907.04840 and its code): steps 1 to 4 and their order; p from 0.5 down by a cosine or linearly;
    the mean over the real weights before they are pruned; a weight that is pruned and grown in the same round keeps its
    value; pruned weights keep their momentum; the mask after every step. Different here:

    - The number of real weights in all layers together stays exactly what it was. The published code draws the first
      ones each with a probability, rounds layer by layer and corrects the sum in later rounds.
    - A layer can be filled, and what is beyond goes to the others in proportion to their momentum again. The published
      code stops at 99% of the zero weights and spreads the rest evenly.
    - A layer keeps at least one weight when it is pruned. The published code prunes less where a layer is more than 80%
      dense and its momentum is large; here all layers are pruned alike.
    - p ends at 0, so that nothing changes after the last step. In the published code the cosine ends at 0.005.
    - Ties go to the lower index, and fractions of a weight to the largest remainders.

    Args:
        model: A model of which all or some layers have the rule, by :func:`dnw_graph.sparsify.sparsify` or as neural
            graphs.
        optimizer: Its optimiser: SGD with momentum, Adam, AdamW.
        num_steps: Optimiser steps of the whole training, for schedules in fractions.
        every: Steps between rounds.

    Attributes:
        steps: Optimiser steps so far.

    Raises:
        InputError: If no layer has the rule, the optimiser has no momentum or does not know a layer, or a number is no
            whole number from 1 up.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from dnw_graph.sparse_momentum import SparseMomentum, SparseMomentumRounds
        >>> from dnw_graph.sparsify import sparsify
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> _ = sparsify(model, density=0.25, wiring=SparseMomentum())
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> rounds = SparseMomentumRounds(model, optimizer, num_steps=100, every=10)
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(4, 8)).square().mean().backward()
        ...     optimizer.step()
        ...     rounds.step()
        >>> sum(rounds.kept().values())
        40
    """

    @checked
    def __init__(self, model: nn.Module, optimizer: Optimizer, *, num_steps: int, every: int) -> None:
        for name, number in (("num_steps", num_steps), ("every", every)):
            require(number >= 1, name, "an integer from 1 up", number)
        self.optimizer = optimizer
        self.num_steps = num_steps
        self.every = every
        self.steps = 0
        self._layers = momentum_layers(model)
        if not self._layers:
            raise InputError(
                f"a {type(model).__name__} has no layer with the rule SparseMomentum: "
                "sparsify(model, density=…, wiring=SparseMomentum()) comes first"
            )
        momentum = {
            p: group.get("momentum") or "betas" in group for group in optimizer.param_groups for p in group["params"]
        }
        for layer in self._layers:
            for parameter in layer.parameters:
                if parameter not in momentum:
                    raise InputError(
                        f"{layer.name} is not among the parameters of the optimiser: give it model.parameters()"
                    )
                if not momentum[parameter]:
                    raise InputError(
                        f"{type(optimizer).__name__} has no momentum for {layer.name}: "
                        "give SGD momentum=0.9, or use Adam"
                    )

    def kept(self) -> dict[str, int]:
        """Return the number of real weights per layer."""
        return {layer.name: int(layer.rule.kept.sum()) for layer in self._layers}

    def step(self) -> None:
        """Set hallucinated weights back to zero after a step of the optimiser, and do a round if it is time.

        An evaluation at the end of an epoch belongs before the step that does a round: what is pruned is missed at
        once, and what is grown starts at zero.
        """
        self.reset_hallucinated()
        self.steps += 1
        if self.steps % self.every == 0:
            self.redistribute(self.steps)

    @torch.no_grad()
    def reset_hallucinated(self) -> None:
        """Set every hallucinated weight to zero, so that only real ones are trained."""
        for layer in self._layers:
            layer.write(layer.weight().mul(layer.rule.kept))

    @torch.no_grad()
    @checked
    def redistribute(self, step: int) -> None:
        """Do one round.

        Args:
            step: Optimiser steps done, which decide the prune rate.

        Raises:
            InputError: If a layer has no momentum yet, or it is not finite.
        """
        momenta = [
            layer.flat([self._momentum(layer, parameter) for parameter in layer.parameters]) for layer in self._layers
        ]
        means = [
            float(m[layer.rule.kept].abs().mean(dtype=torch.float64))
            for layer, m in zip(self._layers, momenta, strict=True)
        ]
        for layer, mean in zip(self._layers, means, strict=True):
            if not math.isfinite(mean):
                raise InputError(f"{layer.name}: the momentum is NaN or infinite; lower the learning rate")
        pruned = [layer.prune(step, self.num_steps) for layer in self._layers]
        room = [int((~layer.rule.kept).sum()) for layer in self._layers]
        for layer, momentum, number in zip(self._layers, momenta, allot(sum(pruned), means, room), strict=True):
            layer.grow(momentum, number)

    def _momentum(self, layer: MomentumLayer, parameter: Tensor) -> Tensor:
        state = self.optimizer.state.get(parameter, {})
        if "exp_avg" in state:
            average: Tensor = state["exp_avg"]
            return average / (state["exp_avg_sq"].sqrt() + 1e-8)
        if state.get("momentum_buffer") is None:
            raise InputError(
                f"{layer.name} has no momentum yet: a round comes after steps of the optimiser "
                "in which it had a gradient"
            )
        buffer: Tensor = state["momentum_buffer"]
        return buffer

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps; the real edges are buffers of the model."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on after so many steps."""
        self.steps = int(state_dict["steps"])

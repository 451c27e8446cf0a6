"""The interface of a wiring: which candidates are real edges, which are trained, and what follows a step."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dnw_graph.selection import Selector, new_flag
from dnw_graph.wirings.saved import saved_number
from dnw_graph.wirings.schedule import Schedule
from dnw_graph.wirings.view import View

COUNTERS = ("step", "num_steps", "seed")


class Wiring(nn.Module):
    r"""A rule that chooses the real edges of a graph and decides which candidates are trained.

    A subclass overrides :meth:`choose`, and other methods as needed. All methods get a
    :class:`~dnw_graph.wirings.View`: flat vectors in the order of the candidates. Keep state that must survive a
    checkpoint in persistent buffers; the graph's ``state_dict`` has them under ``wiring.``. Parameters of a rule are
    trained with the others, with weight decay ``weight_decay``, by the optimiser given to :func:`dnw_graph.attach`.

    A rule decides on three sets of candidates, which may differ: the real edges E, used by the forward pass; those
    whose gradient :math:`\langle Z_u, \partial L/\partial I_v \rangle` (line 10 of the paper's Algorithm 1) is added
    to ``.grad``; and those that the optimiser may change. No gradient ever flows *through* a hallucinated edge.

    Attributes:
        trained: The candidates that the optimiser may change: ``"all"``, ``"real"``, or ``"own"`` for those that
            :meth:`trained_edges` returns. Weight and optimiser state of all others stay the same, bit for bit.
        gradient: The candidates whose gradient is added to ``.grad``. Default: ``trained``. The gradient of the others
            is zero; momentum and weight decay still move those that are trained.
        ignores_k: Whether the rule does not depend on k, so that a state with another k may be loaded.
        decides_k: Whether the rule itself determines k, so that models leave it out.
        needs_momentum: Whether the rule needs an optimiser with momentum.
        weight_decay: Weight decay of the rule's own parameters.
        step: Number of optimiser steps so far; counted by :func:`dnw_graph.attach` for rules that need it.
        num_steps: Number of steps of the whole training; 0 if unknown.
        steps_per_epoch: Number of steps per epoch; 0 if unknown.
        seed: Seed of the rule's random numbers; 0 before ``attach``.

    Examples:
        >>> from dnw_graph import NeuralGraph, Wiring
        >>> class StrongestPositive(Wiring):
        ...     def choose(self, view):
        ...         return view.weight.topk(view.k).indices.sort().values
        >>> graph = NeuralGraph(blocks=(3, 4, 2), num_edges=3, wiring=StrongestPositive())
        >>> bool((graph.edge_weight > 0).all())
        True
    """

    trained: ClassVar[str] = "all"
    gradient: ClassVar[str | None] = None
    ignores_k: ClassVar[bool] = False
    decides_k: ClassVar[bool] = False
    needs_momentum: ClassVar[bool] = False
    weight_decay: float = 0.0
    step = 0
    num_steps = 0
    steps_per_epoch = 0
    seed = 0
    _flag: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._selector = Selector()
        # A buffer, so that it moves with the graph, and so that CUDA graphs can write to it.
        self.register_buffer("_flag", new_flag(), persistent=False)
        self.register_state_dict_pre_hook(_read_flag)

    def setup(self, view: View) -> None:
        """Initialise the rule's state, and weights if needed; called for a new rule and after weights are redrawn."""

    def setup_loaded(self, view: View) -> None:
        """Initialise the rule's state for weights that were loaded; calls :meth:`setup` by default.

        A rule whose :meth:`setup` replaces weights overrides this and keeps the loaded ones.
        """
        self.setup(view)

    def choose(self, view: View) -> Int[Tensor, " edges"]:
        """Return the flat indices of the real edges, ascending. Must not change state.

        Called in evaluation after the weights changed, and whenever the wiring is read. The number of edges may differ
        from k; early in training it may be larger.
        """
        raise NotImplementedError

    def choose_to_train(self, view: View) -> Int[Tensor, " edges"]:
        """Return the flat indices of the real edges of a training step, ascending. May change state.

        Called once per forward pass in training; calls :meth:`choose` by default. A rule that overrides it cannot have
        ``trained = "real"``, which is :meth:`choose` after the pass: it uses ``"own"``. Activation checkpointing reuses
        the edges of the last forward pass. So if a rule chooses randomly, do not checkpoint a graph that is called
        several times before the backward pass.
        """
        return self.choose(view)

    def values(self, weight: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """Return the values used for real edges, an elementwise differentiable function of the weights."""
        return weight

    def trained_edges(self, view: View) -> Int[Tensor, " trained"]:
        """Return the flat indices of the trained candidates, ascending; must not change state.

        Called for ``trained = "own"``.
        """
        raise NotImplementedError

    def penalty(self, view: View) -> Float[Tensor, ""] | None:
        """Return the rule's penalty term of the loss, or None; see :func:`dnw_graph.wiring_penalty`."""
        return None

    def needs_gradient(self, view: View) -> bool:
        """Return whether the next :meth:`after_step` needs gradients of candidates that get none otherwise."""
        return False

    def leave(self, stay: Bool[Tensor, " candidates"]) -> None:
        """Drop candidates, after a layer has left a ranking of several layers.

        A rule with state per candidate overrides this and keeps the state of those that stay.
        """

    def skips_update(self, view: View) -> bool:
        """Return whether the next step must leave all candidates and their optimiser state unchanged."""
        return False

    def after_step(self, view: View) -> None:
        """Act after an optimiser step. Changes to the view's vectors are written back; no gradient is recorded.

        Called once per step by the hook of :func:`dnw_graph.attach`, when ``view.step`` steps are done, unless the
        graph is frozen or had no gradient in this step.
        """

    @classmethod
    def after_steps(cls, views: Sequence[View]) -> None:
        """Act after an optimiser step on all graphs with this rule. By default calls :meth:`after_step` for each.

        A rule that overrides this must override :meth:`after_step` too.
        """
        for view in views:
            view.wiring.after_step(view)

    @property
    def needs_steps(self) -> bool:
        """Whether the rule needs the steps of an optimiser: it acts after them, freezes candidates or has schedules."""
        own = type(self)
        acts = own.after_step is not Wiring.after_step or own.skips_update is not Wiring.skips_update
        return acts or self.trained != "all" or bool(self.schedules)

    @property
    def needs_attach(self) -> bool:
        """Whether training needs :func:`dnw_graph.attach`: the rule needs steps, or has parameters."""
        return self.needs_steps or next(self.parameters(), None) is not None

    def refuse_unknown_numbers(self, view: View) -> None:
        """Refuse a training of unknown length if the rule depends on it. Called by :func:`dnw_graph.attach`.

        Raises:
            InputError: If a number of steps that the rule needs is unknown.
        """
        if any(each.in_fractions for each in self.schedules):
            _ = view.num_steps

    @property
    def schedules(self) -> list[Schedule]:
        """The schedules among the rule's attributes whose value changes."""
        return [each for each in vars(self).values() if isinstance(each, Schedule) and not each.constant]

    @property
    def counts_steps(self) -> bool:
        """Whether :func:`dnw_graph.attach` counts steps for the rule; its state then includes the counters."""
        return self.needs_steps

    def own_num_edges(self, view: View) -> int | None:
        """Return the number of edges if the rule determines it, else None."""
        return None

    def num_edges(self, k: int) -> int:
        """Return the graph's current number of edges: k, unless the rule moves edges between graphs."""
        return k

    def largest(self, view: View, k: int, among: Int[Tensor, " some"] | None = None) -> Int[Tensor, " edges"]:
        """Return the flat indices of the k weights of largest |w|, ascending, ties to the lower index.

        The same as :func:`dnw_graph.selection.select_top_k`, but faster if the weights have changed little since the
        last call. On a GPU it does not synchronise; :meth:`raise_non_finite` reports weights that are not finite.

        Args:
            view: The candidates.
            k: Number of edges, 1 … number of candidates.
            among: Flat indices of the candidates to choose from, ascending. Default: all.

        Raises:
            InputError: If k is out of range or, on a CPU, a weight is NaN or infinite.
        """
        weight = view.weight
        if self._flag.device != weight.device:  # The graph was moved before it got the rule.
            self._flag = new_flag(weight.device)
        if not k and not view.k:  # All edges belonged to layers that have left the ranking.
            return torch.empty(0, dtype=torch.long, device=weight.device)
        if among is None:
            return self._selector.select(weight, k, view.name, self._flag)
        return among[self._selector.select(weight.detach()[among], k, view.name, self._flag)]

    def raise_non_finite(self) -> None:
        """Raise an error if :meth:`largest` found weights on a GPU that are not finite. Synchronises.

        Called when the edges are read, in evaluation and at the switch to it, and before every ``state_dict``, hence
        before a checkpoint is written.

        Raises:
            InputError: If weights were NaN or infinite; repeated until edges are chosen again.
        """
        self._selector.raise_non_finite(self._flag)

    def check_saved(self, saved: Mapping[str, Any], num_candidates: int, num_edges: int, name: str) -> None:
        """Refuse a saved state that the rule cannot use. Called before any part of a graph is loaded.

        Stored edges must be distinct candidates in ascending order, as many as the rule keeps.

        Args:
            saved: The rule's part of a state dict, by the names of its buffers; it may lack some.
            num_candidates: Number of candidates.
            num_edges: k.
            name: The graph's name, for messages.

        Raises:
            InputError: If it is not a state of this rule for such a graph.
        """
        for counter in COUNTERS if self.counts_steps else ():
            saved_number(saved, counter, f"{name}: wiring.{counter}")

    def forget_weights(self) -> None:
        """Reset the cached threshold and the error flag. Called when the weights were replaced."""
        self._selector.forget(self._flag)

    def train(self, mode: bool = True) -> Wiring:
        """Switch between training and evaluation."""
        if self.training and not mode:
            self.raise_non_finite()
        super().train(mode)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.counts_steps:
            destination.update({prefix + name: torch.tensor(getattr(self, name)) for name in COUNTERS})

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # Whether they are there depends on the rule that was saved, which may be another one.
        counters = {prefix + name: name for name in COUNTERS}
        super()._load_from_state_dict({k: v for k, v in state_dict.items() if k not in counters}, prefix, *args)
        for key, name in counters.items():
            if self.counts_steps and key in state_dict:
                setattr(self, name, int(state_dict[key]))

    def extra_repr(self) -> str:
        """Options, for ``repr``: constructor arguments stored under their names."""
        names = (name for name in inspect.signature(type(self)).parameters if name in vars(self))
        options = [(name, vars(self)[name]) for name in names if not isinstance(vars(self)[name], Tensor)]
        return ", ".join(f"{name}={repr(value) if isinstance(value, str) else value}" for name, value in options)

    def __getstate__(self) -> dict[str, Any]:
        self.raise_non_finite()
        return self.__dict__


def _read_flag(wiring: Wiring, *_: Any) -> None:
    """Keep weights that are not finite out of checkpoints."""
    wiring.raise_non_finite()

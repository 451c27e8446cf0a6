"""Dynamic graphs without dead nodes, as layers of a compact model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dnw_graph.compaction.functions import WholeFunction
from dnw_graph.compaction.plain_layers import Layer, require, require_whole
from dnw_graph.compaction.products import Product
from dnw_graph.dynamics import Continuous
from dnw_graph.dynamics.discrete import INPUT_MODES
from dnw_graph.errors import InputError, unknown_name


class Step(Layer):
    """One application of f_θ(A Z, t) in a dynamic graph.

    Args:
        send: Applied to states before they are propagated, unless ``receive`` is a whole function with its own
            ``send``.
        product: The product Z → I.
        receive: Computes states from what nodes receive.
    """

    product: Product

    def __init__(self, send: nn.Module, product: Product, receive: nn.Module) -> None:
        super().__init__()
        self.send = send
        self.product = product
        self.receive = receive

    @property
    def num_inputs(self) -> int:
        """Number of nodes whose states the step takes."""
        return self.product.num_inputs

    @property
    def num_outputs(self) -> int:
        """Number of nodes whose states the step returns."""
        return self.product.num_outputs

    def forward(self, z: Float[Tensor, "batch have *space"], time: int | Tensor) -> Float[Tensor, "batch want *space"]:
        """Return f_θ(A Z, t)."""
        receive = self.receive
        if isinstance(receive, WholeFunction):
            received = self.product(_keep_size(receive.send(z), z))
            return _keep_size(receive(received, time), received)
        received = self.product(_keep_size(self.send(z), z))
        return _keep_size(receive(received), received)


class DiscreteGraph(Layer):
    """A discrete-time graph: steps in sequence.

    Args:
        steps: The different steps.
        schedule: The number of the step to take at each time, or None to take the first one for each element of a
            sequence.
        input_mode: See :class:`~dnw_graph.Discrete`.
        num_nodes: Number of nodes whose states the first step takes; those after the inputs start at zero.
    """

    options = ("schedule", "input_mode", "num_nodes")

    def __init__(self, steps: Sequence[Step], schedule: Sequence[int] | None, input_mode: str, num_nodes: int) -> None:
        super().__init__()
        require(input_mode in INPUT_MODES, f"no such input mode: {input_mode!r}")
        require((schedule is None) == (input_mode == "sequence"), "only a sequence comes without a schedule")
        order = [0, 0] if schedule is None else list(schedule)
        require_whole(order, 0, "steps of a schedule")
        require(all(0 <= number < len(steps) for number in order), f"{len(steps)} steps do not fit {schedule}")
        require(steps[order[0]].num_inputs == num_nodes, f"the first step does not take {num_nodes} nodes")
        for first, second in pairwise(steps[number] for number in order):
            require(first.num_outputs == second.num_inputs, f"{first} and {second} do not follow one another")
        self.steps = nn.ModuleList(steps)
        self.schedule = None if schedule is None else list(schedule)
        self.input_mode = input_mode
        self.num_nodes = num_nodes
        self._num_outputs = steps[order[-1]].num_outputs

    @property
    def num_outputs(self) -> int:
        """Number of nodes whose states the last step returns."""
        return self._num_outputs

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch outputs *space"]:
        """Take the steps."""
        sequence = self.schedule is None
        schedule = [0] * x.size(1) if self.schedule is None else self.schedule
        z = _pad_nodes(x[:, 0] if sequence else x, self.num_nodes)
        for time, number in enumerate(schedule):
            if time and self.input_mode != "initial":
                now = x[:, time] if sequence else x
                z = torch.cat([now, z[:, now.size(1) :]], dim=1)
            z = self.steps[number](z, time)
        return z


TABLEAUS: dict[str, tuple[tuple[float, ...], ...]] = {
    "euler": ((1,),),
    "midpoint": ((1 / 2,), (0, 1)),
    "heun2": ((1,), (1 / 2, 1 / 2)),
    "heun3": ((1 / 3,), (0, 2 / 3), (1 / 4, 0, 3 / 4)),
    "rk4": ((1 / 3,), (-1 / 3, 1), (1, -1, 1), (1 / 8, 3 / 8, 3 / 8, 1 / 8)),
}
"""Butcher tableaus of torchdiffeq's one-step solvers: the rows of A from the second one on, then b."""


class RungeKuttaGraph(Layer):
    """A continuous-time graph with a fixed-step solver, unrolled: the states of all nodes at the end of time.

    Args:
        step: The right-hand side f_θ(A Z, t).
        method: One of :data:`TABLEAUS`.
        times: Bounds of the steps.
    """

    options = ("method", "times")

    step: Step

    def __init__(self, step: Step, method: str, times: Sequence[float]) -> None:
        super().__init__()
        if method not in TABLEAUS:
            raise unknown_name("fixed-step solver", method, TABLEAUS)
        require(len(times) >= 2, "a solution takes a start and an end")
        require(all(isinstance(time, int | float) and math.isfinite(time) for time in times), "times must be numbers")
        self.step = step
        require(step.num_inputs == step.num_outputs, "a continuous graph needs as many targets as sources")
        self.method = method
        self.times = list(times)

    @property
    def num_outputs(self) -> int:
        """Number of nodes."""
        return self.step.num_outputs

    def forward(self, x: Float[Tensor, "batch inputs *space"]) -> Float[Tensor, "batch nodes *space"]:
        """Take the steps from the inputs."""
        z = _pad_nodes(x, self.num_outputs)
        for start, end in pairwise(self.times):
            slopes: list[Tensor] = []
            at = z
            time = start
            for row in TABLEAUS[self.method]:
                slopes.append(self.step(at, torch.full((), time, dtype=z.dtype, device=z.device)))
                at = z + (end - start) * sum(share * slope for share, slope in zip(row, slopes, strict=True) if share)
                time = start + (end - start) * sum(row)
            z = at
        return z


class ContinuousGraph(Layer):
    """A continuous-time graph: the states of all nodes at the end of time, solved with torchdiffeq.

    Args:
        step: The right-hand side f_θ(A Z, t).
        method: As in :class:`~dnw_graph.Continuous`, like the following arguments.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        solver_options: Further options of the solver.
        t_span: Start and end of time.
    """

    options = ("method", "rtol", "atol", "solver_options", "t_span")
    step: Step

    def __init__(
        self,
        step: Step,
        method: str,
        rtol: float,
        atol: float,
        solver_options: Mapping[str, Any],
        t_span: Sequence[float],
    ) -> None:
        super().__init__()
        self.step = step
        require(step.num_inputs == step.num_outputs, "a continuous graph needs as many targets as sources")
        Continuous(method, rtol=rtol, atol=atol, options=solver_options, t_span=t_span)  # refuses unknown options
        self.method = method
        self.rtol = rtol
        self.atol = atol
        self.solver_options = dict(solver_options)
        self.t_span = list(t_span)

    @property
    def num_outputs(self) -> int:
        """Number of nodes."""
        return self.step.num_outputs

    def forward(self, x: Float[Tensor, "batch inputs *space"]) -> Float[Tensor, "batch nodes *space"]:
        """Solve from the inputs."""
        from torchdiffeq import odeint

        times = torch.tensor(self.t_span, dtype=x.dtype, device=x.device)
        z = _pad_nodes(x, self.num_outputs)
        solver: dict[str, Any] = {"method": self.method, "options": self.solver_options}
        try:
            states = odeint(lambda time, z: self.step(z, time), z, times, rtol=self.rtol, atol=self.atol, **solver)
        except AssertionError as error:  # Among other things, torchdiffeq asserts that its step stays above zero.
            raise InputError(f"{self.method} failed ({error}): the states grow without bound for this input") from error
        return states[-1]


def _pad_nodes(x: Tensor, num_nodes: int) -> Tensor:
    """Add nodes of state zero after the inputs."""
    missing = num_nodes - x.size(1)
    return F.pad(x, (*[0, 0] * (x.dim() - 2), 0, missing)) if missing else x


def _keep_size(result: Tensor, like: Tensor) -> Tensor:
    """Pad maps that a strided node function made smaller, below and to the right."""
    missing = [want - got for want, got in zip(like.shape[2:], result.shape[2:], strict=True)]
    return F.pad(result, [side for amount in reversed(missing) for side in (0, amount)]) if any(missing) else result

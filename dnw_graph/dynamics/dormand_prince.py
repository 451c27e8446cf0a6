r"""The Dormand–Prince method of order 5(4) with fused arithmetic, for states that the kernels of this package support.

It takes the steps of torchdiffeq's ``dopri5`` (Dormand & Prince 1980; Shampine 1986 for the values between steps;
Hairer, Nørsett & Wanner, *Solving Ordinary Differential Equations I*, II.4 for the step size), and has the same
gradients, including those of the first step size. It makes fewer passes over memory: each stage

.. math:: y_m = y_0 + \Delta t \sum_{j<m} a_{mj} k_j, \qquad k_m = f(t_m, y_m)

is one pass, and so is the gradient of each k_j, which comes from all combinations after it:

.. math:: \frac{\partial L}{\partial k_j} = \Delta t \sum_{m>j} a_{mj} \frac{\partial L}{\partial y_m}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dnw_graph.ops.combination import combination, error_norm
from dnw_graph.ops.operands import first_order

Field = Callable[[Tensor, Tensor], Tensor]

TIMES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),  # The state after the step.
)
ERROR = (
    35 / 384 - 1951 / 21600,
    0.0,
    500 / 1113 - 22642 / 50085,
    125 / 192 - 451 / 720,
    -2187 / 6784 + 12231 / 42400,
    11 / 84 - 649 / 6300,
    -1 / 60,
)
MIDDLE = (
    6025192743 / 30085553152 / 2,
    0.0,
    51252292925 / 65400821598 / 2,
    -2691868925 / 45128329728 / 2,
    187940372067 / 1594534317056 / 2,
    -1776094331 / 19743644256 / 2,
    11237099 / 235043384 / 2,
)
SAFETY, LARGEST, SMALLEST, ORDER = 0.9, 10.0, 0.2, 5


def dormand_prince(field: Field, y: Tensor, grid: Tensor, rtol: float, atol: float) -> list[Tensor]:
    """Return the states at the times of the grid but the first.

    Args:
        field: The right-hand side f(t, y); it takes and returns contiguous tensors.
        y: The state at the first time.
        grid: Increasing times.
        rtol: Relative tolerance.
        atol: Absolute tolerance.

    Raises:
        ArithmeticError: If the state is not finite, or the steps become too small.
    """
    if not torch.isfinite(y).all():
        raise ArithmeticError("non-finite values in state `y`")
    grid = grid.double()
    time = before = grid[0]
    slope = field(grid[0].to(y.dtype), y)
    size = _first_size(field, time, y, slope, rtol, atol)
    step: _Step | None = None
    states = []
    for target in grid[1:]:
        while target > time:
            if not time + size > time:  # NaN included.
                raise ArithmeticError("underflow in dt")
            tried = _Step(field, y, slope, time, size)
            error = error_norm(tried.times_size(ERROR), tried.stages, y.detach(), tried.end.detach(), rtol, atol)
            if error <= 1:
                step, before, time = tried, time, time + size
                y, slope = tried.end, tried.slope
            size = _next_size(size, error)
        assert step is not None
        states.append(step.between((target - before) / (time - before)))
    return states


def _first_size(field: Field, time: Tensor, y: Tensor, slope: Tensor, rtol: float, atol: float) -> Tensor:
    """Return the size of the first step, with its gradient."""
    scale = atol + y.abs() * rtol
    d0, d1 = _rms(y / scale), _rms(slope / scale)
    h0 = torch.full_like(d0, 1e-6) if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
    ahead = field((time + h0).to(y.dtype), y + h0 * slope)
    d2 = _rms((ahead - slope) / scale) / h0
    if d1 <= 1e-15 and d2 <= 1e-15:
        h1 = torch.max(torch.full_like(h0, 1e-6), h0 * 1e-3)
    else:
        h1 = (0.01 / max(d1, d2)) ** (1 / ORDER)
    return torch.min(100 * h0, h1).double()


def _rms(y: Tensor) -> Tensor:
    return y.square().mean().sqrt()


def _next_size(size: Tensor, error: float) -> Tensor:
    """Return the size of the next step, or of the next try, as a constant."""
    if error == 0:
        return size.detach() * LARGEST
    if math.isnan(error):
        return size.detach() * math.nan
    smallest = 1.0 if error < 1 else SMALLEST
    return size.detach() * min(LARGEST, max(SAFETY / error ** (1 / ORDER), smallest))


class _Step:
    """One step, accepted or not.

    Attributes:
        stages: k, without their gradients.
        end: The state after the step.
        slope: f there.
    """

    def __init__(self, field: Field, y: Tensor, slope: Tensor, time: Tensor, size: Tensor) -> None:
        self.start, self.size = y, size
        self.stages: list[Tensor] = []
        self.shared = _Shared([], {})
        self.chain: Tensor | None = None
        for moment, row in zip(TIMES, STAGES, strict=True):
            self.stages.append(slope.detach())
            self.end = self._combine(slope, self.times_size(row))
            at = (time + moment * size).to(y.dtype)
            # Just before the end, in case the field jumps there.
            at = torch.nextafter(at, at - 1) if moment == 1 else at
            slope = field(at, self.end)
        self.slope = slope
        self.stages.append(slope.detach())

    def times_size(self, row: Sequence[float]) -> Tensor:
        """Return coefficients times the size of the step."""
        return self.start.new_tensor(row) * self.size.to(self.start.dtype)

    def between(self, part: Tensor) -> Tensor:
        """Return the state after a part of the step, by a polynomial of order 4."""
        first, *_, last = torch.eye(len(MIDDLE), dtype=torch.float64, device=self.start.device)
        end, middle = (first.new_tensor(row) for row in ((*STAGES[-1], 0.0), MIDDLE))
        powers = [
            first,
            last - 4 * first - 5 * end + 16 * middle,
            5 * first - 3 * last + 14 * end - 32 * middle,
            2 * (last - first) - 8 * end + 16 * middle,
        ]
        row = part ** torch.arange(1, len(powers) + 1, device=part.device) @ torch.stack(powers)
        dtype = self.start.dtype
        new = self.slope if len(self.shared.rows) == len(STAGES) else None
        return self._combine(new, row.to(dtype) * self.size.to(dtype))

    def _combine(self, new: Tensor | None, row: Tensor) -> Tensor:
        """Return y_0 plus a combination of all stages; ``new`` is the last one, if no earlier combination had it."""
        y = self.start if self.chain is None else self.start.detach()
        result, self.chain = _Combination.apply(y, new, row, self.chain, tuple(self.stages), self.shared)
        return result


@dataclass(frozen=True)
class _Shared:
    """State shared by the combinations of one step.

    Attributes:
        rows: The coefficients of each.
        grads: During a backward pass, the gradients that have reached them.
    """

    rows: list[Tensor]
    grads: dict[int, Tensor]


class _Combination(torch.autograd.Function):
    """y_0 + Σ c_j k_j; its fourth argument and second result make a chain of a step's combinations.

    The backward pass of a combination follows those of all later ones, so that the gradient of the stage that is new to
    it is complete.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        new: Tensor | None,
        row: Tensor,
        chain: Tensor | None,
        stages: tuple[Tensor, ...],
        shared: _Shared,
    ) -> tuple[Tensor, Tensor]:
        ctx.number, ctx.shared, ctx.place = len(shared.rows), shared, None if new is None else len(stages) - 1
        shared.rows.append(row.detach())
        ctx.set_materialize_grads(False)
        if ctx.needs_input_grad[2]:
            ctx.save_for_backward(*stages)
        return combination(y, row, stages), y.new_empty(0)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        known = ctx.shared.grads
        if grads[1] is None:
            # No later combination came before: a backward pass begins.
            known.clear()
        if grads[0] is not None:
            known[ctx.number] = grads[0].contiguous()
        y_grad = new_grad = row_grad = chain_grad = None
        if known and ctx.needs_input_grad[1]:
            row = torch.stack([ctx.shared.rows[number][ctx.place] for number in known])
            new_grad = combination(None, row, list(known.values()))
        if known and ctx.needs_input_grad[0] and ctx.number == 0:
            first, *others = known.values()
            y_grad = combination(first, first.new_ones(len(others)), others) if others else first
        if grads[0] is not None and ctx.needs_input_grad[2]:
            flat = known[ctx.number].flatten()
            row_grad = torch.stack([flat @ stage.flatten() for stage in ctx.saved_tensors])
        if ctx.number == 0:
            known.clear()
        else:
            chain_grad = ctx.shared.rows[0].new_empty(0)
        return y_grad, new_grad, row_grad, chain_grad, None, None

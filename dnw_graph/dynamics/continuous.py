"""Continuous-time dynamics: a neural ODE on a graph."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dnw_graph._compat import not_compiled, solver_names
from dnw_graph.arguments import check, checked, require
from dnw_graph.dynamics.dormand_prince import dormand_prince
from dnw_graph.dynamics.recompute import FrozenBuffers
from dnw_graph.dynamics.recurrent import Recurrent
from dnw_graph.errors import InputError, unknown_name
from dnw_graph.ops.layout import kernels_take, transformed
from dnw_graph.propagation import Propagate
from dnw_graph.propagation.propagate import autocast_dtype

EXPLICIT = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams")
"""Fixed-step solvers without a tolerance: a node's result does not depend on unrelated nodes."""
FIXED_STEPS = (*EXPLICIT, "implicit_adams", "fixed_adams")
"""All fixed-step solvers, including those that solve an equation in every step up to a tolerance."""


class Continuous(Recurrent):
    r"""The solution of :math:`\dot Z(t) = f_\theta(A Z(t), t)`, Equation 13 of the paper.

    Solved with torchdiffeq (arXiv 1806.07366); ``"dopri5"`` without options, where products are sparse, by
    :mod:`dnw_graph.dynamics.dormand_prince`, which makes the same steps in fewer passes over memory. With fewer inputs
    than nodes this is an Augmented Neural ODE (Dupont et al. 2019): the other nodes start at zero. Edges are chosen
    once per forward pass, not per evaluation. Under autocast the solver computes in float32, and f_θ in the autocast
    dtype. ``torch.compile`` does not compile the solver.

    Args:
        method: Name of a torchdiffeq solver.
        rtol: Relative tolerance of an adaptive solver, at least 0.
        atol: Absolute tolerance of an adaptive solver, above 0: states that are zero have no relative error.
        options: Further options of the solver, such as ``{"step_size": 0.1}``.
        t_span: Start and end of time.
        adjoint: Solve the adjoint equation backwards instead of backpropagating through the solver. Memory does not
            grow with the number of steps, but the result is the gradient of the exact solution. Where the node
            function is not smooth (norm → ReLU), it differs much from the gradient of the computed solution.
        adjoint_options: Further arguments of ``torchdiffeq.odeint_adjoint``, such as ``{"adjoint_rtol": 1e-6}``.

    Attributes:
        num_evaluations: Evaluations of f_θ(A Z, t) in the last forward pass.
        num_backward_evaluations: Those in the backward pass that followed, with ``adjoint=True``.

    Shapes:
        - input: ``[batch, inputs, *space]``
        - output: ``[batch, outputs, *space]``; with ``times=…``, ``[batch, times, outputs, *space]``

    Raises:
        InputError: If the solver is unknown, if a tolerance or the time span is invalid, if the solver yields no
            gradient in training or does not work under a transform of ``torch.func``, or if the inputs or the solution
            are not finite.
    """

    @checked
    def __init__(
        self,
        method: str = "dopri5",
        *,
        rtol: float = 1e-3,
        atol: float = 1e-3,
        options: Mapping[str, Any] | None = None,
        t_span: Sequence[float] = (0.0, 1.0),
        adjoint: bool = False,
        adjoint_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if method not in solver_names():
            raise unknown_name("solver", method, solver_names())
        require(len(set(t_span)) == len(t_span) == 2, "t_span", "two different times, start and end", t_span)
        require(rtol >= 0, "rtol", "a number >= 0", rtol)
        require(atol > 0, "atol", "a number above 0", atol)
        self.method = method
        self.rtol = rtol
        self.atol = atol
        self.options = dict(options or {})
        self.t_span = (t_span[0], t_span[1])
        self.adjoint = adjoint
        self.adjoint_options = dict(adjoint_options or {})
        self.num_evaluations = 0
        self.num_backward_evaluations = 0

    # A solver is mostly Python that branches on values: compiled, it would be many small graphs with graph breaks.
    @not_compiled
    def forward(
        self, x: Tensor, propagate: Propagate, *, times: Sequence[float] | Tensor | None = None, **options: Any
    ) -> Tensor:
        """Solve from the inputs and return the outputs at the end, or at the given times.

        Args:
            x: Inputs at the start, ``t_span[0]``.
            propagate: The product of this forward pass.
            times: Times at which to return outputs, increasing (or decreasing) from the start.
            options: Refused; there are none.
        """
        if options:
            raise InputError(f"{self.name}: unknown options {', '.join(options)}; known is times")
        if self.method == "scipy_solver" and not self.adjoint and torch.is_grad_enabled() and self.training:
            raise InputError(
                f"{self.name}: scipy_solver computes outside PyTorch and yields no gradient; "
                "train with adjoint=True or another solver"
            )
        if isinstance(times, Tensor):
            require(times.dim() == 1, f"{self.name}: times", "a vector", times)
            times = times.tolist()
        ends = self.t_span[1:] if times is None else check(f"{self.name}: times", times, Sequence[float])
        moves = [after - before for before, after in pairwise([self.t_span[0], *ends])]
        if not (all(move > 0 for move in moves) or all(move < 0 for move in moves)):
            raise InputError(
                f"{self.name}: times must increase (or decrease) from the start, t = {self.t_span[0]}; got {ends}"
            )
        if autocast_dtype(x) is not None:
            x = x.float()
        if x.dtype in (torch.float16, torch.bfloat16) and self.method not in FIXED_STEPS:
            raise InputError(
                f"{self.name}: {self.method} chooses its steps by errors that {x.dtype} cannot tell from rounding: "
                "keep the graph in float32 (torch.autocast still runs its node function in bfloat16), or use a solver "
                "with fixed steps, such as 'rk4'"
            )
        # Rounded once, on the CPU: not all devices have float64.
        grid = torch.tensor([self.t_span[0], *ends], dtype=torch.float64, device="cpu").to(x.dtype).to(x.device)
        z = F.pad(x, (*[0, 0] * (x.dim() - 2), 0, self.nodes.num_nodes - x.size(1)))
        # The solver creates tensors in the default layout, so it gets the states with their dimensions in memory order,
        # unless the user's norm sees them.
        own_norm = "norm" in self.options or "norm" in self.adjoint_options.get("adjoint_options", {})
        order = list(range(z.dim())) if own_norm else _memory_order(propagate.arrange(z))
        states = self._solve(_Field(self, propagate, order), z.permute(order).contiguous(), grid)
        states = states.permute(0, *(1 + order.index(dim) for dim in range(z.dim())))
        outputs = states[:, :, self.nodes.outputs.start :]
        return outputs[0] if times is None else outputs.transpose(0, 1)

    def _solve(self, field: _Field, z: Tensor, grid: Tensor) -> Tensor:
        """Return the states of all nodes, in memory order, at all times of the grid but the first."""
        from torchdiffeq import odeint, odeint_adjoint

        solver: dict[str, Any] = {"rtol": self.rtol, "atol": self.atol, "method": self.method, "options": self.options}
        self.num_evaluations = self.num_backward_evaluations = 0
        try:
            if self.adjoint and torch.is_grad_enabled():
                # torchdiffeq computes gradients of the tensors named here alone, not of those in the field's closure.
                params = (*field.propagate.weights, *self.node_function.parameters())
                solver |= {"adjoint_params": tuple(p for p in params if p.requires_grad), **self.adjoint_options}
                states = odeint_adjoint(field, z, grid, **solver)[1:]
            elif self._fuses(field.propagate, z, grid):
                states = torch.stack(dormand_prince(field, z, grid, self.rtol, self.atol))
            else:
                states = odeint(field, z, grid, **solver)[1:]
        except (AssertionError, ArithmeticError) as error:
            # torchdiffeq asserts, among other things, that its step stays above zero and its state finite.
            self._refuse_start(z)
            raise InputError(self._diverged(field.time, str(error).split(":")[0])) from error
        except RuntimeError as error:
            if not transformed():
                raise
            raise InputError(
                f"{self.name}: {self.method} does not work under this transform of torch.func "
                f"({str(error).split('. ')[0]}): use grad, vjp or jvp, not vmap, and a solver with fixed steps, such "
                "as 'rk4', without adjoint"
            ) from error
        finally:
            field.forward_done = True
        for time, state in zip(grid[1:].tolist(), states, strict=True):
            if not torch.isfinite(state).all():
                self._refuse_start(z)
                raise InputError(self._diverged(time, "the state is not finite"))
        return states

    def _fuses(self, propagate: Propagate, z: Tensor, grid: Tensor) -> bool:
        """Return whether the solver's own arithmetic is that of the kernels, whose gradients are of first order."""
        plain = self.method == "dopri5" and not self.options and bool(grid[0] < grid[-1])
        return plain and propagate.first_order and kernels_take(z) and z.numel() > 0

    def _refuse_start(self, z: Tensor) -> None:
        """Raise an error if a solver failed because of its inputs."""
        if not z.numel():
            raise InputError(f"{self.name}: the batch is empty, so that {self.method} cannot choose its steps")
        if not torch.isfinite(z).all():
            raise InputError(
                f"{self.name}: the inputs of the graph are NaN or infinite; check images and earlier layers"
            )

    def _diverged(self, time: float, reason: str) -> str:
        return (
            f"{self.name}: {self.method} failed at t = {time:.4g} ({reason}); lower the learning rate, bound the node "
            "function (a norm, tanh), loosen rtol and atol, or use smaller steps"
        )

    def extra_repr(self) -> str:
        """Options, for ``repr``."""
        return f"method={self.method!r}, rtol={self.rtol}, atol={self.atol}, adjoint={self.adjoint}"


class _Field(torch.nn.Module):
    """The right-hand side f_θ(A Z, t) of one forward pass; counts its evaluations.

    Args:
        dynamics: The dynamics that solves.
        propagate: The product of this forward pass.
        order: The order of the dimensions of Z in the solver's states.
    """

    dynamics: Continuous

    def __init__(self, dynamics: Continuous, propagate: Propagate, order: Sequence[int]) -> None:
        super().__init__()
        # Not a submodule: the adjoint's parameters are passed explicitly.
        object.__setattr__(self, "dynamics", dynamics)
        self.propagate = propagate
        self.order = order
        # The last may be NaN: an adaptive solver computes such a step from a state that is not finite.
        self._times: deque[Tensor] = deque(maxlen=2)
        self.forward_done = False

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        dynamics = self.dynamics
        self._times.append(t.detach())
        if self.forward_done:
            dynamics.num_backward_evaluations += 1
            # The adjoint solves again, from the end; nothing else checks these states.
            if not torch.isfinite(z).all():
                raise InputError(dynamics._diverged(self.time, "the state is not finite, solved backwards"))
        else:
            dynamics.num_evaluations += 1
        z = z.permute(*(self.order.index(dim) for dim in range(z.dim())))
        # The adjoint meets the same states again: running statistics must not be updated twice.
        with FrozenBuffers(dynamics.node_function, later=False) if self.forward_done else nullcontext():
            change = dynamics.step(self.propagate, dynamics.node_function, z, t)
        return change.permute(*self.order).to(z.dtype).contiguous()

    @property
    def time(self) -> float:
        """The time of the last evaluation; reading it synchronises with the device."""
        times = [float(time) for time in self._times]
        return next((time for time in reversed(times) if not math.isnan(time)), self.dynamics.t_span[0])


def _memory_order(z: Tensor) -> list[int]:
    """Return the dimensions of a tensor, those of longest stride first."""
    strides = z.stride()
    return sorted(range(z.dim()), key=lambda dim: -strides[dim])

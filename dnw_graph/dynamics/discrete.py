"""Discrete-time dynamics: a recurrent graph, computed step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dnw_graph.arguments import checked, fits, require, wrong
from dnw_graph.dynamics.recurrent import Recurrent
from dnw_graph.errors import InputError, unknown_name
from dnw_graph.ops.layout import plain_eager
from dnw_graph.propagation import Propagate

INPUT_MODES = ("initial", "hold", "sequence")


class Discrete(Recurrent):
    r"""L steps of :math:`Z(\ell + 1) = f_\theta(A Z(\ell), \ell)`, Equations 11 and 12 of the paper.

    At step 0 only the inputs are non-zero, and after the last step only the outputs are read. Nothing else is computed
    there if the node function can be applied to some nodes only.

    Args:
        steps: Number of steps L. Leave it out with ``input_mode="sequence"``, where L is the length of the sequence.
        input_mode: What sets the state of the input nodes. ``"initial"``: the input, at step 0 (Equation 10).
            ``"hold"``: the input, at every step. ``"sequence"``: element ℓ of the input, at step ℓ.
        function_per_step: Use a separate node function, with its own parameters, for every step.

    Shapes:
        - input: ``[batch, inputs, *space]``, or ``[batch, time, inputs, *space]`` for a sequence
        - output: the outputs after the last step, ``[batch, outputs, *space]``; with ``return_states=True`` the states
          of all nodes at steps 0 … L, ``[batch, L + 1, nodes, *space]``
        - ``initial_states``, if given: states of all nodes at step 0, ``[batch, nodes, *space]``; x replaces those of
          the inputs. To continue a sequence, give the last states of the earlier call. If node functions take the time,
          also give the number of its steps as ``first_step``

    Raises:
        InputError: If ``steps`` or ``input_mode`` is invalid.
    """

    @checked
    def __init__(
        self, steps: int | None = None, *, input_mode: str = "initial", function_per_step: bool = False
    ) -> None:
        super().__init__()
        if input_mode not in INPUT_MODES:
            raise unknown_name("input mode", input_mode, INPUT_MODES)
        sequence = input_mode == "sequence"
        if sequence and (steps is not None or function_per_step):
            raise InputError(
                "input_mode='sequence' takes as many steps as the input has: leave out steps and function_per_step"
            )
        require(sequence or (steps is not None and steps >= 1), "steps", "an integer >= 1", steps)
        self.steps = steps
        self.input_mode = input_mode
        self.function_per_step = function_per_step
        self.sets_inputs = input_mode != "initial"
        self.node_dim = 2 if sequence else 1

    def build(self, make_function: Callable[[range], nn.Module]) -> None:
        """Build one node function, or one per step."""
        count = self.steps if self.function_per_step and self.steps else 1
        self.node_functions = nn.ModuleList(make_function(self.nodes.all) for _ in range(count))
        if len(set(self.node_functions)) < count:
            raise InputError("function_per_step needs a name or a factory as node_function; got a module instance")

    def functions(self) -> list[tuple[nn.Module, range]]:
        """Return the node functions; each acts on all nodes."""
        return [(function, self.nodes.all) for function in self.node_functions]

    def forward(
        self,
        x: Tensor,
        propagate: Propagate,
        *,
        return_states: bool = False,
        initial_states: Tensor | None = None,
        first_step: int = 0,
        **options: Any,
    ) -> Tensor:
        """Run the steps and return the outputs, or all states."""
        if options:
            known = "return_states, initial_states and first_step"
            raise InputError(f"{self.name}: unknown options {', '.join(options)}; known are {known}")
        if not isinstance(return_states, bool):
            raise wrong(f"{self.name}: return_states", "True or False", return_states)
        require(isinstance(first_step, int) and first_step >= 0, f"{self.name}: first_step", "0 or more", first_step)
        steps = self.steps or x.size(1)
        if steps < 1:
            raise InputError(f"{self.name}: the sequence has no elements: {list(x.shape)}")
        first = x[:, 0] if self.input_mode == "sequence" else x
        if initial_states is not None:
            self._check_initial(first, initial_states)
            propagate = propagate.suited(initial_states)
        # Until the first step is done, z holds only the states of the inputs if all others are zero.
        z = first
        states = [self._with_inputs(first, initial_states)] if return_states else []
        # States that nobody reads need not be made: from what nodes receive follows what they send next.
        unread = self.input_mode == "initial" and not (return_states or self.function_per_step) and plain_eager()
        sends = True
        for step in range(steps):
            function = self.node_functions[step % len(self.node_functions)]
            part: dict[str, Any] = {}
            if step == 0 and initial_states is None and (node_wise(function) or not hasattr(function, "send")):
                part["have"] = self.nodes.inputs
            elif step == 0:
                z = self._with_inputs(first, initial_states)
            if step == steps - 1 and node_wise(function) and not return_states:
                want = self.nodes.outputs
                return self.step(propagate, function, z, first_step + step, want=want, sends=sends, **part)
            passes_on = unread and step < steps - 1 and getattr(function, "passes_on", False)
            call: Any = function.pass_on if passes_on else None
            z = self.step(propagate, function, z, first_step + step, sends=sends, call=call, **part)
            sends = not passes_on
            if step < steps - 1:
                z = self._after(z, x, step + 1)
            if return_states:
                states.append(z)
        if return_states:
            return torch.stack(states, dim=1)
        return z[:, self.nodes.outputs.start :]

    def _check_initial(self, x: Tensor, states: object) -> None:
        shape = [x.size(0), self.nodes.num_nodes, *x.shape[2:]]
        if not fits(states, x) or list(states.shape) != shape:
            raise wrong(f"{self.name}: initial_states", f"a tensor of {x.dtype} {shape} on {x.device}", states)

    def _after(self, z: Tensor, x: Tensor, step: int) -> Tensor:
        """Set the inputs of a step in the states."""
        if self.input_mode == "initial":
            return z
        return self._with_inputs(x if self.input_mode == "hold" else x[:, step], z)

    def _with_inputs(self, x: Tensor, z: Tensor | None) -> Tensor:
        """Replace the states of the input nodes by x, in z or in zeros."""
        if z is None:
            z = x.new_zeros(x.size(0), self.nodes.num_nodes, *x.shape[2:])
        return torch.cat([x, z[:, x.size(1) :]], dim=1)

    def extra_repr(self) -> str:
        """Options, for ``repr``."""
        return f"steps={self.steps}, input_mode={self.input_mode!r}, function_per_step={self.function_per_step}"


def node_wise(function: nn.Module) -> bool:
    """Return whether a node function can be applied to some nodes only."""
    return bool(getattr(function, "node_wise", False))

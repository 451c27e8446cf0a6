"""Calls the rules of a model after every step of its optimiser."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from dnw_graph._compat import backward_pass, capturing, steps_in_progress, unwrapped, unwrapped_name, version
from dnw_graph.arguments import checked, require
from dnw_graph.candidates import RankedWeight, split_index
from dnw_graph.errors import InputError
from dnw_graph.partial_step import LARGEST, PartialStep, can_be_partial
from dnw_graph.ranking import Ranking, rankings
from dnw_graph.rule_parameters import RuleParameters, parameter_groups
from dnw_graph.wirings import View, Wiring
from dnw_graph.wirings.view import new_seed


class Updates:
    """The handle that :func:`attach` returns; it lives as long as the optimiser.

    Attributes:
        graphs: The graphs whose rules need steps, by their full names.
    """

    def __init__(
        self, graphs: dict[str, Ranking], optimizer: Optimizer, parameters: RuleParameters, num_steps: int | None
    ) -> None:
        self.graphs = graphs
        self._num_steps = num_steps
        self._optimizer = weakref.ref(optimizer)
        self._stepped = False  # Whether it has, since another optimiser began a step.
        self._parameters = parameters
        self._before: dict[str, _Before] = {}
        self._partial: PartialStep | None = None
        self._probe_handles: list[RemovableHandle] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            # After a step that raised an error.
            optimizer.register_state_dict_pre_hook(self._parameters.end),
        ]
        for name, graph in graphs.items():
            graph.attached(self, name)
        self._set_probes()
        _LIVING.add(self)
        _watch_all_optimizers()

    def remove(self) -> None:
        """Remove the hooks from the optimiser."""
        _LIVING.discard(self)
        self.release(self.graphs.values())
        for handle in self._handles:
            handle.remove()

    def release(self, graphs: Iterable[Ranking]) -> None:
        """Do not act on some graphs any more."""
        self._remove_probes()
        gone = set(graphs)
        for graph in gone.intersection(self.graphs.values()):
            graph.attached(None, graph.full_name)
        self.graphs = {name: each for name, each in self.graphs.items() if each not in gone}
        self._set_probes()

    def adopt(self, graph: Ranking) -> None:
        """Act on a graph too that was a part of another one."""
        self.graphs[graph.name] = graph
        graph.attached(self, graph.name)
        self._set_probes()

    def is_of(self, optimizer: Optimizer) -> bool:
        """Return whether this is the handle of an optimiser."""
        return self._optimizer() is optimizer

    def steps_parameters(self, rule: Wiring) -> bool:
        """Return whether the optimiser, or another one of the model, has the parameters that a rule learns."""
        return all(each in self._parameters.decays or not each.requires_grad for each in rule.parameters())

    def has_gradients_of_all(self) -> bool:
        """Return whether the backward passes of the step have collected gradients of all candidates of a graph."""
        probes = (weight.holder.probe for weight in self._weights())
        return any(probe is not None and probe.grad is not None for probe in probes)

    def before_other(self, optimizer: Optimizer) -> None:
        """Note that another optimiser begins a step."""
        if not self.is_of(optimizer):
            self._stepped = False

    def after_other(self, optimizer: Optimizer) -> None:
        """Raise an error if another optimiser has moved the weights of a graph, not as a wrapper of the attached one.

        Raises:
            InputError: If it has.
        """
        attached = self._optimizer()
        if self._stepped or attached is optimizer or (attached is not None and steps_in_progress(attached)):
            return
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        moved = {parameter for parameter in parameters if parameter.grad is not None}
        own = {} if attached is None else parameter_groups(attached)
        for name, graph in self.graphs.items():
            rule, tensors = graph.wiring, graph.tensors()
            # If only the parameters of the rule are attached, another optimiser has the weights.
            if any(each in moved and (rule.counts_steps or (rule.needs_attach and each in own)) for each in tensors):
                raise InputError(
                    f"{type(optimizer).__name__} has moved the weights of {name}, but another optimiser is attached, "
                    f"and {type(rule).__name__} needs the steps of that one: call dnw_graph.attach(model, "
                    "optimizer) for each optimiser before its first step"
                )

    def _weights(self) -> Iterator[RankedWeight]:
        for graph in self.graphs.values():
            yield from graph.weights

    @torch.no_grad()
    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Make the step leave untrained candidates unchanged: hide them from it, or remember their values."""
        if steps_in_progress(optimizer) > 1:  # This is the step of its base class.
            return None
        if capturing():
            raise InputError("replaying a step in a CUDA graph calls no rule: leave the step out of the graph")
        self._before = {}  # The last step may have raised an error.
        self._parameters.end(optimizer)
        alone: dict[Tensor, Tensor] = {}
        for name, graph in self.graphs.items():
            _refuse_frozen(graph)
            view = graph.view(optimizer=optimizer)
            none = torch.empty(0, dtype=torch.long, device=graph.weights[0].parameter.device)
            trained = none if graph.wiring.skips_update(view) else graph.trained_edges()
            if trained is None or trained.numel() == graph.num_candidates:
                continue
            if parts := _positions(graph, trained, optimizer):
                alone |= parts
            else:
                self._before[name] = _Before(trained, {key: flat.clone() for key, flat in _flats(view).items()})
        self._partial = PartialStep(optimizer, alone) if alone else None
        if self._partial is None and not self._parameters.decays:
            return None
        stepping = args[0] if self._partial is None else self._partial.stand_in
        return _after_closure(lambda: self._begin(optimizer), (stepping, *args[1:]), kwargs)

    def _begin(self, optimizer: Optimizer) -> None:
        self._parameters.begin(optimizer)
        if self._partial is not None:
            self._partial.begin()

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *call: Any) -> None:
        """Restore untrained candidates, count the step and call the rules."""
        if steps_in_progress(optimizer) > 1:
            return
        self._stepped = True
        before, self._before = self._before, {}
        if self._partial is not None:
            self._partial.end()
            self._partial = None
        self._parameters.end(optimizer)
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not found_inf.item():  # Otherwise a GradScaler made a fused optimiser skip the step.
            for name, remembered in before.items():
                view = self.graphs[name].view(optimizer=optimizer)
                remembered.restore(view)
                view.write_back()
            views = {name: graph.view(optimizer=optimizer) for name, graph in self.graphs.items()}
            self._average_probes()
            for graph in self.graphs.values():
                graph.wiring.step += 1
            by_rule: dict[type, list[View]] = {}
            for view in views.values():
                if _has_gradient(view):
                    if view.wiring.needs_momentum and view.step == 1:
                        _ = view.momentum  # Raises an error: some optimisers take the option but keep no momentum.
                    by_rule.setdefault(type(view.wiring), []).append(view)
            for rule, together in by_rule.items():
                rule.after_steps(together)  # type: ignore[attr-defined]
            for view in views.values():
                view.write_back()
                view.graph.forget_edges()
        self._set_probes()

    def _set_probes(self) -> None:
        """Collect the gradients that the rules will need in the next backward passes, and no others."""
        self._remove_probes()
        for graph in self.graphs.values():
            self._add_probes(graph)

    def renew(self, graph: Ranking) -> None:
        """Act on a graph with another rule, or with a loaded state, whose number of steps a given one replaces."""
        graph.wiring.num_steps = self._num_steps or graph.wiring.num_steps
        self._add_probes(graph)  # The next step may have a round.

    def _add_probes(self, graph: Ranking) -> None:
        if graph.wiring.needs_gradient(graph.view()):
            for weight in graph.weights:
                if weight.holder.probe is None and weight.parameter.requires_grad:
                    weight.holder.probe, handles = _new_probe(weight.parameter)
                    self._probe_handles += handles

    def _remove_probes(self) -> None:
        for handle in self._probe_handles:
            handle.remove()
        self._probe_handles = []
        for weight in self._weights():
            weight.holder.probe = None

    def _average_probes(self) -> None:
        ranks = _num_ranks()
        probes = [(each.holder.probe, each.parameter) for each in self._weights() if each.holder.probe is not None]
        if ranks == 1 or not probes:
            return
        some = [probe.grad is not None for probe, _ in probes]
        collected = torch.tensor(some, dtype=torch.long, device=probes[0][1].device)
        dist.all_reduce(collected)
        for (probe, parameter), ranks_with_one in zip(probes, collected.tolist(), strict=True):
            if ranks_with_one:  # Otherwise a rule that reads the gradient refuses what is in ``.grad``.
                probe.grad = torch.zeros_like(parameter) if probe.grad is None else probe.grad.contiguous()
                dist.all_reduce(probe.grad)
                probe.grad /= ranks


_LIVING: weakref.WeakSet[Updates] = weakref.WeakSet()


@functools.cache
def _watch_all_optimizers() -> None:
    """Register hooks of every optimiser, once something is attached."""
    register_optimizer_step_pre_hook(_before_any)
    register_optimizer_step_post_hook(_after_any)


def _before_any(optimizer: Optimizer, *_: Any) -> None:
    for updates in list(_LIVING):
        updates.before_other(optimizer)


def _after_any(optimizer: Optimizer, *_: Any) -> None:
    for updates in list(_LIVING):
        updates.after_other(optimizer)


def _positions(graph: Ranking, trained: Tensor, optimizer: Optimizer) -> dict[Tensor, Tensor] | None:
    """Return the positions of the trained candidates in each parameter, or None if it cannot step on them alone."""
    weights = graph.weights
    if not all(each.numel == each.parameter.numel() and can_be_partial(optimizer, each.parameter) for each in weights):
        return None
    parts = list(zip(weights, split_index(trained, weights), strict=True))
    if any(len(own) > LARGEST * weight.numel for weight, own in parts):
        return None
    return {weight.parameter: weight.positions(own) for weight, own in parts}


def _after_closure(
    act: Callable[[], None], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Act now, or once the closure of a step has run.

    Args:
        act: The action.
        args: Arguments of the step: the optimiser itself, and perhaps a closure.
        kwargs: The same, by name.

    Returns:
        The arguments of the step.
    """
    itself, *given = args
    closure = given[0] if given else kwargs.get("closure")
    if closure is None:
        act()
        return args, kwargs

    def then_act() -> Any:
        loss = closure()
        with torch.no_grad():
            act()
        return loss

    return ((itself, then_act, *given[1:]), kwargs) if given else (args, {**kwargs, "closure": then_act})


@dataclass
class _Before:
    """The candidates that a step may change, and weights and optimiser state before it."""

    trained: Tensor
    flats: dict[str, Tensor]

    def restore(self, view: View) -> None:
        """Restore untrained candidates; optimiser state that the step created is zeroed there."""
        for name, now in _flats(view).items():
            before = self.flats.get(name)
            restored = torch.zeros_like(now) if before is None else before
            now.copy_(restored.index_copy_(0, self.trained, now[self.trained]))


def _flats(view: View) -> dict[str, Tensor]:
    return {"weight": view.weight, **{f"state {name}": flat for name, flat in view.state.items()}}


def _new_probe(parameter: Tensor) -> tuple[Tensor, list[RemovableHandle]]:
    """Return a leaf of zeros that accumulates a gradient, and the handles of its hooks.

    The gradient is reset when ``zero_grad`` has reset that of the parameter, to None or to zeros, so the gradient of a
    step that a GradScaler skipped is not added to that of the next one.
    """
    probe = parameter.new_zeros(()).expand(parameter.shape).requires_grad_()
    # The first backward pass after a reset, the last backward pass, and the version of the parameter's ``.grad``.
    fresh = last = gathered = None

    def begins() -> bool:
        grad = parameter.grad
        return grad is None or (version(grad) != gathered and not grad.any())

    def before_parameter(grad: Tensor) -> None:
        nonlocal fresh
        if begins():
            fresh = backward_pass()

    def after_parameter(_: Tensor) -> None:
        nonlocal gathered
        gathered = None if parameter.grad is None else version(parameter.grad)

    def before_probe(grad: Tensor) -> None:
        nonlocal last
        now = backward_pass()
        if now != last and (begins() or fresh == now):
            probe.grad = None
        last = now

    probe.register_hook(before_probe)
    return probe, [
        parameter.register_hook(before_parameter),
        parameter.register_post_accumulate_grad_hook(after_parameter),
    ]


def _has_gradient(view: View) -> bool:
    parameters = [weight.parameter for weight in view.graph.weights]
    return any(each.requires_grad and each.grad is not None for each in parameters)


@checked
def attach(
    model: nn.Module, optimizer: Optimizer, num_steps: int | None = None, *, steps_per_epoch: int | None = None
) -> Updates:
    """Call the rules of a model after every step of its optimiser, with hooks; the training loop does not change.

    Needed for rules that exchange or remove edges between steps (``"set"``, ``"rigl"``, …), that freeze candidates or
    have parameters (``"str"``), and for all schedules. Call it after creating the optimiser, and before loading a
    checkpoint into it; learning-rate schedulers may exist before. Steps that a ``torch.amp.GradScaler`` skips do not
    count, nor do passes without a step. A copy of the optimiser has no hooks: attach it too. Register other pre-hooks
    of its step, such as one that clips gradients, before: for rules that freeze candidates, the gradients of the others
    are gathered here.

    Parameters of a rule, such as the threshold of ``"str"``, are stepped with their own weight decay. If the optimiser
    was created without them, before ``sparsify`` or ``rewire``, they are added to the group of the graph's weights; if
    they have another optimiser than the weights, attach only that one.

    Attaching an optimiser again replaces its hooks. If it has the parameters of two models, attach it to both at once:
    ``attach(nn.ModuleList([first, second]), optimizer)``.

    Args:
        model: The model, or a wrapper of it (data-parallel, compiled, averaged).
        optimizer: Its optimiser.
        num_steps: Steps of the whole training, for schedules in fractions of it. Default: that of a loaded state.
        steps_per_epoch: Steps of an epoch, for rules that act once per epoch.

    Returns:
        A handle, which need not be kept; :meth:`Updates.remove` removes the hooks.

    Raises:
        InputError: If the optimiser is not supported, is attached to another model, or lacks a parameter, the momentum
            or the weight decay that a rule needs; or if a rule needs a number of steps that is not known.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from dnw_graph import attach, sparsify
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> _ = sparsify(model, density=0.25, wiring="rigl")
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> _ = attach(model, optimizer, num_steps=1000)
    """
    for name, number in (("num_steps", num_steps), ("steps_per_epoch", steps_per_epoch)):
        require(number is None or number >= 1, name, "an integer >= 1", number)
    return attach_beside(model, optimizer, (), num_steps, steps_per_epoch)


def attach_beside(
    model: nn.Module,
    optimizer: Optimizer,
    others: Iterable[Optimizer],
    num_steps: int | None,
    steps_per_epoch: int | None,
) -> Updates:
    """Attach one of several optimisers of a model, see :func:`attach`, to what no other one has."""
    elsewhere = {each for other in others if other is not optimizer for each in parameter_groups(other)}
    own = parameter_groups(optimizer)
    graphs: dict[str, Ranking] = {}
    for path, graph in rankings(unwrapped(model)):
        rule = graph.wiring
        # A rule that only has parameters needs the optimiser that has them; that of another model may lack them.
        has_any = any(each in own for each in (*graph.tensors(), *rule.parameters()))
        if (rule.counts_steps or (rule.needs_attach and has_any)) and not elsewhere.issuperset(graph.tensors()):
            name = graph.full_name_at(unwrapped_name(path))
            graphs[path if name in graphs else name] = graph
    if graphs:
        _refuse_optimizer(optimizer)
    earlier = [each for each in _LIVING if graphs and each.is_of(optimizer)]
    for other in earlier:
        if other.graphs and set(other.graphs.values()).isdisjoint(graphs.values()):
            raise InputError(
                f"{type(optimizer).__name__} is attached to another model, with {next(iter(other.graphs))}: call "
                "attach(nn.ModuleList([first, second]), optimizer) for both, or remove() of the earlier handle before"
            )
    parameters = RuleParameters(unwrapped(model), optimizer, others)
    for name, graph in graphs.items():
        _refuse_parameters(name, graph, optimizer)
        _refuse_frozen(graph)
    seed = _common_seed(model)
    for graph in graphs.values():
        rule = graph.wiring
        rule.num_steps = num_steps or rule.num_steps
        rule.steps_per_epoch = steps_per_epoch or rule.steps_per_epoch
        rule.seed = rule.seed or seed
        rule.refuse_unknown_numbers(graph.view())
    for updates in earlier:
        updates.remove()
    for updates in {graph.updates for graph in graphs.values()} - {None}:
        updates.release(graphs.values())
    parameters.add_missing()
    return Updates(graphs, optimizer, parameters, num_steps)


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _common_seed(model: nn.Module) -> int:
    """Return one seed for all ranks."""
    seed = [new_seed()]
    if _num_ranks() > 1:
        # By default NCCL uses the current device, which is the same GPU on all ranks where a program does not set it.
        device = next((parameter.device for parameter in model.parameters() if parameter.is_cuda), None)
        dist.broadcast_object_list(seed, device=device)
    return seed[0]


def _refuse_optimizer(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    inner = [key for key, value in vars(optimizer).items() if isinstance(value, Optimizer)]
    if isinstance(optimizer, LBFGS):
        raise InputError("LBFGS takes many steps in one but calls its hooks once: use SGD, Adam or another optimiser")
    if name in ("Lookahead", "ZeroRedundancyOptimizer"):
        raise InputError(f"{name} keeps weights or state where rules cannot access them: use its base optimiser")
    if inner:
        raise InputError(f"{name} wraps another optimiser, which has the state: attach(model, optimizer.{inner[0]})")
    for group in optimizer.param_groups:
        if group.get("capturable"):
            raise InputError(
                f"{name}(capturable=True) is for steps in a CUDA graph, whose replay calls no rule: leave it out"
            )
        if any(hasattr(parameter, "full_tensor") for parameter in group["params"]):
            raise InputError("a parameter is sharded, and rules rank it as a whole: use DistributedDataParallel")


def _refuse_frozen(graph: Ranking) -> None:
    """Refuse a rule that would exchange edges of frozen weights for others."""
    weights: Sequence[Any] = graph.weights
    if len(weights) == 1 or type(graph.wiring).after_step is Wiring.after_step:
        return
    frozen = [weight.name for weight in weights if not weight.parameter.requires_grad]
    trained = [weight.name for weight in weights if weight.parameter.requires_grad]
    if frozen and trained:
        raise InputError(
            f"{frozen[0]} is frozen (requires_grad=False) but shares a ranking with {trained[0]}, and "
            f"{type(graph.wiring).__name__} would change it: skip it in sparsify, freeze all of them, or take another "
            "distribution than 'global'"
        )


def _refuse_parameters(name: str, graph: Ranking, optimizer: Optimizer) -> None:
    groups = parameter_groups(optimizer)
    for weight in graph.weights:
        if weight.parameter not in groups:
            if not weight.parameter.requires_grad or not graph.wiring.counts_steps:
                continue
            raise InputError(f"{name} is not among the parameters of the optimiser: give it model.parameters()")
        group = groups[weight.parameter]
        if graph.wiring.needs_momentum and not (group.get("momentum") or "betas" in group):
            raise InputError(
                f"{type(optimizer).__name__} has no momentum for {name}, which {type(graph.wiring).__name__} needs: "
                "give SGD momentum=0.9, or use Adam"
            )

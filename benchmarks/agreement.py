"""Checks that a model and its reference formulation have the same loss and gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from reference_formulation import DenseGraph, graphs_of
from torch import Tensor, nn


def gradients(ours: nn.Module, reference: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Pair the gradients of a model, or a graph, with those of its reference formulation.

    Yields:
        The parameter's name in the package's model, its gradient there, and in the reference formulation.
    """
    names = {parameter: name for name, parameter in ours.named_parameters()}
    pairs: list[tuple[Tensor, Tensor | None]] = []
    dense = [module for module in reference.modules() if isinstance(module, DenseGraph)]
    for graph, other in zip(graphs_of(ours), dense, strict=True):
        pairs.append((graph.candidates.weight, other.flat([_gradient(weight) for weight in other.weights])))
        for (function, _), function2 in zip(graph.dynamics.functions(), other.functions, strict=True):
            pairs += [(p, function2.get_parameter(name).grad) for name, p in function.named_parameters()]
    inside = {id(parameter) for parameter, _ in pairs}
    pairs += [(p, reference.get_parameter(name).grad) for p, name in names.items() if id(p) not in inside]
    for parameter, gradient in pairs:
        assert gradient is not None
        yield names[parameter], _gradient(parameter), gradient  # type: ignore[index]


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def check(ours: nn.Module, reference: nn.Module, x: Tensor, labels: Tensor, tolerance: float) -> float:
    """Check that a model and its reference formulation have the same loss and gradients.

    The error of a tensor is ‖a - b‖ / ‖b‖. For gradients that vanish up to rounding, such as that of a shift before an
    instance norm, the denominator is a millionth of the norm of all gradients.

    Args:
        ours: The model, in training mode.
        reference: Its reference formulation.
        x: Images.
        labels: Their classes.
        tolerance: Largest error of the loss and of each parameter's gradient.

    Returns:
        The largest error found.

    Raises:
        AssertionError: If an error is larger than the tolerance.
    """
    losses = []
    for model in (ours, reference):
        model.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        losses.append(loss.detach())
    found = list(gradients(ours, reference))
    negligible = 1e-6 * float(torch.stack([b.norm() for _, _, b in found]).norm())
    pairs = [("loss", losses[0], losses[1]), *found]
    errors = {name: float((a - b).norm() / b.norm().clamp_min(negligible)) for name, a, b in pairs}
    for name, error in errors.items():
        if not error <= tolerance:
            raise AssertionError(f"{name} differs from the reference formulation: relative error {error:.1e}")
    ours.zero_grad()
    reference.zero_grad()
    return max(errors.values())

"""Training steps to be timed: a model of this package in several variants, and its reference formulation."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from agreement import check
from timing import median_times, use_tf32
from torch import Tensor, nn

OURS = "dnw_graph"
REFERENCE = "reference formulation"
LAYOUTS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# In float32, rounding sometimes opens a ReLU in one formulation and not in the other, which changes gradients by 1e-3
# to 1e-2; the comparison in float64 is the strict one.
EXACT, SINGLE, HALF = 1e-10, 5e-2, 5e-2
# In half precision a compiler rounds elsewhere, so gradients differ; a missing gradient differs by 1.
HALF_GRADIENTS = 0.3
EXACT_IMAGES = 4


@dataclass(frozen=True)
class Case:
    """A model to train.

    Attributes:
        name: Its name.
        ways: Variants of the model by name; all start from the weights of the first.
        reference: Creates the reference formulation of a model, in a layout.
        images: A batch.
        labels: Its classes.
    """

    name: str
    ways: Mapping[str, nn.Module]
    reference: Callable[[nn.Module, torch.memory_format], nn.Module]
    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        first, *others = self.ways.values()
        for model in others:
            model.load_state_dict(first.state_dict())

    @property
    def first(self) -> nn.Module:
        """The first variant."""
        return next(iter(self.ways.values()))


def check_case(case: Case, dtype: torch.dtype, compiled: bool = False) -> None:
    """Check that all variants have the loss and the gradients of the reference formulation.

    Args:
        case: The model to train.
        dtype: Dtype of the step; in half precision only the loss is compared, in addition to everything in float32.
        compiled: Whether to check that the compiled variants have the same gradients.

    Raises:
        AssertionError: If a variant differs.
    """
    use_tf32(False)
    few = (case.images[:EXACT_IMAGES].double(), case.labels[:EXACT_IMAGES])
    for model in case.ways.values():
        if not _rounds(model):
            exact = copy.deepcopy(model).double()
            check(exact, case.reference(exact, torch.contiguous_format), *few, EXACT)
        model, reference = copy.deepcopy(model), case.reference(model, torch.contiguous_format)
        check(model, reference, case.images, case.labels, SINGLE)
        if dtype != torch.float32:
            with torch.no_grad(), torch.autocast(case.images.device.type, dtype):
                ours, theirs = (F.cross_entropy(m(case.images), case.labels).float() for m in (model, reference))
            if not (ours - theirs).abs() <= HALF * theirs:
                raise AssertionError(f"{case.name}: loss {ours:.4g}, reference formulation {theirs:.4g} in {dtype}")
        if compiled:
            _check_compiled(model, case, dtype)


def _rounds(model: nn.Module) -> bool:
    """Return whether a model computes its candidate gradient in half precision, from float32."""
    return any(getattr(part, "candidate_gradient", "exact") != "exact" for part in model.modules())


def _check_compiled(model: nn.Module, case: Case, dtype: torch.dtype) -> None:
    names, gradients = [name for name, _ in model.named_parameters()], []
    twin = copy.deepcopy(model)
    for each, call in ((model, model), (twin, torch.compile(twin))):
        loss = _loss(call, case.images, case.labels, dtype)
        gradients.append(torch.autograd.grad(loss, list(each.parameters())))
    negligible = 1e-3 * max(float(gradient.norm()) for gradient in gradients[0])
    for name, expected, found in zip(names, *gradients, strict=True):
        error = float((found - expected).norm()) / max(float(expected.norm()), negligible)
        if not error <= (SINGLE if dtype == torch.float32 else HALF_GRADIENTS):
            raise AssertionError(f"{case.name}: compiled, the gradient of {name} has a relative error of {error:.1e}")


def steps_of(case: Case, dtype: torch.dtype, options: Namespace) -> dict[str, Callable[[], None]]:
    """Return a function that runs a step, for every variant and for the reference formulation in its faster layout.

    Args:
        case: The model to train.
        dtype: Dtype of the maps.
        options: ``device``, ``tf32``; ``compile``: whether to compile all models; ``cuda_graphs``: whether to record
            each step and replay it.
    """
    use_tf32(options.tf32)
    steps = {name: _step(model, case, dtype, options) for name, model in case.ways.items()}
    layouts = {
        name: _step(case.reference(case.first, layout), case, dtype, options) for name, layout in LAYOUTS.items()
    }
    tried = median_times(layouts, 1, options.device)
    return {**steps, REFERENCE: layouts[min(tried, key=tried.__getitem__)]}


def _step(model: nn.Module, case: Case, dtype: torch.dtype, options: Namespace) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    call = torch.compile(model) if options.compile else model
    step = partial(_train, call, optimizer, case.images, case.labels, dtype)
    return _recorded(step) if options.cuda_graphs else step


def _recorded(step: Callable[[], None]) -> Callable[[], None]:
    """Return the replay of a step as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # libraries choose their algorithms, and the optimiser creates its state
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _train(
    model: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    dtype: torch.dtype,
) -> None:
    optimizer.zero_grad()
    _loss(model, images, labels, dtype).backward()
    optimizer.step()


def _loss(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        return F.cross_entropy(model(images), labels)

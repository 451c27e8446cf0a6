"""Normalisation → ReLU → 3×3 depthwise convolution in one compiled pass over the maps, with gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dnw_graph._compat import has_hooks
from dnw_graph.errors import InputError
from dnw_graph.ops.build import kernels
from dnw_graph.ops.call import readable, run
from dnw_graph.ops.layout import batch_last, detach_view, is_batch_last, kernels_take, plain_eager
from dnw_graph.ops.operands import first_order
from dnw_graph.ops.signatures import BATCH, CONSTANT, INSTANCE, NO_NORM
from dnw_graph.usual import keeps_methods

_CONVOLUTION = {"kernel_size": (3, 3), "padding": (1, 1), "dilation": (1, 1), "padding_mode": "zeros", "bias": None}
# The exact classes only: a subclass, such as a norm synchronised over devices, may compute something else.
_FORWARD: dict[type[nn.Module], Callable[..., Tensor]] = {
    kind: kind.forward for kind in (nn.BatchNorm2d, nn.InstanceNorm2d, nn.Conv2d)
}
_Module = TypeVar("_Module", bound=type[nn.Module])
_Options = tuple[int, int, int, float]


def fusible(convolution: _Module) -> _Module:
    """Class decorator: declares that a class computes the same as ``nn.Conv2d``."""
    _FORWARD[convolution] = convolution.forward
    return convolution


def computes_as_usual(module: nn.Module | None) -> bool:
    """Return whether a norm or a convolution computes the same as its class and has no hooks."""
    return module is None or (keeps_forward(module) and not has_hooks(module))


def keeps_forward(module: nn.Module) -> bool:
    """Return whether a norm or a convolution has the ``forward`` of its class, without parametrizations."""
    forward: Any = module.forward
    return (
        type(module) in _FORWARD
        and getattr(forward, "__func__", None) is _FORWARD[type(module)]
        and getattr(forward, "__self__", None) is module
    )


def fused_node_function(
    z: Tensor, norm: nn.Module | None, relu: bool, conv: nn.Conv2d | None, nodes: range | None = None
) -> Tensor | None:
    """Apply norm, ReLU and convolution in one pass, or return None if the kernel cannot do it.

    The kernel takes float32 or float64 maps on the CPU in the layout of :func:`~dnw_graph.ops.layout.batch_last`, with
    parameters and running statistics of the same dtype. It does not call the modules, so modules with hooks are not
    fused. Its gradients cannot be differentiated again.

    Args:
        z: Maps ``[batch, nodes, height, width]``.
        norm: Batch norm or instance norm, or None.
        relu: Whether a ReLU follows.
        conv: A 3×3 convolution of stride 1 or 2 with one kernel for every node, or None.
        nodes: The nodes in z. Default: all nodes of the modules.
    """
    if z.dim() != 4 or z.size(0) < 2 or z.numel() == 0 or not is_batch_last(z):
        return None
    if not plain_eager() or not kernels_take(z) or kernels() is None:
        return None
    if torch.is_autocast_enabled("cpu") or not _usual(z, norm, conv, nodes):
        return None
    kind, eps = NO_NORM, 0.0
    statistics: list[Tensor | None] = []  # Running mean and variance.
    if isinstance(norm, nn.InstanceNorm2d):
        kind, eps = INSTANCE, norm.eps
    elif isinstance(norm, nn.BatchNorm2d):
        if norm.running_mean is not None or norm.running_var is not None:
            statistics = [norm.running_mean, norm.running_var]
        kind, eps = CONSTANT if statistics and not norm.training else BATCH, norm.eps
    parameters = [
        None if module is None else getattr(module, name)
        for module, name in ((norm, "weight"), (norm, "bias"), (conv, "weight"))
    ]
    if nodes is not None:
        parameters = [None if each is None else each[nodes.start : nodes.stop] for each in parameters]
    options = (kind, int(relu), 0 if conv is None else conv.stride[0], eps)
    if kind == BATCH and not all(_follows(each, z) for each in statistics):
        return None
    mean, variance = statistics if kind == CONSTANT else (None, None)
    out, mean, variance = _NodeFunction.apply(z, *parameters, mean, variance, options)
    if out is not None and isinstance(norm, nn.BatchNorm2d) and kind == BATCH and statistics:
        _follow(norm, mean, variance, z.numel() // z.size(1))
    return out


def _usual(z: Tensor, norm: nn.Module | None, conv: nn.Conv2d | None, nodes: range | None) -> bool:
    """Return whether the kernel computes the same as these modules."""
    if not computes_as_usual(norm) or not computes_as_usual(conv):
        return False
    if not all(module is None or keeps_methods(module) for module in (norm, conv)):
        return False
    if norm is not None and not (isinstance(norm.eps, float) and norm.eps > 0):
        return False
    if isinstance(norm, nn.InstanceNorm2d) and (norm.track_running_stats or z.size(2) * z.size(3) == 1):
        return False
    # With ``nodes``, the modules have more channels than z.
    if isinstance(norm, nn.InstanceNorm2d) and nodes is None and norm.num_features != z.size(1):
        return False
    if conv is None:
        return True
    usual = all(getattr(conv, name) == value for name, value in _CONVOLUTION.items())
    usual = usual and conv.groups == conv.in_channels == conv.out_channels and conv.stride in ((1, 1), (2, 2))
    return usual and (nodes is not None or conv.groups == z.size(1))


def _follows(statistic: Tensor | None, z: Tensor) -> bool:
    """Return whether the kernel can update a running statistic of the batch norm of z."""
    if statistic is None or statistic.dtype != z.dtype or statistic.shape != z.shape[1:2]:
        return False
    return readable(statistic) and statistic.is_contiguous()


def _follow(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    """Update the running statistics of a batch norm as the module itself would."""
    if not norm.track_running_stats:
        return
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1 / float(norm.num_batches_tracked)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    # Like PyTorch's norm, ``.data`` does not change the version counter: earlier calls may have saved these tensors.
    norm.running_mean.data.lerp_(mean, momentum)
    norm.running_var.data.lerp_(variance * (count / (count - 1)), momentum)


def _memory(z: Tensor) -> Tensor:
    """Return maps in memory order, ``[nodes, height, width, batch]``."""
    return z.movedim(0, -1)


def _numbers(z: Tensor, options: _Options) -> tuple[int | float, ...]:
    batch, nodes, height, width = z.shape
    return nodes, height, width, batch, *options


class _NodeFunction(torch.autograd.Function):
    """The kernel; for a batch norm in training it also returns mean and (biased) variance of every node.

    If the kernel does not support a tensor, all results are None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        kernel: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
        options: _Options,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        kind, _, stride, _ = options
        batch, nodes, height, width = z.shape
        if kind in (BATCH, INSTANCE):
            mean, variance = z.new_empty(2, *((nodes,) if kind == BATCH else (nodes, batch)))
        step = stride or 1
        out = z.new_empty(nodes, (height + step - 1) // step, (width + step - 1) // step, batch)
        constants = scale, shift, kernel, mean, variance
        if not run("node_function", _numbers(z, options), _memory(z), *constants, out):
            return None, None, None
        ctx.options = options
        ctx.save_for_backward(z, *constants)
        out = detach_view(out.movedim(-1, 0))
        if kind != BATCH:
            return out, None, None
        ctx.mark_non_differentiable(mean, variance)
        return out, mean, variance

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # Hooks on saved tensors may have changed their layout.
        z, *constants = ctx.saved_tensors
        z = batch_last(z)
        constants = [None if each is None else each.contiguous() for each in constants]
        z_grad = z.new_empty(_memory(z).shape) if ctx.needs_input_grad[0] else None
        own = [
            each.new_empty(each.shape) if each is not None and needed else None
            for each, needed in zip(constants[:3], ctx.needs_input_grad[1:4], strict=True)
        ]
        assert grads[0] is not None
        out_grad = _memory(batch_last(grads[0]))
        if not run("node_function_grad", _numbers(z, ctx.options), _memory(z), *constants, out_grad, z_grad, *own):
            raise InputError("the kernel of a node function takes dense gradients only; use propagation='block'")
        return None if z_grad is None else z_grad.movedim(-1, 0), *own, None, None, None

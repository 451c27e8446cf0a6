"""Normalisation → ReLU → 3×3 single-channel convolution in one compiled pass over the maps, with its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dnw_graph.ops.build import kernels, run
from dnw_graph.ops.checks import first_order
from dnw_graph.ops.layout import batch_last, is_batch_last, owned, takes, unseen

NO_NORM, BATCH, INSTANCE, CONSTANT = range(4)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CONVOLUTION = {"kernel_size": (3, 3), "padding": (1, 1), "dilation": (1, 1), "padding_mode": "zeros", "bias": None}


def fused_node_function(
    z: Tensor, norm: nn.Module | None, relu: bool, conv: nn.Conv2d | None, nodes: range | None = None
) -> Tensor | None:
    """Apply norm, ReLU and convolution in one pass, or return None where PyTorch's operations have to do it.

    The kernel takes maps on the CPU in float32 or float64 that lie as :func:`~dnw_graph.ops.layout.batch_last` makes
    them. It does not call the modules, so that it leaves those alone that somebody listens to. Its gradients cannot be
    differentiated again.

    Args:
        z: Maps ``[batch, nodes, height, width]``.
        norm: Batch norm or instance norm, or None.
        relu: Whether a ReLU follows.
        conv: A 3×3 convolution of stride 1 or 2 with one kernel for every node, or None.
        nodes: The nodes that z holds, if not all that the modules are for.
    """
    if not _fits(z, norm, conv) or kernels() is None:
        return None
    kind, mean, variance, eps = NO_NORM, None, None, 0.0
    if isinstance(norm, nn.InstanceNorm2d):
        kind, eps = INSTANCE, norm.eps
    elif isinstance(norm, nn.BatchNorm2d):
        kind, eps = BATCH, norm.eps
        if not norm.training and norm.running_mean is not None:
            kind, mean, variance = CONSTANT, norm.running_mean, norm.running_var
    part = slice(None) if nodes is None else slice(nodes.start, nodes.stop)
    scale, shift, kernel = (
        None if module is None or getattr(module, name) is None else getattr(module, name)[part]
        for module, name in ((norm, "weight"), (norm, "bias"), (conv, "weight"))
    )
    stride = 0 if conv is None else conv.stride[0]
    out, mean, variance = _NodeFunction.apply(
        z, scale, shift, kernel, mean, variance, (kind, int(relu), stride, float(eps))
    )
    if isinstance(norm, nn.BatchNorm2d) and kind == BATCH:
        _follow(norm, mean, variance, z.numel() // z.size(1))
    return out


def _fits(z: Tensor, norm: nn.Module | None, conv: nn.Conv2d | None) -> bool:
    if not takes(z) or z.dim() != 4 or z.size(0) < 2 or z.numel() == 0 or not is_batch_last(z):
        return False
    if torch.is_autocast_enabled("cpu") or not unseen():
        return False
    for module in (norm, conv):
        if module is not None and (
            any(getattr(module, hooks) for hooks in _HOOKS) or any(p.dtype != z.dtype for p in module.parameters())
        ):
            return False
    # The exact types: a subclass, such as a norm that is synchronised over devices, computes something else.
    if isinstance(norm, nn.InstanceNorm2d):
        if type(norm) is not nn.InstanceNorm2d or norm.track_running_stats or z.size(2) * z.size(3) == 1:
            return False
    elif norm is not None and type(norm) is not nn.BatchNorm2d:
        return False
    if conv is None:
        return True
    usual = all(getattr(conv, name) == value for name, value in _CONVOLUTION.items())
    return usual and conv.groups == conv.in_channels == conv.out_channels and conv.stride in ((1, 1), (2, 2))


def _follow(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    """Update the running statistics of a batch norm as it would itself."""
    if not norm.training or norm.running_mean is None:
        return
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean, momentum)
    norm.running_var.lerp_(variance * (count / (count - 1)), momentum)


class _NodeFunction(torch.autograd.Function):
    """The kernel; with a batch norm in training it returns mean and variance (biased) of every node as well."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        kernel: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
        options: tuple[int, int, int, float],
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        kind, _, stride, _ = options
        batch, nodes, height, width = z.shape
        if kind in (BATCH, INSTANCE):
            mean, variance = z.new_empty(2, nodes if kind == BATCH else nodes * batch)
        step = stride or 1
        out = z.new_empty(nodes, (height + step - 1) // step, (width + step - 1) // step, batch)
        scale, shift, kernel = (None if each is None else each.contiguous() for each in (scale, shift, kernel))
        ctx.options = options
        ctx.save_for_backward(z, scale, shift, kernel, mean, variance)
        _run("node_function", z, options, scale, shift, kernel, mean, variance, out)
        out = owned(out.movedim(-1, 0))
        if kind != BATCH:
            return out, None, None
        ctx.mark_non_differentiable(mean, variance)
        return out, mean, variance

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        z, scale, shift, kernel, mean, variance = ctx.saved_tensors
        # In the memory of z there is no other layout than its own.
        z_grad = torch.empty_like(z) if ctx.needs_input_grad[0] else None
        own = [
            torch.empty_like(each) if each is not None and needed else None
            for each, needed in zip((scale, shift, kernel), ctx.needs_input_grad[1:4], strict=True)
        ]
        assert grads[0] is not None
        out_grad = batch_last(grads[0])
        _run("node_function_grad", z, ctx.options, scale, shift, kernel, mean, variance, out_grad, z_grad, *own)
        return z_grad, *own, None, None, None


def _run(name: str, z: Tensor, options: tuple[int, int, int, float], *tensors: Tensor | None) -> None:
    library = kernels()
    assert library is not None
    batch, nodes, height, width = z.shape
    run(library, name, (z.dtype,), nodes, height, width, batch, *options, z, *tensors)

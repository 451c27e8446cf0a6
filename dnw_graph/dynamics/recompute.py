"""Recomputes node functions in the backward pass (activation checkpointing) instead of storing their results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dnw_graph.ops.layout import transformed


def recomputed(module: nn.Module, call: Callable[..., Tensor], *arguments: Any, **keywords: Any) -> Tensor:
    """Return ``call(*arguments, **keywords)``, and keep only the arguments for the backward pass.

    The backward pass repeats the call, with the same result bit for bit: it restores the state of random numbers, and
    gives the module copies of its earlier buffers, such as a norm's running statistics, so that its own are updated
    only once. ``torch.func`` transforms do not support this: there, nothing is recomputed.

    Args:
        module: The module that computes.
        call: The module itself or one of its methods.
        arguments: Arguments of the call.
        keywords: Further arguments of the call.
    """
    if transformed():
        return call(*arguments, **keywords)
    buffers = FrozenBuffers(module, later=True)
    return checkpoint(call, *arguments, use_reentrant=False, context_fn=lambda: (nullcontext(), buffers), **keywords)


class FrozenBuffers:
    """Buffers of a module and its submodules at one moment, as a context.

    Inside the context the module works on copies, so that a recomputation does not update its own buffers twice.

    Args:
        module: The module.
        later: Whether the buffers may change before the context is entered, so that they must be copied now.
    """

    def __init__(self, module: nn.Module, *, later: bool) -> None:
        self.modules = list(module.modules())
        now = [_buffers(each) for each in self.modules]
        self.values = [_copies(buffers) for buffers in now] if later else now
        self.own: list[dict[str, Tensor]] = []

    def __enter__(self) -> None:
        self.own = [_buffers(each) for each in self.modules]
        for each, values in zip(self.modules, self.values, strict=True):
            # Copies of copies: a backward pass may be repeated.
            _put(each, _copies(values))

    def __exit__(self, *error: object) -> None:
        for each, buffers in zip(self.modules, self.own, strict=True):
            _put(each, buffers)


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_buffers(recurse=False, remove_duplicate=False))


def _put(module: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    for name, buffer in buffers.items():
        setattr(module, name, buffer)


def _copies(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in buffers.items()}

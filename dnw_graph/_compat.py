"""What other packages do not promise to keep: the private interfaces in use, each with its reason.

No other module names one (``tests/test_private_interfaces.py``), and ``tests/test_compat.py`` says in one line what has
gone when a new version takes one away. Nothing here is part of the public interface of this package.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

# Makes ``torch.compiler.disable`` wait for the first call. The public one imports the compiler at once: 2 s of CPU.
from torch._compile import _disable_dynamo

# PyTorch's documentation tells users to subclass it from there; no public module has it.
from torch.utils._python_dispatch import TorchDispatchMode, is_in_torch_dispatch_mode

# ``torch.utils.pytree`` is public in recent versions only.
from torch.utils._pytree import tree_leaves

__all__ = [
    "OPERATORS_WITHOUT_FORMULA",
    "TorchDispatchMode",
    "as_plain_tensors",
    "backward_pass",
    "functorch_active",
    "has_hooks",
    "has_own_hooks",
    "import_pyg",
    "in_backward_pass",
    "is_batched",
    "is_in_torch_dispatch_mode",
    "is_replica",
    "leave_signals_alone",
    "not_compiled",
    "one_dnn_linear",
    "remove_hooks",
    "solver_names",
    "tree_leaves",
    "unwrapped",
    "unwrapped_name",
    "version",
]

F = TypeVar("F", bound=Callable[..., Any])

# Operators of PyTorch that multiply and that its FLOP counter has no formula for.
OPERATORS_WITHOUT_FORMULA = frozenset(
    {
        "_addmm_activation",
        "_cudnn_rnn",
        "_int_mm",
        "_native_multi_head_attention",
        "_transformer_encoder_layer_fwd",
        "_trilinear",
        "_weight_int4pack_mm",
        "_weight_int8pack_mm",
        "addbmm",
        "linalg_matrix_exp",
        "mkldnn_rnn_layer",
    }
)


def in_backward_pass() -> bool:
    """Return whether a backward pass is at work, so that a forward pass is a recomputation of an earlier one.

    Activation checkpointing calls modules again in the backward pass and does not tell them; no public function does.
    """
    return backward_pass() is not None


def backward_pass() -> int | None:
    """Return a number that stands for the backward pass at work, or None if there is none."""
    number = torch._C._current_graph_task_id()
    return None if number == -1 else number


def functorch_active() -> bool:
    """Return whether a transform of ``torch.func`` is at work; ``torch.func`` has no public question for it."""
    return torch._C._are_functorch_transforms_active()


def is_batched(tensor: Tensor) -> bool:
    """Return whether a tensor stands for several, as in ``torch.func.vmap`` and with ``is_grads_batched``.

    Such a tensor has the shape of one, and nothing public tells.
    """
    return torch._C._functorch.is_batchedtensor(tensor) or torch._C._functorch.is_legacy_batchedtensor(tensor)


def as_plain_tensors() -> AbstractContextManager[None]:
    """Return a context in which operators see plain tensors in those of a subclass, and return such.

    PyTorch's notes on extending it name this class; no public module has it.
    """
    return torch._C.DisableTorchFunctionSubclass()


def version(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place, or −1 if it does not count that (inference tensors).

    Autograd checks saved tensors by this counter; it has no public name.
    """
    return -1 if tensor.is_inference() else tensor._version


def not_compiled(function: F) -> F:
    """Have ``torch.compile`` leave a function as it is: ``torch.compiler.disable`` that costs no import."""
    return cast(F, _disable_dynamo(function))


def one_dnn_linear() -> Callable[..., Tensor] | None:
    """Return oneDNN's product ``linear(a, b, None, "none", [], "") = a bᵀ``, or None where this build has none.

    An operator that PyTorch has for its compiler. ``torch.mm`` goes to another library, which is half as fast on some
    processors; no public function goes to oneDNN.
    """
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model within wrappers for data-parallel training, averages and compiled code.

    Compiled modules keep theirs in a private field; the others call it ``module``.
    """
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel, torch.optim.swa_utils.AveragedModel)
    while True:
        if hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        elif isinstance(model, wrappers):
            model = model.module
        else:
            return model


def unwrapped_name(name: str) -> str:
    """Return the name of a module without the parts that compiled modules around it add."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def is_replica(module: nn.Module) -> bool:
    """Return whether ``nn.DataParallel`` has made a module for one forward pass; it leaves no public mark."""
    return getattr(module, "_is_replica", False)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Return whether somebody listens to the calls of a module; PyTorch lists hooks in private fields only."""
    return has_own_hooks(module) or bool(nn.modules.module._has_any_global_hook())


def has_own_hooks(module: nn.Module) -> bool:
    """Return whether somebody listens to the calls of this module, not of all."""
    return any(getattr(module, hooks) for hooks in _HOOKS)


def remove_hooks(module: nn.Module, belongs: Callable[[Any], bool]) -> None:
    """Remove the hooks of a forward pass and of loading for which ``belongs(hook)`` is true.

    Handles would remove them in public, but a copy of a module has hooks and no handles of its own.
    """
    for hooks in (module._forward_pre_hooks, module._forward_hooks, module._state_dict_pre_hooks):
        for key in [key for key, hook in hooks.items() if belongs(hook)]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)
    loading = module._load_state_dict_pre_hooks
    # PyTorch wraps these.
    for key in [key for key, hook in loading.items() if belongs(getattr(hook, "hook", None))]:
        del loading[key]


def leave_signals_alone(trainer: Any) -> None:
    """Have a trainer of Lightning install no signal handlers; no option of it says so.

    Its automatic requeue under SLURM is off with them, which docs/training.md says.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None


def solver_names() -> Iterable[str]:
    """Return the names of torchdiffeq's solvers, which it lists nowhere else."""
    from torchdiffeq._impl.odeint import SOLVERS

    return SOLVERS


def import_pyg() -> ModuleType:
    """Import PyTorch Geometric and return it.

    Its modules decorate functions with ``torch.jit.script``, of which newer versions of PyTorch warn whoever imports
    them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
        import torch_geometric
    return torch_geometric

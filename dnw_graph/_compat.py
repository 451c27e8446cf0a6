"""Private interfaces of other packages that this package uses, each with the reason.

No other module may use one (``tests/test_private_interfaces.py``). If a new version removes one,
``tests/test_compat.py`` names it in one line. Nothing here is part of this package's public interface.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from types import FrameType, ModuleType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

# Delays ``torch.compiler.disable`` until the first call. The public function imports the compiler at once: 2 s of CPU.
from torch._compile import _disable_dynamo
from torch.nn.utils import prune

# PyTorch's documentation tells users to subclass TorchDispatchMode; no public module has it.
from torch.utils._python_dispatch import TorchDispatchMode, is_in_torch_dispatch_mode

# ``torch.utils.pytree`` is public in recent versions only.
from torch.utils._pytree import tree_leaves

__all__ = [
    "OPERATORS_WITHOUT_FORMULA",
    "TorchDispatchMode",
    "as_plain_tensors",
    "backward_pass",
    "calls_in_progress",
    "convolves_as_pytorch",
    "forget_loaders",
    "forward_pre_hooks",
    "frames_of",
    "functorch_active",
    "has_bfloat16_products",
    "has_hooks",
    "has_own_hooks",
    "import_pyg",
    "in_backward_pass",
    "in_forward_mode",
    "is_batched",
    "is_in_torch_dispatch_mode",
    "is_replica",
    "leave_signals_alone",
    "not_compiled",
    "one_dnn_linear",
    "remove_hooks",
    "remove_pruning",
    "solver_names",
    "steps_in_progress",
    "tree_leaves",
    "unwrapped",
    "unwrapped_name",
    "unwrapped_tensor",
    "version",
]

F = TypeVar("F", bound=Callable[..., Any])

# Operators that multiply but for which PyTorch's FLOP counter has no formula.
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
    """Return whether a backward pass is running, so that a forward pass now is a recomputation.

    Activation checkpointing calls modules again in the backward pass; no public function tells.
    """
    return backward_pass() is not None


def backward_pass() -> int | None:
    """Return the number of the running backward pass, or None if none is running."""
    number = torch._C._current_graph_task_id()
    return None if number == -1 else number


def functorch_active() -> bool:
    """Return whether a ``torch.func`` transform is active; no public function tells."""
    return torch._C._are_functorch_transforms_active()


def in_forward_mode() -> bool:
    """Return whether ``torch.autograd.forward_ad`` computes tangents; no public function tells."""
    return torch.autograd.forward_ad._current_level >= 0


def is_batched(tensor: Tensor) -> bool:
    """Return whether a tensor is batched by ``torch.func.vmap`` or ``is_grads_batched``.

    Its shape is that of a single tensor, and no public function tells them apart.
    """
    return torch._C._functorch.is_batchedtensor(tensor) or torch._C._functorch.is_legacy_batchedtensor(tensor)


def unwrapped_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor without the wrappers of ``torch.func.grad``, ``vjp`` and ``jvp``, which end with the transform.

    The public ``torch.func.debug_unwrap`` is for debugging, and newer than the oldest PyTorch supported.
    """
    while torch._C._functorch.is_gradtrackingtensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def as_plain_tensors() -> AbstractContextManager[None]:
    """Return a context in which operators treat tensor subclasses as plain tensors, and return plain tensors.

    PyTorch's notes on extending it name this class; no public module has it.
    """
    return torch._C.DisableTorchFunctionSubclass()


def capturing() -> bool:
    """Return whether a CUDA graph is being captured: then the host cannot synchronise, and a replay skips it."""
    # Not is_available(), which loads NVIDIA's libraries anew on every call.
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def version(tensor: Tensor) -> int:
    """Return how many times a tensor was changed in place, or −1 for inference tensors, which have no such counter.

    Autograd uses the counter to check saved tensors; it has no public name.
    """
    return -1 if tensor.is_inference() else tensor._version


def not_compiled(function: F) -> F:
    """Exclude a function from ``torch.compile``, like ``torch.compiler.disable`` but without its import."""
    return cast(F, _disable_dynamo(function))


def one_dnn_linear() -> Callable[..., Tensor] | None:
    """Return oneDNN's product ``linear(a, b, None, "none", [], "") = a bᵀ``, or None where this build has none.

    PyTorch has this operator for its compiler. No public function uses oneDNN; ``torch.mm`` uses another library, which
    is half as fast on some processors.
    """
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def has_bfloat16_products() -> bool:
    """Return whether this processor has bfloat16 products; PyTorch 2.8 has only private functions for this."""
    questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, question, bool)() for question in questions)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers for data-parallel training, averaging and compilation.

    Compiled modules have it in a private field, other wrappers as ``module``.
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
    """Return the name of a module without the parts that compiled wrappers add."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def remove_pruning(model: nn.Module) -> None:
    """Make the weights that ``torch.nn.utils.prune`` prunes plain parameters with zeros; only its hooks know them."""
    for module in model.modules():
        for hook in forward_pre_hooks(module):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)


def is_replica(module: nn.Module) -> bool:
    """Return whether a module is a replica that ``nn.DataParallel`` made for one forward pass; nothing public tells."""
    return getattr(module, "_is_replica", False)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has hooks, including global ones; PyTorch lists hooks in private fields only."""
    return has_own_hooks(module) or bool(nn.modules.module._has_any_global_hook())


def convolves_as_pytorch(layer: nn.Conv2d) -> bool:
    """Return whether the forward pass of a convolution pads and convolves as PyTorch's does.

    It calls a private method, which a subclass may override and others may replace on the object.
    """
    return getattr(layer._conv_forward, "__func__", None) is nn.Conv2d._conv_forward


def has_own_hooks(module: nn.Module) -> bool:
    """Return whether a module has its own hooks, excluding global ones."""
    return any(getattr(module, hooks) for hooks in _HOOKS)


def forward_pre_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """Return the hooks before the forward pass of a module; PyTorch lists them in a private field only."""
    return list(module._forward_pre_hooks.values())


def remove_hooks(module: nn.Module, belongs: Callable[[Any], bool]) -> None:
    """Remove the forward, state-dict and loading hooks for which ``belongs(hook)`` is true.

    The public way is a hook's handle, but a copied module has hooks without handles.
    """
    for hooks in (module._forward_pre_hooks, module._forward_hooks, module._state_dict_pre_hooks):
        for key in [key for key, hook in hooks.items() if belongs(hook)]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)
    loading = module._load_state_dict_pre_hooks
    # PyTorch wraps these hooks.
    for key in [key for key, hook in loading.items() if belongs(getattr(hook, "hook", None))]:
        del loading[key]


def leave_signals_alone(trainer: Any) -> None:
    """Keep a Lightning trainer from installing signal handlers; it has no option for that.

    This also turns off its automatic requeue under SLURM; docs/training.md says so.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None


def forget_loaders(trainer: Any) -> None:
    """Make a Lightning trainer set its training loader up again, as it restores the state of a loader only then."""
    trainer.fit_loop._combined_loader = None


def solver_names() -> Iterable[str]:
    """Return the names of torchdiffeq's solvers; no public module lists them."""
    from torchdiffeq._impl.odeint import SOLVERS

    return SOLVERS


def frames_of(top: FrameType | None) -> Iterator[FrameType]:
    """Yield a frame and those that it was called from."""
    while top is not None:
        yield top
        top = top.f_back


def calls_in_progress(module: nn.Module) -> int:
    """Return how many calls of a module are running in this thread; walking the frames of others is not safe."""
    frames = frames_of(inspect.currentframe())
    return sum(frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is module for frame in frames)


# A step calls its hooks itself, and that of a subclass calls those of its base class again; neither says which it is.
def steps_in_progress(optimizer: torch.optim.Optimizer) -> int:
    """Return how many calls of an optimiser's ``step`` are running: its own, and those of its base classes."""
    step = "Optimizer.profile_hook_step.<locals>.wrapper"
    frames = frames_of(inspect.currentframe())
    return sum(frame.f_code.co_qualname == step and frame.f_locals.get("self") is optimizer for frame in frames)


def import_pyg() -> ModuleType:
    """Import PyTorch Geometric and return it.

    Its modules use ``torch.jit.script`` at import, for which newer versions of PyTorch show a warning; it is hidden.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
        import torch_geometric
    return torch_geometric

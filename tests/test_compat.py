"""The private interfaces in use: one test each, which says what has gone when a new version takes it away."""

import copy
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dnw_graph import _compat


def test_in_backward_pass_is_true_in_a_recomputation_only():
    seen = []

    def watched(x):
        seen.append(_compat.in_backward_pass())
        return x.square()

    checkpoint(watched, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()
    assert seen == [False, True], "PyTorch no longer tells in torch._C._current_graph_task_id that it goes backwards"


def test_functorch_active_is_true_within_a_transform_only():
    seen = []
    torch.func.vmap(lambda x: (seen.append(_compat.functorch_active()), x)[1])(torch.ones(2))
    seen.append(_compat.functorch_active())
    assert seen == [True, False], "PyTorch has no torch._C._are_functorch_transforms_active that tells of vmap"


def test_in_forward_mode_is_true_where_tangents_are_computed_only():
    with torch.autograd.forward_ad.dual_level():
        assert _compat.in_forward_mode(), "torch.autograd.forward_ad no longer has the level in _current_level"
    assert not _compat.in_forward_mode()


def test_is_batched_tells_tensors_that_stand_for_several():
    seen = []
    torch.func.vmap(lambda x: (seen.append(_compat.is_batched(x)), x)[1])(torch.ones(2))
    x = torch.ones(3, requires_grad=True)
    y = x * 1
    y.register_hook(lambda grad: seen.append(_compat.is_batched(grad)))
    torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True)
    seen.append(_compat.is_batched(torch.ones(2)))
    assert seen == [True, True, False], "torch._C._functorch no longer tells batched tensors"


def test_wrappers_of_torch_func_are_taken_off():
    kept = []

    def square(x):
        kept.append(_compat.unwrapped_tensor(x))
        return x.square()

    torch.func.grad(torch.func.grad(square))(torch.tensor(3.0))
    assert copy.deepcopy(kept) == [torch.tensor(3.0)], "torch._C._functorch no longer unwraps tensors"


def test_dispatch_modes_see_operators_and_are_noticed():
    class Names(_compat.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    names = []
    with Names():
        torch.ones(2) + 1
        inside = _compat.is_in_torch_dispatch_mode()
    assert "add" in names, "torch.utils._python_dispatch.TorchDispatchMode sees no operator"
    assert (inside, _compat.is_in_torch_dispatch_mode()) == (True, False), "is_in_torch_dispatch_mode tells nothing"


def test_a_convolution_that_convolves_in_its_own_way_is_told():
    class Own(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, 2 * weight, bias)

    class Renamed(nn.Conv2d):
        """Nothing of its own."""

    told = [_compat.convolves_as_pytorch(kind(1, 1, 1)) for kind in (nn.Conv2d, Renamed, Own)]
    assert told == [True, True, False], "torch.nn.Conv2d no longer calls _conv_forward"


def test_tree_leaves_are_those_of_nested_containers():
    assert _compat.tree_leaves([1, {"a": (2, [3])}]) == [1, 2, 3], "torch.utils._pytree.tree_leaves has changed"


def test_tensors_of_a_subclass_are_seen_as_plain_ones():
    class Other(torch.Tensor):
        pass

    other = torch.ones(2).as_subclass(Other)
    assert type(other + 1) is Other
    with _compat.as_plain_tensors():
        assert type(other + 1) is torch.Tensor


def test_version_counts_changes_in_place():
    weight = torch.ones(2)
    before = _compat.version(weight)
    weight.add_(1)
    with torch.inference_mode():
        uncounted = torch.ones(2)
    assert _compat.version(weight) > before >= 0, "PyTorch no longer counts changes in Tensor._version"
    assert _compat.version(uncounted) == -1


@pytest.mark.slow
def test_not_compiled_imports_no_compiler_and_keeps_the_compiler_out():
    assert _compat.not_compiled(lambda x: x + 1)(1) == 2
    program = (
        "import sys, torch; from dnw_graph import _compat; f = _compat.not_compiled(lambda x: x + 1);"
        "assert 'torch._dynamo' not in sys.modules, 'torch._compile._disable_dynamo imports the compiler at once';"
        "seen = []; g = _compat.not_compiled(lambda x: (seen.append(torch.compiler.is_compiling()), x)[1]);"
        "torch.compile(lambda x: g(x) + 1, backend='eager')(torch.ones(1));"
        "assert seen == [False], 'the compiler looks into what torch._compile._disable_dynamo has wrapped'"
    )
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr.splitlines()[-1]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of PyTorch has no oneDNN")
def test_one_dnn_linear_is_the_product_with_the_transpose():
    linear = _compat.one_dnn_linear()
    assert linear is not None, "PyTorch has no operator mkldnn::_linear_pointwise: products take torch.mm instead"
    a, b = torch.rand(3, 4), torch.rand(5, 4)
    torch.testing.assert_close(linear(a, b, None, "none", [], ""), a @ b.t())


def test_replicas_are_told():
    module = nn.Linear(1, 1)
    replica = module._replicate_for_data_parallel()
    told = _compat.is_replica(module), _compat.is_replica(replica)
    assert told == (False, True), "nn.DataParallel no longer marks its copies with _is_replica"


@pytest.mark.parametrize(
    "register", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_every_kind_of_hook_is_found(register):
    module = nn.Linear(1, 1)
    assert not _compat.has_hooks(module)
    getattr(module, f"register_{register}")(lambda *_: None)
    assert _compat.has_hooks(module), f"nn.Module no longer lists what register_{register} takes where it did"


def test_hooks_of_all_modules_are_found():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert _compat.has_hooks(nn.Linear(1, 1)), "nn.modules.module._has_any_global_hook no longer tells"
    finally:
        handle.remove()


def test_own_hooks_are_removed_and_others_stay():
    calls = []

    def ours(*_):
        calls.append("ours")

    module = nn.Linear(1, 1)
    module.register_forward_hook(ours, always_call=True)
    module.register_forward_pre_hook(ours)
    module.register_load_state_dict_pre_hook(ours)
    module.register_forward_hook(lambda *_: calls.append("other"))
    for each in (copy.deepcopy(module), module):
        _compat.remove_hooks(each, lambda hook: hook is ours)
        calls.clear()
        each(torch.ones(1, 1))
        each.load_state_dict(nn.Linear(1, 1).state_dict())
        assert calls == ["other"], "nn.Module no longer lists hooks where remove_hooks looks for them"


def test_solvers_are_those_that_torchdiffeq_takes():
    from torchdiffeq import odeint

    assert {"dopri5", "euler", "rk4"} <= set(_compat.solver_names())
    with pytest.raises(ValueError, match="Must be one of"):
        odeint(lambda t, y: -y, torch.ones(1), torch.tensor([0.0, 1.0]), method="no such solver")
    for name in set(_compat.solver_names()) - {"scipy_solver"}:
        end = odeint(lambda t, y: -y, torch.ones(1), torch.tensor([0.0, 1.0]), method=name)[-1]
        assert end.shape == (1,), f"torchdiffeq lists the solver {name} and cannot use it"


@pytest.mark.slow
def test_pyg_is_imported_without_warnings_of_other_makers():
    program = "from dnw_graph import _compat; print(_compat.import_pyg().__name__)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "torch_geometric\n"
    assert "torch.jit.script" not in result.stderr


def test_a_trainer_of_lightning_leaves_signals_alone(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.demos import boring_classes as boring

    before = signal.getsignal(signal.SIGTERM)
    seen = []

    class Watched(boring.BoringModel):
        def on_train_start(self):
            seen.append(signal.getsignal(signal.SIGTERM))

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_steps=1, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    _compat.leave_signals_alone(trainer)
    trainer.fit(Watched())
    assert seen == [before], "Lightning has no Trainer._signal_connector.register_signal_handlers any more"


def test_products_of_bfloat16_are_told():
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    assert all(hasattr(torch.cpu, name) for name in names), "torch.cpu no longer tells which products it has"
    assert _compat.has_bfloat16_products() == any(getattr(torch.cpu, name)() for name in names)


def test_running_calls_of_a_module_are_found():
    class Counting(nn.Module):
        def forward(self, again: bool) -> int:
            return self(False) if again else _compat.calls_in_progress(self)

    assert [Counting()(again) for again in (False, True)] == [1, 2], "calls of modules are no longer _call_impl"

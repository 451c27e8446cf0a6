"""What a training costs: against the operators that PyTorch counts, and by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from pairs import rest_is_slow
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.lr_scheduler import ConstantLR
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torch.utils.flop_counter import flop_registry

from dnw_graph import ACDC, GMP, Continuous, Discrete, L1Anneal, NeuralGraph, RigL, Schedule, TargetedDropout, Wiring
from dnw_graph.data.sources import ImageData
from dnw_graph.dynamics import Dynamics
from dnw_graph.node_functions import NormReluConv
from dnw_graph.sparse_layers import sparsify
from dnw_graph.training import Classifier, DataModule, RunOptions, TrainingCost, WiringUpdates, read_checkpoint, run

IMAGES, BATCH = 70, 16
CHANNELS, NODES, OUTPUTS, PLACES = 4, 12, 3, 16


class Net(nn.Module):
    """A stem that halves images of 8×8, a graph, and a classifier."""

    def __init__(
        self, wiring: str | Wiring, k: int, dynamics: Dynamics | None, node_function: Any, propagation: str = "block"
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, 2, 1)
        nodes: dict[str, Any] = {"blocks": (CHANNELS, 5, OUTPUTS)}
        if dynamics is not None:
            nodes = {"num_nodes": NODES, "num_inputs": CHANNELS, "num_outputs": OUTPUTS, "dynamics": dynamics}
        self.graph = NeuralGraph(
            **nodes, num_edges=k, wiring=wiring, node_function=node_function, propagation=propagation, name="graph"
        )
        self.classifier = nn.Linear(OUTPUTS, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.graph(self.stem(x)).mean((2, 3)))


def conv_backward(grad_output: Tensor, x: Tensor, weight: Tensor, *options: Any) -> int:
    """Two operations per multiply-add of the convolution, for each gradient that is asked for.

    PyTorch's own count takes the gradient of a grouped convolution's weights for that of a dense one.
    """
    return 2 * grad_output.numel() * weight[0].numel() * sum(options[-1][:2])


class Operators(TorchDispatchMode):
    """Adds up PyTorch's formulas.

    ``FlopCounterMode`` does the same, but also tracks modules, which the adjoint's backward pass does not allow.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.convolution_backward:
            self.operations += conv_backward(*args)
        elif func.overloadpacket in flop_registry:
            self.operations += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


class Operations(Callback):
    """Counts the operators of every training step, forward and backward."""

    def __init__(self) -> None:
        self.total = 0
        self._operators = Operators()

    def on_train_batch_start(self, *args: Any) -> None:
        self._operators = Operators()
        self._operators.__enter__()

    def on_train_batch_end(self, *args: Any) -> None:
        self._operators.__exit__(None, None, None)
        self.total += self._operators.operations


def fit(
    model: nn.Module,
    images: ImageData,
    options: RunOptions,
    *callbacks: Callback,
    training_cost: TrainingCost | None = None,
    accumulate: int = 1,
) -> int:
    """Train, and return what the training cost."""
    training_cost = training_cost or TrainingCost(model)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=options.epochs,
        logger=False,
        callbacks=[WiringUpdates(), training_cost, *callbacks],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    module = Classifier(
        model, 10, partial(ConstantLR, factor=1.0), options.lr, 0.9, 1e-4, seed=0, accumulate=accumulate
    )
    trainer.fit(module, DataModule(images, options))
    return training_cost.multiply_adds


FIXED_STEP = {"method": "rk4", "options": {"step_size": 0.5}}
DYNAMICS: dict[str, Callable[[], Dynamics | None]] = {
    "static": lambda: None,
    "discrete": lambda: Discrete(3),
    "discrete, held inputs": lambda: Discrete(3, input_mode="hold"),
    "continuous, fixed steps": lambda: Continuous(**FIXED_STEP),
    "continuous, fixed steps, adjoint": lambda: Continuous(**FIXED_STEP, adjoint=True),
    "continuous, dopri5": lambda: Continuous(),
    "continuous, dopri5, adjoint": lambda: Continuous(adjoint=True),
}


class Tanh(nn.Module):
    """tanh; counts results through which no gradient flows back."""

    def __init__(self) -> None:
        super().__init__()
        self.without_gradient = 0

    def forward(self, z: Tensor) -> Tensor:
        result = torch.tanh(z)
        if result.requires_grad:
            self.without_gradient += 1
            result.register_hook(self._back)
        return result

    def _back(self, grad: Tensor) -> None:
        self.without_gradient -= 1


NODE_FUNCTIONS: dict[str, Callable[[], Any]] = {
    "tanh": Tanh,
    "norm_relu_conv": lambda: partial(NormReluConv, norm="instance"),
    "relu_conv_send_norm": lambda: "relu_conv_send_norm",
}


@pytest.mark.parametrize(("dynamics", "node_function"), rest_is_slow(product(DYNAMICS, NODE_FUNCTIONS), quick=3))
def test_with_all_candidates_real_it_is_what_pytorch_counts(
    dynamics: str, node_function: str, small_digits: ImageData, options: Callable[..., RunOptions]
):
    if dynamics == "static" and node_function == "relu_conv_send_norm":
        pytest.skip("a node function of dynamic graphs")
    # One step per epoch: an adaptive solver may take another number of evaluations in every step.
    batch_size = 64 if "dopri5" in dynamics else BATCH
    operations, function = Operations(), NODE_FUNCTIONS[node_function]()
    model = Net("complete", 1, DYNAMICS[dynamics](), function)
    total = fit(model, small_digits, options(epochs=2, lr=0.05, batch_size=batch_size), operations)
    if isinstance(function, Tanh) and function.without_gradient:
        # An adaptive solver evaluates once more to choose its first step; that counts like the other evaluations.
        assert dynamics == "continuous, dopri5"
        total -= function.without_gradient * 2 * NODES**2 * PLACES * batch_size
    assert total == operations.total / 2


def by_hand(through_edges: int, to_weights: int) -> int:
    """One image of a static graph without convolutions, given products along edges for every place."""
    stem = 2 * 9 * 3 * CHANNELS * PLACES  # the gradient of an image is not needed
    classifier = 3 * OUTPUTS * 10
    return stem + classifier + PLACES * (2 * through_edges + to_weights)


K = 11
N = CHANNELS * 5 + (CHANNELS + 5) * OUTPUTS
# Real edges, and candidates that get a gradient, in all steps of two epochs together.
STEPS = 2 * (IMAGES // BATCH)
LEFT = [N - round(step / (STEPS - 1) * (N - K)) for step in range(STEPS)]
RULES: dict[str, tuple[Callable[[], str | Wiring], int, int]] = {
    "complete": (lambda: "complete", STEPS * N, STEPS * N),
    "dnw": (lambda: "dnw", STEPS * K, STEPS * N),
    "no_update": (lambda: "no_update", STEPS * K, STEPS * K),
    "random_graph": (lambda: "random_graph", STEPS * K, STEPS * K),
    "l1_anneal": (lambda: L1Anneal(removal=Schedule(0.0, 1.0)), sum(LEFT), sum(LEFT)),
    "targeted_dropout, all dropped": (lambda: TargetedDropout(1.0), STEPS * K, STEPS * K),
}


@pytest.mark.parametrize(("rule", "propagation"), rest_is_slow(product(RULES, ["block", "message_passing"]), quick=3))
def test_rules_by_hand(
    rule: str, propagation: str, small_digits: ImageData, options: Callable[..., RunOptions], tmp_path: Path
):
    make, real, updated = RULES[rule]
    chosen = options(epochs=2, lr=0.05)
    summary = run(lambda *_: Net(make(), K, None, nn.Tanh(), propagation), {}, chosen, small_digits)
    # Each step is rounded to an integer.
    expected = BATCH * (STEPS * by_hand(0, 0) + PLACES * (2 * real + updated))
    assert summary.training_multiply_adds == pytest.approx(expected, abs=STEPS)
    assert str(summary.training_multiply_adds) in (tmp_path / "run" / "summary.json").read_text()


def test_dropped_edges_cost_nothing_in_the_step_that_drops_them(
    small_digits: ImageData, options: Callable[..., RunOptions]
):
    model = Net(TargetedDropout(0.5), K, None, nn.Tanh())
    real: list[int] = []
    model.graph.propagation.register_forward_hook(
        lambda module, args, output: real.append(len(args[0].index)) if model.training else None
    )
    total = fit(model, small_digits, options(epochs=2, lr=0.05))
    assert len(real) == STEPS
    assert len(set(real)) > 1
    assert total == pytest.approx(BATCH * (STEPS * by_hand(0, 0) + PLACES * 3 * sum(real)), abs=STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("sparse", [False, True])
def test_a_compiled_model_costs_as_much(sparse: bool, small_digits: ImageData, options: Callable[..., RunOptions]):
    def make(classes: int, size: int) -> nn.Module:
        model = Net("dnw", K, None, nn.Tanh())
        if sparse:
            sparsify(model, 0.5, "random_graph")
        return model

    torch.compiler.reset()
    costs = []
    for compiled in (False, True):
        chosen = options(epochs=3, lr=0.05, compile=compiled, output=f"{options().output}{compiled}")
        costs.append(run(make, {}, chosen, small_digits).training_multiply_adds)
    assert costs[0] == costs[1]


def test_a_step_that_fails_leaves_neither_hook_nor_stance(small_digits: ImageData, options: Callable[..., RunOptions]):
    model = Net("dnw", K, None, nn.Tanh())
    model.classifier.register_forward_pre_hook(lambda module, args: 1 / 0 if module.training else None)
    with pytest.raises(ZeroDivisionError):
        run(lambda *_: model, {}, options(), small_digits)
    assert not model.stem._forward_hooks
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch.compile(lambda x: 2 * x, backend=backend)(torch.ones(2))
    assert compiled


def test_accumulated_parts_cost_as_much_as_the_batch(small_digits: ImageData, options: Callable[..., RunOptions]):
    """A batch of 16 in 5 parts is one in 4."""

    def cost(accumulate: int) -> int:
        torch.manual_seed(0)
        model = Net("no_update", K, None, nn.Tanh())
        sparsify(model, 0.5, "no_update", distribution="global")
        return fit(model, small_digits, options(epochs=2, lr=0.05), accumulate=accumulate)

    assert cost(1) == cost(4) == cost(5)


@pytest.mark.parametrize("part", ["node functions", "graph"])
def test_recomputed_activations_cost_nothing(part: str, small_digits: ImageData, options: Callable[..., RunOptions]):
    def cost(recompute: bool) -> int:
        # The convolution is followed by something, so that the recomputation does not stop before its end.
        model = Net("dnw", K, None, "norm_relu_conv_norm_relu")
        if part == "node functions":
            model.graph.dynamics.recompute = recompute
        elif recompute:
            forward = model.graph.forward
            model.graph.forward = lambda x: checkpoint(forward, x, use_reentrant=False)  # type: ignore[method-assign]
        return fit(model, small_digits, options(epochs=2, lr=0.05))

    assert cost(True) == cost(False)


def test_a_frozen_part_has_no_gradients(small_digits: ImageData, options: Callable[..., RunOptions]):
    model = Net("complete", K, None, nn.Tanh())
    model.stem.requires_grad_(False)
    operations = Operations()
    assert fit(model, small_digits, options(epochs=1), operations) == operations.total / 2


def test_without_a_graph(small_digits: ImageData, options: Callable[..., RunOptions]):
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=3), nn.Flatten(), nn.Linear(6, 10)
    )
    operations = Operations()
    assert fit(model, small_digits, options(epochs=2, lr=0.05), operations) == operations.total / 2


@pytest.mark.parametrize(("wiring", "updated"), [("dnw", 1), ("no_update", 0.25), ("complete", 1)])
def test_sparse_layers_by_hand(
    wiring: str, updated: float, small_digits: ImageData, options: Callable[..., RunOptions]
):
    """A quarter of the weights is real: 3×3 kernels from 3 to 8 channels at 16 places, and 128 · 10 of a classifier."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Flatten(), nn.Linear(128, 10))
    sparsify(model, density=0.25, wiring=wiring)
    total = fit(model, small_digits, options(epochs=2, lr=0.05))
    real = 1 if wiring == "complete" else 0.25
    conv, classifier = 9 * 3 * 8 * 16, 128 * 10
    assert total == STEPS * BATCH * ((real + updated) * conv + (2 * real + updated) * classifier)


class Perceptron(nn.Sequential):
    """Notes the numbers of real weights in training."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(192, 30), nn.Tanh(), nn.Linear(30, 10))
        self.real: list[list[int]] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:  # Weights that have grown are zero in their first step.
            masks = (layer.parametrizations.weight[0].masks()[0] for layer in (self[1], self[3]))
            self.real.append([int(mask.count_nonzero()) for mask in masks])
        return super().forward(x)


FIRST, LAST = 192 * 30, 300
# Three epochs of four steps: the switches, removals and rounds are within them.
CHANGING: dict[str, tuple[Callable[[], Wiring], list[float], set[int]]] = {
    "ac_dc": (lambda: ACDC((2, 5, 9)), [1, 1, 0.1, 0.1, 0.1, 1, 1, 1, 1, 0.1, 0.1, 0.1], set()),
    "gmp": (
        lambda: GMP(1, 9, every=4),
        [1.0, *[1.0] * 4, *[0.1 + 0.9 / 8] * 4, *[0.1] * 3],
        set(),
    ),
    "rigl": (lambda: RigL(every=3, until=100), [0.1] * 12, {2, 5, 8}),  # No round follows the last step.
}


@pytest.mark.parametrize("distribution", ["uniform", "global"])
@pytest.mark.parametrize("rule", CHANGING)
def test_real_weights_that_change_within_an_epoch(
    rule: str, distribution: str, small_digits: ImageData, options: Callable[..., RunOptions]
):
    """The input of the first layer gets no gradient, that of the second does."""
    make, shares, dense_gradients = CHANGING[rule]
    model = Perceptron()
    sparsify(model, density=0.1, wiring=make(), distribution=distribution)
    total = fit(model, small_digits, options(epochs=3, lr=0.05))
    assert [sum(step) for step in model.real] == [round(share * (FIRST + LAST)) for share in shares]
    expected = 0
    for step, (first, last) in enumerate(model.real):
        learning = FIRST + LAST if step in dense_gradients else first + last
        expected += BATCH * (first + 2 * last + learning)
    assert total == expected


def test_a_weight_that_is_parametrized_is_counted_once(small_digits: ImageData, options: Callable[..., RunOptions]):
    model = nn.Sequential(nn.Flatten(), weight_norm(nn.Linear(192, 10)))
    assert fit(model, small_digits, options(epochs=1)) == STEPS // 2 * BATCH * 2 * 1920


def test_an_older_state_has_no_counts_of_parts_and_sparse_layers_which_are_counted_anew(
    small_digits: ImageData, options: Callable[..., RunOptions]
):
    model = Perceptron()
    sparsify(model, density=0.1, wiring="no_update")
    cost = TrainingCost(model)
    state = cost.state_dict()
    assert state.pop("sparse_layers") == {"1.weight": (0, 0), "3.weight": (0, 0)}
    assert state.pop("parts") == 1
    cost.load_state_dict({**state, "epoch": 0, "multiply_adds": 7})
    total = fit(model, small_digits, options(epochs=1), training_cost=cost)
    assert total == 7 + STEPS // 2 * BATCH * (2 * 576 + 3 * 30)


class StoppedError(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop_at", "dynamics", "sparse"),
    [(2, "static", False), (8, "discrete", False), (5, "continuous, dopri5", False), (6, "static", True)],
)
def test_a_resumed_run_counts_as_an_unbroken_one(
    stop_at: int,
    dynamics: str,
    sparse: bool,
    small_digits: ImageData,
    options: Callable[..., RunOptions],
    tmp_path: Path,
):
    def create(num_classes: int, image_size: int) -> nn.Module:
        model = Net(L1Anneal(removal=Schedule(0.0, 1.0)), K, DYNAMICS[dynamics](), nn.Tanh())
        if sparse:
            sparsify(model, 0.5, GMP(1, 11, every=2), distribution="global")
        return model

    def create_stopping(num_classes: int, image_size: int) -> nn.Module:
        model = create(num_classes, image_size)
        steps = iter(range(100))

        def stop(*args: Any) -> None:
            if model.training and next(steps) == stop_at:
                raise StoppedError

        model.register_forward_pre_hook(stop)
        return model

    chosen = options(epochs=3, lr=0.1, save_every=1)
    unbroken = run(create, {}, replace(chosen, output=str(tmp_path / "unbroken")), small_digits)
    with pytest.raises(StoppedError):
        run(create_stopping, {}, chosen, small_digits)
    last = f"{chosen.output}/last.ckpt"
    assert read_checkpoint(last)["global_step"] == stop_at
    resumed = run(create, {}, replace(chosen, resume=last), small_digits)
    assert resumed.training_multiply_adds == unbroken.training_multiply_adds
    again = run(create, {}, replace(chosen, resume=last), small_digits)
    assert again.training_multiply_adds == unbroken.training_multiply_adds


@pytest.mark.slow
def test_evaluation_costs_no_training(small_digits: ImageData, options: Callable[..., RunOptions]):
    chosen = options(epochs=1)
    run(lambda *_: Net("dnw", K, None, nn.Tanh()), {}, chosen, small_digits)
    evaluated = run(
        lambda *_: Net("dnw", K, None, nn.Tanh()),
        {},
        replace(chosen, output=None, evaluate=f"{chosen.output}/last.ckpt"),
        small_digits,
    )
    assert evaluated.training_multiply_adds is None


class Kept(Callback):
    """The bytes that each step's forward pass keeps for its backward pass."""

    def __init__(self) -> None:
        self.steps: list[dict[int, int]] = []

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.steps[-1][storage.data_ptr()] = storage.nbytes()
        return tensor

    def on_train_batch_start(self, *args: Any) -> None:
        self.steps.append({})
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self._hooks.__enter__()

    def on_train_batch_end(self, *args: Any) -> None:
        self._hooks.__exit__(None, None, None)


def test_a_step_that_is_counted_keeps_no_more_than_others(small_digits: ImageData, options: Callable[..., RunOptions]):
    kept, model = Kept(), Net("dnw", K, None, nn.Tanh())
    model.graph = NeuralGraph((CHANNELS, 5, 6, 7, OUTPUTS), K, node_function=nn.Tanh(), propagation="block")
    fit(model, small_digits, options(epochs=1, lr=0.05, batch_size=16), kept)
    assert len(kept.steps) > 1
    assert len({sum(step.values()) for step in kept.steps}) == 1


class Plain(LightningModule):
    """Takes batches without labels, and fails in a step."""

    def __init__(self, fails: int) -> None:
        super().__init__()
        self.graph = NeuralGraph((4, 8, 2), 20, name="g")
        self.fails: int | None = fails

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == self.fails:
            raise StoppedError
        return self.graph(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.parametrize("fails", [0, 1])
def test_batches_without_labels_and_another_fit_after_one_that_failed(fails: int):
    module = Plain(fails)
    cost = TrainingCost(module)
    data = DataLoader(torch.randn(8, 4, 5, 5), batch_size=4)

    def costs() -> int:
        before = cost.multiply_adds
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        Trainer(max_epochs=1, accelerator="cpu", callbacks=[cost], **quiet).fit(module, data)
        return cost.multiply_adds - before

    with pytest.raises(StoppedError):
        costs()
    one_step = cost.multiply_adds
    assert (one_step > 0) == (fails == 1)
    module.fails = None
    both = [costs(), costs()]
    assert both[0] == both[1] > 0
    assert both[0] % 8 == 0
    assert one_step in (0, both[0] // 2)

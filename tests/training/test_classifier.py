from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from dnw_graph import InputError, L1Anneal, NeuralGraph, Schedule
from dnw_graph.recipes.schedules import after_warmup
from dnw_graph.recipes.schedules import step as two_steps
from dnw_graph.training import Classifier, ImageData, RunOptions, cosine, read_checkpoint, run
from dnw_graph.training.data_module import DataModule


def rates(schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler], steps: int) -> list[float]:
    """The learning rate at every step, for one of 1."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, found = schedule(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_cosine_falls_from_1_to_0():
    expected = [(1 + math.cos(math.pi * step / 40)) / 2 for step in range(41)]
    assert rates(cosine(40), 41) == pytest.approx(expected, abs=1e-9)


def test_warm_up_rises_linearly_and_the_schedule_follows_it():
    # 2 of 6 epochs of 3 steps: 1/6, 2/6 … 1, then a cosine over 12 steps.
    found = rates(after_warmup(cosine, 6, 18), 19)
    assert found[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert [found[step] for step in (6, 12, 14, 18)] == pytest.approx([1, 0.5, 0.25, 0])
    stepped = rates(after_warmup(two_steps, 6, 18), 18)  # ×0.1 after half and three quarters of the 12 that are left
    assert [stepped[t] for t in (5, 6, 11, 12, 14, 15, 17)] == pytest.approx([1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert rates(after_warmup(cosine, 0, 18), 19) == rates(cosine(18), 19)
    assert rates(after_warmup(cosine, 1, 18), 2) == [1, 1]


@pytest.mark.parametrize("step", [0, 3, 6, 11])
def test_the_schedule_of_an_older_checkpoint_goes_on(step: int):
    """Its scheduler was a LambdaLR, whose state is another."""
    module = Classifier(nn.Linear(2, 3), 3, after_warmup(cosine, 6, 18), 1.0, 0.9, 0.0, seed=0)
    old = {"base_lrs": [1.0], "last_epoch": step, "_step_count": step + 1, "_last_lr": [9.0], "lr_lambdas": [None]}
    optimizers = [{"param_groups": [{"lr": 9.0}], "state": {}}]
    checkpoint = {"global_step": step, "lr_schedulers": [old], "optimizer_states": optimizers}
    module.setup("fit")
    module.on_load_checkpoint(checkpoint)
    fresh = module.configure_optimizers()
    optimizer, scheduler = fresh["optimizer"], fresh["lr_scheduler"]["scheduler"]
    scheduler.load_state_dict(checkpoint["lr_schedulers"][0])
    optimizer.param_groups[0]["lr"] = optimizers[0]["param_groups"][0]["lr"]
    for expected in rates(module.schedule, 18)[step:]:
        assert optimizer.param_groups[0]["lr"] == expected
        optimizer.step()
        scheduler.step()


def normed(norm_weight_decay: bool = True) -> dict[str, Any]:
    """Arguments of a classifier with a norm."""
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 3))
    common = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.0, "seed": 0}
    return {"model": model, "num_classes": 3, "schedule": cosine(9), "norm_weight_decay": norm_weight_decay, **common}


@pytest.mark.parametrize("weights_only", [True, False])
def test_a_checkpoint_may_be_evaluated_without_its_optimiser(weights_only: bool, tmp_path: Path):
    images = DataLoader(TensorDataset(torch.randn(8, 3, 2, 2), torch.arange(8) % 3), batch_size=4)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    saving = ModelCheckpoint(tmp_path, save_weights_only=weights_only)
    module = Classifier(**normed())
    Trainer(max_epochs=1, callbacks=[saving], **quiet).fit(module, images)
    quiet["enable_checkpointing"] = False
    saved = {name: value.clone() for name, value in module.state_dict().items()}
    path = saving.best_model_path
    other = Classifier(**normed(norm_weight_decay=False))
    Trainer(**quiet).validate(other, images, ckpt_path=path, verbose=False)
    for found in (other, Classifier.load_from_checkpoint(path, **normed(norm_weight_decay=False))):
        assert all(torch.equal(value, saved[name]) for name, value in found.state_dict().items())
    if not weights_only:
        with pytest.raises(InputError, match="optimiser of the checkpoint has 1 groups of parameters, this one 2"):
            Trainer(max_epochs=2, **quiet).fit(other, images, ckpt_path=path)


def test_a_schedule_that_makes_no_scheduler_is_told():
    module = Classifier(nn.Linear(2, 3), 3, lambda step: 1.0, 1.0, 0.9, 0.0, seed=0)
    with pytest.raises(InputError, match="schedule must be a function that returns a PyTorch scheduler"):
        module.configure_optimizers()


class _Norms(nn.Module):
    """Every kind of norm, with a bias beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.norms = nn.ModuleList([nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(2, 4), nn.LayerNorm(4)])
        self.rms = nn.RMSNorm(4)
        self.downsample = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.fc = nn.Linear(4, 2)


def test_weight_decay_may_leave_out_norms():
    model = _Norms()
    decayed = {"conv.weight", "conv.bias", "downsample.0.weight", "fc.weight", "fc.bias"}
    for norm_weight_decay in (True, False):
        module = Classifier(model, 2, cosine(1), 0.1, 0.9, 0.3, seed=0, norm_weight_decay=norm_weight_decay)
        optimizer = module.configure_optimizers()["optimizer"]
        names = {parameter: name for name, parameter in model.named_parameters()}
        found = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        expected = decayed if not norm_weight_decay else set(names.values())
        assert found == {name: 0.3 if name in expected else 0.0 for name in names.values()}
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


def test_label_smoothing_is_for_training_only():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 5))
    x, y = torch.randn(6, 3, 1, 1), torch.tensor([0, 1, 2, 3, 4, 0])
    module = Classifier(model, 5, cosine(1), 0.1, 0.9, 0.0, seed=0, label_smoothing=0.2)
    module.log = lambda *args, **options: None
    log_p = model(x).log_softmax(1)
    # 0.8 of the label and 0.2 of an even spread over all 5 classes.
    target = torch.full((6, 5), 0.04).scatter(1, y[:, None], 0.84)
    optimizer = module.configure_optimizers()["optimizer"]
    module._trainer = type("Trainer", (), {"global_step": 0, "optimizers": [optimizer]})()
    torch.testing.assert_close(module.training_step((x, y), 0), -(target * log_p).sum(1).mean())
    module.validation_step((x, y), 0)
    torch.testing.assert_close(module.loss.compute(), -log_p.gather(1, y[:, None]).mean())


class _Copies(TorchDispatchMode):
    """Collects what makes a tensor on one device from one on another."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if args and isinstance(args[0], Tensor) and isinstance(result, Tensor) and result.device != args[0].device:
            self.found.append(str(func))
        return result


@pytest.mark.parametrize("rule", ["dnw", L1Anneal(0.5, Schedule(0.0, 0.0, 0, 0))])
def test_a_step_brings_nothing_to_the_device(rule: str | L1Anneal):
    model = nn.Sequential(NeuralGraph((3, 4, 5), 9, wiring=rule), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    module = Classifier(model, 5, cosine(1), 0.1, 0.9, 0.0, seed=0)
    optimizer = module.configure_optimizers()["optimizer"]
    module._trainer = type("Trainer", (), {"global_step": 0, "optimizers": [optimizer]})()
    logged: dict[str, Any] = {}
    module.log = lambda name, value, **options: logged.update({name: value})
    x, y = torch.randn(6, 3, 4, 4), torch.tensor([0, 1, 2, 3, 4, 0])
    loss = module.training_step((x, y), 0)
    expected = nn.functional.cross_entropy(model(x), y)
    if rule != "dnw":
        assert logged["train/penalty"].item() == pytest.approx(0.5 * model[0].candidates.weight.abs().sum().item())
        expected = expected + logged["train/penalty"]
    torch.testing.assert_close(loss, expected)
    if rule == "dnw":  # the other looks at its edges
        module.to("meta")
        batch = x.to("meta"), y.to("meta")
        with _Copies() as copies:
            module.training_step(batch, 0).backward()
        assert copies.found == []
    # Of a number Lightning makes a tensor on the device.
    assert all(isinstance(value, Tensor) for value in logged.values())
    assert logged["train/lr"].is_cpu


def test_a_run_is_sgd_over_the_same_batches(
    create: Callable[[int, int], nn.Module], small_digits: ImageData, options: Callable[..., RunOptions]
):
    """Against a plain loop, which reads the order from the sampler but does the rest by itself."""

    def without_dropout(num_classes: int, image_size: int) -> nn.Module:
        model = create(num_classes, image_size)
        model.dropout.p = 0.0
        return model

    chosen = options(epochs=2, lr=0.2, weight_decay=1e-2)
    run(without_dropout, {}, chosen, small_digits)
    trained = read_checkpoint(f"{chosen.output}/last.ckpt")["state_dict"]

    torch.manual_seed(chosen.seed)
    model = without_dropout(10, 8)
    data = DataModule(small_digits, chosen)
    from dnw_graph.data.order import TrainOrder
    from dnw_graph.data.samples import Samples

    samples = Samples(small_digits.train, data.train_transform, chosen.seed)
    momentum = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for step in range(8):
        keys = next(iter(TrainOrder(70, 16, chosen.seed, lambda: step)))  # noqa: B023
        batch = [samples[key] for key in keys]
        x, y = torch.stack([image for image, _ in batch]), torch.tensor([label for _, label in batch])
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        lr = 0.2 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 8, dtype=torch.float64)).item())
        with torch.no_grad():
            for name, p in model.named_parameters():
                momentum[name] = 0.9 * momentum[name] + p.grad + 1e-2 * p
                p -= lr * momentum[name]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained[f"model.{name}"], value, rtol=1e-4, atol=1e-5)


def test_metrics_are_those_of_the_scores(small_digits: ImageData):
    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.projection = nn.Linear(3 * 8 * 8, 10)

        def forward(self, x):
            return self.projection(x.flatten(1))

    torch.manual_seed(0)
    module = Classifier(Scores(), 10, cosine(1), 0.1, 0.9, 0.0, seed=0)
    data = DataModule(small_digits, RunOptions(image_size=8, batch_size=7, accelerator="cpu"))
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    found = trainer.validate(module, data, verbose=False)[0]
    images = small_digits.test
    x = torch.stack([data.preprocess(images.load(i)) for i in range(len(images))])
    y = torch.tensor(images.labels)
    with torch.no_grad():
        scores = module(x)
    best = scores.argsort(1, descending=True)
    assert found["val/top1"] == pytest.approx((best[:, 0] == y).double().mean().item())
    assert found["val/top5"] == pytest.approx((best[:, :5] == y[:, None]).any(1).double().mean().item())
    assert found["val/loss"] == pytest.approx(nn.functional.cross_entropy(scores, y).item(), rel=1e-5)

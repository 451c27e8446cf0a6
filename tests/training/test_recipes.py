"""Recipes of today: optimisers, averages of weights, mixed images, clipped and accumulated gradients."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import Mock
from uuid import uuid4

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dnw_graph
from dnw_graph import InputError
from dnw_graph.callbacks.averages import Averages
from dnw_graph.data.sources import ImageData
from dnw_graph.data.transforms import transforms
from dnw_graph.recipes.optimizers import make_optimizer
from dnw_graph.recipes.options import RunOptions
from dnw_graph.training import Classifier, cosine, read_checkpoint, run

Create = Callable[[int, int], nn.Module]
Make = Callable[..., RunOptions]
MODERN = {"ema": 0.9, "randaugment": 9, "mixup": 0.2, "cutmix": 1.0, "clip_grad_norm": 1.0, "accumulate": 2}


def weights(path: str | Path, key: str = "state_dict") -> dict[str, torch.Tensor]:
    return read_checkpoint(path)[key]


@pytest.mark.parametrize("optimizer", ["adamw", "torch.optim.Adafactor", pytest.param("sgd", marks=pytest.mark.slow)])
def test_a_resumed_run_is_exact(optimizer: str, create: Create, small_digits: ImageData, options: Make, tmp_path: Path):
    """With everything at once, from within an epoch."""
    whole = options(optimizer=optimizer, lr=0.01, epochs=2, save_every=3, **MODERN)
    copies = tmp_path / "third.ckpt"

    class Copy(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 3:
                copies.write_bytes((Path(whole.output or "") / "last.ckpt").read_bytes())

    import sys

    module = sys.modules["dnw_graph.training.runs"]
    make = module.make_trainer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "make_trainer", lambda o, c, *rest: make(o, [*c, Copy()], *rest))
        run(create, {}, whole, small_digits)
    assert read_checkpoint(copies)["global_step"] == 3
    again = options(
        optimizer=optimizer, lr=0.01, epochs=2, resume=str(copies), output=str(tmp_path / "again"), **MODERN
    )
    run(create, {}, again, small_digits)
    for key in ("state_dict", "current_model_state"):
        first, second = (weights(Path(each.output or "") / "last.ckpt", key) for each in (whole, again))
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert torch.equal(value, second[name]), (key, name)


def test_the_average_is_what_is_evaluated_and_saved(create: Create, small_digits: ImageData, options: Make):
    """Against averages taken step by step."""
    decay, seen = 0.8, []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    import sys

    module = sys.modules["dnw_graph.training.runs"]
    make = module.make_trainer
    chosen = options(ema=decay, epochs=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "make_trainer", lambda o, c, *rest: make(o, [*c, Look()], *rest))
        summary = run(create, {}, chosen, small_digits)
    average = seen[0]
    for step in seen[1:]:
        average = {name: decay * average[name] + (1 - decay) * value for name, value in step.items()}
    path = Path(chosen.output or "") / "last.ckpt"
    saved, current = weights(path), weights(path, "current_model_state")
    for name, value in average.items():
        torch.testing.assert_close(saved[name], value, rtol=1e-5, atol=1e-6)
        assert torch.equal(current[name], seen[-1][name])
    model = dnw_graph.load(path, create=create)
    assert model.graph.edge_index.size(1) == 40
    right = sum(
        int(
            model(model.preprocess(small_digits.test.load(n)).unsqueeze(0)).argmax() == int(small_digits.test.labels[n])
        )
        for n in range(len(small_digits.test))
    )
    assert summary.top1 == pytest.approx(right / len(small_digits.test))


def test_an_average_is_on_the_device_of_the_run(create: Create):
    class Look(Averages):
        @property
        def devices(self) -> set[str]:
            assert self._average_model is not None
            module = self._average_model
            return {tensor.device.type for tensor in (*module.parameters(), *module.buffers())}

    average, trainer = Look(0.9), Mock(spec=Trainer)
    trainer.strategy.root_device = torch.device("meta")
    module = Classifier(create(10, 8), 10, lambda step: 1.0, 0.1, 0.9, 0.0, 0)
    average.setup(trainer, module, "fit")
    assert average.devices == {"meta"}


@pytest.mark.parametrize("rule", ["rigl", "gmp", "random_graph", "set"])
def test_rules_keep_whole_wirings_in_an_average(rule: str, small_digits: ImageData, options: Make):
    from dnw_graph.recipes.models import TinyOptions

    model_options = TinyOptions(wiring=rule, wiring_options={"every": 2} if rule in ("rigl", "set") else {})
    chosen = options(ema=0.9, epochs=1, image_size=16, lr=0.1)
    run(model_options.create, model_options.identity(), chosen, small_digits, "tiny")
    model = dnw_graph.load(Path(chosen.output or "") / "last.ckpt")
    assert model.graph.edge_index.size(1) == model.graph.num_real_edges
    assert model(torch.randn(2, 3, 16, 16)).isfinite().all()


def test_parts_of_a_batch_give_the_gradient_of_the_whole(small_digits: ImageData, options: Make):
    """Without norms over the batch."""

    def plain(num_classes: int, image_size: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, num_classes))

    found = []
    for parts in (1, 4):
        chosen = options(accumulate=parts, epochs=1, lr=0.1, output=None)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(Path(str(options().output)).parent)
            run(plain, {}, chosen, small_digits)
        found.append(weights(sorted(Path(str(options().output)).parent.glob("runs/*/last.ckpt"))[-1]))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6)


def fitted(batches: list[list[int]], accumulate: int, epochs: int = 1, **trainer: Any) -> nn.Module:
    """A linear classifier after SGD with momentum over batches of random images."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    images = TensorDataset(torch.randn(15, 3, 2, 2), torch.arange(15) % 3)
    module = Classifier(model, 3, cosine(100), 0.5, 0.9, 0.0, 0, accumulate=accumulate)
    loader = DataLoader(images, batch_sampler=batches)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    Trainer(accelerator="cpu", max_epochs=epochs, **quiet, **trainer).fit(module, loader)
    return model


@pytest.mark.parametrize("parts", [2, 4])
def test_batches_need_not_be_multiples_of_their_parts(parts: int):
    """Nor need they have an image for every part."""
    batches = [list(range(9)), [9], list(range(10, 15))]
    whole, found = (fitted(batches, accumulate, epochs=2)[1].weight for accumulate in (1, parts))
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "wrong", [{"accumulate_grad_batches": 2}, {"callbacks": [GradientAccumulationScheduler({1: 2})]}]
)
def test_parts_and_a_trainer_that_accumulates_are_refused(wrong: dict[str, Any]):
    batches = [[0, 1], [2, 3]]
    with pytest.raises(InputError, match="accumulate is 2, and the trainer accumulates gradients too"):
        fitted(batches, 2, **wrong)
    fitted(batches, 1, **wrong)


def test_mixed_labels_follow_from_seed_and_step(create: Create):
    module = Classifier(create(10, 8), 10, lambda optimizer: None, 0.1, 0.9, 0.0, 0, mixup=0.4, cutmix=1.0)
    batch = torch.randn(6, 3, 8, 8), torch.arange(6)
    mixed = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        mixed.append(module.mix(*batch))
    assert all(torch.equal(a, b) for a, b in zip(mixed[0], mixed[1], strict=True))
    assert not torch.equal(mixed[0][0], mixed[2][0])
    for images, labels in mixed:
        assert labels.shape == (6, 10)
        torch.testing.assert_close(labels.sum(1), torch.ones(6))
        assert F.cross_entropy(module(images), labels).isfinite()


def test_randaugment_changes_training_images_only(small_digits: ImageData):
    image = small_digits.train.load(0)
    (plain, _), (augmented, test) = transforms("digits", 16), transforms("digits", 16, randaugment=9)
    results = []
    for transform in (plain, augmented, augmented):
        torch.manual_seed(0)
        results.append(transform(image))
    assert torch.equal(results[1], results[2])
    assert not torch.equal(results[0], results[1])
    assert torch.equal(test(image), transforms("digits", 16)[1](image))


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("sgd", torch.optim.SGD, {"nesterov": True}),
        ("adamw", torch.optim.AdamW, {"betas": [0.9, 0.98]}),
        ("torch.optim.NAdam", torch.optim.NAdam, {}),
    ],
)
def test_optimisers_by_name_and_class_path(name: str, kind: type, options: dict[str, object]):
    groups = [{"params": [nn.Parameter(torch.ones(2))]}]
    made = make_optimizer(name, groups, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}, options)
    assert type(made) is kind
    assert made.defaults["lr"] == 0.1
    assert made.defaults["weight_decay"] == 1e-4
    for key, value in options.items():
        assert made.defaults[key] == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adamv", {}, "unknown optimizer 'adamv': did you mean 'adamw'"),
        ("torch.optim.Nothing", {}, "'torch.optim.Nothing', which cannot be imported"),
        ("torch.nn.Linear", {}, "which is not a torch.optim.Optimizer"),
        ("adamw", {"nesterov": True}, "does not take --optimizer-options"),
    ],
)
def test_what_is_no_optimiser_is_refused(name: str, options: dict[str, object], message: str):
    with pytest.raises(InputError, match=message):
        make_optimizer(name, [{"params": [nn.Parameter(torch.ones(2))]}], {"lr": 0.1}, options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema": 1.0}, r"--ema must be in \[0, 1\)"),
        ({"randaugment": 31}, "--randaugment must be a magnitude from 0 to 30"),
        ({"mixup": -1.0}, "--mixup must be 0 or more"),
        ({"accumulate": 3}, "3 parts cannot share a batch of 16 images evenly"),
        ({"accumulate": 3, "devices": 2}, "2 devices with 3 parts cannot share a batch of 16 images evenly"),
    ],
)
def test_options_that_cannot_be(changes: dict[str, object], message: str, options: Make):
    with pytest.raises(InputError, match=message):
        options(**changes)


@pytest.mark.slow
def test_a_compiled_run_learns_the_same(create: Create, small_digits: ImageData, options: Make, tmp_path: Path):
    def calm(num_classes: int, image_size: int) -> nn.Module:
        model = create(num_classes, image_size)
        model.dropout.p = 0.0  # compiled, it draws other numbers
        return model

    tops = [
        run(calm, {}, options(epochs=1, lr=0.1, compile=value, output=str(tmp_path / str(value))), small_digits)
        for value in (False, True)
    ]
    first, second = (weights(tmp_path / str(value) / "last.ckpt") for value in (False, True))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=1e-4)
    assert tops[0].top1 == pytest.approx(tops[1].top1, abs=0.1)


@pytest.mark.parametrize(
    ("package", "given"), [("wandb", "project"), ("mlflow", "sqlite:///{}/mlflow.db"), ("mlflow", "file:{}/mlruns")]
)
def test_further_logs_have_the_rows_of_the_table(
    package: str, given: str, create: Create, small_digits: ImageData, options: Make, tmp_path: Path, monkeypatch
):
    pytest.importorskip(package)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    given = given.format(tmp_path)
    chosen = options(epochs=1, **{package: given})
    run(create, {}, chosen, small_digits)
    if package == "wandb":
        assert list(Path(chosen.output or "").glob("wandb/offline-run-*/*.wandb"))
    else:
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=given)
        (logged,) = client.search_runs([client.get_experiment_by_name("dnw_graph").experiment_id])
        assert {*logged.data.metrics} >= {"train/loss", "val/top1"}


class Hosted(Logger):
    """A service that draws an id for a run, unless it is given one."""

    name = "hosted"
    experiment = None
    runs: ClassVar[list[str]] = []

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__()
        self.runs.append(options.get("id") or options.get("run_id") or uuid4().hex)

    @property
    def version(self) -> str:
        return self.runs[-1]

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        pass

    def log_hyperparams(self, *args: Any, **options: Any) -> None:
        pass


@pytest.mark.parametrize(("package", "logger"), [("wandb", "Wandb"), ("mlflow", "MLFlowLogger")])
def test_a_resumed_run_continues_its_log_and_another_begins_its_own(
    package: str, logger: str, create: Create, small_digits: ImageData, options: Make, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(f"dnw_graph.training.loggers.{logger}", Hosted)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(Hosted, "runs", [])
    chosen = options(epochs=1, **{package: "here"})
    run(create, {}, chosen, small_digits)
    shutil.rmtree(str(chosen.output))
    run(create, {}, chosen, small_digits)  # another one in the same place
    resume = replace(chosen, resume=f"{chosen.output}/last.ckpt")
    run(create, {}, resume, small_digits)
    run(create, {}, replace(resume, **{package: "elsewhere"}), small_digits)
    first, second, resumed, elsewhere = Hosted.runs
    assert resumed == second
    assert len({first, second, elsewhere}) == 3


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize(("package", "logger"), [("wandb", "Wandb"), ("mlflow", "MLFlowLogger")])
def test_a_service_that_refuses_a_run_is_named(
    package: str,
    logger: str,
    begins: bool,
    create: Create,
    small_digits: ImageData,
    options: Make,
    monkeypatch: pytest.MonkeyPatch,
):
    class Refuses(Hosted):
        def __init__(self, *args: Any, **given: Any) -> None:
            super().__init__(*args, **given)
            if not begins:
                raise RuntimeError("no such address")

        @property
        def experiment(self) -> None:
            raise RuntimeError("no such address")

    monkeypatch.setattr(f"dnw_graph.training.loggers.{logger}", Refuses)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    chosen = options(epochs=1, **{package: "here"})
    with pytest.raises(InputError, match=f"--{package} cannot be used: no such address"):
        run(create, {}, chosen, small_digits)
    assert not (Path(str(chosen.output)) / "metrics.csv").exists()


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_log_whose_package_is_missing_is_refused(
    package: str, options: Make, create: Create, small_digits: ImageData
):
    if __import__("importlib.util").util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(InputError, match=rf"--{package} needs {package}: install the extra dnw-graph\[{package}\]"):
        run(create, {}, options(**{package: "project"}), small_digits)

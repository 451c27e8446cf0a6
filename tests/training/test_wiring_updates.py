"""The callback: a Lightning run needs nothing else for rules that act between steps."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, LambdaLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from dnw_graph import GMP, SET, STR, InputError, RigL, sparsify
from dnw_graph.sparse_layers import weight_graphs
from dnw_graph.training import Classifier, DataModule, ImageData, RunOptions, WiringUpdates


class Module(LightningModule):
    def __init__(self, rule: object) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        sparsify(self.net, 0.3, rule)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def fit(module: LightningModule, data: DataLoader, **options: object) -> None:
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options = {"max_epochs": 2, "callbacks": [WiringUpdates()], **dict.fromkeys(quiet, False), **options}
    Trainer(accelerator="cpu", **options).fit(module, data)


@pytest.mark.parametrize(("rule", "accumulate"), [(SET(0.5), 1), (SET(0.5), 2), (RigL(0.5, 2), 1)])
def test_steps_are_those_of_the_optimiser(rule: object, accumulate: int):
    data = DataLoader(TensorDataset(torch.randn(24, 6), torch.arange(24) % 3), batch_size=4)  # 6 batches
    module = Module(rule)
    before = [graph.real_index.tolist() for graph in weight_graphs(module).values()]
    fit(module, data, accumulate_grad_batches=accumulate)
    for graph in weight_graphs(module).values():
        rule = graph.wiring
        expected = (12 // accumulate, 12 // accumulate, 6 // accumulate)
        assert (rule.step, rule.num_steps, rule.steps_per_epoch) == expected
    assert before != [graph.real_index.tolist() for graph in weight_graphs(module).values()]


@pytest.mark.parametrize("options", [{"max_epochs": None, "max_steps": 12}, {"callbacks": [WiringUpdates(12)]}])
def test_the_steps_of_an_epoch_are_known_where_those_of_the_run_are_given(options: dict[str, object]):
    module = Module(SET(0.5))
    fit(module, DataLoader(TensorDataset(torch.randn(24, 6), torch.arange(24) % 3), batch_size=4), **options)
    for graph in weight_graphs(module).values():
        assert (graph.wiring.step, graph.wiring.num_steps, graph.wiring.steps_per_epoch) == (12, 12, 6)


def test_steps_that_are_not_known_are_asked_of_the_callback_too():
    module = Module(SET(0.5))
    with pytest.raises(InputError, match=r"attach\(model, optimizer, steps_per_epoch=…\) or WiringUpdates\(steps_per_"):
        fit(module, DataLoader(Stream()), max_epochs=None, max_steps=2)


class Stream(IterableDataset):
    """Of unknown length."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        return ((torch.randn(6), 1) for _ in range(4))


@pytest.mark.parametrize("norms", [True, False])
def test_a_run_gives_parameters_of_rules_their_own_decay(norms: bool):
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    sparsify(model, 0.3, STR(weight_decay=0.25))
    module = Classifier(model, 3, partial(ConstantLR, factor=1.0), 0.1, 0.9, 0.01, 0, norm_weight_decay=norms)
    optimizer = module.configure_optimizers()["optimizer"]
    found = {group["weight_decay"]: len(group["params"]) for group in optimizer.param_groups}
    assert found == ({0.01: 6, 0.25: 2} if norms else {0.01: 4, 0.0: 2, 0.25: 2})


class Scheduled(Module):
    """One optimiser with a schedule, or two: one for the weights, one for the thresholds."""

    def __init__(self, num_optimisers: int) -> None:
        super().__init__(STR(-3.0, 0.25))
        self.automatic_optimization = num_optimisers == 1

    def parts(self) -> list[list[nn.Parameter]]:
        own = [each for each in self.parameters() if not each.dim()]
        return [[each for each in self.parameters() if each.dim()], own]

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        if not self.automatic_optimization:
            self.zero_grad()
            self.manual_backward(loss)
            for optimiser in self.optimizers():
                optimiser.step()
        return loss

    def on_train_epoch_end(self) -> None:
        if not self.automatic_optimization:
            for scheduler in self.lr_schedulers():
                scheduler.step()

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[LambdaLR]]:
        parts = [self.parameters()] if self.automatic_optimization else self.parts()
        optimisers = [torch.optim.SGD(part, 0.1, momentum=0.9) for part in parts]
        return optimisers, [LambdaLR(each, lambda epoch: 0.5**epoch) for each in optimisers]


def test_thresholds_follow_a_schedule_and_step_once_whichever_optimiser_has_them():
    """Against a plain loop whose optimiser has a group for the thresholds."""
    torch.manual_seed(0)
    x, y = torch.randn(24, 6), torch.arange(24) % 3
    start = Scheduled(1)
    for graph in weight_graphs(start).values():
        graph._needs_attach = False
    modules = [Scheduled(1), Scheduled(2)]
    for module in modules:
        module.load_state_dict(start.state_dict())
        fit(module, DataLoader(TensorDataset(x, y), batch_size=4))
    rest, own = start.parts()
    optimiser = torch.optim.SGD([{"params": rest}, {"params": own, "weight_decay": 0.25}], 0.1, momentum=0.9)
    for epoch in range(2):
        for group in optimiser.param_groups:
            group["lr"] = 0.1 * 0.5**epoch
        for batch in zip(x.split(4), y.split(4), strict=True):
            optimiser.zero_grad()
            start.training_step([*batch], 0).backward()
            optimiser.step()
    for module in modules:
        for a, b in zip(module.parameters(), start.parameters(), strict=True):
            torch.testing.assert_close(a, b)


def test_images_of_ones_own_need_a_size(small_digits: ImageData):
    mine = replace(small_digits, name="mine")
    with pytest.raises(InputError, match="images 'mine' have no default size: give --image-size"):
        DataModule(mine, RunOptions(data="digits", batch_size=8))
    assert DataModule(mine, RunOptions(data="digits", batch_size=8, image_size=16)).image_size == 16


def test_numbers_that_are_none_are_refused():
    for wrong in (0, -1, 2.5, "x"):
        with pytest.raises(InputError, match=r"num_steps .*integer"):
            WiringUpdates(num_steps=wrong)
        with pytest.raises(InputError, match=r"steps_per_epoch .*integer"):
            WiringUpdates(steps_per_epoch=wrong)


class Apart(Module):
    """Each layer has an optimiser of its own; the second one steps half as often."""

    def __init__(self) -> None:
        super().__init__(RigL(0.5, 2))
        self.automatic_optimization = False

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimiser in self.optimizers()[: 1 + batch_idx % 2]:
            optimiser.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(self.net[layer].parameters(), 0.1) for layer in (0, 2)]


def test_every_optimiser_of_a_module_is_attached_to_the_graphs_that_it_has():
    module = Apart()
    before = [graph.real_index.tolist() for graph in weight_graphs(module).values()]
    fit(module, DataLoader(TensorDataset(torch.randn(24, 6), torch.arange(24) % 3), batch_size=4))
    assert [graph.wiring.step for graph in weight_graphs(module).values()] == [12, 6]
    assert all(
        graph.real_index.tolist() != old for graph, old in zip(weight_graphs(module).values(), before, strict=True)
    )


def test_a_loader_of_unknown_length_needs_the_number_of_steps():
    with pytest.raises(InputError, match=r"does not know how many steps training has.*WiringUpdates\(num_steps=…\)"):
        fit(Module(GMP()), DataLoader(Stream()), max_epochs=1)


def test_a_changing_accumulation_needs_the_number_of_steps():
    data = DataLoader(TensorDataset(torch.randn(24, 6), torch.arange(24) % 3), batch_size=4)
    scheduler = GradientAccumulationScheduler({0: 4})
    with pytest.raises(InputError, match=r"does not know how many steps.*WiringUpdates"):
        fit(Module(GMP(every=1)), data, callbacks=[WiringUpdates(), scheduler])
    model = Module(GMP(every=1))
    fit(model, data, callbacks=[WiringUpdates(2, 2), scheduler], max_epochs=1)
    assert {graph.wiring.num_steps for graph in weight_graphs(model).values()} == {2}
    fit(Module("random_graph"), data, callbacks=[WiringUpdates(), scheduler])


class Resumable:
    """A loader of six batches that has a state."""

    def __init__(self) -> None:
        self.at, self.seen = 0, []

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        while self.at < 6:
            self.at += 1
            self.seen.append(self.at)
            yield [torch.randn(4, 6), torch.arange(4) % 3]
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Saving(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == 4:
            trainer.save_checkpoint(self.path)


def test_a_resumable_loader_goes_on_where_it_was(tmp_path: Path):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    seen = []
    for path, callbacks in ((None, [Saving(tmp_path / "x.ckpt")]), (tmp_path / "x.ckpt", [])):
        loader = Resumable()
        trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[WiringUpdates(), *callbacks], **quiet)
        trainer.fit(Module("set"), loader, ckpt_path=path, weights_only=False)
        seen.append(loader.seen)
    assert seen == [[1, 2, 3, 4, 5, 6], [5, 6]]

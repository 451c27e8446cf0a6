"""The callback: a Lightning run needs nothing else for rules that act between steps."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim.lr_scheduler import ConstantLR
from torch.utils.data import DataLoader, TensorDataset

from dnw_graph import SET, STR, InputError, RigL, sparsify
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


@pytest.mark.parametrize(("rule", "accumulate"), [(SET(0.5), 1), (SET(0.5), 2), (RigL(0.5, 2), 1)])
def test_steps_are_those_of_the_optimiser(rule: object, accumulate: int):
    data = DataLoader(TensorDataset(torch.randn(24, 6), torch.arange(24) % 3), batch_size=4)  # 6 batches
    module = Module(rule)
    before = [graph.real_index.tolist() for graph in weight_graphs(module).values()]
    trainer = Trainer(
        max_epochs=2,
        accumulate_grad_batches=accumulate,
        callbacks=[WiringUpdates()],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    for graph in weight_graphs(module).values():
        rule = graph.wiring
        expected = (12 // accumulate, 12 // accumulate, 6 // accumulate)
        assert (rule.step, rule.num_steps, rule.steps_per_epoch) == expected
    assert before != [graph.real_index.tolist() for graph in weight_graphs(module).values()]


@pytest.mark.parametrize("norms", [True, False])
def test_a_run_gives_parameters_of_rules_their_own_decay(norms: bool):
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    sparsify(model, 0.3, STR(weight_decay=0.25))
    module = Classifier(model, 3, partial(ConstantLR, factor=1.0), 0.1, 0.9, 0.01, 0, norm_weight_decay=norms)
    optimizer = module.configure_optimizers()["optimizer"]
    found = {group["weight_decay"]: len(group["params"]) for group in optimizer.param_groups}
    assert found == ({0.01: 6, 0.25: 2} if norms else {0.01: 4, 0.0: 2, 0.25: 2})


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

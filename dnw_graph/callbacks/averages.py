"""An exponential moving average of the weights, by Lightning, with valid wirings."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging

from dnw_graph.arguments import checked, require
from dnw_graph.ranking import NUMBERS
from dnw_graph.wirings.base import COUNTERS


class Averages(EMAWeightAveraging):
    """Evaluates an exponential moving average of the weights, which checkpoints hold beside the training weights.

    Candidate weights are averaged, and real edges are chosen among the averages as among any weights, so exactly k are
    real. Buffers (edges that a rule stores, statistics of norms) are those of training: an average of masks is not a
    mask.

    Args:
        decay: Weight of the average so far, such as 0.999; the weights of a step get 1 − decay.

    Raises:
        InputError: If the decay is not in [0, 1).
    """

    @checked
    def __init__(self, decay: float) -> None:
        require(0 <= decay < 1, "decay", "a number from 0 to below 1", decay)
        super().__init__(decay=decay, use_buffers=False)
        self._exchanged = False  # Whether the model has the average, and the average the weights in training.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the average on the device of the run, to which the trainer moves the model only later."""
        pl_module.to(trainer.strategy.root_device)
        super().setup(trainer, pl_module, stage)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the model the average."""
        super().on_validation_epoch_start(trainer, pl_module)
        self._exchanged = True

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give it the weights in training again."""
        super().on_validation_epoch_end(trainer, pl_module)
        self._exchanged = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Replace the weights by the average; numbers of edges are not averaged."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._exchanged and "current_model_state" in checkpoint:  # A run that is stopped while it is evaluated.
            average, current = checkpoint["current_model_state"], checkpoint["state_dict"]
            checkpoint["state_dict"], checkpoint["current_model_state"] = average, current
        for name, value in checkpoint.get("current_model_state", {}).items():
            if name.rpartition(".")[2] in (*NUMBERS, *COUNTERS):
                checkpoint["state_dict"][name] = value

"""An exponential moving average of the weights, by Lightning, with wirings that stay whole."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging

from dnw_graph.arguments import checked, require
from dnw_graph.ranking import NUMBERS


class Averages(EMAWeightAveraging):
    """Evaluates an exponential moving average of the weights, which checkpoints hold beside the weights of training.

    Candidate weights are averaged, and real edges are chosen among the averages as among any weights, so that there are
    exactly k. Buffers (edges that a rule stores, statistics of norms) are those of training: an average of masks would
    be none.

    Args:
        decay: Weight of the average so far, such as 0.999; the weights of a step have 1 − decay.

    Raises:
        InputError: If the decay is no number from 0 to below 1.
    """

    @checked
    def __init__(self, decay: float) -> None:
        require(0 <= decay < 1, "decay", "a number from 0 to below 1", decay)
        super().__init__(decay=decay, use_buffers=False)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the average in the place of the weights; how many edges there are is no part of it."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        for name, value in checkpoint.get("current_model_state", {}).items():
            if name.rpartition(".")[2] in NUMBERS:
                checkpoint["state_dict"][name] = value

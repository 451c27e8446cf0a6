"""Has a run do the rounds of sparse momentum."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from dnw_graph.sparse_momentum import SparseMomentumRounds, momentum_layers


class SparseMomentumCallback(Callback):
    """Does a round at the start of every epoch but the first, and keeps hallucinated weights at zero.

    As published, an epoch is evaluated before its round. When a round is due is a function of the number of steps, and
    the real weights are buffers of the model, so a resumed run goes on as an unbroken one does. A model without the
    rule :class:`~dnw_graph.sparse_momentum.SparseMomentum` is left alone.

    Args:
        model: The model that is trained, as it is within the LightningModule.
        num_steps: Optimiser steps of the whole run.
        every: Steps between rounds: those of an epoch.
    """

    def __init__(self, model: nn.Module, num_steps: int, every: int) -> None:
        self.model = model
        self.num_steps = num_steps
        self.every = every
        self._rounds: SparseMomentumRounds | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers and the optimiser."""
        if momentum_layers(self.model):
            self._rounds = SparseMomentumRounds(
                self.model, trainer.optimizers[0], num_steps=self.num_steps, every=self.every
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Do a round if it is time."""
        if self._rounds and trainer.global_step and trainer.global_step % self.every == 0:
            self._rounds.redistribute(trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep hallucinated weights at zero."""
        if self._rounds:
            self._rounds.reset_hallucinated()

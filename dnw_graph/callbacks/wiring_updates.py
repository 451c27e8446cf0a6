"""Attaches the rules of a model to the optimiser of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from dnw_graph._compat import forget_loaders
from dnw_graph.arguments import checked, require
from dnw_graph.updates import Updates, attach_beside


def accumulation_changes(trainer: Trainer) -> bool:
    """Return whether a callback changes how many batches a step has."""
    callbacks: Sequence[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    return any(isinstance(each, GradientAccumulationScheduler) for each in callbacks)


def accumulates(trainer: Trainer) -> bool:
    """Return whether a step may have more than one batch."""
    return trainer.accumulate_grad_batches != 1 or accumulation_changes(trainer)


class WiringUpdates(Callback):
    """Calls :func:`dnw_graph.attach` before training starts: all that rules need in a Lightning run.

    This happens before the optimiser's state is restored, so a resumed run continues like an uninterrupted one.

    Args:
        num_steps: Optimiser steps of the whole run. Default: the trainer's estimate.
        steps_per_epoch: Optimiser steps per epoch. Default: the trainer's estimate.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from dnw_graph.training import WiringUpdates
        >>> trainer = Trainer(max_epochs=3, callbacks=[WiringUpdates()], logger=False, enable_checkpointing=False)
    """

    @checked
    def __init__(self, num_steps: int | None = None, steps_per_epoch: int | None = None) -> None:
        for name, number in (("num_steps", num_steps), ("steps_per_epoch", steps_per_epoch)):
            require(number is None or number >= 1, name, "an integer >= 1", number)
        self.num_steps = num_steps
        self.steps_per_epoch = steps_per_epoch
        self.updates: list[Updates] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the rules."""
        num_steps, steps_per_epoch = self.num_steps, self.steps_per_epoch
        if steps_per_epoch is None:
            trainer.fit_loop.setup_data()  # Otherwise the number of batches is unknown until the first epoch.
        if num_steps is None:
            expected = trainer.estimated_stepping_batches
            num_steps = int(expected) if math.isfinite(expected) and expected > 0 else None  # -1: unknown
        if steps_per_epoch is None and math.isfinite(trainer.num_training_batches):
            steps_per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches) or None
        if trainer.ckpt_path is not None:
            forget_loaders(trainer)
        if accumulation_changes(trainer):
            num_steps, steps_per_epoch = self.num_steps, self.steps_per_epoch  # The others are of its first value only.
        for optimizer in trainer.optimizers:
            updates = attach_beside(pl_module, optimizer, trainer.optimizers, num_steps, steps_per_epoch)
            self.updates.append(updates)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach from the optimiser."""
        for updates in self.updates:
            updates.remove()
        self.updates = []

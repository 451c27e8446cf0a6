"""Records how the wirings of a model change in training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from dnw_graph.arguments import checked, require
from dnw_graph.ranking import rankings
from dnw_graph.visualize.pictures import draw_pictures, log_pictures, write_pictures
from dnw_graph.visualize.recording import Recording


class WiringRecorder(Callback):
    """Makes a :class:`~dnw_graph.visualize.Recording` of a Lightning run, after every epoch or every few steps.

    The recording is part of the checkpoint, so a resumed run records the same as an uninterrupted one. Put it before
    the callback that writes checkpoints. On several devices the first process records.

    Args:
        path: File to which the recording is written after every epoch; None: no file.
        every_n_steps: Also record every this many optimiser steps; 0: only at the end of epochs.
        model: The model to record, as found in the LightningModule. Default: the whole LightningModule.
        pictures: Directory for pictures at the end of training: curves, an animation of each graph and a page; they are
            also sent to TensorBoard and W&B. None: no pictures.
        metrics: The run's table, ``metrics.csv``, from which the curves are drawn; None: no curves.

    Attributes:
        recording: The recording; None before training, and for a model without graphs and sparse layers.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from dnw_graph.training import WiringRecorder
        >>> recorder = WiringRecorder("wiring.recording")
        >>> trainer = Trainer(max_epochs=3, callbacks=[recorder], logger=False, enable_checkpointing=False)
    """

    @checked
    def __init__(
        self,
        path: str | Path | None = None,
        every_n_steps: int = 0,
        model: nn.Module | None = None,
        pictures: str | Path | None = None,
        metrics: str | Path | None = None,
    ) -> None:
        require(every_n_steps >= 0, "WiringRecorder: every_n_steps", "an integer >= 0", every_n_steps)
        self.path = None if path is None else Path(path)
        self.every_n_steps = every_n_steps
        self.model = model
        self.pictures = None if pictures is None else Path(pictures)
        self.metrics = None if metrics is None else Path(metrics)
        self.recording: Recording | None = None
        self._saved: Tensor | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue the recording of a checkpoint."""
        if self._saved is not None:
            self.recording, self._saved = read(self._saved, self.model or pl_module), None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the wiring at the start of training."""
        model = self.model or pl_module
        if self.recording is not None:
            later = self.recording.moments[-1].step > trainer.global_step
            if later or self.recording.model is not model:  # Of an earlier fit.
                self.recording = None
        if self.recording is None and trainer.is_global_zero and any(rankings(model)):
            self.recording = Recording(model, step=trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record after some steps."""
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._record(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record after an epoch, or where training ends within one, and write the file."""
        self._record(trainer)
        if self.recording is not None and self.path is not None and trainer.is_global_zero:
            self.recording.save(self.path)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the recording."""
        if self.recording is not None and self.pictures is not None and trainer.is_global_zero:
            pictures = draw_pictures(self.recording, self.metrics)
            write_pictures(pictures, self.pictures)
            log_pictures(pictures, trainer.loggers, trainer.global_step - 1)

    def _record(self, trainer: Trainer) -> None:
        # With gradient accumulation, not every batch ends with a step.
        if self.recording is not None and trainer.global_step > self.recording.moments[-1].step:
            self.recording.add(trainer.global_step, _epochs(trainer))

    def state_dict(self) -> dict[str, Any]:
        """Return the recording so far."""
        if self.recording is None:
            return {} if self._saved is None else {"recording": self._saved}
        return {"recording": torch.frombuffer(bytearray(self.recording.to_bytes()), dtype=torch.uint8)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the recording from a checkpoint."""
        self._saved = state_dict.get("recording")


def _epochs(trainer: Trainer) -> float | None:
    """Return the number of epochs so far; None within an epoch of unknown length."""
    progress, batches = trainer.fit_loop.epoch_loop.batch_progress, trainer.num_training_batches
    if progress.is_last_batch:
        return trainer.current_epoch + 1.0
    return trainer.current_epoch + progress.current.ready / batches if math.isfinite(batches) else None


def read(content: Tensor, model: nn.Module) -> Recording:
    """Return the recording that a checkpoint holds as bytes.

    Raises:
        InputError: If it is damaged, or belongs to another model.
    """
    return Recording.from_bytes(content.cpu().numpy().tobytes(), model)

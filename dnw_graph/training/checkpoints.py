"""When and how checkpoints are written, so that a resumed run continues exactly."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import Logger

from dnw_graph import stopping
from dnw_graph.arguments import checked
from dnw_graph.checkpoint import FORMAT, SECTION, read_checkpoint
from dnw_graph.checksum import checksum
from dnw_graph.errors import InputError
from dnw_graph.model_card import ModelCard
from dnw_graph.training.loggers import Table
from dnw_graph.whole_file import write_whole

# Steps between checks of whether several GPUs should stop; each check synchronises.
CALLS_PER_LOOK_ON_GPUS = 5


class WholeFileIO(TorchCheckpointIO):
    """Writes checkpoints atomically: if the run is killed or the disk is full, the previous checkpoint remains.

    Args:
        content: Content of the checkpoint that the run resumes, already read.
    """

    def __init__(self, content: dict[str, Any] | None = None) -> None:
        self.content = content

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write a checkpoint, with the checksum of its content in the section of this package."""
        checkpoint = {**checkpoint, SECTION: {**checkpoint[SECTION], "checksum": checksum(checkpoint)}}
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_whole(Path(path), buffer.getbuffer(), "--output")

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return the content already read, or read a checkpoint without running code in it."""
        content, self.content = self.content, None
        return content or read_checkpoint(path)


# Not Lightning's ModelCheckpoint: to stop all ranks after the same step, each of its hooks would be overridden.
class Checkpoints(Checkpoint):
    """Writes ``last.ckpt`` at the end of every epoch, every few steps and when a run is stopped; and two others.

    ``first.ckpt`` is the checkpoint before the first step, ``best.ckpt`` that of the epoch with the highest top-1
    accuracy, of equal ones the last. A run can resume from any of them.

    Checkpoints are taken between steps, where weights, optimiser and schedule are consistent. A run that is stopped
    (Ctrl-C, SIGTERM) finishes the step in progress, on several GPUs up to four more, and saves the last one, which is
    the same on all devices. A run on one device that fails saves its last complete step. A state that is not finite is
    refused.

    Args:
        directory: Directory of the checkpoints.
        save_every: Steps between checkpoints within an epoch; 0 for none.
        identity: Options of the run, saved so that a resumed run can be compared.
        table: The run's ``metrics.csv``; a checkpoint stores the number of rows before it.
        card: The card in the checkpoints, without metrics.
        machine: Options that a resumed run inherits and may change.
        hosted: Loggers of services by their option, whose runs a resumed run continues.

    Attributes:
        first, last, best: The three files.
        best_top1: Highest top-1 accuracy so far, or None.
        best_epoch: The epoch in which it was reached, counted from 1.
        seconds: Time spent in training, over all parts of a resumed run.
    """

    @checked
    def __init__(
        self,
        directory: Path,
        save_every: int,
        identity: dict[str, Any],
        table: Table | None = None,
        card: ModelCard | None = None,
        machine: dict[str, Any] | None = None,
        hosted: Mapping[str, Logger] | None = None,
    ) -> None:
        self.first, self.last, self.best = (directory / f"{name}.ckpt" for name in ("first", "last", "best"))
        self.save_every = save_every
        self.identity = identity
        self.table = table
        self.card = card
        self.machine = machine or {}
        self.hosted = hosted or {}
        self.best_top1: float | None = None
        self.best_epoch = 0
        self._seconds_before = 0.0
        self._started = time.monotonic()
        self._ended: float | None = self._started
        self._in_step = False
        self._epoch_complete = True
        self._stoppable = False
        self._calls = 0
        self._rows = 0 if table is None else table.rows

    @property
    def seconds(self) -> float:
        """Time spent in training, over all parts of a resumed run."""
        now = time.monotonic() if self._ended is None else self._ended
        return self._seconds_before + now - self._started

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the initial state, and start the clock; from now on Ctrl-C and SIGTERM wait for the end of a step."""
        stopping.defer()
        self._stoppable = True
        self._calls = 0
        if not trainer.global_step:
            self._save(trainer, self.first)
        self._started, self._ended = time.monotonic(), None
        self._save_last(trainer, due=False)

    def _save(self, trainer: Trainer, path: Path) -> None:
        trainer.save_checkpoint(path)
        stopping.saved(path)

    def _save_last(self, trainer: Trainer, due: bool) -> None:
        """Save if it is time; save and stop if any rank was told to.

        All ranks call this at the same places and check at the same calls whether to stop, so they stop at the same
        step.
        """
        on_gpus = trainer.world_size > 1 and trainer.strategy.root_device.type != "cpu"
        looks = due or not on_gpus or self._calls % CALLS_PER_LOOK_ON_GPUS == 0
        self._calls += 1
        if not looks:
            return
        number = self._told(trainer)
        stopping.agree(number)
        if due or number:
            self._save(trainer, self.last)
        if not number:
            return
        if trainer.is_global_zero:
            stopping.say(f"stopped after step {trainer.global_step}: {stopping.how_to_continue()}")
        raise stopping.Stopped(number)

    def _told(self, trainer: Trainer) -> int:
        """Return the number of the signal that any rank got, or 0."""
        number = stopping.requested()
        if trainer.world_size == 1:
            return number
        told = torch.tensor(number, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
        return int(told)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note that a step is in progress."""
        self._in_step = True
        self._epoch_complete = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every few steps, and stop if told to."""
        self._in_step = False
        self._rows = 0 if self.table is None else self.table.rows
        self._save_last(trainer, due=bool(self.save_every) and trainer.global_step % self.save_every == 0)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Stop if told to, during an evaluation within training."""
        if self._stoppable:
            self._save_last(trainer, due=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end of an epoch, after validation."""
        self._epoch_complete = True
        top1 = float(trainer.callback_metrics["val/top1"])
        if self.best_top1 is None or top1 >= self.best_top1:
            self.best_top1, self.best_epoch = top1, trainer.current_epoch + 1
            trainer.save_checkpoint(self.best)
        self._save_last(trainer, due=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock, and ignore evaluations that follow."""
        self._ended = time.monotonic()
        self._stoppable = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the last complete step of a run on one device that fails."""
        # With several devices, the others may be at another step, and saving would wait for them.
        if trainer.world_size > 1 or isinstance(exception, stopping.Stopped) or not self._stoppable or self._in_step:
            return
        if trainer.global_step:
            try:
                self._save(trainer, self.last)
            except InputError as error:
                if not isinstance(exception, InputError):  # the error shown next says enough
                    stopping.say(f"the last complete step is lost: {error}")

    def state_dict(self) -> dict[str, Any]:
        """Return the best result, the time, and whether the epoch has been evaluated."""
        return {
            "best_top1": self.best_top1,
            "best_epoch": self.best_epoch,
            "seconds": self.seconds,
            "epoch_complete": self._epoch_complete,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore all of it from a checkpoint."""
        self.best_top1 = state_dict["best_top1"]
        self.best_epoch = state_dict["best_epoch"]
        self._seconds_before = state_dict["seconds"]
        self._epoch_complete = state_dict["epoch_complete"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the options of the run and the position of this checkpoint in it.

        Raises:
            InputError: If a weight is NaN or infinite, so that it does not replace a good checkpoint.
        """
        state = {name: value for name, value in checkpoint["state_dict"].items() if value.is_floating_point()}
        wrong = [name for name, value in state.items() if not value.isfinite().all()]
        if wrong:
            raise InputError(
                f"after step {trainer.global_step} {len(wrong)} of {len(state)} tensors, such as {wrong[0]}, are NaN "
                "or infinite: this state is not saved, and earlier checkpoints are kept; lower --lr"
            )
        logs = {name: logger.version for name, logger in self.hosted.items()}
        checkpoint[SECTION] = {"format": FORMAT, "options": self.identity, "logs": logs}
        if self.card is not None:
            found = {name: trainer.callback_metrics.get(f"val/{name}") for name in ("top1", "top5")}
            metrics = {name: float(value) for name, value in found.items() if value is not None}
            metrics |= {"step": trainer.global_step, "epoch": trainer.global_step // int(trainer.num_training_batches)}
            card = replace(self.card, metrics=metrics)
            checkpoint[SECTION] |= {"card": card.to_dict(), "machine": self.machine}
        if self.table is not None:
            # An epoch that is not complete is evaluated again, which adds the rows after its last step again.
            checkpoint[SECTION]["metrics_rows"] = self.table.rows if self._epoch_complete else self._rows
        checkpoint["loops"]["fit_loop"].update(
            loop_state(trainer.global_step, int(trainer.num_training_batches), self._epoch_complete)
        )


def loop_state(steps: int, steps_per_epoch: int, epoch_complete: bool) -> dict[str, Any]:
    """Return the state of Lightning's loops after a number of steps.

    Lightning's own record depends on the hook that saves: from a checkpoint taken at the end of a step it may repeat or
    lose that step's epoch. The position is a function of the number of steps, so it is computed from that:

    - within an epoch: continue with the next step of the epoch;
    - after an epoch's last step: evaluate, then continue with the next epoch;
    - after that evaluation: continue with the next epoch.

    Args:
        steps: Optimiser steps done.
        steps_per_epoch: Steps of one epoch.
        epoch_complete: Whether the epoch that step ``steps`` belongs to has been evaluated.
    """
    epochs, within = divmod(steps, steps_per_epoch)
    validating = within == 0 and not epoch_complete
    if validating:
        epochs, within = epochs - 1, steps_per_epoch
    unfinished = 1 if within else 0
    epoch = _counts(epochs + unfinished, epochs)
    return {
        "epoch_progress": {"total": epoch, "current": epoch},
        "epoch_loop.state_dict": {"_batches_that_stepped": steps - validating},
        "epoch_loop.batch_progress": {
            "total": _counts(steps, steps),
            "current": _counts(within, within),
            "is_last_batch": validating,
        },
        "epoch_loop.val_loop.batch_progress": {
            "total": _counts(int(validating), 0),
            "current": _counts(0, 0),
            "is_last_batch": False,
        },
    }


def _counts(begun: int, done: int) -> dict[str, int]:
    return {"ready": begun, "started": begun, "processed": done, "completed": done}

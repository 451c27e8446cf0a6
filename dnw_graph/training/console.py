"""The output of a run during training: a progress bar on a terminal, and a line per epoch everywhere."""

from __future__ import annotations

import sys
import time

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from dnw_graph.callbacks.wiring_monitor import WiringMonitor


class Console(TQDMProgressBar):
    """Lightning's progress bar for training steps, if there is a terminal, and a line after every epoch.

    Args:
        refresh_rate: Steps between updates of the loss.
        monitor: Provides the number of swapped edges and the share of live nodes; None for an evaluation.
    """

    def __init__(self, refresh_rate: int, monitor: WiringMonitor | None = None) -> None:
        super().__init__(refresh_rate)
        self.monitor = monitor
        self._started = 0.0
        self._epochs_before = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Show no bar in a file, where each of its states would remain."""
        super().setup(trainer, pl_module, stage)
        if not sys.stdout.isatty():
            self.disable()

    def init_validation_tqdm(self) -> Tqdm:
        """Return a bar for a standalone evaluation; within training, the bar of the steps is enough."""
        return Tqdm(disable=True) if self.trainer.state.fn == "fit" else super().init_validation_tqdm()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._started, self._epochs_before = time.monotonic(), trainer.current_epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line of the epoch."""
        super().on_train_epoch_end(trainer, pl_module)
        done, epochs = trainer.current_epoch + 1, int(trainer.max_epochs or 0)
        seconds = (time.monotonic() - self._started) / (done - self._epochs_before)
        found = trainer.callback_metrics
        # A run resumed before an evaluation has no steps of this epoch left.
        loss = f"loss {float(found['train/loss']):.3f}  " if "train/loss" in found else ""
        line = f"epoch {done}/{epochs}  {loss}top-1 {float(found['val/top1']):.2%}"
        if self.monitor is not None and self.monitor.live is not None:
            line += f"  swapped {self.monitor.swapped:,}  live {self.monitor.live:.1%}"
        line += f"  {duration(seconds)}" + (f", {duration(seconds * (epochs - done))} left" if done < epochs else "")
        if not trainer.is_global_zero:
            return
        if self.is_disabled:
            print(line, flush=True)
        else:
            self.print(line)


def duration(seconds: float) -> str:
    """Return a duration in its two largest units, such as ``"3 h 20 min"``."""
    for unit, name, smaller, small_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= unit:
            return f"{int(seconds // unit)} {name} {int(seconds % unit // smaller)} {small_name}"
    return f"{seconds:.1f} s"

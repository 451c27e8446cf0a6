"""Measures how fast a model is evaluated."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class Throughput(Callback):
    """Images per second in evaluation on all devices: the model alone, without loading images.

    The first batch is left out if there are others: it warms up.
    """

    def __init__(self) -> None:
        self._images: list[int] = []
        self._seconds: list[float] = []
        self._start = 0.0

    @property
    def images_per_second(self) -> float:
        """Images per second."""
        warm_up = int(len(self._images) > 1)
        return sum(self._images[warm_up:]) / sum(self._seconds[warm_up:])

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Start the clock."""
        _wait(pl_module)
        self._start = time.perf_counter()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Sequence[Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop the clock."""
        _wait(pl_module)
        self._seconds.append(time.perf_counter() - self._start)
        self._images.append(len(batch[1]) * trainer.world_size)


def _wait(module: LightningModule) -> None:
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)

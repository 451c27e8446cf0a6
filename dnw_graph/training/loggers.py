"""Logs that a resumed run continues."""

from __future__ import annotations

import csv
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only


def make_loggers(folder: Path, steps: int) -> list[Logger]:
    """Return the loggers to ``metrics.csv`` and ``tensorboard/``.

    What an interrupted run logged after the checkpoint that is resumed from is dropped: it will be logged again.

    Args:
        folder: Folder of the run.
        steps: Steps trained before; 0 for a new run.
    """
    table = CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1)
    _keep_rows(table, folder / "metrics.csv", steps)
    return [table, TensorBoardLogger(folder, name="tensorboard", version="", purge_step=steps or None)]


@rank_zero_only
def _keep_rows(logger: CSVLogger, file: Path, steps: int) -> None:
    rows = []
    if file.exists():
        with open(file, newline="") as lines:
            rows = [row for row in csv.DictReader(lines) if int(row["step"]) < steps]
    logger.experiment.metrics.extend(rows)  # the logger deletes the file when it makes its experiment
    logger.save()

"""Logs that a resumed run can continue."""

from __future__ import annotations

import csv
import importlib.util
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from dnw_graph.errors import InputError
from dnw_graph.stopping import is_first_process
from dnw_graph.whole_file import unwritable, write_whole


# Not Lightning's CSVLogger: it deletes the rows of a resumed run, and rewrites its file in place.
class Table(Logger):
    """Writes ``metrics.csv``: a row per call, flushed to disk when the call returns.

    Args:
        directory: Directory of the run.
        rows: Number of rows to keep: those before a resumed checkpoint; None for all. Later rows, the last of which may
            be incomplete, are dropped, since they will be logged again.

    Attributes:
        rows: Number of rows in the file.

    Raises:
        InputError: If the file cannot be read or written.
    """

    name = version = ""  # a run's directory has one table

    def __init__(self, directory: Path, rows: int | None) -> None:
        super().__init__()
        self.path = directory / "metrics.csv"
        self.columns: list[str] = []
        self.rows = 0
        if not is_first_process():
            return
        kept = self._read(rows)
        self.rows = len(kept)
        if kept:
            write_whole(self.path, self._csv(kept, header=True), "--output")
        else:
            self.columns = []
            self.path.unlink(missing_ok=True)

    def _read(self, rows: int | None) -> list[dict[str, Any]]:
        try:
            with open(self.path, newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                kept = list(islice(reader, rows))
                self.columns = list(reader.fieldnames or [])
        except FileNotFoundError:
            return []
        except (OSError, ValueError, csv.Error) as error:
            raise InputError(f"{self.path} cannot be read ({error}): move it away; its rows are lost") from error
        return kept

    def _csv(self, rows: list[dict[str, Any]], header: bool) -> bytes:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, extrasaction="ignore")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add a row. New columns require rewriting the file.

        Raises:
            InputError: If the file cannot be written.
        """
        if not is_first_process():
            return
        row = {**metrics, "step": step}
        if set(row) <= set(self.columns):
            self._append(self._csv([row], header=False))
        else:
            rows = self._read(self.rows)
            self.columns = sorted({*self.columns, *row})
            write_whole(self.path, self._csv([*rows, row], header=True), "--output")
        self.rows += 1

    def _append(self, line: bytes) -> None:
        try:
            with open(self.path, "ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise unwritable(self.path, error, "--output") from error

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Ignore options, which the run's summary has."""


class Events(TensorBoardLogger):
    """Writes ``tensorboard/``.

    Args:
        directory: Directory of the run.
        steps: Steps trained before; later events are dropped, since they will be logged again.

    Raises:
        InputError: If a file cannot be written.
    """

    def __init__(self, directory: Path, steps: int) -> None:
        # A separate flushing thread would fail with its own traceback; save() flushes.
        never = 10**6
        super().__init__(directory, name="tensorboard", version="", purge_step=steps or None, flush_secs=never)

    @property
    def experiment(self) -> Any:
        """TensorBoard's writer, created on first use."""
        with self._writing():
            return super().experiment

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add an event per metric."""
        with self._writing():
            super().log_metrics(dict(metrics), step)

    def save(self) -> None:
        """Write all events to the file."""
        with self._writing():
            super().save()

    def finalize(self, status: str) -> None:
        """Close the file, except after a failed run."""
        with self._writing() if status == "success" else suppress(OSError, InputError):
            super().finalize(status)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise unwritable(Path(self.log_dir), error, "--output") from error
        except ValueError as error:  # Lightning's, around another
            if isinstance(error.__cause__, InputError):
                raise error.__cause__ from error
            if isinstance(error.__cause__, OSError):
                raise unwritable(Path(self.log_dir), error.__cause__, "--output") from error
            raise


class Wandb(WandbLogger):
    """Logs to Weights & Biases, and ends the run there: Lightning would log the next one of the process to it too.

    A run that the program has begun itself goes on.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        import wandb

        super().__init__(*args, **kwargs)
        self._begins_run = wandb.run is None

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the run."""
        import wandb

        super().finalize(status)
        if self._begins_run:
            wandb.finish(exit_code=int(status != "success"))


def hosted_loggers(
    wandb: str | None, mlflow: str | None, directory: Path, section: Mapping[str, Any]
) -> dict[str, Logger]:
    """Return the loggers of the requested services by their option. A resumed run continues its logs.

    Args:
        wandb: Project of Weights & Biases; ``WANDB_MODE=offline`` keeps everything in the directory.
        mlflow: Tracking URI of MLflow.
        directory: Directory of the run.
        section: Section of this package in the checkpoint to resume; empty for a new run.

    Raises:
        InputError: If the package of a service is missing, or it refuses what was given.
    """
    loggers: dict[str, Logger] = {}
    services = {"wandb": wandb, "mlflow": mlflow}
    for package, given in services.items():
        if given is not None and importlib.util.find_spec(package) is None:
            raise InputError(f"--{package} needs {package}: install the extra dnw-graph[{package}]")
    name = str(directory.resolve())
    # Elsewhere there is no such run; the services draw the ids of new ones.
    then = section.get("machine", {})
    begun = {key: each for key, each in section.get("logs", {}).items() if then.get(key) == services[key]}
    if wandb is not None:
        with _usable("wandb"):
            loggers["wandb"] = Wandb(name, directory, project=wandb, id=begun.get("wandb"), resume="allow")
    if mlflow is not None:
        with _usable("mlflow"):
            id_ = begun.get("mlflow")
            loggers["mlflow"] = MLFlowLogger("dnw_graph", run_name=name, tracking_uri=mlflow, run_id=id_)
    return loggers


def begin(loggers: Mapping[str, Any]) -> None:
    """Begin the run at each service, before anything is trained.

    Raises:
        InputError: If a service cannot be reached, or refuses the run.
    """
    for service, logger in loggers.items():
        with _usable(service):
            _ = logger.experiment


@contextmanager
def _usable(service: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Each service has its own.
        raise InputError(f"--{service} cannot be used: {error}") from error


class StepLog(Callback):
    """Logs the values of a training step under ``train/``, every few steps.

    It logs before a checkpoint of that step can be written. Lightning, whose own logging of steps is turned off
    (``log_every_n_steps=0``), would log afterwards, and a run that stops in between would lack the row.

    Args:
        every: Steps between rows.
    """

    def __init__(self, every: int) -> None:
        self.every = every

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log this step if it is time."""
        if trainer.global_step % self.every:
            return
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
        for logger in trainer.loggers:
            logger.log_metrics({**values, "epoch": trainer.current_epoch}, trainer.global_step - 1)
            logger.save()

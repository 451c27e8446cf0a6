"""Lightning's trainer for runs, and the other processes of a multi-device run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import LightningEnvironment

from dnw_graph import stopping
from dnw_graph._compat import leave_signals_alone
from dnw_graph.callbacks.wiring_monitor import WiringMonitor
from dnw_graph.recipes.options import RunOptions
from dnw_graph.training.checkpoints import WholeFileIO
from dnw_graph.training.console import Console
from dnw_graph.training.hardware import on_gpu

# Steps between updates of the loss in the progress bar; each one synchronises.
STEPS_SHOWN_ON_GPU = 20


def make_trainer(
    options: RunOptions,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger] = (),
    content: dict[str, Any] | None = None,
) -> Trainer:
    """Return the trainer of a run.

    Args:
        options: Machine, precision and epochs.
        callbacks: Its callbacks, without the console.
        loggers: Its loggers; none for an evaluation.
        content: Content of the checkpoint to resume.
    """
    monitor = next((each for each in callbacks if isinstance(each, WiringMonitor)), None)
    trainer = Trainer(
        accelerator="gpu" if on_gpu(options) else "cpu",  # by itself, Lightning would choose others too
        devices=options.devices,
        num_nodes=options.num_nodes,
        precision=options.precision,  # type: ignore[arg-type]  # checked by RunOptions
        max_epochs=options.epochs,
        gradient_clip_val=options.clip_grad_norm or None,
        logger=loggers or False,
        callbacks=[*callbacks, Console(STEPS_SHOWN_ON_GPU if on_gpu(options) else 1, monitor)],
        plugins=[WholeFileIO(content)],
        enable_checkpointing=bool(loggers),
        enable_model_summary=False,
        num_sanity_val_steps=0,  # images are checked elsewhere, and a resumed run must not evaluate twice
        use_distributed_sampler=False,  # the data module orders the images
        log_every_n_steps=0,  # see StepLog
    )
    # Its SIGTERM handler waits for all ranks, but not all get the signal.
    leave_signals_alone(trainer)
    return trainer


def start_ranks(trainer: Trainer, directory: Path | None) -> None:
    """Start this program again for every further device of this machine, unless a launcher does.

    Lightning would do the same, but ends every process without a message when one is lost.

    Args:
        trainer: The trainer of the run.
        directory: Directory of the run, if it has one.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if not isinstance(environment, LightningEnvironment) or environment.creates_processes_externally:
        return
    os.environ.update(
        MASTER_ADDR=environment.main_address,
        MASTER_PORT=str(environment.main_port),
        NODE_RANK=str(environment.node_rank()),
        LOCAL_RANK="0",
        WORLD_SIZE=str(trainer.num_devices * trainer.num_nodes),
    )
    for rank in range(1, trainer.num_devices):
        environ = {**os.environ, "LOCAL_RANK": str(rank), stopping.MAIN_PROCESS: str(os.getpid())}
        if directory is not None:
            environ[stopping.DIRECTORY] = str(directory)
        with stopping.held():
            process = subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=environ)
        stopping.add_rank(process)


@contextmanager
def repeatable() -> Iterator[None]:
    """Make cuDNN use deterministic algorithms."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before

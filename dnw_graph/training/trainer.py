"""Lightning's trainer as runs use it, and the other processes of a run on several devices."""

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
from dnw_graph.training.checks import on_gpu
from dnw_graph.training.console import Console

# Steps between two looks at the loss for the progress bar, for which the host waits for the device.
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
        callbacks: Its callbacks, but for the console.
        loggers: Its loggers; none for an evaluation.
        content: Content of the checkpoint that it resumes.
    """
    monitor = next((each for each in callbacks if isinstance(each, WiringMonitor)), None)
    trainer = Trainer(
        accelerator=options.accelerator,
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
        num_sanity_val_steps=0,  # images have been checked, and a resumed run must not evaluate twice
        use_distributed_sampler=False,  # the order of images is ours
        log_every_n_steps=0,  # see StepLog
    )
    # Its handler for SIGTERM waits for all ranks, which do not all get the signal.
    leave_signals_alone(trainer)
    return trainer


def start_ranks(trainer: Trainer, directory: Path | None) -> None:
    """Start this program once more for every further device of this machine, unless somebody else does.

    Lightning would do the same, but its watch over them ends every process without a word when one is lost.

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
    """Have cuDNN take algorithms that give the same numbers in every run."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before

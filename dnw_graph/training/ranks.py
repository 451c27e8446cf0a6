"""Starts the other processes of a run on several devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment

from dnw_graph import stopping


def start_ranks(trainer: Trainer, folder: Path | None) -> None:
    """Start this program once more for every further device of this machine, unless somebody else does.

    Lightning would do the same, but its watch over them ends every process without a word when one is lost.

    Args:
        trainer: The trainer of the run.
        folder: Folder of the run, if it has one.
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
        if folder is not None:
            environ[stopping.FOLDER] = str(folder)
        with stopping.held():
            process = subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=environ)
        stopping.add_rank(process)

"""Checkpoint files, written whole or not at all."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from dnw_graph.checkpoint import SECTION, read_checkpoint
from dnw_graph.checksum import checksum
from dnw_graph.whole_file import write_whole


class WholeFileIO(CheckpointIO):
    """Writes a checkpoint whole or not at all.

    A run that is killed, or a disk that fills up, leaves the previous checkpoint as it was.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write a checkpoint, with the checksum of its content in the section of this package.

        Raises:
            InputError: If it cannot be written, for example because the disk is full.
        """
        checkpoint = {**checkpoint, SECTION: {**checkpoint[SECTION], "checksum": checksum(checkpoint)}}
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_whole(Path(path), buffer.getbuffer(), "--output")

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, always without running anything in it."""
        return read_checkpoint(path)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove a checkpoint."""
        Path(path).unlink(missing_ok=True)

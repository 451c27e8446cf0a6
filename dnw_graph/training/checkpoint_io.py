"""Checkpoint files: written whole or not at all, read without running anything that is in them."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from dnw_graph.arguments import checked
from dnw_graph.errors import InputError

# Where a checkpoint says that it is ours, and of which run.
SECTION = "dnw_graph"
FORMAT = 1


class WholeFileIO(CheckpointIO):
    """Writes to a temporary file beside the checkpoint and renames it once it is on the disk.

    A run that is killed, or a disk that fills up, leaves the previous checkpoint as it was; at most a file
    ``<name>.partial`` is left, which the next checkpoint overwrites.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            InputError: If it cannot be written, for example because the disk is full.
        """
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        try:
            with open(partial, "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise InputError(
                f"cannot write checkpoint {path} ({error.strerror}): make room, or give another --output"
            ) from error

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; see :func:`read_checkpoint`. It is always read with ``weights_only=True``."""
        return read_checkpoint(path)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove a checkpoint."""
        Path(path).unlink(missing_ok=True)


@checked
def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the contents of a checkpoint that a run of this package wrote, with all tensors on the CPU.

    Raises:
        InputError: If the file is missing, torn or not such a checkpoint.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise InputError(f"checkpoint {str(path)!r} is not a file: give a .ckpt file, such as runs/.../last.ckpt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere in the decoder
        raise InputError(
            f"checkpoint {path} cannot be read ({type(error).__name__}): it is damaged or not a checkpoint; "
            "give a .ckpt file that a run wrote"
        ) from error
    section = checkpoint.get(SECTION) if isinstance(checkpoint, dict) else None
    if not isinstance(section, dict) or section.get("format") != FORMAT:
        raise InputError(
            f"{path} is no checkpoint of this package, or one of another version: give a .ckpt file that a run wrote"
        )
    return checkpoint

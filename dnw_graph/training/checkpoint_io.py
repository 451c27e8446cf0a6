"""Checkpoint files: written whole or not at all, read without running anything that is in them."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from dnw_graph.arguments import checked
from dnw_graph.checksum import checksum
from dnw_graph.errors import InputError
from dnw_graph.training.archive import read_archive
from dnw_graph.training.structure import match
from dnw_graph.whole_file import write_whole

# Where a checkpoint says that it is ours, of which run, and what the checksum of all the rest is.
SECTION = "dnw_graph"
FORMAT = 2
# What every use of a checkpoint looks at.
CONTENT = {
    SECTION: {"options": dict},
    "global_step": int,
    "loops": {"fit_loop": {"epoch_progress": {"current": {"completed": int}}}},
    "state_dict": dict,
}


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
        """Read a checkpoint; see :func:`read_checkpoint`. It is always read with ``weights_only=True``."""
        return read_checkpoint(path)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove a checkpoint."""
        Path(path).unlink(missing_ok=True)


@checked
def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of a checkpoint that a run of this package wrote, with all tensors on the CPU.

    Nothing in the file is run, and nothing is returned unless it is, bit for bit, what was written.

    Raises:
        InputError: If the file is missing, torn, damaged, not such a checkpoint, or of another version.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise InputError(f"checkpoint {str(path)!r} is not a file: give a .ckpt file, such as runs/.../last.ckpt")
    try:
        checkpoint = read_archive(path)
    except Exception as error:  # a damaged file can fail anywhere in the decoder
        raise damaged(path, f"cannot be read ({type(error).__name__})") from error
    section = checkpoint.get(SECTION) if isinstance(checkpoint, dict) else None
    if not isinstance(section, dict) or section.get("format") != FORMAT:
        raise InputError(
            f"{path} is no checkpoint of this package, or one of another version (this one reads format {FORMAT}): "
            "give a .ckpt file that a run of this version wrote"
        )
    found = section.pop("checksum", None)
    try:
        intact = checksum(checkpoint) == found
    except Exception as error:  # what torch.load returns need not be what checkpoints are made of
        raise damaged(path, f"holds what no checkpoint does ({type(error).__name__})") from error
    if not intact:
        raise damaged(path, "does not hold what was written (its checksum differs)")
    try:
        match(checkpoint, CONTENT, "the content", exact=False)
    except InputError as error:
        raise damaged(path, f"lacks a part ({error})") from error
    return checkpoint


def damaged(path: Path | str, what: str) -> InputError:
    """Return the error for a file that is no whole checkpoint.

    Args:
        path: The file.
        what: What is wrong with it.
    """
    return InputError(
        f"checkpoint {path} {what}: it is damaged or not a checkpoint; give a .ckpt file that a run wrote, such as the "
        "run's best.ckpt"
    )

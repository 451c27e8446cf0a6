"""Reads checkpoints without running code in them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dnw_graph.archive import read_archive
from dnw_graph.arguments import checked
from dnw_graph.checksum import checksum
from dnw_graph.errors import InputError
from dnw_graph.ranking import NUMBERS
from dnw_graph.structure import match

# The section that identifies a checkpoint of this package and its run, and holds the checksum of everything else.
SECTION = "dnw_graph"
FORMAT = 2
# Needed by every use of a checkpoint.
CONTENT = {
    SECTION: {"options": dict},
    "global_step": int,
    "loops": {"fit_loop": {"epoch_progress": {"current": {"completed": int}}}},
    "state_dict": dict,
}


@checked
def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of a checkpoint that a run of this package wrote, with all tensors on the CPU.

    No code in the file is run. The content is returned only if it is exactly what was written.

    Raises:
        InputError: If the file is missing, truncated, damaged, not such a checkpoint, or of another version.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise InputError(f"checkpoint {str(path)!r} is not a file: give a .ckpt file, such as runs/.../last.ckpt")
    try:
        checkpoint = read_archive(path)
    except Exception as error:  # A damaged file can fail anywhere in the decoder.
        raise damaged(path, f"cannot be read ({type(error).__name__})") from error
    section = checkpoint.get(SECTION) if isinstance(checkpoint, dict) else None
    if not isinstance(section, dict) or section.get("format") != FORMAT:
        raise InputError(
            f"{path} is not a checkpoint of this package, or has another version (this one reads format {FORMAT}): "
            "give a .ckpt file that a run of this version wrote"
        )
    found = section.pop("checksum", None)
    try:
        intact = checksum(checkpoint) == found
    except Exception as error:  # The file may hold content that checkpoints do not.
        raise damaged(path, f"holds content that no checkpoint has ({type(error).__name__})") from error
    if not intact:
        raise damaged(path, "does not hold what was written (its checksum differs)")
    try:
        match(checkpoint, CONTENT, "the content", exact=False)
    except InputError as error:
        raise damaged(path, f"lacks a part ({error})") from error
    return checkpoint


def damaged(path: Path | str, what: str) -> InputError:
    """Return the error for a file that is not a complete checkpoint.

    Args:
        path: The file.
        what: What is wrong with it.
    """
    return InputError(
        f"checkpoint {path} {what}: it is damaged or not a checkpoint; give a .ckpt file that a run wrote, such as the "
        "run's best.ckpt"
    )


def model_weights(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model's part of the state of a run."""
    state = checkpoint["state_dict"].items()
    return {str(name).removeprefix("model."): value for name, value in state if str(name).startswith("model.")}


def check_weights(path: str, given: Mapping[str, Any], model_state: Mapping[str, Tensor], hint: str) -> None:
    """Refuse weights of another model.

    Args:
        path: The checkpoint.
        given: Its weights. An older file lacks the identifier of each graph's rule, its number of edges and the
            checksum of stored edges.
        model_state: ``state_dict`` of the model.
        hint: What to do instead.

    Raises:
        InputError: If names, shapes or types differ, or a number is NaN or infinite.
    """
    numbers = {name: value for name, value in model_state.items() if name.rpartition(".")[2] in (*NUMBERS, "checksum")}
    try:
        match({**numbers, **given}, model_state, "state_dict")
    except InputError as error:
        raise InputError(f"the weights in {path} do not fit the model: {hint} ({error})") from error

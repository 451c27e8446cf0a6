"""The second stage of Lottery Ticket and Fine Tune: a model from the checkpoints of a trained complete one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from dnw_graph.errors import InputError
from dnw_graph.training.checkpoint_io import SECTION, read_checkpoint
from dnw_graph.two_stage import fine_tune, lottery_ticket

FIRST, LAST = "first.ckpt", "last.ckpt"
RULES = ("lottery_ticket", "fine_tune")


def second_stage(rule: str, folder: Path, complete: nn.Module, expected: dict[str, Any]) -> nn.Module:
    """Return the model that a second stage starts from.

    Args:
        rule: One of ``RULES``.
        folder: Folder of a finished run with ``--wiring complete``.
        complete: A model like the one that was trained, whose graphs know k.
        expected: Options that the run must share, such as the size of the images.

    Raises:
        InputError: If the folder holds no finished run of such a complete model.
    """
    if rule not in RULES:
        raise InputError(f"--complete is for --wiring {' or '.join(RULES)}; got --wiring {rule}")
    checkpoint = read_checkpoint(folder / LAST)
    options = checkpoint[SECTION]["options"]
    for name, value in {"wiring": "complete", **expected}.items():
        if options.get(name) != value:
            raise InputError(
                f"--complete needs a run with {name} {value!r}, but {folder / LAST} was trained with "
                f"{options.get(name)!r}: train the complete graph first, with --wiring complete"
            )
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["completed"]
    if epochs != options["epochs"]:
        raise InputError(
            f"{folder / LAST} stands at epoch {epochs} of {options['epochs']}: finish the run first, with --resume"
        )
    _load(complete, checkpoint["state_dict"], folder / LAST)
    if rule == "fine_tune":
        return fine_tune(complete)
    return lottery_ticket(complete, _weights(read_checkpoint(folder / FIRST)["state_dict"]))


def _weights(state: dict[str, Any]) -> dict[str, Any]:
    """Return the model's part of the state of a run."""
    return {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}


def _load(model: nn.Module, state: dict[str, Any], path: Path) -> None:
    try:
        model.load_state_dict(_weights(state))
    except RuntimeError as error:
        raise InputError(f"the weights in {path} do not fit the model: give a run of this model") from error

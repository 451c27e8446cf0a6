"""The second stage of Lottery Ticket and Fine Tune: a model from the checkpoints of a trained complete model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from dnw_graph.checkpoint import SECTION, check_weights, model_weights, read_checkpoint
from dnw_graph.errors import InputError
from dnw_graph.recipes.options import completed, flag
from dnw_graph.wirings.two_stage import fine_tune, lottery_ticket

FIRST, LAST = "first.ckpt", "last.ckpt"
RULES = ("lottery_ticket", "fine_tune")


def second_stage(rule: str, directory: Path, complete: nn.Module, expected: dict[str, Any]) -> nn.Module:
    """Return the model that a second stage starts from.

    Args:
        rule: One of ``RULES``.
        directory: Directory of a finished run with ``--wiring complete``.
        complete: A model like the trained one, whose graphs know k.
        expected: Options that the run must share: the size of the images, and what defines the function of the model.

    Raises:
        InputError: If the directory holds no finished run of such a complete model.
    """
    if rule not in RULES:
        raise InputError(f"--complete goes with --wiring {' or '.join(RULES)}: give one of these rules")
    checkpoint = read_checkpoint(directory / LAST)
    options = completed(checkpoint[SECTION]["options"])
    for name, value in {"wiring": "complete", **expected}.items():
        if options.get(name) != value:
            hint = "train the complete graph first" if name == "wiring" else "give the same value in both stages"
            raise InputError(
                f"--complete needs a run with {flag(name)} {value!r}, but {directory / LAST} was trained with "
                f"{options.get(name)!r:.100}: {hint}"
            )
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["completed"]
    if epochs != options.get("epochs"):
        raise InputError(
            f"{directory / LAST} is at epoch {epochs} of {options.get('epochs')!r:.20}: finish the run first, "
            "with --resume"
        )
    complete.load_state_dict(_weights(directory / LAST, checkpoint, complete))
    if rule == "fine_tune":
        return fine_tune(complete)
    return lottery_ticket(complete, _weights(directory / FIRST, read_checkpoint(directory / FIRST), complete))


def _weights(path: Path, checkpoint: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    weights = model_weights(checkpoint)
    check_weights(str(path), weights, model.state_dict(), "give a run of this model")
    return weights

"""A run that starts from a trained model instead of random weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from dnw_graph.errors import InputError
from dnw_graph.loading import load
from dnw_graph.model_card import card_of


def start_from(model: nn.Module, create: Callable[[int, int], nn.Module], path: Path, classes: Sequence[str]) -> None:
    """Give a model the weights and the wiring of a trained one.

    If that one was trained on other classes, the parts of the model whose size depends on their number, such as the
    classifier, stay as they are.

    Args:
        model: The model, changed in place.
        create: What made it, and makes the trained one: both have the same options.
        path: The trained one: a checkpoint or the folder of a run.
        classes: Classes of the run.

    Raises:
        InputError: If the file cannot be read, or holds another model.
    """
    source = load(path, create=create)
    card = card_of(source)
    if card is None or path.suffix == ".safetensors":
        raise InputError(f"--init-from is {str(path)!r}: expected a checkpoint or the folder of a run")
    weights = source.state_dict()
    if card.classes != list(classes):
        with torch.random.fork_rng(devices=[]):  # the run goes on to draw what it would have drawn
            other = create(len(card.classes) + 1, card.preprocess.image_size).state_dict()
        sized = {name.partition(".")[0] for name, value in weights.items() if other[name].shape != value.shape}
        fresh = {name: value for name, value in model.state_dict().items() if name.partition(".")[0] in sized}
        weights = {**weights, **fresh}
    model.load_state_dict(weights)

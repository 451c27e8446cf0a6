"""The description of a model that is stored in its files."""

from __future__ import annotations

import importlib.metadata
import json
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import dnw_graph
from dnw_graph._compat import unwrapped
from dnw_graph.arguments import check_fields, require
from dnw_graph.errors import InputError
from dnw_graph.preprocessing import Preprocessing
from dnw_graph.usual import evaluating, first_floats

# The place of the card in exports: an extra file in .pt2, a metadata entry in .onnx.
CARD_FILE, CARD_ENTRY = "card.json", "dnw_graph.card"
PACKAGES = ("torch", "torchvision", "lightning", "numpy", "pillow")


@dataclass(frozen=True)
class ModelCard:
    """How to use a model, and how it was trained. Every checkpoint, compact file and export contains it.

    Args:
        preprocess: Converts an image to the input of the model.
        classes: Names of the classes, in the order of the logits.
        models: Registered name of the model's options, see
            :func:`~dnw_graph.training.register_models`; None for a model that is not registered.
        options: Options of the run that trained it, by the names of the command line.
        metrics: Top-1 and top-5 accuracy (0 to 1) at the last evaluation, and the epochs and steps before it.
        versions: Versions of the packages that trained it.
        directories: Directories of the classes in a data set, if those have other names, such as WordNet's.

    Raises:
        InputError: If a field has the wrong type.
    """

    preprocess: Preprocessing
    classes: list[str]
    models: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, int | float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    directories: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_fields(self)
        require(len(self.classes) >= 1, "classes", "at least one name", self.classes)
        fits = len(self.directories) in (0, len(self.classes))
        require(fits, "directories", f"{len(self.classes)} names", self.directories)

    @property
    def class_directories(self) -> list[str]:
        """Directories of the classes in a data set."""
        return self.directories or self.classes

    def with_classes(self, classes: list[str]) -> ModelCard:
        """Return the card of the same model with other classes, whose directories have their names."""
        return replace(self, classes=classes, directories=[])

    def to_dict(self) -> dict[str, Any]:
        """Return the card as dicts, lists, strings and numbers, for JSON."""
        return dict(json.loads(json.dumps(asdict(self))))

    def to_json(self) -> str:
        """Return the card as JSON, for the metadata of other formats."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_dict(content: Any) -> ModelCard:
        """Return the card from the result of :meth:`to_dict`.

        Raises:
            InputError: If the content is not a card.
        """
        try:
            parts = dict(content["preprocess"])
            parts |= {name: tuple(parts[name]) for name in ("mean", "std")}
            return ModelCard(**{**content, "preprocess": Preprocessing(**parts)})
        except (TypeError, KeyError, ValueError) as error:
            raise InputError(f"a model's card cannot be read ({type(error).__name__}: {error})") from error

    def describe(self, model: nn.Module) -> None:
        """Set the attributes ``card``, ``classes`` and ``preprocess`` of a model, also of one in a wrapper."""
        model = unwrapped(model)
        model.card, model.classes, model.preprocess = self, self.classes, self.preprocess  # type: ignore[assignment]


def card_of(model: nn.Module) -> ModelCard | None:
    """Return the card of a model, or None."""
    card = getattr(unwrapped(model), "card", None)
    return card if isinstance(card, ModelCard) else None


def written_card(model: nn.Module) -> ModelCard | None:
    """Return the card to write with a model, or None.

    Raises:
        InputError: If the model has another number of outputs than the card has classes.
    """
    if (card := card_of(model)) is None:
        return None
    size = card.preprocess.image_size
    with torch.no_grad(), evaluating(model):
        logits = model(first_floats(model).new_zeros(2, 3, size, size))
    if isinstance(logits, Tensor) and logits.size(-1) != len(card.classes):
        raise InputError(
            f"the model has {logits.size(-1)} outputs, but its card {len(card.classes)} classes: describe it with "
            "model.card.with_classes([…]).describe(model)"
        )
    return card


def versions() -> dict[str, str]:
    """Return the versions of this package and of those used in training."""
    found = {"dnw-graph": dnw_graph.__version__}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found

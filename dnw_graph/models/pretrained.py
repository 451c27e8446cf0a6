"""The trained models in the package, and their data."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

from dnw_graph.columns import in_columns
from dnw_graph.errors import unknown_name

FOLDER = Path(__file__).parent
TABLE = FOLDER / "pretrained.json"


@dataclass(frozen=True)
class Pretrained:
    """A trained model that comes with the package.

    Attributes:
        name: Its name, for ``create_model(name, pretrained=True)``, :func:`dnw_graph.load` and the command line.
        data: What it was trained and tested on.
        top1: Top-1 accuracy of the file on all test images, 0 to 1.
        parameters: Number of parameters, see :class:`~dnw_graph.analysis.cost.Cost`.
        multiply_adds: Multiply-adds for one image.
        file_size: Size of the file in bytes.
        trained: How far it is trained, such as ``"15 of 15 epochs"``.
        command: The command that trains it.
        commit: The version of the package that trained it.
    """

    name: str
    data: str
    top1: float
    parameters: int
    multiply_adds: int
    file_size: int
    trained: str
    command: str
    commit: str

    @property
    def path(self) -> Path:
        """The file."""
        return FOLDER / f"{self.name}.safetensors"


class PretrainedModels(tuple[Pretrained, ...]):
    """A row per model; ``print`` shows the table without the commands."""

    def __str__(self) -> str:
        cells = [("name", "data", "top-1", "parameters", "multiply-adds", "file", "trained", "commit")]
        cells += [
            (
                each.name,
                each.data,
                f"{each.top1:.2%}",
                f"{each.parameters:,}",
                f"{each.multiply_adds:,}",
                f"{each.file_size / 1e6:.2f} MB",
                each.trained,
                each.commit,
            )
            for each in self
        ]
        return in_columns(cells, left=(0, 1, 6, 7))


@cache
def pretrained() -> PretrainedModels:
    """Return the trained models that come with the package."""
    rows = json.loads(TABLE.read_text(encoding="utf-8"))
    return PretrainedModels(Pretrained(**{f.name: row[f.name] for f in fields(Pretrained)}) for row in rows)


def pretrained_file(name: str) -> Path | None:
    """Return the file of a trained model, the first one if several share the name before the dot.

    Args:
        name: Such as ``"mobilenet_v1_dnw.cifar10"`` or ``"mobilenet_v1_dnw"``.
    """
    return next((each.path for each in pretrained() if name in (each.name, each.name.partition(".")[0])), None)


def require_pretrained(name: str) -> Path:
    """Return the file of a trained model of the package.

    Raises:
        InputError: If there is none.
    """
    file = pretrained_file(name)
    if file is None:
        raise unknown_name("pretrained model", name, [each.name for each in pretrained()])
    return file

"""The rows of a table, of the paper or of our own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dnw_graph.recipes.models import Family

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "examples" / "configs"


@dataclass(frozen=True)
class Data:
    """Images for training runs.

    Attributes:
        what: A short description.
        test_images: Number of test images.
    """

    what: str
    test_images: int


# Values of --data-name, which names the content of a directory, since its path does not.
DATA = {
    "digits": Data("scikit-learn's digits", 360),
    "cifar10": Data("CIFAR-10", 10_000),
    "cifar10-jpeg75": Data("CIFAR-10 as JPEG copies of quality 75, which are lossy", 10_000),
    "imagenette80": Data("Imagenette, 10 classes of ImageNet, scaled to 80 pixels on the shorter side once", 3_925),
    "imagenet": Data("ImageNet", 50_000),
}
CIFAR10 = ("cifar10", "cifar10-jpeg75")


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        label: The row's name in the paper.
        config: Name of its configuration, without ``.yaml``.
        paper: Accuracy in the paper, in percent, as "mean ± standard deviation"; empty if it has none.
        options: Options of the run that differ from the file.
        first_stage: The ``config`` of the row whose run this one starts from, if any.
        name: Name of the row's directory. Default: from ``config`` and ``options``.
    """

    label: str
    config: str
    paper: str = ""
    options: dict[str, str] = field(default_factory=dict)
    first_stage: str | None = None
    name: str = ""

    @property
    def key(self) -> str:
        """Name of the row's directory."""
        return self.name or "-".join([self.config, *(f"{name}-{value}" for name, value in self.options.items())])


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: Name of its files.
        title: Its title.
        example: The script that runs its rows, from the root of the repository.
        models: The options of the script's models, and its defaults.
        rows: Its rows.
        quick: Options of every run with ``--quick``.
        data: Names of the data that its rows are about; that of the paper first.
        options: Options of every run that differ from the files.
        free: Options in which a run may differ from its row and still count; each has a column.
        configs: Directory of the configurations.
        seeds: Number of seeds of a complete row.
        margins: Pairs of rows; the first should be better.
        top5: Whether to show top-5 accuracy beside top-1.
    """

    name: str
    title: str
    example: str
    models: Family
    rows: tuple[Row, ...]
    quick: dict[str, str]
    data: tuple[str, ...] = CIFAR10
    options: dict[str, str] = field(default_factory=dict)
    free: tuple[str, ...] = ()
    configs: Path = CONFIGS
    seeds: int = 5
    margins: tuple[tuple[str, str], ...] = ()
    top5: bool = False

    def configured(self, row: Row) -> dict[str, Any]:
        """Return the options of a row's run as written, without seed and data; empty without a file."""
        path = self.configs / f"{row.config}.yaml"
        return {**yaml.safe_load(path.read_text()), **self.options, **row.options} if path.is_file() else {}

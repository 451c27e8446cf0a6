"""The rows of a table of the paper."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        label: The row's name in the paper.
        config: Name of its file in ``examples/configs/``, without ``.yaml``.
        paper: Accuracy in the paper, in percent, as "mean ± standard deviation"; empty if it has none.
        options: Options of the run that differ from the file.
        first_stage: The ``config`` of the row whose run this one starts from, if any.
    """

    label: str
    config: str
    paper: str = ""
    options: dict[str, str] = field(default_factory=dict)
    first_stage: str | None = None

    @property
    def key(self) -> str:
        """Name of the row's folder."""
        return "-".join([self.config, *(f"{name}-{value}" for name, value in self.options.items())])


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
        name: Name of its files.
        title: What stands above it.
        example: File in ``examples/`` that runs its rows.
        rows: Its rows.
        quick: Options of every run with ``--quick``.
        top5: Whether top-5 accuracy is told beside top-1.
    """

    name: str
    title: str
    example: str
    rows: tuple[Row, ...]
    quick: dict[str, str]
    top5: bool = False

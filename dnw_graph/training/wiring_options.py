"""The options of models whose graphs take any rule of the package."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dnw_graph.errors import InputError
from dnw_graph.training.options import ModelOptions, option
from dnw_graph.training.second_stage import second_stage
from dnw_graph.wirings import WIRINGS, Wiring, create_wiring


@dataclass(frozen=True)
class WiringOptions(ModelOptions):
    """Which rule chooses the real edges. An example adds its model's own options and :meth:`with_wiring`."""

    wiring: str = option("dnw", f"rule that chooses the real edges: one of {', '.join(sorted(WIRINGS))}")
    wiring_options: dict[str, Any] = option(  # noqa: RUF009  # a field with a factory
        {}, "options of the rule, such as --wiring-options.rho 0.9 for targeted_dropout; in a YAML file a mapping"
    )
    complete: str | None = option(
        None, "lottery_ticket and fine_tune: folder of the finished run with --wiring complete that they start from"
    )

    @abstractmethod
    def with_wiring(self, wiring: Wiring, num_classes: int, image_size: int) -> nn.Module:
        """Return the model with a wiring for all of its graphs."""

    def create(self, num_classes: int, image_size: int) -> nn.Module:
        """Return the model; the second stage of a trained complete one, if ``complete`` names it."""
        wiring = create_wiring(self.wiring, **self.wiring_options)
        if self.complete is None:
            return self.with_wiring(wiring, num_classes, image_size)
        if self.complete == "":
            raise InputError("--complete is '': expected the folder of a run")
        complete = self.with_wiring(create_wiring("complete"), num_classes, image_size)
        return second_stage(self.wiring, Path(self.complete), complete, {"image_size": image_size})

    def identity(self) -> dict[str, Any]:
        """Return all options but the folder of the first stage, which a resumed run does not need."""
        return {name: value for name, value in super().identity().items() if name != "complete"}

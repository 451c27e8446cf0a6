"""Monitors how the wiring of a model changes in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from dnw_graph.analysis.cost import live_nodes, neural_graphs
from dnw_graph.analysis.silent import largest_weights, silent_blocks, silent_nodes
from dnw_graph.arguments import checked, require


def real_edges(model: nn.Module) -> dict[str, Tensor]:
    """Return the current real edges of each graph: ascending flat indices ``[num_edges]``, on the CPU."""
    return {name: graph.real_index.to("cpu", torch.int32) for name, graph in neural_graphs(model).items()}


def edges_swapped(before: dict[str, Tensor], now: dict[str, Tensor]) -> dict[str, int]:
    """Return, per graph, the number of real edges that were hallucinated before."""
    return {name: int(torch.isin(now[name], before[name], invert=True).sum()) for name in now}


class WiringMonitor(Callback):
    """Logs, per graph and in total, the edges swapped in each epoch and the state at its end.

    The state is the share of live nodes, the share of silent ones and the largest |w| of a candidate. It warns once if
    most outputs of a block are silent (:func:`~dnw_graph.analysis.silent.silent_nodes`).

    An edge counts as swapped if it is real at the end of the epoch and was not at its start. A node is live if a
    path of real edges leads from it to an output of the model. The sets of real edges at the start of the run and of
    the epoch are part of the checkpoint, so a resumed run counts like an uninterrupted one.

    Args:
        model: The model in training, as found in the LightningModule.
        every: Steps between checks for silent blocks; there is also one at the end of every epoch.

    Attributes:
        initial: Real edges per graph when training started.
        epoch_start: Real edges per graph when the epoch started.
        swapped: Total number of edges swapped in the last epoch.
        live: Overall share of live nodes at its end; None for a model without neural graphs.
    """

    @checked
    def __init__(self, model: nn.Module, every: int = 50) -> None:
        require(every >= 1, "every", "an integer >= 1", every)
        self.model = model
        self.every = every
        self.warned = False
        self.initial: dict[str, Tensor] = {}
        self.epoch_start: dict[str, Tensor] = {}
        self.swapped = 0
        self.live: float | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the wiring at the start of training, unless a checkpoint had it."""
        self.initial = self.initial or real_edges(self.model)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the wiring at the start of the epoch."""
        self.epoch_start = real_edges(self.model)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check for silent blocks if it is time."""
        if trainer.global_step % self.every == 0:
            self._warn(trainer.global_step)

    def _warn(self, step: int) -> None:
        """Warn of the first silent blocks."""
        if self.warned or not (blocks := silent_blocks(self.model)):
            return
        self.warned = True
        rank_zero_warn(
            f"step {step}: no real edge arrives at {', '.join(map(str, blocks))}. The norms of such nodes multiply "
            "gradients by 1/√eps, so the weights of edges to them can explode and the wiring freezes: 1e-3 in these "
            "norms (--node-norm-eps) and a warm-up (--warmup-epochs) prevent this"
        )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the changes."""
        now = real_edges(self.model)
        if not now:
            return
        swapped = edges_swapped(self.epoch_start, now)
        self._warn(trainer.global_step)
        live, silent, largest = live_nodes(self.model), silent_nodes(self.model), largest_weights(self.model)
        self.swapped = sum(swapped.values())
        self.live = torch.cat(list(live.values())).float().mean().item()
        # Metric first, then graph, would make `wiring/live_nodes` a file and a folder in a store of files.
        of_graphs: dict[str, Mapping[str, float]] = {
            "edges_swapped": swapped,
            "live_nodes": {name: nodes.float().mean().item() for name, nodes in live.items()},
            "silent_nodes": {name: nodes.float().mean().item() for name, nodes in silent.items()},
            "largest_weight": largest,
        }
        values: dict[str, float] = {
            "wiring/edges_swapped": self.swapped,
            "wiring/live_nodes": self.live,
            "wiring/silent_nodes": torch.cat(list(silent.values())).float().mean().item(),
            "wiring/largest_weight": max(largest.values()),
            **{f"wiring/{graph}/{what}": value for what, each in of_graphs.items() for graph, value in each.items()},
        }
        # Directly to the loggers: Lightning writes its own epoch-end metrics only after the epoch's checkpoint, and a
        # run that stops in between would lack them.
        for logger in trainer.loggers:
            logger.log_metrics({**values, "epoch": trainer.current_epoch}, trainer.global_step - 1)
            logger.save()

    def state_dict(self) -> dict[str, Any]:
        """Return both sets of real edges."""
        return {"initial": self.initial, "epoch_start": self.epoch_start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both sets of real edges from a checkpoint."""
        self.initial = state_dict["initial"]
        self.epoch_start = state_dict["epoch_start"]

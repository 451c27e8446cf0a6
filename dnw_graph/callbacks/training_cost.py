"""Counts the cost of training in multiply-adds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor, nn

from dnw_graph._compat import in_backward_pass
from dnw_graph.analysis.cost import neural_graphs
from dnw_graph.analysis.multiply_adds import GraphStep, LayersStep, layer_uses
from dnw_graph.arguments import checked
from dnw_graph.propagation import Propagate, Propagation, RealEdges
from dnw_graph.sparse_layers import WeightGraph
from dnw_graph.sparse_layers.access import sparse_weights


class TrainingCost(Callback):
    """Adds up the multiply-adds of every training step, forward and backward.

    A convolution or linear layer of M multiply-adds per image costs M forward, M for the gradient of its weights and M
    for that of its input, if its input has one. A product over a graph's edges costs one multiply-add per *real* edge
    and pixel forward, and one for the gradient of the states; for the gradient of the weights one per *candidate* if
    the wiring updates hallucinated edges, else one per real edge. This is what the method requires; extra work of an
    implementation, such as products with zeros and recomputed activations, is not counted.

    A layer with sparse weights is counted like a graph: one multiply-add per real weight and pixel forward, and one for
    the gradient of its input; for the gradient of its weights one per weight if the wiring updates hallucinated ones,
    else one per real weight.

    The numbers of real edges and weights, and of those with a gradient, are those of each step. Everything else in a
    step is counted once per epoch. Only with adaptive solvers does it change between steps; their evaluations count in
    full even if they only choose the step size. If a product involves only some nodes, the real edges are assumed to be
    evenly spread.

    Args:
        model: The model in training, made of convolutions, linear layers and neural graphs.
    """

    @checked
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._others = 0  # the total without sparse layers in this epoch
        self._layers = 0
        self._parts = 1  # of the batch of the step that was counted in full
        self._graphs = {name: GraphStep() for name in neural_graphs(model)}
        self._sparse: dict[WeightGraph, LayersStep] = {}
        self._in_step = False
        self._recorded: set[nn.Module] = set()  # called in this step, with gradients
        self._listening: list[Any] = []
        self._counting = ExitStack()
        self._counts = False  # whether this step is counted in full
        self._counted_epoch = -1

    @property
    def multiply_adds(self) -> int:
        """Total for all training images and steps so far, on all devices; part of the checkpoint. Synchronises."""
        return self._others + sum(each.multiply_adds() for each in self._sparse.values())

    def _step(self, graph: WeightGraph) -> LayersStep:
        return self._sparse.setdefault(graph, LayersStep(graph))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting the products of every graph."""
        for name, graph in neural_graphs(self.model).items():
            hook = partial(self._on_edges, self._graphs[name])
            self._listening.append(graph.propagation.register_forward_hook(hook))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop counting."""
        while self._listening:
            self._listening.pop().remove()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the first step of an epoch in full."""
        self._in_step = True
        self._recorded.clear()
        if self._counted_epoch != trainer.current_epoch:
            self._counted_epoch = trainer.current_epoch
            self._layers = 0
            self._others, self._sparse = self.multiply_adds, {}
            for counter in self._graphs.values():
                counter.forget()
            # Compiled code would neither call hooks that come later nor stop calling those that go.
            self._counting.enter_context(torch.compiler.set_stance("force_eager"))
            for layer in self.model.modules():
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    self._counting.callback(layer.register_forward_hook(self._on_layer, with_kwargs=True).remove)
            self._counts = True

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Take the real weights of the forward pass for those of the step."""
        for layers in self._sparse.values():
            layers.see_edges()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Sequence[Tensor], batch_idx: int
    ) -> None:
        """Add this step, for all images on all devices."""
        self._in_step, counted = False, self._counts
        self._stop_counting()
        images = extract_batch_size(batch)
        if counted:
            # Layers and graphs were called once per part of the batch, of which there may be fewer than asked for.
            self._parts = math.ceil(images / math.ceil(images / getattr(pl_module, "accumulate", 1)))
        images *= trainer.world_size
        per_image = self._layers + sum(counter.multiply_adds() for counter in self._graphs.values())
        self._others += round(images / self._parts * per_image)
        for layers in self._sparse.values():
            layers.add(images, self._parts)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop counting, also within a step."""
        if self._counts:  # The counts of this epoch are incomplete.
            self._counted_epoch = -1
        self._in_step = False
        self._stop_counting()
        self.on_fit_end(trainer, pl_module)

    def _stop_counting(self) -> None:
        self._counting.close()
        self._counts = False

    def _on_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if self._recomputed(layer):
            return
        parameter, through, to_weight = layer_uses(layer, args[0] if args else kwargs["input"], output)
        if sparse := sparse_weights(layer).get("weight"):
            weight, graph = sparse
            self._step(graph).count(weight, through, to_weight)
        else:
            self._layers += parameter.numel() * (through + to_weight)

    def _recomputed(self, module: nn.Module) -> bool:
        """Return whether a call repeats one that autograd has recorded in this step, as activation checkpointing does.

        The adjoint equation calls modules in the backward pass too, but for the first time with gradients.
        """
        if in_backward_pass():
            return module in self._recorded
        if torch.is_grad_enabled():
            self._recorded.add(module)
        return False

    def _on_edges(
        self, counter: GraphStep, propagation: Propagation, args: tuple[RealEdges, Tensor], output: Propagate
    ) -> Propagate | None:
        if not self._in_step or self._recomputed(propagation):
            return None
        counter.edges = args[0]
        return counter.listen(output) if self._counts else None

    def state_dict(self) -> dict[str, Any]:
        """Return the total so far and the counts of this epoch."""
        counted = {name: (each.through_edges, each.to_weights) for name, each in self._graphs.items()}
        sparse = sparse_weights(self.model).items()
        return {
            "multiply_adds": self.multiply_adds,
            "epoch": self._counted_epoch,
            "layers": self._layers,
            "parts": self._parts,
            "sparse_layers": {name: self._step(graph).uses.get(weight, (0, 0)) for name, (weight, graph) in sparse},
            "graphs": counted,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both from a checkpoint."""
        self._others, self._sparse = state_dict["multiply_adds"], {}
        # Older checkpoints have no counts of sparse layers, or of parts: the next step is counted in full.
        self._counted_epoch = state_dict["epoch"] if {"sparse_layers", "parts"} <= state_dict.keys() else -1
        self._parts = state_dict.get("parts", 1)
        self._layers = state_dict["layers"]
        for name, (through_edges, to_weights) in state_dict["graphs"].items():
            self._graphs[name].through_edges, self._graphs[name].to_weights = through_edges, to_weights
        sparse = sparse_weights(self.model)
        for name, uses in state_dict.get("sparse_layers", {}).items():
            weight, graph = sparse[name]
            self._step(graph).uses[weight] = uses

"""The models that the command line trains, by name: their options, and the models that these make."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from dnw_graph.arguments import checked
from dnw_graph.errors import InputError, unknown_name
from dnw_graph.models.mobilenet import MobileNetV1, MobileNetV1DNW
from dnw_graph.models.tiny import TINY_DYNAMICS, TINY_NODE_FUNCTIONS, TinyClassifier
from dnw_graph.node_functions import EPS, NODE_FUNCTIONS, NormReluConv
from dnw_graph.recipes.options import ModelOptions, RunOptions, completed, option
from dnw_graph.recipes.second_stage import second_stage
from dnw_graph.sparse_layers import sparsify
from dnw_graph.sparse_layers.budget import DISTRIBUTIONS
from dnw_graph.wirings import WIRINGS, Wiring, create_wiring

LARGE_IMAGE = 64
MOBILENETS = ("mobilenet_v1_dnw", "mobilenet_v1")
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
TINY = "tiny_classifier"
NODE_NORM_EPS = 1e-3
"""Eps of node norms, outside of the paper's configurations; with less, nodes without input freeze early stages."""


@dataclass(frozen=True)
class WiringOptions(ModelOptions):
    """The rule that chooses the real edges. An example adds its model's options and :meth:`with_wiring`.

    Attributes:
        shared_by_stages: The options that decide what a model of given weights and edges computes. The two stages of
            ``lottery_ticket`` and ``fine_tune`` must agree in them.
    """

    shared_by_stages: ClassVar[tuple[str, ...]] = ()

    wiring: str = option("dnw", f"rule that chooses the real edges: one of {', '.join(sorted(WIRINGS))}")
    wiring_options: dict[str, Any] = option(  # noqa: RUF009  # a field with a factory
        {}, "options of the rule, such as --wiring-options.rho 0.9 for targeted_dropout; a mapping in a YAML file"
    )
    complete: str | None = option(
        None, "lottery_ticket and fine_tune: directory of the finished run with --wiring complete to start from"
    )

    @abstractmethod
    def with_wiring(self, wiring: Wiring, num_classes: int, image_size: int) -> nn.Module:
        """Return the model with a wiring for all of its graphs."""

    def create(self, num_classes: int, image_size: int) -> nn.Module:
        """Return the model; if ``complete`` is given, the second stage of that trained complete model."""
        wiring = create_wiring(self.wiring, **self.wiring_options)
        if self.complete is None:
            return self.with_wiring(wiring, num_classes, image_size)
        if self.complete == "":
            raise InputError("--complete is '': expected the directory of a run")
        complete = self.with_wiring(create_wiring("complete"), num_classes, image_size)
        identity = self.identity()
        shared = {"image_size": image_size, **{name: identity[name] for name in self.shared_by_stages}}
        return second_stage(self.wiring, Path(self.complete), complete, shared)

    def identity(self) -> dict[str, Any]:
        """Return all options except the directory of the first stage, which a resumed run does not need."""
        return {name: value for name, value in super().identity().items() if name != "complete"}


@dataclass(frozen=True)
class MobileNetOptions(WiringOptions):
    """Options of MobileNetV1. The first convolution has stride 2, or 1 for images smaller than 64 pixels."""

    shared_by_stages = ("model", "width", "small", "node_norm_eps")

    model: str = option("mobilenet_v1_dnw", f"one of {', '.join(MOBILENETS)}")
    width: float = option(0.225, "width multiplier")
    small: bool = option(False, "mobilenet_v1_dnw: learn the edges of the classifier too (DNW-Small)")
    node_norm_eps: float | None = option(
        None, f"mobilenet_v1_dnw: eps of the norms of nodes, added to the variance. Default: {NODE_NORM_EPS}"
    )

    def with_wiring(self, wiring: Wiring, num_classes: int, image_size: int) -> nn.Module:
        """Return the model with a wiring."""
        if self.model not in MOBILENETS:
            raise unknown_name("model", self.model, MOBILENETS)
        stride = 2 if image_size >= LARGE_IMAGE else 1
        shared: dict[str, Any] = {"width": self.width, "num_classes": num_classes, "stem_stride": stride}
        if self.model == "mobilenet_v1":
            if self.small or self.wiring != "dnw" or self.node_norm_eps not in (None, EPS):
                raise InputError(
                    "--small, --wiring and --node-norm-eps are for mobilenet_v1_dnw: mobilenet_v1 has no nodes or edges"
                )
            return MobileNetV1(**shared)
        node_function = partial(NormReluConv, eps=self.eps)
        return MobileNetV1DNW(**shared, small=self.small, wiring=wiring, node_function=node_function)

    @property
    def eps(self) -> float:
        """Eps of the norms of nodes."""
        default = EPS if self.model == "mobilenet_v1" else NODE_NORM_EPS
        return default if self.node_norm_eps is None else self.node_norm_eps

    def identity(self) -> dict[str, Any]:
        """Return all options, with the eps in use."""
        return {**super().identity(), "node_norm_eps": self.eps}


@dataclass(frozen=True)
class TinyOptions(WiringOptions):
    """Options of the tiny classifiers."""

    shared_by_stages = ("dynamics", "node_function", "node_norm_eps")

    dynamics: str = option("static", f"one of {', '.join(TINY_DYNAMICS)}")
    node_function: str | None = option(
        None, f"one of {', '.join(NODE_FUNCTIONS)}; default: that of the paper for these dynamics"
    )
    node_norm_eps: float = option(NODE_NORM_EPS, "eps of the norms of nodes, added to the variance")
    adjoint: bool = option(False, "continuous: train with the adjoint equation instead of through the solver")

    def with_wiring(self, wiring: Wiring, num_classes: int, image_size: int) -> nn.Module:
        """Return the model with a wiring."""
        if self.dynamics not in TINY_DYNAMICS:
            raise unknown_name("dynamics", self.dynamics, TINY_DYNAMICS)
        if self.node_function not in (None, *NODE_FUNCTIONS):
            raise unknown_name("node function", str(self.node_function), NODE_FUNCTIONS)
        if self.adjoint and self.dynamics != "continuous":
            raise InputError("--adjoint goes with --dynamics continuous")
        kind = NODE_FUNCTIONS[self.node_function] if self.node_function else TINY_NODE_FUNCTIONS[self.dynamics]
        return TinyClassifier(
            dynamics=self.dynamics,
            num_classes=num_classes,
            wiring=wiring,
            node_function=partial(kind, norm="instance", eps=self.node_norm_eps),
            adjoint=self.adjoint,
        )


@dataclass(frozen=True)
class ResNetOptions(WiringOptions):
    """Options of torchvision's ResNets. The first convolution has stride 2, or 1 for images smaller than 64 pixels."""

    shared_by_stages = ("model", "first_layer_dense")

    model: str = option("resnet18", f"one of {', '.join(RESNETS)}")
    density: float | None = option(
        None, "share of weights that every layer keeps, 1 for the dense network. Default: 0.1, or that of the rule"
    )
    first_layer_dense: bool = option(False, "keep all weights of the first convolution (First Layer Dense)")
    distribution: str = option("uniform", f"how the budget is divided among layers: one of {', '.join(DISTRIBUTIONS)}")

    def with_wiring(self, wiring: Wiring, num_classes: int, image_size: int) -> nn.Module:
        """Return the model with a wiring for the weights of every layer."""
        import torchvision

        if self.model not in RESNETS:
            raise unknown_name("model", self.model, RESNETS)
        model = torchvision.models.get_model(self.model, weights=None, num_classes=num_classes)
        if image_size < LARGE_IMAGE:
            model.conv1.stride = (1, 1)
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
        if self.density == 1:
            if self.first_layer_dense or self.wiring != "dnw" or self.distribution != "uniform":
                raise InputError(
                    "--first-layer-dense, --wiring and --distribution are for sparse networks: give a --density below 1"
                )
            return model
        sparsify(model, self.share, wiring, ["conv1"] if self.first_layer_dense else [], self.distribution)
        return model

    @property
    def share(self) -> float | None:
        """The density; None if the rule determines it."""
        if self.density is None and create_wiring(self.wiring, **self.wiring_options).decides_k:
            return None
        return 0.1 if self.density is None else self.density

    def identity(self) -> dict[str, Any]:
        """Return all options, with the density in use."""
        return {**super().identity(), "density": self.share}


@dataclass(frozen=True)
class Family:
    """Models that share their options.

    Attributes:
        options: Their options.
        defaults: Default values of the options of a run.
        names: Their names, for ``--model``.
    """

    options: type[ModelOptions]
    defaults: RunOptions
    names: tuple[str, ...]


RESNET_RECIPE = RunOptions(
    held_out=None,
    epochs=5,
    lr=0.064,
    warmup_epochs=1,
    momentum=0.875,
    weight_decay=2**-15,
    norm_weight_decay=False,
    label_smoothing=0.1,
)
MOBILENET_RECIPE = RunOptions(held_out=None, warmup_epochs=1)
TINY_RECIPE = RunOptions(
    image_size=16, held_out=None, epochs=5, schedule="step", lr=0.1, warmup_epochs=1, weight_decay=1e-4
)

FAMILIES: dict[str, Family] = {
    "mobilenet": Family(MobileNetOptions, MOBILENET_RECIPE, MOBILENETS),
    "resnet": Family(ResNetOptions, RESNET_RECIPE, RESNETS),
    "tiny": Family(TinyOptions, TINY_RECIPE, (TINY,)),
}
"""The options of models, by their names in files."""


@checked
def register_models(name: str, options: type[ModelOptions], defaults: RunOptions | None = None) -> None:
    """Make :func:`dnw_graph.load` and the command line load your own models from files, and train them by name.

    Args:
        name: The name, for files and for ``dnw-graph train --model``.
        options: The options class that makes the model.
        defaults: Default values of the options of a run.

    Raises:
        InputError: If other options have the name.
    """
    family = FAMILIES.setdefault(name, Family(options, defaults or RunOptions(held_out=None), (name,)))
    if family.options is not options:
        raise InputError(f"the models {name!r} are made by {family.options.__qualname__} already: choose another name")


def family_name(options: type[ModelOptions]) -> str | None:
    """Return the name under which options are registered, or None."""
    return next((name for name, family in FAMILIES.items() if family.options is options), None)


def names_of(options: type[ModelOptions]) -> list[str]:
    """Return the names of the models that options make; none if they are not registered."""
    return [name for family in FAMILIES.values() if family.options is options for name in family.names]


def family_with(names: Iterable[str]) -> str | None:
    """Return the only family that has one of some options, or None."""
    counts = Counter(f.name for each in FAMILIES.values() for f in fields(each.options))
    given = {name for name in names if counts[name] == 1}
    return next((name for name, each in FAMILIES.items() if given & {f.name for f in fields(each.options)}), None)


def options_from_file(
    path: str, models: str | None, options: dict[str, Any], wiring: str | None = None
) -> ModelOptions:
    """Return the options of a model from a file.

    Args:
        path: The file, for messages.
        models: The name of the family.
        options: Options of a run.
        wiring: The rule's name as the user gave it; a file alone does not decide what is imported.

    Raises:
        InputError: If the family or the rule is not registered in this process, or another rule was given.
    """
    if models not in FAMILIES:
        kind = "a program of its own" if models is None else f"models {models!r}, which are not registered here"
        raise InputError(
            f"{path} was trained with {kind}: register them with dnw_graph.training.register_models, or give "
            "load(path, create=…) what makes the model"
        )
    rule = options.get("wiring", "dnw")
    if wiring not in (None, rule):
        raise InputError(f"--wiring is {wiring!r}, but {path} was trained with {rule!r:.100}: give the same value")
    if wiring is None and rule not in WIRINGS:
        raise InputError(
            f"{path} was trained with the rule {rule!r:.100}, which is not registered here: call "
            "dnw_graph.register_wiring first, with the same name, or give --wiring package.module.Class to the command"
        )
    family, options = FAMILIES[models].options, completed(options)
    return family(**{f.name: options[f.name] for f in fields(family) if f.name in options})

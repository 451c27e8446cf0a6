"""The rows of Table 3 of the paper, with the model compared with each."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torchvision.models import get_model

SIDE = 224


@dataclass(frozen=True)
class Nearest:
    """The nearest model of a library.

    Attributes:
        library: ``torchvision`` or ``timm``.
        name: Name of the model there.
        side: Height and width of the images.
        options: Further arguments of the model.
    """

    library: str
    name: str
    side: int = SIDE
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = "".join(f", {key}={value}" for key, value in self.options.items())
        return f"{self.library} {self.name}{options}{f', {self.side} px' if self.side != SIDE else ''}"

    def build(self) -> nn.Module:
        """Return the model without trained weights."""
        create = get_model if self.library == "torchvision" else importlib.import_module("timm").create_model
        return create(self.name, **self.options)


@dataclass(frozen=True)
class Row:
    """A row of the paper's table.

    Attributes:
        model: Its name.
        parameters: As printed, or None.
        flops: As printed.
        top1: Accuracy in percent.
        name: Name of the configuration in examples/configs that trains the model, if it is one of ours.
        options: Arguments of ``create_model``.
        nearest: The nearest model of a library, if it is another paper's.
        note: Why the count differs from the paper's, if it does.
    """

    model: str
    parameters: str | None
    flops: str
    top1: float
    name: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    nearest: Nearest | None = None
    note: str = ""


def _v1(width: float, parameters: str, flops: str, top1: float) -> Row:
    options = {"name": "mobilenet_v1", "width": width}
    return Row(f"MobileNetV1 (×{width})", parameters, flops, top1, f"mobilenet_v1_x{width}", options)


def _dnw(kind: str, width: float, parameters: str, flops: str, top1: float, note: str = "") -> Row:
    wiring = "random_graph" if kind == "RG" else "dnw"
    options = {"name": "mobilenet_v1_dnw", "width": width, "wiring": wiring, "small": kind == "DNW-Small"}
    name = f"mobilenet_v1_{kind.lower().replace('-', '_')}_x{width}"
    return Row(f"MobileNetV1-{kind} (×{width})", parameters, flops, top1, name, options, note=note)


def _v2(width: float, marks: str, flops: str, top1: float, side: int = SIDE) -> Row:
    nearest = Nearest("torchvision", "mobilenet_v2", side, {"width_mult": width})
    note = "torchvision rounds channels to multiples of 8"
    if side != SIDE:
        note += f"; the image size, which the paper does not name, is the usual one that comes nearest: {side} px"
    return Row(f"MobileNetV2 (×{width}){marks}", None, flops, top1, nearest=nearest, note=note)


def _shuffle(width: float, parameters: str, flops: str, top1: float) -> Row:
    nearest = Nearest("torchvision", f"shufflenet_v2_x{width:.1f}".replace(".", "_"))
    note = "torchvision's implementation is not the one cited"
    return Row(f"ShuffleNetV2 (×{width:g})", parameters, flops, top1, nearest=nearest, note=note)


_VARIANT = "the small variant that the ShuffleNetV2 paper compared with is in neither torchvision nor timm"
_DENSENET = Nearest("torchvision", "densenet121")
_XCEPTION = Nearest("timm", "legacy_xception")
ROWS = (
    _v1(0.25, "0.5M", "41M", 50.6),
    _v2(0.15, "*", "39M", 44.9),
    _v2(0.4, "**", "43M", 56.6, side=160),
    Row("DenseNet (×0.5)*", None, "42M", 41.1, nearest=_DENSENET, note=_VARIANT),
    Row("Xception (×0.5)*", None, "40M", 55.1, nearest=_XCEPTION, note=_VARIANT),
    Row("ShuffleNetV1 (×0.5, g = 3)", None, "38M", 56.8),
    _shuffle(0.5, "1.4M", "41M", 60.3),
    _dnw("RG", 0.225, "1.2M", "55.7M", 53.3, note="another draw of the random graph has other dead nodes"),
    _dnw("DNW-Small", 0.15, "0.24M", "22.1M", 50.3),
    _dnw("DNW-Small", 0.225, "0.4M", "41.2M", 59.9),
    _dnw("DNW", 0.225, "1.1M", "42.1M", 60.9),
    Row(
        "MnasNet-search1",
        "1.9M",
        "65M",
        64.9,
        nearest=Nearest("timm", "mnasnet_small"),
        note="neither torchvision nor timm has search1; this is timm's small MnasNet",
    ),
    _dnw("DNW", 0.3, "1.3M", "66.7M", 65.0),
    _v1(0.5, "1.3M", "149M", 63.7),
    _v2(0.6, "*", "141M", 66.6),
    _v2(0.75, "***", "145M", 67.9, side=192),
    Row("DenseNet (×1)*", None, "142M", 54.8, nearest=_DENSENET, note=_VARIANT),
    Row("Xception (×1)*", None, "145M", 65.9, nearest=_XCEPTION, note=_VARIANT),
    Row("ShuffleNetV1 (×1, g = 3)", None, "140M", 67.4),
    _shuffle(1, "2.3M", "146M", 69.4),
    _dnw(
        "RG",
        0.49,
        "1.8M",
        "170M",
        64.1,
        note="width 0.49 gives 158.8M multiply-adds with no node dead; 170M is the figure of width 0.51 (169.6M), "
        "whose 1.9M parameters are not the paper's 1.8M",
    ),
    _dnw("DNW", 0.49, "1.8M", "154M", 70.4),
)
NAMES = [row.name for row in ROWS if row.name and row.options["name"] == "mobilenet_v1_dnw"]

"""Node functions and other modules that treat every channel separately, as lists of plain layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dnw_graph.compaction.plain_layers import (
    Activation,
    Affine,
    Chain,
    Conv,
    InstanceNorm,
    Layer,
    Linear,
    MapMean,
    require,
    require_whole,
)
from dnw_graph.dynamics.recurrent import takes_time
from dnw_graph.models.tiny import PatchMean
from dnw_graph.node_functions import Biased, Blockwise, NodeConv, NormReluConv, NormReluConvNormRelu, ReluConvSendNorm
from dnw_graph.usual import as_its_class

ACTIVATION_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
    nn.SiLU: "silu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
}

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d)

# Modules that do nothing in evaluation.
SILENT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def steps(module: nn.Module) -> list[Layer] | None:
    """Return the sequence of layers that a module is equivalent to in evaluation, or None if unknown.

    Every layer treats each channel separately, so that it can be cut to some of them. Only exact classes are known:
    subclasses, patched modules and modules with hooks may do something else.
    """
    kind = type(module)
    if not as_its_class(module):
        return None
    if kind in SILENT:
        return []
    if kind in ACTIVATION_MODULES:
        return [Activation(ACTIVATION_MODULES[kind])]
    if isinstance(module, Affine | MapMean):
        return [module]
    if isinstance(module, PatchMean) and kind is PatchMean:
        return [MapMean(module.start, module.stop)]
    if isinstance(module, NORMS) and kind.__module__.startswith("torch."):
        return _norm(module)
    if kind in (nn.Conv2d, NodeConv):
        layer = conv(module)
        return [layer] if layer is not None and layer.single_channel else None
    if isinstance(module, NormReluConv) and kind in (NormReluConv, NormReluConvNormRelu):
        parts = [module.norm, nn.ReLU(), module.conv]
        return _all(parts + ([module.norm2, nn.ReLU()] if isinstance(module, NormReluConvNormRelu) else []))
    if isinstance(module, ReluConvSendNorm):
        return steps(module.norm) if kind is ReluConvSendNorm else None
    if kind is nn.Sequential:
        return _all(list(module.children()))
    if isinstance(module, Biased) and kind is Biased:
        bias = module.bias
        shift = [] if bias is None else [Affine(torch.ones_like(bias), bias.detach().clone())]
        after = steps(module.activation)
        return None if after is None else [*shift, *after]
    if isinstance(module, Blockwise) and kind is Blockwise:
        blocks = [steps(function) for function in module.functions]
        known = [block for block in blocks if block is not None]
        return [PerBlock([Chain(block) for block in known], module.sizes)] if len(known) == len(blocks) else None
    return None


def sending_steps(function: nn.Module) -> list[Layer] | None:
    """Return the layers that a node function applies to states before they are sent, see :func:`steps`."""
    if type(function) is ReluConvSendNorm and as_its_class(function):
        return _all([nn.ReLU(), function.conv])
    return None if hasattr(function, "send") else []


def conv(module: nn.Module) -> Conv | None:
    """Return a convolution as a layer, or None if it does not pad with zeros."""
    assert isinstance(module, nn.Conv2d)
    if module.padding_mode != "zeros":
        return None
    bias = None if module.bias is None else module.bias.detach().clone()
    padding = module.padding if isinstance(module.padding, str) else list(module.padding)
    return Conv(module.weight.detach().clone(), bias, module.stride, padding, module.dilation, module.groups)


def linear_or_conv(module: nn.Module) -> Conv | Linear | None:
    """Return a linear layer or a convolution as a layer, or None for other and for patched modules."""
    if not as_its_class(module):
        return None
    if type(module) is nn.Linear:
        return Linear(module.weight.detach().clone(), None if module.bias is None else module.bias.detach().clone())
    return conv(module) if type(module) is nn.Conv2d else None


def _all(modules: Sequence[nn.Module]) -> list[Layer] | None:
    parts = [steps(module) for module in modules]
    known = [part for part in parts if part is not None]
    return [layer for part in known for layer in part] if len(known) == len(parts) else None


def _norm(norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.SyncBatchNorm | nn.InstanceNorm2d) -> list[Layer] | None:
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        if not isinstance(norm, nn.InstanceNorm2d):
            return None  # It normalises over the batch even in evaluation.
        weight, bias = _scale_and_shift(norm, norm.weight) if norm.affine else (None, None)
        return [InstanceNorm(weight, bias, norm.eps)]
    weight, bias = _scale_and_shift(norm, mean)
    scale = weight * (variance + norm.eps).rsqrt()
    return [Affine(scale, bias - mean * scale)]


def _scale_and_shift(norm: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    scale = torch.ones_like(like) if norm.weight is None else norm.weight.detach().clone()
    return scale, torch.zeros_like(like) if norm.bias is None else norm.bias.detach().clone()


class PerBlock(Layer):
    """A separate chain of layers for each block of channels.

    Args:
        chains: One per block.
        sizes: Number of channels of each block.
    """

    options = ("sizes",)

    def __init__(self, chains: Sequence[nn.Module], sizes: Sequence[int]) -> None:
        super().__init__()
        require_whole(sizes, 1, "sizes of blocks")
        require(len(chains) == len(sizes), f"{len(chains)} chains do not fit {len(sizes)} blocks")
        for chain, size in zip(chains, sizes, strict=True):
            inside = [layer.num_inputs for layer in chain.modules() if isinstance(layer, Layer)]
            require({None, size}.issuperset(inside), f"{chain} does not take {size} channels")
        self.chains = nn.ModuleList(chains)
        self.sizes = list(sizes)

    @property
    def num_inputs(self) -> int:
        """Number of channels."""
        return sum(self.sizes)

    def cut(self, nodes: Tensor) -> PerBlock:
        """Return the chains of some channels; empty blocks are dropped."""
        chains, sizes, start = [], [], 0
        for chain, size in zip(self.chains, self.sizes, strict=True):
            inside = nodes[(nodes >= start) & (nodes < start + size)] - start
            if len(inside):
                assert isinstance(chain, Chain)
                chains.append(chain.cut(inside))
                sizes.append(len(inside))
            start += size
        return PerBlock(chains, sizes)

    def forward(self, z: Float[Tensor, "batch nodes *space"]) -> Float[Tensor, "batch nodes *space2"]:
        """Apply each chain to its own block."""
        parts = z.split(self.sizes, dim=1)
        return torch.cat([chain(part) for chain, part in zip(self.chains, parts, strict=True)], dim=1)


class WholeFunction(nn.Module):
    """A node function of unknown structure: kept as it is, over all its nodes."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.takes_time = takes_time(function)

    def send(self, z: Tensor) -> Tensor:
        """Return the values that the nodes send."""
        send = getattr(self.function, "send", None)
        return z if send is None else send(z)

    def forward(self, z: Tensor, time: object = None) -> Tensor:
        """Apply f_θ."""
        return self.function(z, time) if self.takes_time else self.function(z)

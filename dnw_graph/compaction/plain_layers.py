"""The layers of a compact model: plain modules over maps ``[batch, channels, *space]``, without trainable parameters.

A layer consists of tensors (buffers), options (plain values named in ``options``) and parts (other layers). A file
holds exactly these three; constructors refuse inconsistent arguments, from files and from code.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dnw_graph.errors import InputError, unknown_name
from dnw_graph.ops.operands import INTEGERS


class Layer(nn.Module):
    """A layer of a compact model.

    Attributes:
        options: Names of the constructor arguments that are plain values.
        tensor_names: Names of those that are tensors or None.
        label: Name of the layer in the original model, where the layer has a row in the report.
        sources: Number of columns of the sparse matrix ``rowptr``, ``columns``, ``values``, in a layer that has one.
        on_last: Whether it acts on the last dimension, which is that of the channels for vectors only.
    """

    options: ClassVar[tuple[str, ...]] = ()
    tensor_names: tuple[str, ...] = ()
    label: str = ""
    sources: int
    on_last: ClassVar[bool] = False

    def register(self, **tensors: Tensor | None) -> None:
        """Make tensors buffers."""
        self.tensor_names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def own_parameters(self) -> int:
        """Return the number of its parameters for ``cost``, without those of layers within it."""
        return sum(tensor.numel() for tensor in self.buffers(recurse=False) if tensor.is_floating_point())

    @property
    def num_inputs(self) -> int | None:
        """Number of channels that the layer takes, or None for any."""
        return None

    @property
    def num_outputs(self) -> int | None:
        """Number of channels that the layer returns, or None for as many as it takes."""
        return None

    def cut(self, nodes: Tensor) -> Layer:
        """Return the layer for some of its channels; only layers that treat every channel separately have it."""
        raise NotImplementedError

    def absorb(self, scale: Tensor, shift: Tensor) -> bool:
        """Fold a scale and a shift per channel into the layer if possible; return whether it was possible."""
        return False

    def extra_repr(self) -> str:
        """Options and channels, for ``repr``."""
        sizes = [] if self.num_outputs is None else [f"channels={self.num_outputs}"]
        return ", ".join(sizes + [f"{name}={getattr(self, name)!r}" for name in self.options])


def scaled(weights: Tensor, scale: Tensor) -> Tensor:
    """Return scaled weights in their dtype, also by a norm in another one."""
    return (weights * scale).to(weights.dtype)


def shifted(layer: Any, scale: Tensor, shift: Tensor) -> Tensor:
    """Return the bias of a layer after a scale and a shift, in the dtype of its weights."""
    weights = layer.values if hasattr(layer, "values") else layer.weight
    return (shift if layer.bias is None else layer.bias * scale + shift).to(weights.dtype)


class Chain(Layer):
    """Layers in sequence."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        channels = None
        for layer in layers:
            if isinstance(layer, Layer):
                require(
                    channels is None or layer.num_inputs in (None, channels),
                    f"{layer} cannot take {channels} channels",
                )
                if isinstance(layer, Select) and layer.dim == 1 and channels and layer.num_outputs:
                    require(int(layer.index.max()) < channels, f"a selection leaves the {channels} channels")
                channels = None if layer.on_last else layer.num_outputs or channels
            else:
                channels = None
        self.layers = nn.ModuleList(layers)

    def cut(self, nodes: Tensor) -> Chain:
        """Return the same layers for some channels."""
        return Chain([layer.cut(nodes) for layer in self.layers if isinstance(layer, Layer)])

    def forward(self, z: Tensor) -> Tensor:
        """Apply the layers."""
        for layer in self.layers:
            z = layer(z)
        return z


class Select(Layer):
    """Some of the channels.

    Args:
        index: Their indices.
        dim: The dimension that counts channels.
    """

    options = ("dim",)
    index: Tensor

    def __init__(self, index: Tensor, dim: int = 1) -> None:
        super().__init__()
        require(index.dim() == 1 and index.dtype in INTEGERS, "a selection needs a list of indices")
        require(not len(index) or int(index.min()) >= 0, "a selection has a negative index")
        require_whole(dim, 0, "the dimension of a selection")
        self.register(index=index)
        self.dim = dim

    @property
    def num_outputs(self) -> int:
        """Number of selected channels."""
        return len(self.index)

    def forward(self, z: Tensor) -> Tensor:
        """Select the channels."""
        return z.index_select(self.dim, self.index)


class Activation(Layer):
    """An element-wise function without parameters.

    Args:
        name: One of :data:`ACTIVATIONS`.
    """

    options = ("name",)

    def __init__(self, name: str) -> None:
        super().__init__()
        if name not in ACTIVATIONS:
            raise unknown_name("activation", name, ACTIVATIONS)
        self.name = name

    def cut(self, nodes: Tensor) -> Activation:
        """Return the same function."""
        return self

    def forward(self, z: Tensor) -> Tensor:
        """Apply the function."""
        return ACTIVATIONS[self.name](z)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


class ScaleAndShift(Layer):
    """Base of layers with a scale and a shift per channel, or with none."""

    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, scale: Tensor | None, shift: Tensor | None) -> None:
        super().__init__()
        if scale is not None or shift is not None:
            fits = scale is not None and shift is not None and scale.dim() == 1 and scale.shape == shift.shape
            require(fits, "scale and shift must be two vectors of one length")
        self.register(scale=scale, shift=shift)

    @property
    def num_inputs(self) -> int | None:
        """Number of channels."""
        return None if self.scale is None else len(self.scale)

    def absorb(self, scale: Tensor, shift: Tensor) -> bool:
        """Fold a further scale and shift into the layer."""
        if self.scale is None or self.shift is None:
            self.scale, self.shift = scale, shift
        else:
            self.scale, self.shift = self.scale * scale, self.shift * scale + shift
        return True

    def forward(self, z: Float[Tensor, "batch nodes *space"]) -> Float[Tensor, "batch nodes *space"]:
        """Scale and shift."""
        if self.scale is None or self.shift is None:
            return z
        shape = (-1, *[1] * (z.dim() - 2))
        return (z * self.scale.view(shape) + self.shift.view(shape)).to(z.dtype)


class Affine(ScaleAndShift):
    """A scale and a shift per channel, such as a batch norm in evaluation."""

    scale: Tensor
    shift: Tensor

    def cut(self, nodes: Tensor) -> Affine:
        """Return scale and shift of some channels."""
        return Affine(self.scale[nodes], self.shift[nodes])


class InstanceNorm(ScaleAndShift):
    """Instance norm: normalises every map of every image, then applies a scale and a shift per channel, if any."""

    options = ("eps",)

    def __init__(self, scale: Tensor | None, shift: Tensor | None, eps: float) -> None:
        super().__init__(scale, shift)
        require(isinstance(eps, float | int) and 0 <= eps < math.inf, f"eps is a number >= 0; got {eps!r:.50}")
        self.eps = eps

    def cut(self, nodes: Tensor) -> InstanceNorm:
        """Return the norm of some channels."""
        if self.scale is None or self.shift is None:
            return self
        return InstanceNorm(self.scale[nodes], self.shift[nodes], self.eps)

    def forward(self, z: Float[Tensor, "batch nodes height width"]) -> Float[Tensor, "batch nodes height width"]:
        """Normalise every map."""
        return super().forward(F.layer_norm(z, z.shape[2:], eps=self.eps))


class Conv(Layer):
    """A 2-dimensional convolution with zero padding; with ``groups`` = channels, a single-channel one for every node.

    Args:
        weight: ``[outputs, inputs / groups, *kernel]``
        bias: ``[outputs]``, or None.
        stride: As in ``torch.nn.functional.conv2d``, like the following arguments.
        padding: Two numbers, ``"same"`` or ``"valid"``.
        dilation: Two numbers.
        groups: Number of groups.
    """

    options = ("stride", "padding", "dilation", "groups")
    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int] | str,
        dilation: Sequence[int],
        groups: int,
    ) -> None:
        super().__init__()
        require(weight.dim() == 4, f"a convolution needs a weight of four dimensions; got {list(weight.shape)}")
        require_whole([groups, *stride, *dilation], 1, "stride, dilation and groups")
        if padding not in ("same", "valid"):
            require_whole(padding, 0, "padding")
            require(len(padding) == 2, "a convolution needs two paddings")
        require(len(stride) == len(dilation) == 2, "a convolution needs two strides and two dilations")
        require(len(weight) % groups == 0, f"{len(weight)} channels are not {groups} groups")
        require(bias is None or bias.shape == weight.shape[:1], "a convolution's bias must have one value per channel")
        self.register(weight=weight, bias=bias)
        self.stride = list(stride)
        self.padding = padding if isinstance(padding, str) else list(padding)
        self.dilation = list(dilation)
        self.groups = groups

    @property
    def num_inputs(self) -> int:
        """Number of channels taken."""
        return self.weight.size(1) * self.groups

    @property
    def num_outputs(self) -> int:
        """Number of channels returned."""
        return self.weight.size(0)

    @property
    def single_channel(self) -> bool:
        """Whether it is depthwise: every channel has its own kernel."""
        return self.groups == self.num_inputs == self.num_outputs

    def cut(self, nodes: Tensor) -> Conv:
        """Return the convolution for some of the output channels."""
        bias = None if self.bias is None else self.bias[nodes]
        groups = len(nodes) if self.single_channel else self.groups
        return Conv(self.weight[nodes], bias, self.stride, self.padding, self.dilation, groups)

    def absorb(self, scale: Tensor, shift: Tensor) -> bool:
        """Scale the kernels and shift the bias."""
        self.weight, self.bias = scaled(self.weight, scale.view(-1, 1, 1, 1)), shifted(self, scale, shift)
        return True

    def forward(self, z: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs h w"]:
        """Convolve."""
        return F.conv2d(z, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Linear(Layer):
    """A linear layer over the last dimension."""

    on_last = True
    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        require(weight.dim() == 2, f"a linear layer needs a matrix; got {list(weight.shape)}")
        require(bias is None or bias.shape == weight.shape[:1], "a linear layer's bias must have one value per output")
        self.register(weight=weight, bias=bias)

    def absorb(self, scale: Tensor, shift: Tensor) -> bool:
        """Scale the rows of the matrix and shift the bias."""
        self.weight, self.bias = scaled(self.weight, scale.view(-1, 1)), shifted(self, scale, shift)
        return True

    def forward(self, z: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """Multiply and add the bias."""
        return F.linear(z, self.weight, self.bias)


class MapMean(Layer):
    """The mean over the map of every channel, or over a square patch of it.

    Args:
        start: First row and column of the patch, counted from 0.
        stop: One past the last row and column. Default: the whole map.
    """

    options = ("start", "stop")

    def __init__(self, start: int = 0, stop: int | None = None) -> None:
        super().__init__()
        require_whole([start, start + 1 if stop is None else stop], 0, "bounds of a patch")
        self.start = start
        self.stop = stop

    def cut(self, nodes: Tensor) -> MapMean:
        """Return the same mean."""
        return self

    def forward(self, z: Float[Tensor, "batch nodes height width"]) -> Float[Tensor, "batch nodes"]:
        """Average."""
        if self.stop is not None and min(z.shape[2:]) < self.stop:
            raise InputError(
                f"the read-out needs maps of {self.stop} × {self.stop} or more; got {list(z.shape)}: give larger images"
            )
        return z[:, :, self.start : self.stop, self.start : self.stop].mean(dim=(2, 3))


def require_whole(numbers: object, least: int, what: str) -> None:
    """Raise an InputError unless all numbers are integers >= ``least``."""
    given = list(numbers) if isinstance(numbers, list | tuple) else [numbers]
    fits = all(isinstance(number, int) and not isinstance(number, bool) and number >= least for number in given)
    require(fits, f"{what} must be integers >= {least}; got {reprlib.repr(numbers)}")


def require(condition: bool, message: str) -> None:
    """Raise an InputError unless the condition holds."""
    if not condition:
        raise InputError(message)

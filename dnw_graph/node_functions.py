"""Node functions f_θ, which compute the state of a node from its input."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dnw_graph._compat import has_hooks
from dnw_graph.arguments import checked, fits, require, wrong
from dnw_graph.errors import InputError, unknown_name
from dnw_graph.ops.node_function import computes_as_usual, fused_node_function, fusible, keeps_forward

EPS = 1e-5
NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "instance": lambda num_nodes, eps: nn.InstanceNorm2d(num_nodes, eps, affine=True),
}


@checked
def make_norm(norm: str, num_nodes: int, eps: float = EPS) -> nn.Module:
    """Return a normalisation with a scale and a shift per node.

    Args:
        norm: ``"batch"`` (Ioffe & Szegedy 2015) or ``"instance"`` (Ulyanov et al. 2016).
        num_nodes: Number of nodes.
        eps: Added to the variance.

    Raises:
        InputError: If the name is unknown, or eps is not above 0.
    """
    if norm not in NORMS:
        raise unknown_name("norm", norm, NORMS)
    require(eps > 0, "eps of a norm", "above 0", eps)
    require(num_nodes >= 1, "num_nodes", "an integer >= 1", num_nodes)
    return NORMS[norm](num_nodes, eps)


@fusible
class NodeConv(nn.Conv2d):
    """A single-channel convolution for every node, without bias.

    Args:
        num_nodes: Number of nodes.
        kernel_size: Odd size, padded so that stride 1 keeps the resolution.
        stride: Stride.

    Shapes:
        - input: ``[batch, nodes, height, width]``
        - output: ``[batch, nodes, ⌈height / stride⌉, ⌈width / stride⌉]``
    """

    @checked
    def __init__(self, num_nodes: int, kernel_size: int, stride: int = 1) -> None:
        for name, number in (("num_nodes", num_nodes), ("kernel_size", kernel_size), ("stride", stride)):
            require(number >= 1, name, "an integer >= 1", number)
        require(kernel_size % 2 == 1, "kernel_size", "odd, so that stride 1 keeps the resolution", kernel_size)
        super().__init__(num_nodes, num_nodes, kernel_size, stride, kernel_size // 2, groups=num_nodes, bias=False)

    @property
    def node_wise(self) -> bool:
        """Whether it can be applied to some nodes only: true if it was not modified."""
        own = self.groups == self.in_channels == self.out_channels and self.bias is None
        return own and self.dilation == (1, 1) and self.padding_mode == "zeros" and keeps_forward(self)

    def forward(
        self, z: Float[Tensor, "batch nodes height width"], nodes: range | None = None
    ) -> Float[Tensor, "batch nodes h w"]:
        """Convolve the maps of all nodes, or of the given ones."""
        if nodes is None:
            return super().forward(z)
        weight = self.weight[nodes.start : nodes.stop]
        return F.conv2d(z, weight, None, self.stride, self.padding, groups=len(nodes))


class NormReluConv(nn.Module):
    """Normalisation → ReLU → single-channel convolution: the paper's node function (Section 2.4).

    Args:
        num_nodes: Number of nodes; each has its own parameters.
        stride: Stride of the convolution.
        norm: ``"batch"`` or ``"instance"``.
        kernel_size: Odd size of the convolution, padded so that stride 1 keeps the resolution.
        eps: Added to the variance by the norm. The map of a node without input edges is constant, so its gradient is
            scaled by 1 / √eps.

    Shapes:
        - input: ``[batch, num_nodes, height, width]``
        - output: ``[batch, num_nodes, ⌈height / stride⌉, ⌈width / stride⌉]``

    Raises:
        InputError: If the norm is unknown, the kernel size is even, eps is not above 0, or the input has another number
            of nodes.
    """

    @checked
    def __init__(
        self, num_nodes: int, stride: int = 1, norm: str = "batch", kernel_size: int = 3, eps: float = EPS
    ) -> None:
        super().__init__()
        self.num_nodes = num_nodes
        self.norm = make_norm(norm, num_nodes, eps)
        self.conv = NodeConv(num_nodes, kernel_size, stride)

    @property
    def node_wise(self) -> bool:
        """Whether the function can be applied to some nodes only; not if ``forward`` or ``send`` is overridden."""
        parts = _node_wise(self.norm) and isinstance(self.conv, NodeConv) and self.conv.node_wise
        return parts and _keeps_methods(self)

    def forward(
        self, z: Float[Tensor, "batch nodes height width"], nodes: range | None = None
    ) -> Float[Tensor, "batch nodes h w"]:
        """Apply f_θ to the input of every node, or of the given ones if ``node_wise``."""
        conv = self.conv
        self._check(z, nodes, conv)
        return self._compute(z, self.norm, True, conv, nodes)

    def _check(self, z: object, nodes: range | None, conv: nn.Conv2d) -> None:
        """Refuse inputs that convolution and norm would refuse less clearly, or misinterpret."""
        weight = conv.weight
        count, known = self.num_nodes, True
        if nodes is not None:
            count, known = len(nodes), nodes.start >= 0 and nodes.stop <= count
        if (
            not (known and fits(z, weight))
            or len(shape := z.shape) != 4
            or shape[1] != count
            or not shape[2] * shape[3]
        ):
            kind = str(weight.dtype).removeprefix("torch.")
            raise wrong(
                f"the input of this {type(self).__name__} for {self.num_nodes} nodes",
                f"a tensor of {kind} [batch, {count}, height, width] on {weight.device} (a graph whose groups of nodes "
                "differ in size takes a name or a factory (num_nodes, stride) -> module)",
                z,
            )

    def _compute(
        self, z: Tensor, norm: nn.Module | None, relu: bool, conv: nn.Conv2d | None, nodes: range | None
    ) -> Tensor:
        """Apply norm, ReLU and convolution, each optional, to the maps of all nodes or of the given ones."""
        if nodes is not None:
            self._check_parts(norm, conv)
        fused = fused_node_function(z, norm, relu, conv, nodes)
        if fused is not None:
            return fused
        if norm is not None:
            z = _normalise(norm, z, nodes)
        if relu:
            z = F.relu(z, inplace=norm is not None and computes_as_usual(norm))
        if conv is None:
            return z
        return conv(z) if nodes is None else conv(z, nodes)

    def _check_parts(self, norm: nn.Module | None, conv: nn.Conv2d | None) -> None:
        """Refuse parts that cannot be applied to some nodes."""
        if norm is not None and not _node_wise(norm):
            raise InputError(f"only a plain instance norm can be applied to some nodes; got {type(norm).__name__}")
        if conv is not None and not (isinstance(conv, NodeConv) and conv.node_wise):
            raise InputError(f"only an unmodified NodeConv can be applied to some nodes; got {conv!r}")
        for part in filter(None, (norm, conv)):
            counts = [getattr(part, "num_features", self.num_nodes), *map(len, part.parameters())]
            if set(counts) != {self.num_nodes}:
                raise InputError(
                    f"the {type(part).__name__} of this node function is not for its {self.num_nodes} nodes"
                )


class NormReluConvNormRelu(NormReluConv):
    """Normalisation → ReLU → single-channel convolution → normalisation → ReLU.

    With this node function and complete bipartite edges between adjacent blocks a static graph is MobileNetV1, weight
    for weight. Arguments, shapes and errors as for :class:`NormReluConv`.
    """

    @checked
    def __init__(
        self, num_nodes: int, stride: int = 1, norm: str = "batch", kernel_size: int = 3, eps: float = EPS
    ) -> None:
        super().__init__(num_nodes, stride, norm, kernel_size, eps)
        self.norm2 = make_norm(norm, num_nodes, eps)

    @property
    def node_wise(self) -> bool:
        """Whether the function can be applied to some nodes only; not if ``forward`` or ``send`` is overridden."""
        return super().node_wise and _node_wise(self.norm2)

    def forward(
        self, z: Float[Tensor, "batch nodes height width"], nodes: range | None = None
    ) -> Float[Tensor, "batch nodes h w"]:
        """Apply f_θ to the input of every node, or of the given ones if ``node_wise``."""
        return self._compute(super().forward(z, nodes), self.norm2, True, None, nodes)


class ReluConvSendNorm(NormReluConv):
    """ReLU → single-channel convolution before states are sent along edges, normalisation of the received sums.

    The order of the paper's tiny discrete-time classifier: one step is Z ← norm(A conv(relu(Z))), so that the input
    nodes start without a norm and the output nodes end with one. A dynamics calls :meth:`send` on the states,
    propagates the result, and calls the module on the products. Arguments, shapes and errors as for
    :class:`NormReluConv`.
    """

    def send(
        self, z: Float[Tensor, "batch nodes height width"], nodes: range | None = None
    ) -> Float[Tensor, "batch nodes h w"]:
        """Return the values that all nodes, or the given ones, send; zero for a state of zero."""
        conv = self.conv
        self._check(z, nodes, conv)
        return self._compute(z, None, True, conv, nodes)

    def forward(
        self, z: Float[Tensor, "batch nodes height width"], nodes: range | None = None
    ) -> Float[Tensor, "batch nodes height width"]:
        """Return the states from the inputs of all nodes, or of the given ones if ``node_wise``."""
        self._check(z, nodes, self.conv)
        return self._compute(z, self.norm, False, None, nodes)

    @property
    def passes_on(self) -> bool:
        """Whether :meth:`pass_on` is the same as both methods: neither is overridden, replaced or has hooks."""
        return _keeps_methods(self) and not has_hooks(self)

    def pass_on(self, z: Float[Tensor, "batch nodes height width"]) -> Float[Tensor, "batch nodes h w"]:
        """Return what all nodes send next, ``send(forward(z))``, without their states in between."""
        conv = self.conv
        self._check(z, None, conv)
        return self._compute(z, self.norm, True, conv, None)


_METHODS = tuple(
    (kind.forward, getattr(kind, "send", None)) for kind in (NormReluConv, NormReluConvNormRelu, ReluConvSendNorm)
)


def _keeps_methods(function: NormReluConv) -> bool:
    """Return whether ``forward`` and ``send`` are those of one class of this module, and of this object."""
    bound = [getattr(function, name, None) for name in ("forward", "send")]
    forward, send = (getattr(each, "__func__", None) for each in bound)
    own = all(each is None or getattr(each, "__self__", None) is function for each in bound)
    return own and any(forward is each and send is other for each, other in _METHODS)


class Biased(nn.Module):
    """A bias per node, then an activation.

    Args:
        bias: Bias per node, or None.
        activation: The activation.

    Shapes:
        - input and output: ``[batch, nodes]``
    """

    @checked
    def __init__(self, bias: Tensor | None, activation: nn.Module) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.activation = activation

    def forward(self, z: Float[Tensor, "batch nodes"]) -> Float[Tensor, "batch nodes"]:
        """Add the bias and apply the activation."""
        return self.activation(z if self.bias is None else z + self.bias)


class Blockwise(nn.Module):
    """A separate module for each block of nodes, combined in one module over all nodes.

    Args:
        functions: One module per block.
        sizes: Number of nodes of each block.

    Shapes:
        - input and output: ``[batch, nodes, *space]``

    Raises:
        InputError: If there is not one size per function.
    """

    @checked
    def __init__(self, functions: list[nn.Module], sizes: list[int]) -> None:
        super().__init__()
        possible = len(sizes) == len(functions) and all(size >= 0 for size in sizes)
        require(possible, "sizes", f"{len(functions)} numbers of nodes, one per function", sizes)
        self.functions = nn.ModuleList(functions)
        self.sizes = sizes

    def forward(self, z: Float[Tensor, "batch nodes *space"]) -> Float[Tensor, "batch nodes *space2"]:
        """Apply each function to its own block."""
        parts = z.split(self.sizes, dim=1)
        return torch.cat([function(part) for function, part in zip(self.functions, parts, strict=True)], dim=1)


def _node_wise(norm: nn.Module) -> bool:
    """Return whether a norm treats every node separately."""
    return isinstance(norm, nn.InstanceNorm2d) and not norm.track_running_stats and keeps_forward(norm)


def _refuse_single_values(norm: nn.Module, z: Tensor) -> None:
    """Refuse maps of one pixel if a norm would have one value per node."""
    if isinstance(norm, nn.InstanceNorm2d):
        cause = "give maps of more than one pixel"
    elif isinstance(norm, nn.BatchNorm2d) and norm.training and len(z) == 1:
        cause = "in training, give more images or maps of more than one pixel"
    else:
        return
    raise InputError(f"a {type(norm).__name__} has one value per node in maps {list(z.shape)}: {cause}")


def _normalise(norm: nn.Module, z: Tensor, nodes: range | None) -> Tensor:
    if z.size(2) * z.size(3) == 1:
        _refuse_single_values(norm, z)
    if nodes is None:
        return norm(z)
    assert isinstance(norm, nn.InstanceNorm2d)
    if has_hooks(norm):  # Hooks get the maps of all nodes.
        z = F.pad(z, (0, 0, 0, 0, nodes.start, norm.num_features - nodes.stop))
        return norm(z)[:, nodes.start : nodes.stop]
    weight, bias = (None if each is None else each[nodes.start : nodes.stop] for each in (norm.weight, norm.bias))
    return F.instance_norm(z, weight=weight, bias=bias, eps=norm.eps)


NodeFunction = str | nn.Module | Callable[..., nn.Module]
"""A name, a module, or a factory ``(num_nodes, stride=1) -> module``, such as a module class."""

NODE_FUNCTIONS: dict[str, Callable[..., nn.Module]] = {
    "norm_relu_conv": NormReluConv,
    "norm_relu_conv_norm_relu": NormReluConvNormRelu,
    "relu_conv_send_norm": ReluConvSendNorm,
}

NODELESS = ("torch.nn.modules.activation", "torch.nn.modules.dropout")
"""Modules whose classes take no number of nodes; ``nn.PReLU`` does."""


@checked
def make_node_function(node_function: NodeFunction, num_nodes: int, stride: int = 1) -> nn.Module:
    """Return the module that applies f_θ to a group of nodes.

    Args:
        node_function: A name; a factory, called as ``factory(num_nodes)``, or ``factory(num_nodes, stride=stride)``
            where a stride is needed; or a module, which all groups of nodes then share. PyTorch's activation and
            dropout classes, except ``nn.PReLU``, are called without arguments.
        num_nodes: Number of nodes of the group.
        stride: Stride that the module must have.

    Raises:
        InputError: If the name is unknown, a module instance cannot have the stride or is for another number of nodes,
            or a factory fails or returns no module.
    """
    if isinstance(node_function, str):
        if node_function not in NODE_FUNCTIONS:
            raise unknown_name("node function", node_function, NODE_FUNCTIONS)
        node_function = NODE_FUNCTIONS[node_function]
    if isinstance(node_function, nn.Module):
        if stride != 1:
            raise InputError(
                f"stride {stride} cannot be given to a module instance; "
                "pass a factory (num_nodes, stride) -> module as node_function"
            )
        if isinstance(node_function, NormReluConv) and node_function.num_nodes != num_nodes:
            raise InputError(
                f"the node function is for {node_function.num_nodes} nodes, a group of the graph has {num_nodes}; "
                "pass its name, or a factory (num_nodes, stride) -> module, for groups of several sizes"
            )
        return node_function
    # The first argument of activations is something else: nn.LeakyReLU(num_nodes) would have a slope of num_nodes.
    nodeless = isinstance(node_function, type) and node_function.__module__ in NODELESS and node_function != nn.PReLU
    try:
        module = node_function(*([] if nodeless else [num_nodes]), **({} if stride == 1 else {"stride": stride}))
    except (TypeError, AttributeError) as error:
        raise InputError(
            f"node_function must be a name, a module, or a factory (num_nodes, stride=1) -> module; {node_function!r} "
            f"failed for {num_nodes} nodes, stride {stride}: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(module, nn.Module):
        raise InputError(f"the node_function factory must return an nn.Module; it returned {type(module)}")
    return module

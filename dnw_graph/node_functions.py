"""Node functions f_θ: what a node does with its input."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from dnw_graph.errors import InputError, unknown_name

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "instance": lambda num_nodes: nn.InstanceNorm2d(num_nodes, affine=True),
}


def make_norm(norm: str, num_nodes: int) -> nn.Module:
    """Return a normalisation with a scale and a shift per node.

    Args:
        norm: ``"batch"`` (Ioffe & Szegedy 2015) or ``"instance"`` (Ulyanov et al. 2016).
        num_nodes: Number of nodes.

    Raises:
        InputError: If the name is unknown.
    """
    if norm not in NORMS:
        raise unknown_name("norm", norm, NORMS)
    return NORMS[norm](num_nodes)


class NormReluConv(nn.Module):
    """Normalisation → ReLU → single-channel convolution: the paper's node function (Section 2.4).

    Args:
        num_nodes: Number of nodes; each has its own parameters.
        stride: Stride of the convolution.
        norm: ``"batch"`` or ``"instance"``.
        kernel_size: Odd size of the convolution, padded so that stride 1 keeps the resolution.

    Shapes:
        - input: ``[batch, num_nodes, height, width]``
        - output: ``[batch, num_nodes, ⌈height / stride⌉, ⌈width / stride⌉]``

    Raises:
        InputError: If the norm is unknown or the kernel size even.
    """

    def __init__(self, num_nodes: int, stride: int = 1, norm: str = "batch", kernel_size: int = 3) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise InputError(f"kernel_size must be odd, so that stride 1 keeps the resolution; got {kernel_size}")
        self.norm = make_norm(norm, num_nodes)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(num_nodes, num_nodes, kernel_size, stride, kernel_size // 2, groups=num_nodes, bias=False)

    def forward(self, z: Float[Tensor, "batch nodes height width"]) -> Float[Tensor, "batch nodes h w"]:
        """Apply f_θ to the input of every node."""
        return self.conv(self.relu(self.norm(z)))


class NormReluConvNormRelu(NormReluConv):
    """Normalisation → ReLU → single-channel convolution → normalisation → ReLU.

    With this node function and complete bipartite edges between adjacent blocks a static graph is MobileNetV1, weight
    for weight. Arguments, shapes and errors as for :class:`NormReluConv`.
    """

    def __init__(self, num_nodes: int, stride: int = 1, norm: str = "batch", kernel_size: int = 3) -> None:
        super().__init__(num_nodes, stride, norm, kernel_size)
        self.norm2 = make_norm(norm, num_nodes)

    def forward(self, z: Float[Tensor, "batch nodes height width"]) -> Float[Tensor, "batch nodes h w"]:
        """Apply f_θ to the input of every node."""
        return self.relu(self.norm2(super().forward(z)))


NodeFunction = str | nn.Module | Callable[..., nn.Module]
"""A name, a module applied as it is, or a factory ``(num_nodes, stride=1) -> module``, such as a module class."""

NODE_FUNCTIONS: dict[str, Callable[..., nn.Module]] = {
    "norm_relu_conv": NormReluConv,
    "norm_relu_conv_norm_relu": NormReluConvNormRelu,
}


def make_node_function(node_function: NodeFunction, num_nodes: int, stride: int = 1) -> nn.Module:
    """Return the module that applies f_θ to a group of nodes.

    Args:
        node_function: A name; a factory, called as ``factory(num_nodes)``, or ``factory(num_nodes, stride=stride)``
            where a stride is asked for; or a module, which every group of nodes then shares.
        num_nodes: Number of nodes of the group.
        stride: Stride that the module must have.

    Raises:
        InputError: If the name is unknown, or a stride is asked of a ready module.
    """
    if isinstance(node_function, str):
        if node_function not in NODE_FUNCTIONS:
            raise unknown_name("node function", node_function, NODE_FUNCTIONS)
        node_function = NODE_FUNCTIONS[node_function]
    if isinstance(node_function, nn.Module):
        if stride != 1:
            raise InputError(
                f"stride {stride} cannot be given to a ready module; "
                "pass a factory (num_nodes, stride) -> module as node_function"
            )
        return node_function
    module = node_function(num_nodes) if stride == 1 else node_function(num_nodes, stride=stride)
    if not isinstance(module, nn.Module):
        raise InputError(f"the node_function factory must return an nn.Module; it returned {type(module)}")
    return module

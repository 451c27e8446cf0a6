"""Sparse products, sparse layers and fused node steps as registered PyTorch operators, with compiled CPU kernels.

The operators take ordinary tensors, so that modules which use them work with ``torch.compile``, ``torch.export`` and
safetensors. On the CPU they call a small C++ library that is compiled on first use; see :mod:`dnw_graph.ops.build`.
"""

from dnw_graph.ops.csr import sparse_product
from dnw_graph.ops.layer import sparse_conv2d, sparse_linear
from dnw_graph.ops.whole_graph import static_graph

__all__ = ["sparse_conv2d", "sparse_linear", "sparse_product", "static_graph"]

"""What makes the host wait for a device, seen without one."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """Collects the operations whose result, or its shape, the host needs before it can go on."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        if func is torch.ops.aten.index.Tensor:  # dynamic only with masks
            tags = [index for index in args[1] if index is not None and index.dtype == torch.bool]
        if tags:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))

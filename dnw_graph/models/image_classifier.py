"""The base of image models that apply modules in sequence."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dnw_graph.arguments import fits, refuse_replica, wrong
from dnw_graph.ops.layout import transformed


class ImageClassifier(nn.Module):
    """A model that applies modules to images in sequence.

    A subclass defines its modules and :meth:`modules_in_order`, from which ``cost`` and ``compact`` take the sequence,
    unless the subclass overrides ``forward``.

    Attributes:
        memory_format: Memory format to which images are converted.
        smallest: Smallest height and width of images.

    Shapes:
        - input: ``[batch, 3, height, width]``
        - output: logits ``[batch, num_classes]``
    """

    memory_format: ClassVar[torch.memory_format] = torch.preserve_format
    smallest: ClassVar[int] = 1

    def modules_in_order(self) -> list[nn.Module]:
        """Return the modules in the order in which they are applied."""
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits.

        Raises:
            InputError: If x is not a tensor ``[batch, 3, height, width]`` with the dtype and device of the parameters,
                or an image is too small.
        """
        self._check_images(x)
        if not transformed():  # Within torch.func.vmap no memory format can be requested.
            x = x.to(memory_format=self.memory_format)
        for module in self.modules_in_order():
            x = module(x)
        return x

    def _check_images(self, x: object) -> None:
        refuse_replica(self)
        weight = next(self.parameters())
        if not fits(x, weight) or x.dim() != 4 or x.size(1) != 3 or min(x.shape[2:]) < self.smallest:
            kind = str(weight.dtype).removeprefix("torch.")
            size = f", {self.smallest} × {self.smallest} or more," if self.smallest > 1 else ""
            expected = f"a tensor of {kind} [batch, 3, height, width]{size} on {weight.device}"
            raise wrong(f"the input of {type(self).__name__}", expected, x)

"""Sparse weights that are read outside of a forward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dnw_graph._compat import as_plain_tensors, tree_leaves, version
from dnw_graph.errors import InputError

_Type: Any = Tensor
# Attributes of a parameter, not of values computed from it.
_OF_THE_PARAMETER = {
    _Type.grad.__get__,
    _Type.grad.__set__,
    _Type.requires_grad.__set__,
    _Type.requires_grad_,
    _Type.retain_grad,
    _Type.register_hook,
    _Type.register_post_accumulate_grad_hook,
}


class ReadWeight(Tensor):
    """The values of a sparse weight, computed from its candidates; writes would be lost and are refused.

    Its gradient, its hooks and ``requires_grad`` are those of the candidates. Views refuse writes too; other operations
    return plain tensors.
    """

    _candidates: Tensor | None = None
    _name: str

    @classmethod
    def of(cls, values: Tensor, name: str, candidates: Tensor | None = None) -> ReadWeight:
        """Wrap values, whose memory the new tensor shares.

        Args:
            values: The values.
            name: Name of the weight.
            candidates: The parameter, if the values are all of it.
        """
        read = values.as_subclass(cls)
        read._name, read._candidates = name, candidates
        return read

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call an operator on plain tensors."""
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func in _OF_THE_PARAMETER and isinstance(first, cls) and first._candidates is not None:
            return func(first._candidates, *args[1:], **kwargs)
        read = [each for each in tree_leaves((args, kwargs)) if isinstance(each, cls)]
        if func == _Type.data.__set__ and isinstance(first, cls):
            raise first._lost()
        with as_plain_tensors():
            before = [version(each) for each in read]
            out = func(*args, **kwargs)
            for each, number in zip(read, before, strict=True):
                if version(each) != number:
                    raise each._lost()
            if type(out) in (tuple, list):
                return type(out)(_view(each, read) for each in out)
            return _view(out, read)

    def _lost(self) -> InputError:
        return InputError(
            f"{self._name} is sparse, and writing to the values read from it is lost: densify(…) the model first, "
            f"assign a new weight, or write to {name_of_candidates(self._name)}"
        )

    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        """Refuse ``nn.Parameter(…)``, whose updates would be lost."""
        raise InputError(
            f"{self._name} is sparse, and a parameter cannot share the memory of the values read from it: give "
            "nn.Parameter a clone() of them"
        )

    def __deepcopy__(self, memo: Any) -> Tensor:
        with as_plain_tensors():
            return copy.deepcopy(plain(self), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as a plain tensor."""
        with as_plain_tensors():
            return plain(self).__reduce_ex__(protocol)


def name_of_candidates(name: str) -> str:
    """Return the name of the parameter that holds the candidates of a sparse weight."""
    layer, dot, parameter = name.rpartition(".")
    return f"{layer}{dot}parametrizations.{parameter}.original"


def plain(values: Tensor) -> Tensor:
    """Return the same values as a plain tensor, to which writing is not refused."""
    with as_plain_tensors():
        return values.as_subclass(Tensor)


def _view(out: Any, read: Sequence[ReadWeight]) -> Any:
    """Wrap results that share memory with the values read."""
    if not isinstance(out, Tensor) or out.layout != torch.strided:
        return out
    place = out.untyped_storage().data_ptr()
    source = next((each for each in read if each.untyped_storage().data_ptr() == place), None)
    return out if source is None or isinstance(out, ReadWeight) else ReadWeight.of(out, source._name)

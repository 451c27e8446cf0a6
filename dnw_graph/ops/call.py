"""Calls the compiled kernels; every tensor is checked before its address is passed."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dnw_graph.ops.build import kernels
from dnw_graph.ops.operands import wrong_edges
from dnw_graph.ops.signatures import SIGNATURES, TYPES, Expected

_WRONG_EDGES = 1  # A kernel's status for an index out of range.
Number = int | float | Sequence[int]
Given = Tensor | Sequence[Tensor] | None


def run(name: str, numbers: Sequence[Number], *tensors: Given) -> bool:
    """Call a kernel with as many threads as PyTorch uses.

    Args:
        name: Name of the kernel without its types.
        numbers: Its numbers.
        tensors: Its tensors, inputs and outputs.

    Returns:
        Whether it was called. If not, PyTorch's operations must be used: there are no kernels, or the kernel does not
        support one of the tensors.

    Raises:
        InputError: If the kernel finds an index out of range.
    """
    kernel = bind(name, numbers, *tensors)
    if kernel is None:
        return False
    kernel({}, {})
    return True


class Bound:
    """A kernel with numbers and tensors that fit; made by :func:`bind`."""

    def __init__(self, name: str, function: Any, numbers: Sequence[Any], addresses: Sequence[Any]) -> None:
        self._name = name
        self._function = function
        self._numbers = numbers
        self._addresses = addresses

    def __call__(self, numbers: Mapping[int, int], addresses: Mapping[int, int]) -> None:
        """Call the kernel with as many threads as PyTorch uses.

        Args:
            numbers: Integers to use in place of those bound, by their index.
            addresses: Addresses in place of those bound, by their index; what lies there must fit as well.

        Raises:
            InputError: If the kernel finds an index out of range.
        """
        given = [*self._numbers, *self._addresses]
        for index, number in numbers.items():
            given[index] = ctypes.c_int64(number)
        for index, address in addresses.items():
            given[len(self._numbers) + index] = ctypes.c_void_p(address)
        status = self._function(ctypes.c_int64(torch.get_num_threads()), *given)
        if status == _WRONG_EDGES:
            raise wrong_edges()
        if status:
            raise MemoryError(f"not enough memory for {self._name}")


def bind(name: str, numbers: Sequence[Number], *tensors: Given) -> Bound | None:
    """Return a kernel bound to numbers and tensors, to be called later, or None where :func:`run` returns False.

    The tensors must outlive it, in the same place of memory.
    """
    library = kernels()
    bound = None if library is None else _bind(name, numbers, tensors)
    if bound is None:
        return None
    symbol, addresses = bound
    return Bound(name, getattr(library, symbol), _as_c(numbers), addresses)


def readable(tensor: Tensor) -> bool:
    """Return whether a tensor's values can be read directly from this machine's memory."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)  # A subclass may keep them elsewhere.
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not tensor.is_nested  # It has no sizes, although its layout is the strided one.
        and not tensor.is_neg()
    )


def _bind(
    name: str, numbers: Sequence[Number], tensors: Sequence[Given]
) -> tuple[str, list[ctypes.c_void_p | ctypes.Array]] | None:
    """Return the kernel for the tensors' dtypes and their addresses, or None if it does not support one of them."""
    signature, kinds = SIGNATURES[name]
    types: dict[str, torch.dtype] = {}
    addresses: list[ctypes.c_void_p | ctypes.Array] = []
    for expected, given in zip(signature(*numbers), tensors, strict=True):
        if isinstance(expected, Expected):
            assert given is None or isinstance(given, Tensor)
            found = [_address(given, expected, types)]
        else:
            assert isinstance(given, Sequence)
            found = [_address(*pair, types) for pair in zip(given, expected, strict=True)]
        if None in found:
            return None
        single = isinstance(expected, Expected)
        addresses.append(ctypes.c_void_p(found[0]) if single else (ctypes.c_void_p * len(found))(*found))
    return "_".join([name, *(TYPES[kind][types[kind]] for kind in kinds)]), addresses


def _address(tensor: Tensor | None, expected: Expected, types: dict[str, torch.dtype]) -> int | None:
    """Return the address of a tensor, 0 if it is absent, or None if it is not as expected."""
    if tensor is None:
        return 0 if expected.optional else None
    if (
        tensor.dtype not in TYPES[expected.kind]
        or types.setdefault(expected.kind, tensor.dtype) != tensor.dtype
        or tensor.shape != expected.shape
        or not readable(tensor)
        or not tensor.is_contiguous()
    ):
        return None
    address = tensor.data_ptr()
    return address if address or not tensor.numel() else None  # None if its storage has been freed.


def _as_c(numbers: Sequence[Number]) -> list[ctypes.c_int64 | ctypes.c_double | ctypes.Array]:
    """Convert numbers to C types, a sequence to its length and its address."""
    arguments: list[ctypes.c_int64 | ctypes.c_double | ctypes.Array] = []
    for number in numbers:
        if isinstance(number, int):
            arguments.append(ctypes.c_int64(number))
        elif isinstance(number, float):
            arguments.append(ctypes.c_double(number))
        else:
            arguments += [ctypes.c_int64(len(number)), (ctypes.c_int64 * len(number))(*number)]
    return arguments

"""Checks the types of arguments of public functions against their type hints."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import math
import numbers
import operator
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Literal, TypeGuard, TypeVar, Union

import numpy as np
import torch
from jaxtyping import AbstractArray, jaxtyped
from torch import Tensor, nn

from dnw_graph._compat import is_replica
from dnw_graph.errors import InputError, unknown_name

F = TypeVar("F", bound=Callable[..., Any])

_LONGEST = 80
# No size, count, step or seed can be larger.
_LARGEST = 2**63 - 1


class _MismatchError(Exception):
    """A value does not have the type of its hint."""


def checked(function: F) -> F:
    """Make a function or an ``__init__`` refuse arguments that do not match its type hints.

    The hints are read at the first call. They mean:

    - ``int``: an integer of 64 bits, also NumPy's (anything with ``__index__``); not a bool or a float;
    - ``float``: a finite number, also NumPy's; not a bool;
    - ``bool``: True or False, also NumPy's;
    - ``Sequence``, ``Iterable``, ``Mapping``, ``tuple``: every item is checked; a NumPy vector is accepted, a string is
      not;
    - jaxtyping arrays: dtype and shape;
    - classes, unions, ``Literal``, ``Callable``, ``type[…]``: as usual. Any other hint accepts everything.

    Values are converted to the hint's type: a NumPy integer to an ``int``, 1 to a ``float``.

    Args:
        function: The function.

    Raises:
        InputError: At a call; one line names the argument, what was expected and what was given. For an unknown
            argument it names similar ones.
    """
    hints: dict[str, Any] = {}
    signature: inspect.Signature | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal hints, signature
        if torch.compiler.is_compiling():  # The compiler traces into calls and cannot trace ``inspect``.
            return function(*args, **kwargs)
        if signature is None:
            hints, signature = _hints(function), inspect.signature(function)
        where = function.__qualname__.rpartition("<locals>.")[2].removesuffix(".__init__")
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            if unknown := kwargs.keys() - signature.parameters.keys():  # The function has no ``**kwargs``.
                known = [name for name in signature.parameters if name != "self"]
                raise _unknown_argument(where, sorted(unknown)[0], known) from None
            return function(*args, **kwargs)  # Python's own error says what is missing.
        for name, value in bound.arguments.items():
            if name in hints:
                bound.arguments[name] = check(f"{where}: {name}", value, hints[name])
        return function(*bound.args, **bound.kwargs)

    return typing.cast(F, call)


def _unknown_argument(where: str, name: str, known: list[str]) -> InputError:
    if name == "sparsity" and "density" in known:
        return InputError(f"{where} takes density, the share of weights to keep, not sparsity: give 1 - sparsity")
    return unknown_name(f"argument of {where}", name, known)


def check_fields(instance: Any, label: Callable[[str], str] = "{}".format) -> None:
    """Check and convert the fields of a dataclass, in its ``__post_init__``, as :func:`checked` does arguments.

    Args:
        instance: The dataclass.
        label: Returns the name of a field for messages.

    Raises:
        InputError: If a value does not have the type of its field.
    """
    hints = typing.get_type_hints(type(instance))
    for field in fields(instance):
        value = check(label(field.name), getattr(instance, field.name), hints[field.name])
        object.__setattr__(instance, field.name, value)


def check(what: str, value: object, hint: Any) -> Any:
    """Return a value converted to the type of a hint, see :func:`checked`.

    Args:
        what: What the value is, for the message.
        value: What was given.
        hint: The type.

    Raises:
        InputError: If it has another type.
    """
    if torch.compiler.is_compiling():  # As in ``checked``.
        return value
    try:
        return _convert(value, hint)
    except _MismatchError:
        raise wrong(what, _expected(hint), value) from None


def require(holds: bool, what: str, expected: str, value: object) -> None:
    """Refuse a value that is out of range.

    Args:
        holds: Whether it is in range.
        what: What the value is.
        expected: What it must be.
        value: What was given.

    Raises:
        InputError: If not.
    """
    if not holds:
        raise wrong(what, expected, value)


def fits(x: object, like: Tensor) -> TypeGuard[Tensor]:
    """Return whether ``x`` is a tensor on a parameter's device, with its dtype or one that autocast converts.

    Cheap and traceable, for forward passes.
    """
    if not isinstance(x, Tensor) or x.device != like.device:
        return False
    if x.dtype == like.dtype:
        return True
    if not x.is_floating_point() or torch.float64 in (x.dtype, like.dtype):  # Autocast leaves double precision alone.
        return False
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def refuse_replica(module: nn.Module) -> None:
    """Refuse a forward pass of a module that ``nn.DataParallel`` copied to another device.

    Raises:
        InputError: If it is a copy: what rules note in a forward pass would be lost with it.
    """
    if is_replica(module):
        raise InputError(
            f"nn.DataParallel on several devices copies a {type(module).__name__} for every forward pass, and sparse "
            "weights and wirings are not copied with it: use nn.parallel.DistributedDataParallel"
        )


def wrong(what: str, expected: str, value: object) -> InputError:
    """Return the error for a value that is not what was expected."""
    return InputError(f"{what} must be {expected}; got {shown(value)}")


def shown(value: object) -> str:
    """Return a value as text for messages: tensors by type and shape, modules and classes by name, others by repr."""
    if isinstance(value, Tensor | np.ndarray):
        kind = "tensor" if isinstance(value, Tensor) else "NumPy array"
        device = f" on {value.device}" if isinstance(value, Tensor) and not value.is_cpu else ""
        return f"a {kind} of {str(value.dtype).removeprefix('torch.')} {list(value.shape)}{device}"
    if isinstance(value, nn.Module):
        return f"a {type(value).__name__} module"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    try:
        text = " ".join(repr(value).split())
    except Exception:  # A broken repr, or an integer with thousands of digits.
        return f"an object of type {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({type(value).__name__})"


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    plain = inspect.unwrap(function)
    return {
        name: _evaluated(hint, plain.__globals__) for name, hint in plain.__annotations__.items() if name != "return"
    }


def _evaluated(hint: Any, names: dict[str, Any]) -> Any:
    try:
        return eval(hint, names) if isinstance(hint, str) else hint
    except (NameError, AttributeError):  # Imported for type checkers only.
        return Any


def _convert(value: Any, hint: Any) -> Any:
    if hint is Any:
        return value
    if hint is None or hint is type(None):
        return _if(value is None, value)
    if hint in _NUMBERS:
        return _NUMBERS[hint][1](value)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _first(value, arguments)
    if origin is Literal:
        return _if(value in arguments, value)
    if origin is type:
        return _if(isinstance(value, type) and issubclass(value, arguments), value)
    if origin is None and isinstance(hint, type):
        if issubclass(hint, AbstractArray):
            with jaxtyped("context"):  # Names of dimensions do not refer to those of a caller.
                return _if(isinstance(value, hint), value)
        return _if(isinstance(value, hint), value)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping(value, *arguments)
    if isinstance(origin, type) and issubclass(origin, collections.abc.Iterable):
        return _items(value, origin, arguments)
    if isinstance(origin, type):  # Callable[…], PathLike[…]
        return _if(isinstance(value, origin), value)
    return value


def _if(holds: bool, value: Any) -> Any:
    if not holds:
        raise _MismatchError
    return value


def _first(value: Any, hints: tuple[Any, ...]) -> Any:
    for hint in hints:
        try:
            return _convert(value, hint)
        except _MismatchError:
            pass
    raise _MismatchError


def _mapping(value: Any, key_hint: Any, item_hint: Any) -> Any:
    if not isinstance(value, Mapping):
        raise _MismatchError
    pairs = [(key, item, _convert(key, key_hint), _convert(item, item_hint)) for key, item in value.items()]
    changed = any(key is not new_key or item is not new_item for key, item, new_key, new_item in pairs)
    return {new_key: new_item for _, _, new_key, new_item in pairs} if changed else value


def _items(value: Any, origin: type, hints: tuple[Any, ...]) -> Any:
    if isinstance(value, np.ndarray) and value.ndim == 1:
        value = value.tolist()
    if isinstance(value, str | bytes | bytearray | Tensor | nn.Module | type) or not isinstance(value, origin):
        raise _MismatchError
    given = list(typing.cast(collections.abc.Iterable[Any], value))
    if origin is tuple and hints[-1] is not ...:
        if len(given) != len(hints):
            raise _MismatchError
        items = [_convert(item, hint) for item, hint in zip(given, hints, strict=True)]
    else:
        items = [_convert(item, hints[0]) for item in given]
    if isinstance(value, collections.abc.Sequence) and all(map(operator.is_, items, given)):
        return value
    return tuple(items) if isinstance(value, tuple) else items


def _integer(value: Any) -> int:
    if isinstance(value, bool | np.bool_):
        raise _MismatchError
    try:
        number = operator.index(value)
    except (TypeError, RuntimeError):  # For example of a tensor on the meta device.
        raise _MismatchError from None
    return _if(-_LARGEST <= number <= _LARGEST, number)


def _number(value: Any) -> float:
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise _MismatchError
    try:
        number = float(value)
    except OverflowError:
        raise _MismatchError from None
    return _if(math.isfinite(number), number)


def _truth(value: Any) -> bool:
    return bool(_if(isinstance(value, bool | np.bool_), value))


_NUMBERS: dict[Any, tuple[str, Callable[[Any], Any]]] = {
    int: ("an integer", _integer),
    float: ("a finite number", _number),
    bool: ("True or False", _truth),
}


def _expected(hint: Any, plural: bool = False) -> str:
    """Describe a hint in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is None or hint is type(None):
        return "None"
    if hint in _NUMBERS:
        return {int: "integers", float: "finite numbers"}.get(hint, "booleans") if plural else _NUMBERS[hint][0]
    if hint is str:
        return "strings" if plural else "a string"
    if origin in (Union, types.UnionType):
        kinds = dict.fromkeys(_expected(each, plural) for each in arguments if not (each is int and float in arguments))
        *others, last = kinds
        return f"{', '.join(others)} or {last}" if others else last
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is type:
        return f"a subclass of {arguments[0].__name__}"
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return f"a tensor {hint.__name__}"
    if origin is tuple and arguments[-1] is not ...:
        return f"{'pairs' if plural else 'a tuple'} ({', '.join(_expected(each) for each in arguments)})"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"a mapping from {' to '.join(_expected(each, plural=True) for each in arguments)}"
    if origin is collections.abc.Callable or hint in (Callable, typing.Callable):
        return "a callable"
    if isinstance(origin, type) and issubclass(origin, collections.abc.Iterable):
        return f"a sequence of {_expected(arguments[0], plural=True)}"
    name = getattr(origin or hint, "__name__", "object")
    return f"{name} objects" if plural else f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"

"""Checks whether nested content has the same structure as other content."""

from __future__ import annotations

import math
import reprlib
from types import UnionType
from typing import Any

from torch import Tensor

from dnw_graph.errors import InputError


def match(given: Any, like: Any, where: str, *, exact: bool = True) -> None:
    """Refuse content with another structure.

    Args:
        given: The content.
        like: Content with the expected structure: dicts must have the same keys, lists and tuples the same length,
            tensors the same shape and type (or both floating-point), other values the same type. A type matches any
            of its values.
        where: Name of the content in messages.
        exact: Whether further keys in dicts are refused.

    Raises:
        InputError: At the first difference, or the first number that is NaN or infinite.
    """
    if not _same_kind(given, like):
        raise InputError(f"{where} is {_shown(given)}, expected {_shown(like)}")
    if isinstance(given, Tensor) and given.is_floating_point() and not given.isfinite().all():
        raise InputError(f"{where} has values that are NaN or infinite")
    if isinstance(given, float) and not math.isfinite(given):
        raise InputError(f"{where} is {given}")
    if isinstance(like, dict):
        if missing := like.keys() - given.keys():
            raise InputError(f"{where} lacks {_shown(missing)}")
        if exact and (strange := given.keys() - like.keys()):
            raise InputError(f"{where} has unknown {_shown(strange)}")
        for key, value in like.items():
            match(given[key], value, f"{where}.{key}"[-120:], exact=exact)
    elif isinstance(like, list | tuple):
        for number, value in enumerate(like):
            match(given[number], value, f"{where}.{number}"[-120:], exact=exact)


def _same_kind(given: Any, like: Any) -> bool:
    if isinstance(like, type | UnionType):
        return isinstance(given, like) and (like is bool or not isinstance(given, bool))
    if isinstance(like, Tensor):
        same = isinstance(given, Tensor) and given.shape == like.shape
        return same and (given.dtype == like.dtype or (given.is_floating_point() and like.is_floating_point()))
    if isinstance(like, dict):
        return isinstance(given, dict)
    if isinstance(like, list | tuple):
        return type(given) is type(like) and len(given) == len(like)
    return type(given) is type(like) or (type(like) is float and type(given) is int)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {list(value.shape)}"
    if isinstance(value, dict | list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, type):
        return value.__name__
    return reprlib.repr(value)

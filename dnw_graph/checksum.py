"""A checksum of nested content, independent of the file format."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from dnw_graph.errors import InputError


def checksum(content: Any) -> str:
    """Return the BLAKE2b sum of nested dicts, lists and tuples of tensors, numbers, strings, booleans and None.

    It depends on types, names, the order of sequences, and the shape and every bit of a tensor; not on the order of a
    dict or a tensor's device and strides. It detects damage, not forgery: it involves no secret.

    Args:
        content: The content.

    Raises:
        InputError: If it holds anything else.
    """
    digest = hashlib.blake2b(digest_size=16)
    _add(digest, content)
    return digest.hexdigest()


def _add(digest: Any, content: Any) -> None:
    if isinstance(content, Tensor):
        _say(digest, "tensor", f"{content.dtype} {list(content.shape)}")
        digest.update(content.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    elif isinstance(content, dict):
        # A state dict has the versions of its modules as an attribute.
        own = {"": vars(content)} if getattr(content, "__dict__", None) else {}
        _say(digest, "dict", str(len(content) + len(own)))
        keys = sorted(content, key=lambda key: (type(key).__name__, key))
        for key, value in [*((key, content[key]) for key in keys), *own.items()]:
            _add(digest, key)
            _add(digest, value)
    elif isinstance(content, list | tuple):
        _say(digest, "list" if isinstance(content, list) else "tuple", str(len(content)))
        for value in content:
            _add(digest, value)
    elif content is None or type(content) in (bool, int, float, str):
        _say(digest, type(content).__name__, str(content))
    else:
        raise InputError(f"a file can hold tensors, numbers, strings, and lists and dicts of them; got {type(content)}")


def _say(digest: Any, kind: str, text: str) -> None:
    data = text.encode("utf-8", "surrogatepass")
    digest.update(f"{kind} {len(data)} ".encode() + data)

"""Reads files of ``torch.save`` without running code in them or taking more memory than the file's size."""

from __future__ import annotations

import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dnw_graph.errors import InputError

# The only names that plain content may use; ``weights_only`` allows more, such as a bytearray of any size. A counter
# holds the milestones of ``MultiStepLR``.
NAMES = re.compile(r"torch\._utils _rebuild_tensor_v2|collections (OrderedDict|Counter)|torch \w+Storage")


def read_archive(path: Path) -> Any:
    """Return the nested dicts, lists and tuples of tensors and plain values that a file holds, on the CPU.

    Raises:
        Exception: Of any type, if the file is damaged or claims to hold more than it does.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        # torch.save never compresses. A compressed entry may expand a thousandfold.
        if any(each.compress_type != zipfile.ZIP_STORED for each in entries):
            raise InputError("an entry is compressed")
        if sum(each.file_size for each in entries) > size:
            raise InputError("the entries are larger than the file")
        (program,) = (each for each in entries if each.filename.endswith("/data.pkl"))
        for operation, argument, _ in pickletools.genops(archive.read(program)):
            if operation.name == "STACK_GLOBAL" or (operation.name == "GLOBAL" and not NAMES.fullmatch(str(argument))):
                raise InputError(f"the file refers to {argument}")
    # With mmap, a tensor that claims to be larger than the file takes no memory, and reads nothing outside the file.
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return _Copier(size).copied(content)


class _Copier:
    """Copies tensors out of a mapped file, each storage once.

    Args:
        size: Size of the file in bytes, an upper bound for all content.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.visited = self.copied_bytes = 0
        self.storages: dict[tuple[int, int], torch.UntypedStorage] = {}

    def copied(self, content: Any) -> Any:
        """Return the content with copied tensors; dicts and lists are changed in place."""
        self.visited += 1
        if self.visited > self.size:  # For example lists that contain one another a million times.
            raise InputError("the content is larger than the file")
        if isinstance(content, Tensor):
            return self._tensor(content)
        if isinstance(content, dict):
            for key, value in content.items():
                content[key] = self.copied(value)
            if own := getattr(content, "__dict__", None):  # A state dict has the versions of its modules there.
                self.copied(own)
        elif isinstance(content, list):
            content[:] = map(self.copied, content)
        elif isinstance(content, tuple):
            return tuple(map(self.copied, content))
        return content

    def _tensor(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.nbytes > storage.nbytes():
            raise InputError("a tensor is larger than its part of the file")
        place = storage.data_ptr(), storage.nbytes()
        if place not in self.storages:
            self.copied_bytes += storage.nbytes()
            if self.copied_bytes > self.size:
                raise InputError("the tensors are larger than the file")
            self.storages[place] = storage.clone()
        return tensor.new_empty(0).set_(self.storages[place], tensor.storage_offset(), tensor.shape, tensor.stride())

"""Reading what ``torch.save`` wrote, without running anything in it and without more memory than the file takes."""

from __future__ import annotations

import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dnw_graph.errors import InputError

# All that plain content refers to; ``weights_only`` allows more, such as a bytearray of any size.
NAMES = re.compile(r"torch\._utils _rebuild_tensor_v2|collections OrderedDict|torch \w+Storage")


def read_archive(path: Path) -> Any:
    """Return the nested dicts, lists and tuples of tensors and plain values that a file holds, on the CPU.

    Raises:
        Exception: Of any kind, if the file is damaged or claims to hold more than it does.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        # torch.save compresses nothing. What is compressed may be a thousand times as large.
        if any(each.compress_type != zipfile.ZIP_STORED for each in entries):
            raise InputError("an entry is compressed")
        if sum(each.file_size for each in entries) > size:
            raise InputError("the entries are larger than the file")
        (program,) = (each for each in entries if each.filename.endswith("/data.pkl"))
        for operation, argument, _ in pickletools.genops(archive.read(program)):
            if operation.name == "STACK_GLOBAL" or (operation.name == "GLOBAL" and not NAMES.fullmatch(str(argument))):
                raise InputError(f"the file refers to {argument}")
    # Mapped, a tensor that claims to be larger than the file takes no memory, and reads none that is not the file's.
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return _Copier(size).copied(content)


class _Copier:
    """Copies tensors out of a mapped file, each storage once.

    Args:
        size: Size of the file in bytes: no more can be in it, of tensors or of anything else.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.visited = self.copied_bytes = 0
        self.storages: dict[tuple[int, int], torch.UntypedStorage] = {}

    def copied(self, content: Any) -> Any:
        """Return the content; dicts and lists are changed in place."""
        self.visited += 1
        if self.visited > self.size:  # lists that hold one another a million times
            raise InputError("the content is larger than the file")
        if isinstance(content, Tensor):
            return self._tensor(content)
        if isinstance(content, dict):
            for key, value in content.items():
                content[key] = self.copied(value)
            if own := getattr(content, "__dict__", None):  # of a state dict: the versions of its modules
                self.copied(own)
        elif isinstance(content, list):
            content[:] = map(self.copied, content)
        elif isinstance(content, tuple):
            return tuple(map(self.copied, content))
        return content

    def _tensor(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.nbytes > storage.nbytes():
            raise InputError("a tensor is larger than what is in the file of it")
        place = storage.data_ptr(), storage.nbytes()
        if place not in self.storages:
            self.copied_bytes += storage.nbytes()
            if self.copied_bytes > self.size:
                raise InputError("the tensors are larger than the file")
            self.storages[place] = storage.clone()
        return tensor.new_empty(0).set_(self.storages[place], tensor.storage_offset(), tensor.shape, tensor.stride())

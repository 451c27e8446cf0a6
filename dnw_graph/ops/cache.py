"""The cache directory of compiled code. Files that others may have written are not loaded."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_TEMPORARY = "tmp"  # Prefix of the names of temporary directories.


class Cache:
    """``$XDG_CACHE_HOME/dnw_graph`` or ``~/.cache/dnw_graph``, from :func:`open_cache`.

    The name of a file contains its checksum, so that a damaged file is detected before it is loaded.
    """

    def __init__(self, path: Path, directory: int) -> None:
        self._path, self._directory = path, directory

    def find(self, stem: str) -> Path | None:
        """Return the path to load a file from, or None. Damaged and foreign files of that name are removed."""
        for name in sorted(os.listdir(self._directory)):
            if name.startswith(f"{stem}-"):
                if self._checksum(name) == Path(name).stem.removeprefix(f"{stem}-"):
                    return self._place(name)
                with suppress(OSError):
                    os.unlink(name, dir_fd=self._directory)
        return None

    def keep(self, made: Path, stem: str) -> Path:
        """Move a file from a :meth:`workplace` into the cache atomically, and return the path to load it from."""
        source = f"{made.parent.name}/{made.name}"
        file = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)
        try:
            os.fchmod(file, 0o600)
            os.fsync(file)
        finally:
            os.close(file)
        name = f"{stem}-{self._checksum(source)}{made.suffix}"
        os.rename(source, name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        os.fsync(self._directory)
        return self._place(name)

    @contextmanager
    def workplace(self) -> Iterator[Path]:
        """Create a temporary directory, and remove it at the end."""
        with suppress(OSError):  # Some network file systems have no locks.
            fcntl.flock(self._directory, fcntl.LOCK_SH)
        made = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=self._path))
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def clean(self) -> None:
        """Remove files left by killed processes, unless another process is compiling."""
        left = [name for name in os.listdir(self._directory) if name.startswith(_TEMPORARY)]
        if left:
            with suppress(OSError):
                fcntl.flock(self._directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for name in left:
                    shutil.rmtree(name, ignore_errors=True, dir_fd=self._directory)
                fcntl.flock(self._directory, fcntl.LOCK_UN)

    def _checksum(self, name: str) -> str | None:
        """Return the checksum of a file, or None if others could have written it."""
        try:
            # Non-blocking, since opening a pipe without a writer would wait.
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._directory)
        except OSError:
            return None
        with open(file, "rb") as content:
            found = os.fstat(file)
            own = stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and not _open_to_others(found)
            return hashlib.sha256(content.read()).hexdigest()[:16] if own else None

    def _place(self, name: str) -> Path:
        # Through the open directory if the system supports it: its path may lead elsewhere by now.
        directory = Path(f"/proc/self/fd/{self._directory}")
        return (directory if directory.exists() else self._path) / name


@contextmanager
def open_cache() -> Iterator[Cache]:
    """Open the user's cache; create it if necessary.

    Raises:
        OSError: If it cannot be created, or others than the user and root can write to it.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        path = (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "dnw_graph"
    except RuntimeError as error:
        raise OSError("there is no home directory; set XDG_CACHE_HOME to a directory of your own") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(directory).st_uid == os.geteuid():
            with suppress(PermissionError):  # Some file systems have no permissions.
                os.fchmod(directory, 0o700)
        if _open_to_others(os.fstat(directory)):
            raise OSError(f"others can write to {path}; set XDG_CACHE_HOME to a directory of your own")
        cache = Cache(path, directory)
        cache.clean()
        yield cache
    finally:
        os.close(directory)


def _open_to_others(found: os.stat_result) -> bool:
    """Return whether others than the user and root can write to a file or directory."""
    return found.st_uid not in (0, os.geteuid()) or bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))

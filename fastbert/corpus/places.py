"""Folders, local ones and those behind an fsspec URL, in which a file is whole or not there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

from ..storage import naming, write_atomically

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

# Where local files are written before they take their place. Nobody who reads the data looks here.
UNFINISHED = "unfinished"


def filesystem_of(url: str) -> tuple[Any, str]:
    """(the fsspec file system of a path or URL, the path in it). Local paths become absolute ones."""
    from fsspec.core import url_to_fs

    return url_to_fs(os.path.expanduser(url))


def is_local(filesystem: Any) -> bool:
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(filesystem, LocalFileSystem)


class Place:
    """A folder by its path or URL. Names in it have "/" between their parts."""

    def __init__(self, url: str):
        self.url = url
        self.filesystem, self.root = filesystem_of(url)
        self.is_local = is_local(self.filesystem)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def open(self, name: str) -> BinaryIO:
        """For reading. Raises: FileNotFoundError."""
        return self.filesystem.open(self.path(name), "rb")

    def read(self, name: str) -> bytes | None:
        """None where there is no such file."""
        try:
            with self.open(name) as file:
                return file.read()
        except FileNotFoundError:
            return None

    def exists(self, name: str) -> bool:
        self.filesystem.invalidate_cache()  # other machines write too
        return self.filesystem.exists(self.path(name))

    def names(self, folder: str) -> list[str]:
        """Of all files in a folder of this one, without the folder, sorted. Empty where there is none."""
        self.filesystem.invalidate_cache()
        try:
            found = self.filesystem.find(self.path(folder))
        except FileNotFoundError:
            return []
        start = len(self.path(folder)) + 1
        return sorted(path[start:] for path in found)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """A new file, which is there when the block ends without an exception.

        An object store shows a file when it is closed. Where the block raises, what it shows then is removed again.
        """
        path = self.path(name)
        if self.is_local:
            for folder in (os.path.dirname(path), self.path(UNFINISHED)):
                os.makedirs(folder, exist_ok=True)
            with (
                write_atomically(path, within=self.path(UNFINISHED)) as temporary,
                naming(path),
                open(temporary, "wb") as file,
            ):
                yield file
            return
        self.filesystem.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            with self.filesystem.open(path, "wb") as file:
                yield file
        except BaseException:
            with contextlib.suppress(OSError):
                self.filesystem.rm_file(path)
            raise

    def write(self, name: str, content: bytes) -> None:
        with self.writing(name) as file:
            file.write(content)

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Waits for other processes that are at the same name. Only local folders, and not Windows, can do that."""
        if not self.is_local or fcntl is None:
            yield
            return
        os.makedirs(self.path(UNFINISHED), exist_ok=True)
        path = self.path(f"{UNFINISHED}/{name}.lock")
        while True:
            handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
            fcntl.flock(handle, fcntl.LOCK_EX)
            # The one who held the lock may have removed the file meanwhile, and somebody made it anew.
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(handle).st_ino:
                    break
            os.close(handle)
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            os.close(handle)

    def tidy(self) -> None:
        """Removes the folder for unfinished files where nothing is left in it."""
        if self.is_local:
            with contextlib.suppress(OSError):
                os.rmdir(self.path(UNFINISHED))

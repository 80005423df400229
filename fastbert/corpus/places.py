"""Local folders and folders behind an fsspec URL, in which files are written whole or not at all."""

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

# The folder in which local files are written before they are renamed. It is outside the folder of the data.
UNFINISHED = "unfinished"


def filesystem_of(url: str) -> tuple[Any, str]:
    """(fsspec file system, path in it) of a path or URL. Local paths become absolute."""
    from fsspec.core import url_to_fs

    return url_to_fs(os.path.expanduser(url))


def is_local(filesystem: Any) -> bool:
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(filesystem, LocalFileSystem)


class Place:
    """A folder, given by its path or URL. Names of files in it are relative to it and use "/"."""

    def __init__(self, url: str):
        self.url = url
        self.filesystem, self.root = filesystem_of(url)
        self.is_local = is_local(self.filesystem)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def open(self, name: str) -> BinaryIO:
        """Opens a file for reading. Raises: FileNotFoundError."""
        return self.filesystem.open(self.path(name), "rb")

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if there is no such file."""
        try:
            with self.open(name) as file:
                return file.read()
        except FileNotFoundError:
            return None

    def names(self, folder: str) -> list[str]:
        """Sorted names of all files below a folder, relative to it; empty if there is no such folder."""
        self.filesystem.invalidate_cache()  # other machines may have written meanwhile
        try:
            found = self.filesystem.find(self.path(folder))
        except FileNotFoundError:
            return []
        start = len(self.path(folder)) + 1
        return sorted(path[start:] for path in found)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """A new file for writing. It appears when the block ends without an exception.

        In an object store a file appears when it is closed. If the block raises an exception, it is removed again.
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
        """A block that only one process at a time can be in, for each name. Others wait. There is no such lock behind
        URLs and on Windows."""
        if not self.is_local or fcntl is None:
            yield
            return
        path = self.path(f"{UNFINISHED}/{name}.lock")
        while True:
            os.makedirs(self.path(UNFINISHED), exist_ok=True)
            try:
                handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
            except FileNotFoundError:  # another process has ended and removed the empty folder
                continue
            fcntl.flock(handle, fcntl.LOCK_EX)
            # The process that held the lock may have removed the file, and another one may have made a new file.
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
        """Removes the folder for unfinished files if it is empty."""
        if self.is_local:
            with contextlib.suppress(OSError):
                os.rmdir(self.path(UNFINISHED))

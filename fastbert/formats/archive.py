"""Downloaded archives, .zip and .tar.gz, unpacked into a temporary folder and nowhere else."""

from __future__ import annotations

import contextlib
import gzip
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ..storage import CheckpointError

SUFFIXES = (".zip", ".tar.gz", ".tgz", ".tar")
_COPIED_BYTES = 1 << 20


def is_archive(path: Path) -> bool:
    return path.is_file() and path.name.lower().endswith(SUFFIXES)


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """Yields a temporary folder with an archive's files, and deletes it at the end of the block.

    If all files are in one folder of the archive, that folder is yielded; its name is the name of the model. Otherwise
    the folder has the archive's name. Memory-mapped files stay readable after the block.

    Raises: CheckpointError, before anything is written, for a member that is a link or no file or whose path is
        absolute or has "..", and if the disk has too little space; also for a damaged archive.
    """
    with tempfile.TemporaryDirectory(prefix="fastbert-", ignore_cleanup_errors=True) as temporary:
        name = path.name
        for suffix in SUFFIXES:
            name = name[: -len(suffix)] if name.lower().endswith(suffix) else name
        folder = Path(temporary) / (name or "archive")
        folder.mkdir()
        try:
            if path.name.lower().endswith(".zip"):
                _unpack_zip(path, folder)
            else:
                _unpack_tar(path, folder)
        except (zipfile.BadZipFile, gzip.BadGzipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} is truncated or not an archive ({error})") from error
        except OSError as error:
            raise CheckpointError(f"cannot unpack {path}: {error.strerror or error}") from error
        inside = list(folder.iterdir())
        yield inside[0] if len(inside) == 1 and inside[0].is_dir() else folder


def _unpack_zip(path: Path, folder: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = [m for m in archive.infolist() if not m.is_dir()]
        # If a truncated archive ends in a member that is a zip file, Python would read that member as the archive.
        if members and min(m.header_offset for m in members) > 0:
            raise zipfile.BadZipFile("it does not begin with its first member")
        for m in members:
            mode = stat.S_IFMT(m.external_attr >> 16)
            _check_member(path, m.filename, mode in (0, stat.S_IFREG))
        _check_room(path, folder, sum(m.file_size for m in members))
        for m in members:
            with archive.open(m) as stream:
                _copy(stream, folder, m.filename)


def _unpack_tar(path: Path, folder: Path) -> None:
    with tarfile.open(path) as archive:
        members = [m for m in archive.getmembers() if not m.isdir()]
        for m in members:
            _check_member(path, m.name, m.isreg())
        _check_room(path, folder, sum(m.size for m in members))
        for m in members:
            with archive.extractfile(m) as stream:
                _copy(stream, folder, m.name)
        while archive.fileobj.read(_COPIED_BYTES):  # gzip verifies its checksum at the end of the bytes
            pass


def _check_member(path: Path, name: str, is_file: bool) -> None:
    if not is_file:
        raise CheckpointError(f"{path} has a member that is a link or no file, {name!r}; it is not unpacked")
    if name.startswith(("/", "\\")) or ":" in name or ".." in PurePosixPath(name.replace("\\", "/")).parts:
        raise CheckpointError(f"{path} has a member with the path {name!r}, outside the archive; it is not unpacked")


def _check_room(path: Path, folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(f"{path} unpacks to {needed:,} bytes, and {folder.parent.parent} has {free:,} free")


def _copy(stream: BinaryIO, folder: Path, name: str) -> None:
    target = folder / PurePosixPath(name.replace("\\", "/"))
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "wb") as file:
        shutil.copyfileobj(stream, file, _COPIED_BYTES)

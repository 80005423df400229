"""Files: written whole or not at all, and JSON. What goes wrong with a model's files is a CheckpointError."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None


class CheckpointError(RuntimeError):
    """A model's files cannot be found, read, written, or do not fit the module. One line, naming the file."""


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike, within: str | os.PathLike | None = None) -> Iterator[Path]:
    """Yields a temporary path beside `path`; when the block ends without an exception, it becomes `path`.

        with write_atomically("vectors.npy") as temporary:
            np.save(temporary, vectors)

    The temporary file has the same suffix, is synced to disk before it takes the name, and is removed on any
    exception, KeyboardInterrupt included. One that a killed process left behind is removed by the next that writes
    `path`. A symbolic link is replaced, not followed.

    Args:
        within: a folder of the same file system for the temporary file, instead of the one of `path`. Its name then
            ends in .part. This is for folders of data: many programs read every file in them, also hidden ones.

    Raises: OSError naming `path` where it cannot be written, or is something other than a regular file.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder")
    if path.exists() and not path.is_file():
        raise OSError(f"cannot write {path}: it is not a regular file")
    try:
        temporary, lock = _locked_beside(path) if within is None else _locked_beside(Path(within) / f"{path.name}.part")
    except OSError as error:
        raise type(error)(f"cannot write {path}: {error.strerror}") from error
    try:
        with naming(path):
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(lock)
    _sync(path.parent)


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Adds this file's name to an OSError about a full disk that names no file."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            error.filename = os.fspath(path)
        raise


def _locked_beside(path: Path) -> tuple[Path, int]:
    """(a new temporary file beside `path`, the open descriptor that holds its lock).

    Temporary files of `path` without a lock are removed: their process was killed. Windows has no such
    locks; there they stay.
    """
    name = os.fsencode(path.name)
    # a file's name may have 255 bytes, and the temporary one is longer than `path`
    stem = path.stem if len(name) <= 200 else hashlib.sha256(name).hexdigest()[:32]
    if fcntl is not None:
        ours = re.compile(rf"\.{re.escape(stem)}\.[0-9a-f]{{8}}\.tmp{re.escape(path.suffix)}")
        for entry in [entry.path for entry in os.scandir(path.parent) if ours.fullmatch(entry.name)]:
            with contextlib.suppress(OSError):  # another user's file, or locked
                left = os.open(entry, os.O_WRONLY)
                try:
                    fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(entry)
                finally:
                    os.close(left)
    while True:
        temporary = path.with_name(f".{stem}.{secrets.token_hex(4)}.tmp{path.suffix}")
        # 0o666 less the umask, as for any new file; tempfile's 0o600 would stay with the result
        lock = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        if fcntl is None:
            return temporary, lock
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if temporary.exists():  # otherwise another writer removed the file before it was locked
            return temporary, lock
        os.close(lock)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder
        return
    # Windows syncs only what is open for writing; POSIX opens a folder only for reading
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError where it is missing or is not one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or not JSON
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Writes a JSON object as transformers does: two spaces, sorted, a final newline; whole or not at all."""
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def without_nan(value: Any) -> Any:
    """A copy of what is to be JSON, which has no word for a float that is not finite: null."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def make_folder(folder: str | os.PathLike) -> Path:
    """The folder, made with its parents where it does not exist. Raises CheckpointError where that cannot be."""
    folder = Path(folder).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise CheckpointError(f"cannot save to {folder}: it is a file, not a folder") from None
    except OSError as error:
        raise CheckpointError(f"cannot save to {folder}: {error.strerror}") from error
    return folder


@contextlib.contextmanager
def new_folder(folder: Path, needed: int) -> Iterator[Path]:
    """Yields a temporary folder beside `folder` that takes its place at the end, or is removed on any exception.

    needed: bytes that will be written into it.
    Raises: CheckpointError where `folder` is there and not empty, has no room, or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists, and is no empty folder")
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if needed > free:
            raise CheckpointError(f"{folder} needs {needed:,} bytes, and {folder.parent} has {free:,} free")
        temporary.mkdir()
        yield temporary
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"cannot write {folder}: {error.strerror or error}") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise

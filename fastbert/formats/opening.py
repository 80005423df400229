"""Turns a path, an archive or a hub id into a path that can be read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ..checkpoint import resolve
from ..storage import CheckpointError
from .archive import is_archive, unpacked
from .detect import find_reader


@contextlib.contextmanager
def opened(id_or_path: str | os.PathLike) -> Iterator[Path]:
    """Yields the path of a model: a folder, a checkpoint's prefix or a file; of an archive, a temporary folder.

    Within the block the yielded path can be passed to `opened` again, so that code which needs several parts of an
    archive unpacks it only once.
    Raises: CheckpointError, in one line, if there is no model.
    """
    path = Path(id_or_path).expanduser()
    if is_archive(path):
        with unpacked(path) as folder:
            try:
                yield folder if find_reader(folder) is not None else resolve(folder)
            except (CheckpointError, ValueError) as error:
                # Error messages name the archive, since the user does not know the temporary folder.
                if str(folder) not in str(error):
                    raise
                kind = CheckpointError if isinstance(error, CheckpointError) else ValueError
                raise kind(str(error).replace(str(folder), str(path))) from error
    elif find_reader(path) is not None:
        yield path
    else:
        yield resolve(id_or_path)

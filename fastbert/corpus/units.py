"""Which rows of which file make which part. The inputs alone decide that, never who computes it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..text.files import InputError
from .job import Job
from .places import filesystem_of, is_local
from .reading import READERS, open_table

MAGIC = "*?["


@dataclass(frozen=True)
class Unit:
    """Rows of one file that make one part.

    Attributes:
        source: the file as the user named it.
        path: where a process opens it: an absolute path or a URL.
        first, last: its rows are [first, last); of a .jsonl file the lines that begin in these bytes. None: all to the
            end of the file.
        size: of the whole file, in bytes.
    """

    source: str
    path: str
    first: int
    last: int | None
    size: int

    @property
    def name(self) -> str:
        """Of the part, without ".parquet": that of the file, a hash of its whole path, and the first row or byte."""
        stem = os.path.splitext(os.path.basename(self.source))[0][:80]
        return f"{stem}-{hashlib.sha256(self.source.encode()).hexdigest()[:8]}-{self.first:012d}"

    @property
    def place(self) -> str:
        """What messages call it."""
        return self.source if (self.first, self.last) == (0, None) else f"{self.source}, from {self.first:,}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def files_of(inputs: Sequence[str], out: str) -> list[tuple[str, str]]:
    """(name, path) of every file that paths, folders, patterns and URLs stand for; those of a folder or pattern sorted.

    Of a folder those with a known suffix count, but for hidden ones, those in hidden folders, and what is in `out`, the
    folder that is written.
    Raises: InputError where there is none, where one has no known suffix, or is there twice.
    """
    found: dict[str, str] = {}  # path -> name
    for given in inputs:
        filesystem, path = filesystem_of(given)
        if not filesystem.exists(path) and any(sign in path for sign in MAGIC):
            matches = sorted(p for p in filesystem.glob(path) if p.endswith(tuple(READERS)))
        elif filesystem.isdir(path):
            written = f"{filesystem_of(out)[1]}/"
            inside = (p for p in sorted(filesystem.find(path)) if not p.startswith(written))
            matches = [p for p in inside if _is_data(p[len(path) :])]
        elif filesystem.exists(path):
            if not path.endswith(tuple(READERS)):
                raise InputError(f"{given}: the name of a table must end in one of {', '.join(READERS)}")
            matches = [path]
        else:
            raise InputError(f"{given} does not exist")
        if not matches:
            raise InputError(f"{given}: no file there ends in one of {', '.join(READERS)}")
        for match in matches:
            if match in found:
                raise InputError(f"{match} is among the inputs twice")
            if not is_local(filesystem):
                found[match] = filesystem.unstrip_protocol(match)
            else:  # parts have the same names wherever a folder lies, if it was named relative to it
                found[match] = match if os.path.isabs(os.path.expanduser(given)) else os.path.relpath(match)
    return [(name, name if "://" in name else path) for path, name in found.items()]


def _is_data(path: str) -> bool:
    parts = [part for part in path.split("/") if part]
    return path.endswith(tuple(READERS)) and not any(part.startswith((".", "_")) for part in parts)


def plan(inputs: Sequence[str], job: Job) -> tuple[Job, list[Unit]]:
    """(the job, which knows the types of its columns and says where it all lies on any process of this machine; the
    units of all inputs, in order).

    Raises: InputError where a file cannot be read, lacks a column, holds something other than text in the column of
    texts, or has another type for a column than the first file.
    """
    units: list[Unit] = []
    types: dict[str, str] = {}
    for name, path in files_of(inputs, job.out):
        with open_table(path, name, job) as table:
            found = {field.name: str(field.type) for field in table.schema}
            for column, kind in found.items():
                if types and types[column] != kind:
                    raise InputError(
                        f"{name}: the column {column!r} is {kind}, and in {units[0].source} it is {types[column]}"
                    )
            types = found
            units += [Unit(name, path, first, last, table.size) for first, last in table.extents(job.part_rows)]
    model = os.path.expanduser(str(job.encoder["id_or_path"]))
    encoder = {**job.encoder, "id_or_path": os.path.abspath(model)} if os.path.exists(model) else job.encoder
    out = job.out if "://" in job.out else os.path.abspath(os.path.expanduser(job.out))
    return replace(job, types=types, out=out, encoder=encoder), units

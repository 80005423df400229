"""Which rows of which file make which part. The inputs and `part_rows` alone decide that."""

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
    """The rows of one file that make one part.

    Attributes:
        source: the name of the file, relative if the user gave a relative path.
        path: the absolute path or URL of the file.
        first, last: the rows [first, last) of the file; in a .jsonl file the lines that begin in these bytes. If `last`
            is None, all rows up to the end of the file.
        size: the size of the whole file in bytes.
    """

    source: str
    path: str
    first: int
    last: int | None
    size: int

    @property
    def name(self) -> str:
        """The name of the part, without ".parquet": the name of the file, a hash of its path, the first row or byte."""
        stem = os.path.splitext(os.path.basename(self.source))[0][:80]
        return f"{stem}-{hashlib.sha256(self.source.encode()).hexdigest()[:8]}-{self.first:012d}"

    @property
    def place(self) -> str:
        """The name of the unit in messages."""
        return self.source if (self.first, self.last) == (0, None) else f"{self.source}, from {self.first:,}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def files_of(inputs: Sequence[str], out: str) -> list[tuple[str, str]]:
    """(name, path) of every input file. An input is a file, a folder, a pattern, or the URL of one.

    From a folder all files with a known suffix are taken, in the order of their paths, except hidden files, files in
    hidden folders, and files in `out`, the folder that is written. A name that begins with "_" is hidden too.

    Raises: InputError if an input gives no file, if the suffix of a file is not known, or if a file is given twice.
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
            else:  # a relative path gives the same names of parts on every machine
                found[match] = match if os.path.isabs(os.path.expanduser(given)) else os.path.relpath(match)
    return [(name, name if "://" in name else path) for path, name in found.items()]


def _is_data(path: str) -> bool:
    parts = [part for part in path.split("/") if part]
    return path.endswith(tuple(READERS)) and not any(part.startswith((".", "_")) for part in parts)


def plan(inputs: Sequence[str], job: Job) -> tuple[Job, list[Unit]]:
    """(job, units): the job with the types of its columns and absolute paths, and the units of all inputs in order.

    Raises: InputError if a file cannot be read or lacks a column, if the column of texts does not hold text, or if a
        column has another type than in the first file.
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

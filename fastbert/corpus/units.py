"""Which rows of which file make which part, and how workers share them. The inputs and `part_rows` alone decide."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
        batch, skipped: of an Arrow file, the number of the record batch that holds row `first`, and the number of rows
            before `first` in that batch. Without them the batches before would be read to count their rows.
    """

    source: str
    path: str
    first: int
    last: int | None
    size: int
    batch: int = 0
    skipped: int = 0

    @property
    def name(self) -> str:
        """The name of the part, without ".parquet": the name of the file, a hash of its path, the first row or byte."""
        stem = os.path.splitext(os.path.basename(self.source))[0][:80]
        return f"{stem}-{hashlib.sha256(self.source.encode()).hexdigest()[:8]}-{self.first:012d}"

    @property
    def place(self) -> str:
        """The name of the unit in messages."""
        return self.source if (self.first, self.last) == (0, None) else f"{self.source}, from {self.first:,}"

    def facts(self) -> dict[str, Any]:
        """What the receipt says of the unit. Another machine may have another path."""
        return {"source": self.source, "first": self.first, "last": self.last, "size": self.size}


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
            extents = table.extents(job.part_rows)
            units += [Unit(name, path, first, last, table.size, *batch) for first, last, *batch in extents]
    model = os.path.expanduser(str(job.encoder["id_or_path"]))
    encoder = {**job.encoder, "id_or_path": os.path.abspath(model)} if os.path.exists(model) else job.encoder
    out = job.out if "://" in job.out else os.path.abspath(os.path.expanduser(job.out))
    return replace(job, types=types, out=out, encoder=encoder), units


# ---- sharing -----------------------------------------------------------------------------------------------


def largest_first(missing: Sequence[Unit], units: Sequence[Unit]) -> list[Unit]:
    """The missing ones of all units, in the order in which workers should take them: if the last units are small,
    workers end at about the same time. Units of the same size keep their order."""
    sizes = sizes_of(units)
    return sorted(missing, key=sizes.__getitem__, reverse=True)


def shares_of(missing: Sequence[Unit], units: Sequence[Unit], count: int) -> list[list[Unit]]:
    """The missing ones of all units in `count` shares of about the same size, some of them empty if units are few."""
    sizes, shares, totals = sizes_of(units), [[] for _ in range(count)], [0.0] * count
    for unit in largest_first(missing, units):
        least = totals.index(min(totals))
        shares[least].append(unit)
        totals[least] += sizes[unit]
    return shares


def sizes_of(units: Sequence[Unit]) -> dict[Unit, float]:
    """Bytes of each unit, estimated from its share of the rows of its file. `units` are all units of their files."""
    ends = {unit.path: unit.last for unit in units}
    parts = {unit: (unit.last - unit.first) / ends[unit.path] if ends[unit.path] else 1.0 for unit in units}
    return {unit: unit.size * part for unit, part in parts.items()}

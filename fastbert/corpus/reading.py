"""Reads tables a few hundred rows at a time: Parquet, Arrow IPC, JSON lines and CSV.

A table has `schema` (the columns that are asked for, with canonical types), `size` (of the file, in bytes),
`extents(rows)` (the ranges of rows that become parts) and `batches(unit)` (the rows of such a range). A .parquet or
.arrow file is cut between rows, at ends of row groups or record batches if possible; a .jsonl file at the beginnings of
lines; a .csv file is not cut, because quoted values may contain line ends.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa
from pyarrow import csv, ipc, parquet

from ..text.files import InputError, read_lines
from .job import Job
from .places import filesystem_of, is_local

if TYPE_CHECKING:
    from .units import Unit

# Rows read at once. They are few because texts may be long.
BATCH_ROWS = 512
# A .jsonl file is cut by bytes, since its rows cannot be counted without reading it: bytes of a row, for `part_rows`.
BYTES_A_LINE = 512
CSV_BLOCK = 4_000_000
ARROW_MAGIC = b"ARROW1"  # how files of Arrow begin and end; streams do not begin so
# What pyarrow raises for a broken file; OSError is for pages that cannot be decompressed.
BROKEN = (pa.ArrowException, OSError, UnicodeError)


# ---- types -------------------------------------------------------------------------------------------------


def canonical(kind: pa.DataType) -> pa.DataType:
    """One type for all types that hold the same values: without dictionaries, extensions, large and view types (of text
    and bytes). The child of a list is called "element", as in Parquet's specification. Parquet stores seconds as
    milliseconds, and date64 as date32. Raises: NotImplementedError for list views, which pyarrow 26 casts to lists with
    a wrong buffer."""
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return canonical(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return canonical(kind.storage_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    if kind == pa.date64():
        return pa.date32()
    if pa.types.is_timestamp(kind) and kind.unit == "s":
        return pa.timestamp("ms", kind.tz)
    if kind == pa.time32("s"):
        return pa.time32("ms")
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(pa.field("element", canonical(kind.value_type)), kind.list_size)
    if pa.types.is_map(kind):
        return pa.map_(canonical(kind.key_type), canonical(kind.item_type))
    if pa.types.is_nested(kind) and pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, canonical(field.type)) for field in kind])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(pa.field("element", canonical(kind.value_type)))
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        raise NotImplementedError("list views are not supported; make them lists")
    return kind


def schema_of(found: pa.Schema, job: Job, name: str) -> pa.Schema:
    """The column of texts and the kept columns, with canonical types and without metadata, such as pandas writes.

    Raises: InputError if a column is missing or occurs twice, if the column of texts does not hold text, or if Parquet
        has no type for a kept column.
    """
    fields = []
    for column in dict.fromkeys((job.text, *job.kept)):
        places = found.get_all_field_indices(column)
        if not places:
            raise InputError(f"{name}: no column {column!r}; it has {', '.join(map(repr, found.names)) or 'none'}")
        if len(places) > 1:
            raise InputError(f"{name}: {len(places)} columns are called {column!r}")
        try:
            fields.append(pa.field(column, canonical(found.field(places[0]).type)))
            parquet.ParquetWriter(io.BytesIO(), pa.schema(fields[-1:])).close()
        except NotImplementedError as error:  # pyarrow's error for a type that Parquet does not have is one too
            raise InputError(f"{name}: the column {column!r} cannot be kept: {error}") from None
    if not pa.types.is_string(fields[0].type):
        raise InputError(f"{name}: the column {job.text!r} must hold text, and holds {fields[0].type}")
    return pa.schema(fields)


def width_of(kind: pa.DataType) -> float:
    """Bits of a value, and infinity where values have different sizes."""
    try:
        return kind.bit_width
    except ValueError:
        return float("inf")


# ---- tables ------------------------------------------------------------------------------------------------


class ParquetTable:
    """Parquet. Pages are read as they are needed, so that memory does not depend on the size of row groups."""

    def __init__(self, file: BinaryIO, name: str, job: Job):
        self.file = parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)
        self.schema = schema_of(self.file.schema_arrow, job, name)
        metadata = self.file.metadata
        self.sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def extents(self, rows: int) -> list[tuple[int, int | None]]:
        return extents_of(self.sizes, rows)

    def batches(self, unit: Unit) -> Iterator[pa.RecordBatch]:
        groups, skipped = overlapping(self.sizes, unit.first, unit.last)
        found = self.file.iter_batches(BATCH_ROWS, groups, self.schema.names, use_threads=False) if groups else iter(())
        return cut(found, skipped, unit.last - unit.first)


class ArrowTable:
    """Arrow IPC, in the format of files or of streams.

    A file has an index of its record batches, but the number of rows of a batch is in the batch. `extents` reads one
    column of each batch to learn it; units then say in which batch they begin. A stream has no index: it is one part.
    """

    def __init__(self, file: BinaryIO, name: str, job: Job):
        self.file = file
        try:
            self.reader = ipc.open_file(file)
        except pa.ArrowInvalid:
            file.seek(0)
            if file.read(len(ARROW_MAGIC)) == ARROW_MAGIC:
                raise InputError(f"{name}: an Arrow file without its end; it may have been cut off") from None
            file.seek(0)
            self.reader = ipc.open_stream(file)
        self.is_stream = isinstance(self.reader, ipc.RecordBatchStreamReader)
        found = self.reader.schema
        self.schema = schema_of(found, job, name)
        if not self.is_stream:
            self.reader = self._reading([found.get_field_index(column) for column in self.schema.names])
            self.narrowest = min(range(len(found)), key=lambda place: width_of(found.field(place).type))

    def _reading(self, fields: list[int]) -> ipc.RecordBatchFileReader:
        """A reader of these columns. pyarrow neither reads nor decompresses the others."""
        return ipc.open_file(self.file, options=ipc.IpcReadOptions(use_threads=False, included_fields=fields))

    def extents(self, rows: int) -> list[tuple[int, int | None, int, int]]:
        """Ranges of rows, each with the number of the batch that it begins in, and the rows of that batch before it."""
        if self.is_stream:
            return [(0, None, 0, 0)]
        reader = self._reading([self.narrowest])
        sizes = [reader.get_batch(number).num_rows for number in range(reader.num_record_batches)]
        starts = np.cumsum([0, *sizes])
        found = []
        for first, last in extents_of(sizes, rows):
            batch = int(np.searchsorted(starts, first, side="right")) - 1
            found.append((first, last, batch, first - int(starts[batch])))
        return found

    def batches(self, unit: Unit) -> Iterator[pa.RecordBatch]:
        if self.is_stream:
            found = iter(self.reader)
        else:
            coming = map(self.reader.get_batch, range(unit.batch, self.reader.num_record_batches))
            found = cut(coming, unit.skipped, unit.last - unit.first)
        for batch in found:
            chosen = batch.select(self.schema.names)
            for start in range(0, chosen.num_rows, BATCH_ROWS):
                rows = chosen[start : start + BATCH_ROWS]
                rows.validate(full=True)  # a broken offset would be followed to wherever it points
                yield rows


class CsvTable:
    """CSV with names of columns in the first row. Every value is text; an empty value is the empty text, not a null."""

    def __init__(self, file: BinaryIO, name: str, job: Job):
        self.file = file
        self.schema = schema_of(pa.schema([(column, pa.string()) for column in self._reader().schema.names]), job, name)

    def _reader(self, **convert: Any) -> csv.CSVStreamingReader:
        self.file.seek(0)
        return csv.open_csv(
            self.file,
            csv.ReadOptions(use_threads=False, block_size=CSV_BLOCK),
            csv.ParseOptions(newlines_in_values=True),
            csv.ConvertOptions(strings_can_be_null=False, quoted_strings_can_be_null=False, **convert),
        )

    def extents(self, rows: int) -> list[tuple[int, int | None]]:
        return [(0, None)]

    def batches(self, unit: Unit) -> Iterator[pa.RecordBatch]:
        names = self.schema.names
        for batch in self._reader(include_columns=names, column_types=dict.fromkeys(names, pa.string())):
            yield from (batch[i : i + BATCH_ROWS] for i in range(0, batch.num_rows, BATCH_ROWS))


class JsonLinesTable:
    """JSON lines. Kept values other than strings are kept as JSON text, so that all files have the same types."""

    def __init__(self, file: BinaryIO, name: str, job: Job):
        self.file, self.name, self.job = file, name, job
        self.schema = pa.schema([(column, pa.string()) for column in dict.fromkeys((job.text, *job.kept))])
        self.size = file.seek(0, 2)

    def extents(self, rows: int) -> list[tuple[int, int | None]]:
        starts = range(0, max(self.size, 1), rows * BYTES_A_LINE)
        return [(start, min(start + rows * BYTES_A_LINE, self.size)) for start in starts]

    def batches(self, unit: Unit) -> Iterator[pa.RecordBatch]:
        place = self.name if unit.first == 0 else f"{self.name}, behind byte {unit.first:,}"
        rows: list[list[str | None]] = []
        lines = LinesWithin(self.file, unit.first, unit.last)
        for line in read_lines(lines, place, self.job.text, self.job.line_bytes, nullable=True):
            for column in self.schema.names:
                if column not in line.record:
                    raise InputError(f"{place}: an object has no {column!r}: {json.dumps(line.record)[:80]}")
            rows.append([line.text, *(_spelled(line.record[column]) for column in self.schema.names[1:])])
            if len(rows) == BATCH_ROWS:
                yield self._batch(rows)
                rows = []
        if rows:
            yield self._batch(rows)

    def _batch(self, rows: Sequence[Sequence[str | None]]) -> pa.RecordBatch:
        columns = [pa.array(column, pa.string()) for column in zip(*rows, strict=True)]
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)


class LinesWithin:
    """The lines of a file that begin in the bytes [first, last)."""

    def __init__(self, file: BinaryIO, first: int, last: int):
        self.file, self.last = file, last
        file.seek(max(first - 1, 0))
        if first:
            while (piece := file.readline(1 << 20)) and not piece.endswith(b"\n"):
                pass

    def readline(self, size: int) -> bytes:
        return b"" if self.file.tell() >= self.last else self.file.readline(size)


def _spelled(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


READERS = {
    ".parquet": ParquetTable, ".arrow": ArrowTable, ".feather": ArrowTable, ".jsonl": JsonLinesTable, ".csv": CsvTable,
}  # fmt: skip


@contextlib.contextmanager
def open_table(path: str, name: str, job: Job) -> Iterator[Any]:
    """The table in a file, for a block that reads it. Raises: InputError, also for errors of reading in the block."""
    filesystem, inside = filesystem_of(path)
    with explained(name), contextlib.ExitStack() as stack:
        size = filesystem.size(inside)
        reader = READERS[inside[inside.rindex(".") :]]
        # pyarrow reads local files without Python's global lock. Batches of a mapped Arrow file are not copied: a unit
        # touches only the pages that hold its rows.
        by_pyarrow = {ParquetTable: pa.OSFile, CsvTable: pa.OSFile, ArrowTable: pa.memory_map}
        opened = by_pyarrow.get(reader, filesystem.open) if is_local(filesystem) else filesystem.open
        table = reader(stack.enter_context(opened(inside)), name, job)
        table.size = size
        yield table


@contextlib.contextmanager
def explained(name: str) -> Iterator[None]:
    """Turns errors of a library about a broken file into an InputError with the file's name."""
    try:
        yield
    except InputError:
        raise
    except BROKEN as error:
        raise InputError(f"{name}: {' '.join(str(error).split())}") from error


# ---- cutting -----------------------------------------------------------------------------------------------


def extents_of(sizes: Sequence[int], rows: int) -> list[tuple[int, int]]:
    """Joins row groups of these sizes into ranges of at most `rows` rows. A larger row group is cut evenly. There is at
    least one range, which may be empty."""
    starts, row, within = [0], 0, 0
    for size in sizes:
        if within and within + size > rows:
            starts.append(row)
            within = 0
        pieces = -(-size // rows)
        starts += [row + size * piece // pieces for piece in range(1, pieces)]
        row += size
        within += size
    return list(zip(starts, [*starts[1:], row], strict=True))


def overlapping(sizes: Sequence[int], first: int, last: int) -> tuple[list[int], int]:
    """(numbers of the groups with rows in [first, last), number of rows in the first of them before `first`)."""
    found, skipped, row = [], 0, 0
    for number, size in enumerate(sizes):
        if row < last and row + size > first:
            if not found:
                skipped = first - row
            found.append(number)
        row += size
    return found, skipped


def cut(batches: Iterator[pa.RecordBatch], skipped: int, rows: int) -> Iterator[pa.RecordBatch]:
    """The next `rows` rows after the first `skipped` ones."""
    for batch in batches:
        found = batch[skipped : skipped + rows]
        skipped = max(0, skipped - batch.num_rows)
        rows -= found.num_rows
        if found.num_rows:
            yield found
        if rows <= 0:
            return

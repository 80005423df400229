"""Writes a part: one schema for all inputs, row groups of one size, every option of the Parquet writer fixed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from .job import SCALE, VALID, VECTOR, Job

# Bytes of the vectors of a row group, in float32. So much is held in memory until it is written.
GROUP_BYTES = 32_000_000
# All options of the writer except those for single columns, so that files do not depend on its defaults.
OPTIONS = {
    "version": "2.6", "data_page_version": "1.0", "use_byte_stream_split": False,
    "column_encoding": None, "use_compliant_nested_type": True, "write_batch_size": 1024, "data_page_size": 1 << 20,
    "dictionary_pagesize_limit": 1 << 20, "store_schema": True, "write_page_index": False, "write_page_checksum": True,
    "sorting_columns": None, "store_decimal_as_integer": False, "write_time_adjusted_to_utc": False,
    "use_deprecated_int96_timestamps": False, "use_content_defined_chunking": False,
}  # fmt: skip
PLAIN, PACKED, LEVEL = "NONE", "ZSTD", 3  # compression makes vectors hardly smaller
KINDS = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8()}


def reads_null_vectors() -> bool:
    """Whether this pyarrow can read null vectors from Parquet. Version 25, the last one for Python 3.10, raises
    "Expected all lists to be of size=..." for any fixed-size list that is null, also in files of its own."""
    return int(pa.__version__.split(".")[0]) >= 26


def schema_of_part(kept: pa.Schema, job: Job, description: Mapping[str, Any], source: Mapping[str, Any]) -> pa.Schema:
    """The kept columns, then those of the vectors. `description` and `source` become JSON in the metadata "fastbert".

    kept: the schema of `reading.schema_of`.
    """
    dimension, certain = description["dimension"], job.nulls != "null"
    # pyarrow reads the numbers of a null vector as nulls. Lance refuses those unless the type allows them.
    element = pa.field("element", KINDS[job.precision], nullable=not certain)
    fields = [kept.field(name) for name in job.kept]
    fields.append(pa.field(VECTOR, pa.list_(element, dimension), nullable=not certain))
    if job.precision == "int8":
        fields.append(pa.field(SCALE, pa.float32(), nullable=not certain))
    if job.nulls == "fill":
        fields.append(pa.field(VALID, pa.bool_(), nullable=False))
    told = json.dumps({**description, "source": dict(source)}, sort_keys=True)
    return pa.schema(fields, metadata={"fastbert": told})


def group_rows(dimension: int) -> int:
    """The number of rows in a row group, a multiple of 1,024."""
    return max(1024, GROUP_BYTES // (4 * dimension) // 1024 * 1024)


class PartWriter:
    """Writes rows to a Parquet file, which is complete after `finish`.

    Args:
        file: need not be seekable.
        schema: the schema of `schema_of_part`.
    """

    def __init__(self, file: BinaryIO, schema: pa.Schema, job: Job, dimension: int):
        self.file, self.schema, self.job, self.dimension = Hashing(file), schema, job, dimension
        self.metadata: list[parquet.FileMetaData] = []
        self.packed = [name for name in schema.names if name not in (VECTOR, SCALE, VALID)]
        leaves = leaves_of(schema)
        self.compression = {leaf: PACKED if of in self.packed else PLAIN for leaf, of in leaves.items()}
        self.with_statistics = [leaf for leaf, of in leaves.items() if of in self.packed]
        # Dictionaries are for columns of texts, which often repeat.
        self.with_dictionary = [leaf for leaf in self.with_statistics if pa.types.is_string(_leaf_type(schema, leaf))]
        self.writer = parquet.ParquetWriter(
            pa.PythonFile(self.file, "w"), schema, compression=self.compression,
            compression_level=dict.fromkeys(self.with_statistics, LEVEL), use_dictionary=self.with_dictionary,
            write_statistics=self.with_statistics, metadata_collector=self.metadata, **OPTIONS,
        )  # fmt: skip
        self.values = ValuesHash()
        self.rows = self.without = 0
        self.waiting: list[pa.Table] = []
        self.group = group_rows(dimension)

    def write(self, kept: pa.Table, vectors: np.ndarray, valid: np.ndarray) -> None:
        """Adds rows. kept: the kept columns; vectors: [n, C] float32, zeros in rows where `valid` [n] is false."""
        table = pa.table([*self._kept(kept), *self._vectors(vectors, valid)], schema=self.schema)
        self.rows += len(vectors)
        self.without += int(len(valid) - valid.sum())
        self.waiting.append(table)
        if sum(table.num_rows for table in self.waiting) >= self.group:
            table = pa.concat_tables(self.waiting)
            whole = table.num_rows // self.group * self.group
            for start in range(0, whole, self.group):
                self._write(table.slice(start, self.group))
            self.waiting = [table.slice(whole)] if whole < table.num_rows else []

    def finish(self) -> dict[str, Any]:
        """Ends the file, and returns facts for its receipt. Raises: RuntimeError if an option had no effect."""
        if self.waiting:
            self._write(pa.concat_tables(self.waiting))
        self.writer.close()
        expect_options(self.metadata[0], self.compression, self.with_dictionary, self.with_statistics)
        return {
            "rows": self.rows, "without_vector": self.without, "bytes": self.file.size,
            "sha256": self.file.digest.hexdigest(), "values": self.values.hexdigest(),
        }  # fmt: skip

    def drop(self) -> None:
        """Ends writing without completing the file. Otherwise pyarrow would try to when the writer is deleted."""
        self.file.file, self.writer.is_open = None, False

    def _write(self, table: pa.Table) -> None:
        # Equal tables give equal bytes only if they have the same chunks, so each column becomes a single array.
        table = pa.table([pa.concat_arrays(column.chunks) for column in table.columns], schema=self.schema)
        self.values.add(table)
        self.writer.write_table(table, row_group_size=max(table.num_rows, 1))

    def _kept(self, kept: pa.Table) -> list[pa.Array]:
        return [kept.column(name).combine_chunks() for name in self.packed]

    def _vectors(self, vectors: np.ndarray, valid: np.ndarray) -> list[pa.Array]:
        kind, missing = self.schema.field(VECTOR).type, None
        if not valid.all() and self.job.nulls == "null":
            missing = pa.array(~valid)
        values, scales = stored(vectors, self.job.precision)
        flat = pa.array(values.reshape(-1), KINDS[self.job.precision])
        found = [pa.FixedSizeListArray.from_arrays(flat, type=kind, mask=missing)]
        if scales is not None:
            found.append(pa.array(scales, pa.float32(), mask=None if missing is None else ~valid))
        if self.job.nulls == "fill":
            found.append(pa.array(valid))
        return found


def stored(vectors: np.ndarray, precision: str) -> tuple[np.ndarray, np.ndarray | None]:
    """(numbers to store for vectors [n, C] float32, their scales [n] float32 if the numbers are int8, else None).

    In int8 a vector is its numbers times its scale, which is its largest magnitude divided by 127.
    """
    if precision == "float32":
        return vectors, None
    if precision == "float16":
        return vectors.astype(np.float16), None
    scales = np.abs(vectors).max(axis=1, initial=0.0) / np.float32(127)
    return np.rint(vectors / np.where(scales > 0, scales, 1)[:, None]).astype(np.int8), scales


def numbers_of(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """(vectors [n, C] float32, whether each row has one [n] bool) of a table read from a part. Other rows are zeros."""
    column = table.column(VECTOR).combine_chunks()
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    if VALID in table.column_names:
        valid &= table.column(VALID).to_numpy()
    vectors = np.zeros((len(column), column.type.list_size), dtype=np.float32)
    flat = column.flatten().to_numpy(zero_copy_only=False)  # without those of null rows
    vectors[column.is_valid().to_numpy(zero_copy_only=False)] = flat.reshape(-1, column.type.list_size)
    if SCALE in table.column_names:
        vectors *= table.column(SCALE).fill_null(0.0).to_numpy()[:, None]
    return vectors, valid


# ---- checks of the writer -----------------------------------------------------------------------------------


def leaves_of(schema: pa.Schema) -> dict[str, str]:
    """Path of each column of a Parquet file -> name of the column of the table that it belongs to."""

    def below(field: pa.Field, path: str) -> list[str]:
        kind = field.type
        if pa.types.is_map(kind):
            return below(kind.key_field, f"{path}.key_value.key") + below(kind.item_field, f"{path}.key_value.value")
        if pa.types.is_struct(kind):
            return [leaf for child in kind for leaf in below(child, f"{path}.{child.name}")]
        if pa.types.is_nested(kind):
            return below(kind.value_field, f"{path}.list.element")
        return [path]

    return {leaf: field.name for field in schema for leaf in below(field, field.name)}


def _leaf_type(schema: pa.Schema, leaf: str) -> pa.DataType | None:
    """The type of a column that is not nested; null for others."""
    place = schema.get_field_index(leaf)
    return schema.field(place).type if place >= 0 else pa.null()


def expect_options(
    found: parquet.FileMetaData, compression: Mapping[str, str], dictionary: list[str], statistics: list[str]
) -> None:
    """Checks that the options for single columns had their effect: pyarrow silently ignores names it does not find.

    Raises: RuntimeError if one had none.
    """
    for group in range(found.num_row_groups):
        for number in range(found.num_columns):
            column = found.row_group(group).column(number)
            path = column.path_in_schema
            told = column.statistics if column.is_stats_set else None
            empty = not column.num_values or (told is not None and told.null_count == column.num_values)
            # A column of the type null, which Parquet calls UNKNOWN, gets no statistics.
            empty = empty or found.schema.column(number).logical_type.type == "UNKNOWN"
            seen = {
                "compression": column.compression
                == {PLAIN: "UNCOMPRESSED"}.get(wanted := compression.get(path), wanted),
                "dictionary": column.has_dictionary_page == (path in dictionary) or empty,
                "statistics": column.is_stats_set == (path in statistics) or empty,
            }
            for option, honoured in seen.items():
                if not honoured:
                    raise RuntimeError(f"pyarrow {pa.__version__} did not honour {option} of the column {path!r}")


class Hashing:
    """A file for writing that computes the SHA-256 and size of its content. If `file` is None, nothing is written."""

    closed = False

    def __init__(self, file: BinaryIO):
        self.file: BinaryIO | None = file
        self.digest, self.size = hashlib.sha256(), 0

    def write(self, content: Any) -> int:
        self.digest.update(content)
        self.size += len(content)
        return len(content) if self.file is None else self.file.write(content)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        """Does nothing: the file is flushed when it is closed."""

    def close(self) -> None:
        """Does nothing: the code that opened the file closes it."""


class ValuesHash:
    """A hash of the values of a table, independent of row groups, chunks, encodings and versions of pyarrow."""

    def __init__(self):
        self.digests: dict[str, Any] = {}

    def add(self, table: pa.Table) -> None:
        for name, column in zip(table.column_names, table.columns, strict=True):
            for chunk in column.chunks:
                self._add(name, chunk)

    def hexdigest(self) -> str:
        told = {path: digest.hexdigest() for path, digest in self.digests.items()}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def _update(self, path: str, content: np.ndarray) -> None:
        self.digests.setdefault(path, hashlib.sha256()).update(np.ascontiguousarray(content).data)

    def _add(self, path: str, array: pa.Array) -> None:
        if not len(array):  # the number of empty chunks must not matter
            return
        valid, kind = array.is_valid().to_numpy(zero_copy_only=False), array.type
        self._update(f"{path} valid", valid)
        array = array.drop_null()
        if pa.types.is_struct(kind):
            for field, child in zip(kind, array.flatten(), strict=True):
                self._add(f"{path}.{field.name}", child)
        elif pa.types.is_fixed_size_list(kind):
            self._add(f"{path}[]", array.flatten())
        elif pa.types.is_nested(kind):
            offsets = array.offsets.to_numpy()
            self._update(f"{path} length", np.diff(offsets).astype("<i8"))
            children = {"key": array.keys, "value": array.items} if pa.types.is_map(kind) else {"": array.values}
            for name, child in children.items():
                self._add(f"{path}[{name}]", child[offsets[0] : offsets[-1]] if len(offsets) else child[:0])
        elif not len(array):
            return
        elif pa.types.is_string(kind) or pa.types.is_binary(kind):
            offsets = np.frombuffer(array.buffers()[1], "<i4")[array.offset : array.offset + len(array) + 1]
            self._update(f"{path} length", np.diff(offsets).astype("<i8"))
            if offsets[-1] > offsets[0]:
                self._update(path, np.frombuffer(array.buffers()[2], np.uint8)[offsets[0] : offsets[-1]])
        elif pa.types.is_boolean(kind):
            self._update(path, array.to_numpy(zero_copy_only=False))
        elif not pa.types.is_null(kind):
            width = kind.bit_width // 8
            self._update(
                path, np.frombuffer(array.buffers()[1], np.uint8)[array.offset * width :][: len(array) * width]
            )

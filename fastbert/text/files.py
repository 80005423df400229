"""Reads texts from a file and writes vectors to a file, a line at a time, in constant memory.

In:   plain text, one text a line, or JSON lines with the text in one field
Out:  .npy          [N, C] float32; numpy.load(path, mmap_mode="r") opens it without reading it
      .safetensors  the same, under the name "embeddings"
      .jsonl        the input's objects ({"text": ...} for plain lines), each with its "embedding" added
"""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

BOM = b"\xef\xbb\xbf"
# Longest line. A line is held in memory several times; without a limit, a file without line ends would be read whole.
LINE_BYTES = 10_000_000


class InputError(ValueError):
    """An error in the input; the message names the file and the line."""


class Line(NamedTuple):
    text: str | None  # None where the object says null, and that is allowed
    record: dict[str, Any]  # what a .jsonl output repeats of this line
    n_bytes: int  # of the input, for the progress bar


def read_lines(
    stream: BinaryIO, name: str, field: str | None = None, line_bytes: int = LINE_BYTES, nullable: bool = False
) -> Iterator[Line]:
    """The texts of a UTF-8 stream, one a line. A byte order mark and CRLF line ends are dropped.

    Args:
        name: what errors call the stream.
        field: each line is a JSON object, with the text in this field, and empty lines may follow the last one; None:
            each line is the text.
        line_bytes: how long a line may be, without its end.
        nullable: whether the field may hold null.

    Raises: InputError with the number of a line that is too long, not UTF-8, not a JSON object, or without the field.
    """
    empty = None  # the first empty line; an object after it is an error
    for number in itertools.count(1):
        raw = stream.readline(line_bytes + len(BOM) + len(b"\r\n") + 1)
        if not raw:
            return
        place = f"{name}, line {number}"
        content = raw.removeprefix(BOM) if number == 1 else raw
        content = content.removesuffix(b"\n").removesuffix(b"\r")
        if len(content) > line_bytes:
            raise InputError(f"{place}: longer than {line_bytes:,} bytes; --max-line-bytes allows more")
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            byte = content[error.start]
            raise InputError(f"{place}: not UTF-8 (byte 0x{byte:02x} at position {error.start + 1})") from None
        record = {"text": text}
        if field is not None:
            if not text.strip():
                empty = empty or place
                continue
            if empty is not None:
                raise InputError(f"{empty}: the line is empty, expected a JSON object")
            record = _parse(text, place)
            text = None if nullable and record.get(field, "") is None else _text_of(record, field, place)
        yield Line(text, record, len(raw))


def read_chunks(
    stream: BinaryIO, name: str, field: str | None = None, *, lines: int, n_bytes: int = 4_000_000,
    line_bytes: int = LINE_BYTES,
) -> Iterator[list[Line]]:  # fmt: skip
    """`read_lines` in chunks of at most `lines` lines, closed early where they come to `n_bytes`."""
    chunk: list[Line] = []
    size = 0
    for line in read_lines(stream, name, field, line_bytes):
        chunk.append(line)
        size += line.n_bytes
        if len(chunk) >= lines or size >= n_bytes:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _parse(text: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not JSON: {error}") from None
    if not isinstance(record, dict):
        raise InputError(f"{place}: expected a JSON object, got {type(record).__name__}")
    return record


def _text_of(record: dict[str, Any], field: str, place: str) -> str:
    if field not in record:
        raise InputError(f"{place}: no field {field!r}; it has {', '.join(map(repr, record)) or 'none'}")
    text = record[field]
    if not isinstance(text, str):
        raise InputError(f"{place}: field {field!r} must be a string, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair; no tokenizer can read it
        raise InputError(f"{place}: field {field!r} has half a surrogate pair, which is no character") from None
    return text


# ---- output ----------------------------------------------------------------------------------------------

# Size of a matrix's header. The number of rows is known only at the end, so the header is written last.
HEADER_BYTES = 128


def npy_header(rows: int, columns: int) -> bytes:
    """The first HEADER_BYTES of a .npy file (format 1.0): magic, version, length, a Python literal, spaces."""
    literal = repr({"descr": "<f4", "fortran_order": False, "shape": (rows, columns)})
    padded = literal.ljust(HEADER_BYTES - 11) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded.encode("ascii")


def safetensors_header(rows: int, columns: int) -> bytes:
    """The first HEADER_BYTES of a .safetensors file: length, JSON, spaces."""
    entry = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, 4 * rows * columns]}
    padded = json.dumps({"embeddings": entry}, separators=(",", ":")).ljust(HEADER_BYTES - 8)
    return struct.pack("<Q", len(padded)) + padded.encode("ascii")


class MatrixWriter:
    """Writes rows of float32 after a header of HEADER_BYTES, which `finish` fills in."""

    def __init__(self, file: BinaryIO, columns: int, header: Callable[[int, int], bytes]):
        self.file, self.columns, self.header = file, columns, header
        self.rows = 0
        file.write(bytes(HEADER_BYTES))

    def write(self, vectors: np.ndarray, records: Sequence[dict[str, Any]]) -> None:
        self.file.write(np.ascontiguousarray(vectors, dtype="<f4").data)
        self.rows += len(vectors)

    def finish(self) -> None:
        self.file.seek(0)
        self.file.write(self.header(self.rows, self.columns))


def json_numbers(vector: np.ndarray, row: int) -> str:
    """A vector of float32 in JSON; nine significant digits give each number back exactly.

    Raises: InputError if a number is not finite; `row` is the number of the text, for the message.
    """
    if not np.isfinite(vector).all():
        raise InputError(f"the vector of text {row} is not finite, and JSON cannot hold it")
    return f"[{', '.join(f'{x:.9g}' for x in vector.tolist())}]"


def json_object(record: dict[str, Any], name: str, value: str, row: int) -> str:
    """A line of output: the object of the input, with `value` (already JSON) appended under `name`."""
    others = {key: item for key, item in record.items() if key != name}
    try:
        rest = json.dumps(others, allow_nan=False)
    except ValueError:  # Python reads NaN and Infinity, and takes 1e400 for Infinity
        raise InputError(
            f"text {row} comes with a number that is not finite in float64, and JSON cannot hold it"
        ) from None
    return f'{rest[:-1]}{", " if rest != "{}" else ""}"{name}": {value}}}\n'


class JsonLinesWriter:
    """One object a line."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.rows = 0

    def write(self, vectors: np.ndarray, records: Sequence[dict[str, Any]]) -> None:
        self.file.write("".join(self._lines(vectors, records)).encode("ascii"))
        self.file.flush()

    def _lines(self, vectors: np.ndarray, records: Iterable[dict[str, Any]]) -> Iterator[str]:
        for vector, record in zip(vectors, records, strict=True):
            self.rows += 1
            yield json_object(record, "embedding", json_numbers(vector, self.rows), self.rows)

    def finish(self) -> None:
        self.file.flush()


def writer(suffix: str, file: BinaryIO, columns: int) -> MatrixWriter | JsonLinesWriter:
    """The writer for a file name's suffix (.npy, .safetensors, .jsonl); each has write(vectors, records), finish()."""
    if suffix == ".jsonl":
        return JsonLinesWriter(file)
    return MatrixWriter(file, columns, npy_header if suffix == ".npy" else safetensors_header)

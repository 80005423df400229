"""Reads text from files, a line at a time, in constant memory.

    .txt       a sentence or a paragraph per line; a blank line ends a document
    .jsonl     an object per line, its text is a document
    .parquet   a document per row, in a column of texts

A folder stands for all such files in it, sorted by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from ..text.files import LINE_BYTES, InputError, read_lines

SUFFIXES = (".txt", ".jsonl", ".parquet")


def files_of(paths: Sequence[str | Path]) -> list[Path]:
    """The files of these paths, in order.

    Raises: InputError if a file does not exist or is of another kind, or a folder has no such file.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
            if not inside:
                raise InputError(f"{path} has no file that ends in {', '.join(SUFFIXES)}")
            found += inside
        elif not path.exists():
            raise InputError(f"{path} does not exist")
        elif path.suffix not in SUFFIXES:
            raise InputError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}, or a folder of such files")
        else:
            found.append(path)
    return found


def lines_of(files: Sequence[Path], field: str = "text", line_bytes: int = LINE_BYTES) -> Iterator[str | None]:
    """The non-blank lines of all files, without line ends, and None after each document.

    Args:
        field: the field of objects, or the column, with the text.
        line_bytes: most bytes of a line.

    Raises: InputError that names the file and the line, if a line is too long, not UTF-8, or invalid for its file.
    """
    readers = {".txt": _paragraphs, ".jsonl": _objects, ".parquet": _rows}
    return chain.from_iterable(readers[file.suffix](file, field, line_bytes) for file in files)


def _paragraphs(file: Path, field: str, line_bytes: int) -> Iterator[str | None]:
    within = False
    with open(file, "rb") as stream:
        for line in read_lines(stream, str(file), None, line_bytes):
            blank = not line.text.strip()
            if not blank:
                yield line.text
            elif within:
                yield None
            within = not blank
    if within:
        yield None


def _objects(file: Path, field: str, line_bytes: int) -> Iterator[str | None]:
    with open(file, "rb") as stream:
        for line in read_lines(stream, str(file), field, line_bytes):
            yield from _document(line.text)


def _rows(file: Path, field: str, line_bytes: int) -> Iterator[str | None]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError(f"{file}: Parquet needs pyarrow: pip install pyarrow") from error
    try:
        opened = parquet.ParquetFile(file)
        if field not in opened.schema_arrow.names:
            raise InputError(f"{file}: no column {field!r}; it has {', '.join(opened.schema_arrow.names)}")
        number = 0
        for batch in opened.iter_batches(batch_size=256, columns=[field]):
            for text in batch.column(0).to_pylist():
                number += 1
                if not isinstance(text, str):
                    raise InputError(f"{file}, row {number}: {field!r} must be a text, got {type(text).__name__}")
                if len(text) > line_bytes:
                    raise InputError(
                        f"{file}, row {number}: longer than {line_bytes:,} characters; --max-line-bytes allows more"
                    )
                yield from _document(text)
    except ArrowException as error:
        raise InputError(f"{file} is not a Parquet file: {error}") from error


def _document(text: str) -> Iterator[str | None]:
    lines = [line for line in text.split("\n") if line.strip()]
    yield from lines
    if lines:
        yield None

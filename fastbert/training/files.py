"""Reads examples from files. Each one keeps its place in the file for messages.

    .tsv, .txt   a header, then one row for each line, with tabs between cells; quotes have no meaning
    .csv         a header, then rows with commas between cells, quoted as in RFC 4180
    .jsonl       one object for each line
    CoNLL        one word for each line, with its tag in the last column; an empty line ends a sentence
    SQuAD        JSON of SQuAD 1.1 or 2.0

Cells of tables are kept as they are: NA, null and nan are texts.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

TABLES = (".tsv", ".txt", ".csv", ".jsonl")


_JSON_NAMES = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number",
               bool: "a truth value", type(None): "null"}  # fmt: skip


class DataError(ValueError):
    """An error in a file. The message is one line, with the file's name and the line's number."""


class Row(NamedTuple):
    """A row of a table: its place for messages, and name of a column -> cell."""

    place: str
    cells: dict[str, Any]


class Sentence(NamedTuple):
    """The words of a sentence, with a tag for each word or without tags.

    text, starts: the sentence's text, and the character at which each word begins; None: words are joined by spaces.
    """

    place: str
    words: list[str]
    tags: list[str] | None
    text: str | None = None
    starts: list[int] | None = None


class Answer(NamedTuple):
    """A gold answer. start: its first character in the context; None if the context does not contain the text."""

    text: str
    start: int | None


@dataclass(frozen=True)
class Question:
    """answers: [] if the question has no answer in its context, or if the file gives none."""

    id: str
    question: str
    context: str
    answers: list[Answer] = field(default_factory=list)


class Questions(NamedTuple):
    """The questions of a file, and how many gold answers are not at their offset (repaired), or not in the context
    (lost)."""

    questions: list[Question]
    repaired: int
    lost: int


# ---- tables --------------------------------------------------------------------------------------------------


def read_table(path: str | Path, columns: list[str]) -> list[Row]:
    """The rows of a table that has these columns, and may have others.

    Raises: DataError if a column is missing, a line cannot be parsed, a row has too few cells, or there are no rows.
    """
    path = Path(path)
    rows = list(_objects(path) if path.suffix == ".jsonl" else _cells(path))
    if not rows:
        raise DataError(f"{path} has no rows")
    for row in rows:
        missing = [name for name in columns if name not in row.cells]
        if missing:
            has = ", ".join(map(repr, row.cells)) or "none"
            raise DataError(f"{row.place}: no column {missing[0]!r}; it has {has}")
    return rows


def columns_of(path: str | Path) -> list[str]:
    """The names of a table's columns, from its first line."""
    path = Path(path)
    row = next(_objects(path) if path.suffix == ".jsonl" else _cells(path), None)
    if row is None:
        raise DataError(f"{path} has no rows")
    return list(row.cells)


def _cells(path: Path) -> Iterator[Row]:
    text = read_text(path)
    if path.suffix == ".csv":
        lines = _csv_lines(path, text)
    elif path.suffix in TABLES:
        lines = ((n, line.split("\t")) for n, line in enumerate(_lines(text), 1) if line)
    else:
        raise DataError(f"{path}: expected a table, a file that ends in {', '.join(TABLES)}")
    header = next(lines, (0, None))[1]
    if header is None:
        return
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise DataError(f"{path}: the column {twice[0]!r} is there twice")
    for number, cells in lines:
        if len(cells) != len(header):
            raise DataError(f"{path}, line {number}: {len(cells)} cells, but the header has {len(header)}")
        yield Row(f"{path}, line {number}", dict(zip(header, cells, strict=True)))


def _csv_lines(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for cells in reader:
            if cells:
                yield reader.line_num, cells
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from None


def _objects(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(read_text(path)), 1):
        if not line.strip():
            continue
        try:
            cells = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(cells, dict):
            raise DataError(f"{path}, line {number}: expected a JSON object, got {type(cells).__name__}")
        yield Row(f"{path}, line {number}", cells)


def read_text(path: Path) -> str:
    """A file of UTF-8. A byte order mark is dropped."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8 (byte 0x{error.object[error.start]:02x})") from None


def _lines(text: str) -> list[str]:
    """The lines of a text, split at line feeds. (str.splitlines also splits at U+2028, which occurs in texts.)"""
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines[:-1] if lines[-1] == "" else lines


# ---- tagged words --------------------------------------------------------------------------------------------


def read_conll(path: str | Path, tagged: bool = True) -> list[Sentence]:
    """Sentences. The first column of a line is the word, the last one its tag. Columns are separated by tabs, or by
    white space in a line without tabs. Lines that start with -DOCSTART- are left out.

    tagged: if False, only words are read, and a line may have a single column.

    Raises: DataError if a line has a single column, a tag is not valid, or there are no sentences.
    """
    path = Path(path)
    sentences, words, tags = [], [], []
    for number, line in enumerate([*_lines(read_text(path)), ""], 1):
        line = line.strip()
        if line.startswith("-DOCSTART-"):
            continue
        if line:
            columns = line.split("\t") if "\t" in line else line.split()
            if tagged:
                if len(columns) < 2:
                    raise DataError(f"{path}, line {number}: one column, expected a word and its tag")
                tags.append(_tag(columns[-1].strip(), f"{path}, line {number}"))
            words.append(columns[0].strip())
        elif words:
            place = f"{path}, line {number - len(words)}"
            sentences.append(Sentence(place, words, tags if tagged else None))
            words, tags = [], []
    if not sentences:
        raise DataError(f"{path} has no sentences")
    return sentences


def _tag(tag: str, place: str) -> str:
    prefix, dash, kind = tag.partition("-")
    if tag != "O" and not (prefix in ("B", "I", "E", "S") and dash and kind):
        raise DataError(f"{place}: {tag!r} is no tag; expected O, or B-, I-, E- or S- with a type (columns swapped?)")
    return tag


# ---- questions -----------------------------------------------------------------------------------------------


def read_questions(path: str | Path) -> Questions:
    """The questions of a SQuAD file, or of a .jsonl with `question` and `context`.

    A gold answer that is not at its offset gets the nearest place of its text in the context.

    Raises: DataError if the file has another format, an id occurs twice, or there are no questions.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        rows = read_table(path, ["question", "context"])
        for row in rows:
            for name in ("question", "context"):
                expect_text(row, name)
        questions = [
            Question(str(row.cells.get("id", number)), row.cells["question"], row.cells["context"])
            for number, row in enumerate(rows)
        ]
        return Questions(_with_own_ids(path, questions), 0, 0)
    try:
        data = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not JSON: {error}") from None
    questions, repaired, lost = [], 0, 0
    try:
        for article in _part(data, "data", list):
            for paragraph in _part(article, "paragraphs", list):
                context = _part(paragraph, "context", str)
                for entry in _part(paragraph, "qas", list):
                    key, question, answers = str(_part(entry, "id", (str, int))), _part(entry, "question", str), []
                    for given in [] if entry.get("is_impossible") else entry.get("answers") or ():
                        text, stated = _part(given, "text", str), int(_part(given, "answer_start", (int, str)))
                        start = place_of(text, context, stated)
                        repaired += start is not None and start != stated
                        lost += start is None
                        answers.append(Answer(text, start))
                    questions.append(Question(key, question, context, answers))
    except (TypeError, ValueError) as error:
        raise DataError(f"{path} is not laid out as SQuAD: {error}") from None
    if not questions:
        raise DataError(f"{path} has no questions")
    return Questions(_with_own_ids(path, questions), repaired, lost)


def place_of(text: str, context: str, stated: int) -> int | None:
    """The place of a text in a context: `stated`, else the nearest one, of two the earlier; None if there is none."""
    if not text:
        return None
    if stated >= 0 and context.startswith(text, stated):
        return stated
    stated = min(max(stated, 0), len(context))
    # the last occurrence that begins at `stated` or before it, and the first one after it
    before, after = context.rfind(text, 0, stated + len(text)), context.find(text, stated)
    found = [place for place in (before, after) if place >= 0]
    return min(found, key=lambda place: abs(place - stated)) if found else None


def _with_own_ids(path: Path, questions: list[Question]) -> list[Question]:
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise DataError(f"{path}: the id {question.id!r} is there twice")
        seen.add(question.id)
    return questions


def _part(value: Any, name: str, kind: type | tuple[type, ...]) -> Any:
    """A field of a JSON object. Raises: TypeError if `value` is no object, or has no such field of this type."""
    if not isinstance(value, dict):
        raise TypeError(f"expected an object with {name!r}, got {_JSON_NAMES[type(value)]}")
    if name not in value:
        raise TypeError(f"no {name!r}")
    if not isinstance(value[name], kind):
        wanted = " or ".join(_JSON_NAMES[k] for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise TypeError(f"{name!r} must be {wanted}, got {_JSON_NAMES[type(value[name])]}")
    return value[name]


def expect_text(row: Row, name: str) -> str:
    """The text of a cell. Raises: DataError if a JSON object has another type there."""
    value = row.cells[name]
    if not isinstance(value, str):
        raise DataError(f"{row.place}: {name!r} must be a text, got {type(value).__name__}")
    return value

"""Units into parts, in flat memory, by one process.

    a thread    reads a window of rows and tokenises it        up to two windows ahead, of the next unit too
    the caller  computes its vectors, sorted by length
    a thread    writes them                                    up to two windows behind

A unit whose rows are wrong (a page that cannot be unpacked, a vector that is not finite) fails alone: its part does not
appear, and the others go on. What goes wrong in writing, as on a full disk, ends everything.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from .. import batch_invariant
from ..encoding.encoder import Encoder
from ..functional import is_batch_invariant
from ..text.batching import CHUNK_CHARACTERS, CHUNK_TEXTS, one_ahead
from ..text.files import InputError
from .job import Job
from .manifest import Manifest, part_path
from .reading import open_table
from .units import Unit
from .writing import PartWriter, schema_of_part

# Windows that were computed and are not written yet.
WINDOWS_BEHIND = 2
LARGEST = {"float16": float(np.finfo(np.float16).max)}


@dataclass(frozen=True)
class Done:
    """A unit whose part counts now, or did before."""

    unit: Unit
    receipt: dict[str, Any]


@dataclass(frozen=True)
class Failed:
    """A unit that made no part, and why, in one line."""

    unit: Unit
    reason: str


class Part:
    """A part that is being made: its lock and its file, until it is finished or dropped.

    Attributes:
        receipt: that of somebody who made the part before, or while this waited for the lock; else None.
        schema: of the columns that are read.
        failed: whether the rest of its windows is of no use.
    """

    def __init__(self, unit: Unit, manifest: Manifest):
        self.unit, self.manifest = unit, manifest
        self.schema: pa.Schema | None = None
        self.failed = False
        self._writer: PartWriter | None = None
        self._file, self._lock = contextlib.ExitStack(), contextlib.ExitStack()
        self._lock.enter_context(manifest.place.alone(unit.name))
        self.receipt = manifest.receipt(unit)

    def write(self, window: Window, vectors: np.ndarray, job: Job, description: dict[str, Any]) -> None:
        """vectors: [n, C] float32 of the texts of a window."""
        valid = window.rows >= 0
        of_rows = vectors if window.is_plain else np.zeros((len(valid), vectors.shape[1]), np.float32)
        if not window.is_plain:
            of_rows[valid] = vectors[window.rows[valid]]
        self._open(job, description).write(window.kept, of_rows, valid)

    def finish(self, job: Job, description: dict[str, Any]) -> Done:
        """Puts the part in its place, and then its receipt."""
        if self.receipt is None:
            told = self._open(job, description).finish()
            self._file.close()
            self.receipt = self.unit.to_dict() | told
            del self.receipt["path"]  # the file lies elsewhere on another machine
            self.manifest.add(self.unit, self.receipt)
        self._lock.close()
        return Done(self.unit, self.receipt)

    def drop(self, reason: str) -> Failed:
        """Removes what was written."""
        if self._writer is not None:
            self._writer.drop()
        error = InputError(reason)
        with contextlib.suppress(InputError):
            # the block of the file ends with an exception, so that it removes the file
            self._file.__exit__(InputError, error, None)
        self._lock.close()
        return Failed(self.unit, reason)

    def _open(self, job: Job, description: dict[str, Any]) -> PartWriter:
        if self._writer is None:
            source = {"name": self.unit.source, "first": self.unit.first, "last": self.unit.last}
            file = self._file.enter_context(self.manifest.place.writing(part_path(self.unit.name)))
            schema = schema_of_part(self.schema, job, description, source)
            self._writer = PartWriter(file, schema, job, description["dimension"])
        return self._writer


@dataclass
class Window:
    """Some hundreds or thousands of rows of a part, in order; or its end, with or without an error.

    Attributes:
        kept: the columns of the input.
        ids: of the texts that get a vector.
        rows: [n] int64, which of `ids` is the text of each row; -1 for a row without a vector.
        first: the number of its first row in the unit.
    """

    part: Part
    kept: pa.Table | None = None
    ids: list[list[int]] = field(default_factory=list)
    rows: np.ndarray | None = None
    first: int = 0
    error: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether row i has text i."""
        return len(self.ids) == len(self.rows) and bool((self.rows == np.arange(len(self.rows))).all())


class CorpusEncoder:
    """Makes parts out of units. What it writes goes into the folder of its job.

        job = Job("out", {"id_or_path": "sentence-transformers/all-MiniLM-L6-v2"}, keep=("id",))
        job, units = plan(["in/*.parquet"], job)
        for outcome in CorpusEncoder(job).encode(units): ...

    Args:
        encoder: the one that the job names, where it is at hand already.

    Raises: ManifestError where the folder holds parts of another job.
    """

    def __init__(self, job: Job, encoder: Encoder | None = None):
        self.job = job
        self.encoder = Encoder.from_pretrained(**job.encoder) if encoder is None else encoder
        self.manifest = Manifest(job.out)
        self.description = self.manifest.begin(job.description(self.encoder))
        self.budget = self.encoder.token_budget(job.max_tokens_per_batch)

    @property
    def stats(self):
        return self.encoder.stats

    def encode(self, units: Iterable[Unit]) -> Iterator[Done | Failed]:
        """An outcome for each unit, in their order. `units` is drawn by a thread, one unit ahead.

        Raises: OSError where a part cannot be written. Parts that were finished stay.
        """
        parts: dict[Unit, Part] = {}  # that are neither finished nor dropped
        windows = self._windows(units, parts)
        waiting: deque[Future] = deque()
        settled = (self.job, self.description)
        try:
            with ThreadPoolExecutor(1, "write") as writer:
                for ready in one_ahead(lambda _: next(windows, None), repeat(None)):
                    if (window := ready()) is None:
                        break
                    part = window.part
                    if part.failed:
                        continue
                    vectors = self._vectors(window)
                    if window.error is not None:
                        part.failed = True
                        waiting.append(writer.submit(part.drop, window.error))
                    elif vectors is None:
                        waiting.append(writer.submit(part.finish, *settled))
                    else:
                        waiting.append(writer.submit(part.write, window, vectors, *settled))
                    yield from _outcomes(waiting, parts, WINDOWS_BEHIND)
                yield from _outcomes(waiting, parts, 0)
        finally:
            for part in tuple(parts.values()):
                part.drop("stopped")

    # ---- the caller's thread --------------------------------------------------------------------------------

    def _vectors(self, window: Window) -> np.ndarray | None:
        """[n, C] float32 of the texts of a window; None of an end. One that is not finite is the window's error."""
        if window.rows is None:
            return None
        started = time.perf_counter()
        with batch_invariant(self.job.batch_invariant or is_batch_invariant()):
            vectors = self.encoder.encode_ids(window.ids, self.budget)
        self.stats.seconds += time.perf_counter() - started
        # False also for one that is not a number
        fine = vectors.abs().amax(1) <= LARGEST.get(self.job.precision, torch.finfo(torch.float32).max)
        if not fine.all():
            row = int(np.flatnonzero(window.rows == int((~fine).nonzero()[0]))[0])
            number = vectors[window.rows[row]].abs().amax().item()
            large = f"has {number:g}, more than {self.job.precision} can hold" if number < np.inf else "is not finite"
            window.error = f"{self._place(window, row)}: the vector {large}"
        return vectors.numpy()

    def _place(self, window: Window, row: int) -> str:
        """What messages call a row of a window."""
        unit, number = window.part.unit, window.first + row + 1
        by_rows = not unit.source.endswith(".jsonl")
        place = f"{unit.source}, row {number + unit.first:,}" if by_rows else f"{unit.place}, row {number:,}"
        return place if self.job.id is None else f"{place} ({self.job.id} {window.kept.column(self.job.id)[row]})"

    # ---- the thread that reads ------------------------------------------------------------------------------

    def _windows(self, units: Iterable[Unit], parts: dict[Unit, Part]) -> Iterator[Window]:
        for unit in units:
            part = Part(unit, self.manifest)
            parts[unit] = part
            try:
                if part.receipt is None:
                    with open_table(unit.path, unit.source, self.job) as table:
                        if table.size != unit.size:
                            raise InputError(f"{unit.source} has changed since the parts were planned")
                        part.schema = table.schema
                        yield from self._of_table(part, table)
            except InputError as error:
                yield Window(part, error=str(error))
            else:
                yield Window(part)

    def _of_table(self, part: Part, table: Any) -> Iterator[Window]:
        first = 0
        for rows in windows_of(table.batches(part.unit.first, part.unit.last), table.schema):
            window = Window(part, rows.select(list(self.job.kept)), first=first)
            texts = [self._text(window, row, text) for row, text in enumerate(rows.column(self.job.text).to_pylist())]
            asked = [row for row, text in enumerate(texts) if text is not None]
            window.rows = np.full(len(texts), -1, np.int64)
            if self.job.dedup:
                places = {text: place for place, text in enumerate(dict.fromkeys(texts[row] for row in asked))}
                window.rows[asked] = [places[texts[row]] for row in asked]
            else:
                places = [texts[row] for row in asked]
                window.rows[asked] = np.arange(len(asked))
            window.ids = self.encoder.tokenise(list(places))
            yield window
            first += len(texts)

    def _text(self, window: Window, row: int, text: str | None) -> str | None:
        """The text of a row as the job wants it. Raises: InputError where there is none, and that is refused."""
        if text is not None and (text.strip() or not self.job.empty_is_null):
            return text
        if self.job.nulls == "refuse":
            raise InputError(f"{self._place(window, row)}: there is no text; --nulls says what to make of that")
        return "" if self.job.nulls == "encode" else None


def windows_of(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.Table]:
    """Rows that are tokenised and sorted together, bounded in number and in bytes of the first column, the texts."""
    waiting: list[pa.Table] = []
    rows = size = 0
    for batch in batches:
        table = pa.Table.from_batches([batch]).select(schema.names).cast(schema)
        waiting.append(table)
        rows += table.num_rows
        size += pc.sum(pc.binary_length(table.column(0))).as_py() or 0
        if rows >= CHUNK_TEXTS or size >= CHUNK_CHARACTERS:
            yield pa.concat_tables(waiting)
            waiting, rows, size = [], 0, 0
    if waiting:
        yield pa.concat_tables(waiting)


def _outcomes(waiting: deque[Future], parts: dict[Unit, Part], behind: int) -> Iterator[Done | Failed]:
    """Of what was written: whatever is ready, and as much more as leaves `behind` at most."""
    while waiting and (waiting[0].done() or len(waiting) > behind):
        outcome = waiting.popleft().result()
        if outcome is not None:
            del parts[outcome.unit]
            yield outcome


def expect_done(outcomes: Iterable[Done | Failed]) -> list[dict[str, Any]]:
    """The receipts of all parts, once every unit had its turn. Raises: InputError with the first unit that failed."""
    receipts, failures, first = [], 0, ""
    for outcome in outcomes:
        if isinstance(outcome, Failed):
            failures, first = failures + 1, first or outcome.reason
        else:
            receipts.append(outcome.receipt)
    if failures:
        raise InputError(f"{first} ({failures:,} parts failed; the other {len(receipts):,} are finished)")
    return receipts

"""Makes parts out of units, in one process and in constant memory.

    a thread    reads a window of rows and tokenises it        up to two windows ahead, also of the next unit
    the caller  computes its vectors, sorted by length
    a thread    writes them                                    up to two windows behind

If the rows of a unit are wrong (a page that cannot be decompressed, a vector that is not finite), that unit fails and
the others continue. If writing fails, as on a full disk, the run ends.
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
from ..storage import naming
from ..text.batching import CHUNK_CHARACTERS, CHUNK_TEXTS, one_ahead
from ..text.files import InputError
from .job import Job
from .manifest import Manifest, part_path
from .reading import open_table
from .units import Unit
from .writing import PartWriter, reads_null_vectors, schema_of_part

# The most windows that are computed and not written yet.
WINDOWS_BEHIND = 2
LARGEST = {"float16": float(np.finfo(np.float16).max)}


@dataclass(frozen=True)
class Done:
    """A unit whose part counts."""

    unit: Unit
    receipt: dict[str, Any]


@dataclass(frozen=True)
class Failed:
    """A unit that failed, with the reason in one line. There is no part of it."""

    unit: Unit
    reason: str


class Part:
    """A part that is being made. It holds a lock and an open file until it is finished or dropped.

    Attributes:
        receipt: the receipt, if another process has made the part already, perhaps while this one waited for the lock.
        path: of the file, as messages name it.
        schema: the schema of the columns that are read.
        failed: whether the part has failed, so that its other windows can be skipped.
    """

    def __init__(self, unit: Unit, manifest: Manifest):
        self.unit, self.manifest = unit, manifest
        self.path = manifest.place.path(part_path(unit.name))
        self.schema: pa.Schema | None = None
        self.failed = False
        self._writer: PartWriter | None = None
        self._file, self._lock = contextlib.ExitStack(), contextlib.ExitStack()
        self._lock.enter_context(manifest.place.alone(unit.name))
        self.receipt = manifest.receipt(unit)

    def write(self, window: Window, vectors: np.ndarray, job: Job, description: dict[str, Any]) -> None:
        """Writes the rows of a window. vectors: [n, C] float32, of the window's texts."""
        valid = window.rows >= 0
        of_rows = vectors if window.is_plain else np.zeros((len(valid), vectors.shape[1]), np.float32)
        if not window.is_plain:
            of_rows[valid] = vectors[window.rows[valid]]
        with naming(self.path):
            self._open(job, description).write(window.kept, of_rows, valid)

    def finish(self, job: Job, description: dict[str, Any]) -> Done:
        """Moves the part to its place, then writes its receipt."""
        if self.receipt is None:
            with naming(self.path):
                told = self._open(job, description).finish()
                self._file.close()
            self.receipt = self.unit.facts() | told
            self.manifest.add(self.unit, self.receipt)
        self._lock.close()
        return Done(self.unit, self.receipt)

    def drop(self, reason: str) -> Failed:
        """Removes the unfinished file."""
        if self._writer is not None:
            self._writer.drop()
        error = InputError(reason)
        # An exception in the block that writes the file makes the block remove it. Closing the file first writes what
        # Python still holds of it, which a full disk refuses once more.
        with contextlib.suppress(InputError, OSError):
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
    """Successive rows of a part that are tokenised and sorted together. Without rows it marks the end of the part.

    Attributes:
        kept: the columns that are copied.
        ids: the ids of each text that gets a vector.
        rows: [n] int64, the index into `ids` for each row, or -1 for a row without a vector.
        first: the number of the first row, counted from the beginning of the unit.
        error: why the part fails.
    """

    part: Part
    kept: pa.Table | None = None
    ids: list[list[int]] = field(default_factory=list)
    rows: np.ndarray | None = None
    first: int = 0
    error: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the text of every row i is text i."""
        return len(self.ids) == len(self.rows) and bool((self.rows == np.arange(len(self.rows))).all())


class CorpusEncoder:
    """Makes parts out of units, and writes them to the folder of the job.

        job = Job("out", {"id_or_path": "sentence-transformers/all-MiniLM-L6-v2"}, keep=("id",))
        job, units = plan(["in/*.parquet"], job)
        for outcome in CorpusEncoder(job).encode(units): ...

    Args:
        encoder: the Encoder of the job, if it is loaded already.

    Raises: ManifestError if the folder has parts of another job.
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
        """Yields an outcome for each unit, in order. `units` is iterated in another thread, up to one unit ahead.

        Raises: OSError if a part cannot be written. Finished parts stay.
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
        """Vectors [n, C] float32 of the texts of a window, or None at the end of a part. Sets the window's error if a
        vector is not finite."""
        if window.rows is None:
            return None
        started = time.perf_counter()
        with batch_invariant(self.job.batch_invariant or is_batch_invariant()):
            vectors = self.encoder.encode_ids(window.ids, self.budget)
        self.stats.seconds += time.perf_counter() - started
        # The comparison is false for NaN too
        fine = vectors.abs().amax(1) <= LARGEST.get(self.job.precision, torch.finfo(torch.float32).max)
        if not fine.all():
            row = int(np.flatnonzero(window.rows == int((~fine).nonzero()[0]))[0])
            number = vectors[window.rows[row]].abs().amax().item()
            large = f"has {number:g}, more than {self.job.precision} can hold" if number < np.inf else "is not finite"
            window.error = f"{self._place(window, row)}: the vector {large}"
        return vectors.numpy()

    def _place(self, window: Window, row: int) -> str:
        """The name of a row of a window in messages."""
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
        for rows in windows_of(table.batches(part.unit), table.schema):
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
        """The text to encode for a row, or None if it gets no vector.

        Raises: InputError if `nulls` is "refuse", or if it is "null" and this pyarrow could not read the file.
        """
        if text is not None and (text.strip() or not self.job.empty_is_null):
            return text
        if self.job.nulls == "refuse":
            raise InputError(f"{self._place(window, row)}: there is no text; --nulls says what to make of that")
        if self.job.nulls == "null" and not reads_null_vectors():
            raise InputError(
                f"{self._place(window, row)}: there is no text, and pyarrow {pa.__version__} cannot read the null "
                "vector that such a row gets by default: use --nulls fill, encode or refuse, or pyarrow 26"
            )
        return "" if self.job.nulls == "encode" else None


def windows_of(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.Table]:
    """Joins batches into windows, bounded in their number of rows and in the bytes of the first column, the texts."""
    waiting: list[pa.Table] = []
    rows = size = 0
    for batch in batches:
        table = pa.table([_plain(batch.column(name)) for name in schema.names], schema.names).cast(schema)
        waiting.append(table)
        rows += table.num_rows
        size += pc.sum(pc.binary_length(table.column(0))).as_py() or 0
        if rows >= CHUNK_TEXTS or size >= CHUNK_CHARACTERS:
            yield pa.concat_tables(waiting)
            waiting, rows, size = [], 0, 0
    if waiting:
        yield pa.concat_tables(waiting)


def _plain(array: pa.Array) -> pa.Array:
    """Run-end encoded arrays have no cast to the type of their values."""
    return pc.run_end_decode(array) if pa.types.is_run_end_encoded(array.type) else array


def _outcomes(waiting: deque[Future], parts: dict[Unit, Part], behind: int) -> Iterator[Done | Failed]:
    """Outcomes of finished writes. Waits until at most `behind` writes are left."""
    while waiting and (waiting[0].done() or len(waiting) > behind):
        outcome = waiting.popleft().result()
        if outcome is not None:
            del parts[outcome.unit]
            yield outcome


def expect_done(outcomes: Iterable[Done | Failed]) -> list[dict[str, Any]]:
    """Runs through all outcomes and returns the receipts. Raises: InputError if units failed, with the first reason."""
    receipts, failures, first = [], 0, ""
    for outcome in outcomes:
        if isinstance(outcome, Failed):
            failures, first = failures + 1, first or outcome.reason
        else:
            receipts.append(outcome.receipt)
    if failures:
        raise InputError(f"{first} ({failures:,} parts failed; the other {len(receipts):,} are finished)")
    return receipts

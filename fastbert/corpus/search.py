"""The nearest rows of a corpus to some vectors, exactly: one matrix product for each block of rows, in constant memory.

    score(query, row) = <query, row> / (|query| |row|)

Rows stored in float16 or int8 are converted to float32 first. Of equal scores the earlier row comes first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from ..encoding.encoder import Encoder
from .job import SCALE, VALID, VECTOR, fingerprint
from .manifest import Manifest, ManifestError, part_path
from .reading import explained
from .writing import numbers_of

# Bytes of a block of rows in float32.
BLOCK_BYTES = 32_000_000


@dataclass(frozen=True)
class Hit:
    """A row that was found: its score, its part, its number in that part (from 0), and its kept columns."""

    score: float
    part: str
    row: int
    columns: dict[str, Any]


def asking(manifest: Manifest, model: str | None = None, device: str = "auto") -> Encoder:
    """The Encoder of a corpus, for encoding questions.

    Args:
        model: path or hub id of the model; None for the one in the manifest.

    Raises: ManifestError if the folder has no corpus, or if its weights differ from those of the corpus.
    """
    description = _description(manifest)
    encoder = Encoder.from_pretrained(model or description["model"], device=device, **description["arguments"])
    if fingerprint(encoder) != description["weights"]:
        raise ManifestError(f"{manifest.place.url} was encoded by another model than {model or description['model']}")
    return encoder


def search(manifest: Manifest, queries: np.ndarray, top_k: int) -> list[list[Hit]]:
    """For each of `queries` [Q, C] float32 the `top_k` nearest rows, nearest first. Rows without a vector are left out.

    Raises: ManifestError if the folder has no corpus, or if its vectors have another width; InputError if a part cannot
        be read.
    """
    dimension = _description(manifest)["dimension"]
    if queries.shape[1] != dimension:
        raise ManifestError(f"vectors of {manifest.place.url} have {dimension} numbers, the query's {queries.shape[1]}")
    queries = unit_rows(queries)
    scores = np.full((len(queries), 0), 0.0, np.float32)
    places = np.zeros((len(queries), 0), np.int64)  # numbers of rows, counted through all parts
    parts, starts, start = list(manifest.receipts()), [], 0
    for part in parts:
        starts.append(start)
        for table in _blocks(manifest, part, [VECTOR, SCALE, VALID], dimension):
            vectors, valid = numbers_of(table)
            found = np.where(valid, queries @ unit_rows(vectors).T, -np.inf)
            scores = np.concatenate([scores, found], axis=1)
            places = np.concatenate([places, np.tile(np.arange(start, start + len(valid)), (len(queries), 1))], axis=1)
            scores, places = _best(scores, places, top_k)
            start += len(valid)
    wanted = {int(place) for place in places[scores > -np.inf]}
    columns = _columns(manifest, parts, starts, sorted(wanted))
    hits = []
    for of_query, at in zip(scores, places, strict=True):
        kept = [(float(score), int(place)) for score, place in zip(of_query, at, strict=True) if score > -np.inf]
        hits.append([_hit(score, place, parts, starts, columns) for score, place in kept])
    return hits


def _description(manifest: Manifest) -> dict[str, Any]:
    description = manifest.description()
    if description is None:
        raise ManifestError(f"{manifest.place.url} holds no corpus that fastbert encode --out-dir wrote")
    return description


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Vectors [n, C] divided by their lengths; zeros stay zeros."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


def _best(scores: np.ndarray, places: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """The `top_k` highest scores of each query, in order. Equal scores keep their order, which is that of the rows."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(places, order, 1)


def _blocks(manifest: Manifest, part: str, columns: list[str], dimension: int) -> Iterator[pa.Table]:
    with manifest.place.open(part_path(part)) as file, explained(manifest.place.path(part_path(part))):
        source = parquet.ParquetFile(file, pre_buffer=False)
        names = [name for name in columns if name in source.schema_arrow.names]
        for batch in source.iter_batches(max(1, BLOCK_BYTES // (4 * dimension)), columns=names, use_threads=False):
            yield pa.Table.from_batches([batch])


def _hit(score: float, place: int, parts: list[str], starts: list[int], columns: dict[int, dict]) -> Hit:
    number = int(np.searchsorted(starts, place, side="right")) - 1
    return Hit(score, f"{parts[number]}.parquet", place - starts[number], columns[place])


def _columns(manifest: Manifest, parts: list[str], starts: list[int], places: list[int]) -> dict[int, dict[str, Any]]:
    """The kept columns of some rows, by their numbers counted through all parts."""
    found: dict[int, dict[str, Any]] = {}
    for number, part in enumerate(parts):
        end = starts[number + 1] if number + 1 < len(parts) else np.inf
        inside = [place for place in places if starts[number] <= place < end]
        if not inside:
            continue
        with manifest.place.open(part_path(part)) as file:
            source, row = parquet.ParquetFile(file), starts[number]
            names = [name for name in source.schema_arrow.names if name not in (VECTOR, SCALE, VALID)]
            for group in range(source.num_row_groups):
                count = source.metadata.row_group(group).num_rows
                here = [place for place in inside if row <= place < row + count]
                if here and names:
                    table = source.read_row_group(group, columns=names).take([place - row for place in here])
                    found |= dict(zip(here, table.to_pylist(), strict=True))
                row += count
        found |= {place: {} for place in inside if place not in found}
    return found

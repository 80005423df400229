"""Reads every part again, and compares it with its receipt, and the receipts with the inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import pyarrow as pa
from pyarrow import parquet

from .manifest import DATA, Manifest, part_path
from .reading import BROKEN
from .units import Unit
from .writing import ValuesHash, group_rows

BLOCK = 1 << 22


def verify(manifest: Manifest, units: Sequence[Unit]) -> Iterator[str]:
    """Yields a line for everything that is wrong with a corpus.

    Raises: ManifestError if it has parts of other inputs.
    """
    missing = {unit.name for unit in manifest.missing(units)}
    receipts = manifest.receipts()
    for unit in units:
        if unit.name in missing:
            yield f"{unit.place}: there is no part of it"
        elif found := _faults(manifest, unit.name, receipts[unit.name]):
            yield f"{manifest.place.path(part_path(unit.name))}: {found}"
    counted = {f"{name}.parquet" for name in receipts}
    for name in manifest.place.names(DATA):
        if name not in counted:
            yield f"{manifest.place.path(f'{DATA}/{name}')}: the manifest does not name it"


def _faults(manifest: Manifest, name: str, receipt: dict) -> str | None:
    """What is wrong with a part, in words. Values are compared even if bytes differ, as another writer's do."""
    try:
        with manifest.place.open(part_path(name)) as file:
            digest = hashlib.sha256()
            while block := file.read(BLOCK):
                digest.update(block)
            file.seek(0)
            rows, values = _values(file)
    except FileNotFoundError:
        return "it is gone"
    except BROKEN as error:
        return f"it cannot be read: {' '.join(str(error).split())}"
    if rows != receipt["rows"]:
        return f"it has {rows:,} rows, and the manifest says {receipt['rows']:,}"
    if values != receipt["values"]:
        return "its values are others than those that were written"
    if digest.hexdigest() != receipt["sha256"]:
        return "its values are those that were written, and its bytes are others"
    return None


def _values(file) -> tuple[int, str]:
    """(number of rows, hash of the values) of a part."""
    part = parquet.ParquetFile(file, pre_buffer=False, page_checksum_verification=True)
    found, rows = ValuesHash(), 0
    schema = part.schema_arrow.remove_metadata()
    for batch in part.iter_batches(group_rows(1536), use_threads=False):
        found.add(pa.Table.from_batches([batch], schema=schema))
        rows += batch.num_rows
    return rows, found.hexdigest()

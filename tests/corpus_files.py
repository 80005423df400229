"""Tables of short texts for the tests of corpora, and functions that encode them."""

import csv
import hashlib
import json
import random
from dataclasses import replace

import pytest

pytest.importorskip("pyarrow", reason="needs the corpus extra")

import pyarrow as pa
from pyarrow import parquet

from fastbert.corpus.job import Job
from fastbert.corpus.manifest import Manifest
from fastbert.corpus.run import CorpusEncoder, Done
from fastbert.corpus.units import plan

PLAIN = {"device": "cpu", "dtype": "float32", "impl": "native"}
WORDS = [str(word) for option, value in PLAIN.items() for word in (f"--{option}", value)]


def texts_of(count, seed=0):
    choose = random.Random(seed)
    return [" ".join(choose.choices("abcdefghij", k=choose.randint(1, 12))) for _ in range(count)]


def table_of(count, seed=0):
    """A table with the columns number, text, tags (lists) and facts (structs)."""
    return pa.table(
        {
            "number": range(count),
            "text": texts_of(count, seed),
            "tags": [["x", "y"][: i % 3] for i in range(count)],
            "facts": [{"a": i, "b": None if i % 4 else str(i)} for i in range(count)],
        }
    )


def write(path, table, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, **options)
    return path


def write_arrow(path, table, rows=None, new=pa.ipc.new_file, **options):
    """Writes an Arrow file, or a stream, with `rows` rows in each record batch."""
    with new(path, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as sink:
        sink.write_table(table, max_chunksize=rows)
    return path


def every_kind(folder, count):
    """Writes the same rows in every kind of file, and returns the names of the files."""
    table = table_of(count).select(["number", "text"])
    write(folder / "a.parquet", table)
    for name, new in (("b.arrow", pa.ipc.new_file), ("c.arrow", pa.ipc.new_stream), ("d.feather", pa.ipc.new_file)):
        write_arrow(folder / name, table, 7, new)
    rows = table.to_pylist()
    (folder / "e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    with open(folder / "f.csv", "w", newline="") as file:
        csv.writer(file).writerows([table.column_names, *([row["number"], row["text"]] for row in rows)])
    return ["a.parquet", "b.arrow", "c.arrow", "d.feather", "e.jsonl", "f.csv"]


def job_of(folder, out, **options):
    encoder = {"id_or_path": str(folder), **PLAIN, **options.pop("encoder", {})}
    return Job(str(out), encoder, part_rows=options.pop("part_rows", 100), **options)


def encode(folder, inputs, out, encoder=None, **options):
    """The outcomes of a run that encodes all missing parts."""
    job, units = plan([str(path) for path in inputs], job_of(folder, out, **options))
    return list(CorpusEncoder(job, encoder).encode(Manifest(job.out).missing(units)))


def done(outcomes):
    """Asserts that no part failed, and returns how many were made."""
    outcomes = list(outcomes)
    assert all(isinstance(outcome, Done) for outcome in outcomes), outcomes
    return len(outcomes)


def hashes(out):
    """File name -> content, for every file of the data."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.glob("data/*"))}


def read(out):
    """All parts as one table, in the order of their names."""
    return pa.concat_tables(parquet.ParquetFile(path).read() for path in sorted((out / "data").iterdir()))


def vectors_of(table):
    from fastbert.corpus.writing import numbers_of

    return numbers_of(table)


__all__ = [
    "PLAIN", "WORDS", "done", "encode", "every_kind", "hashes", "job_of", "pa", "parquet", "plan", "read", "replace",
    "table_of", "texts_of", "vectors_of", "write", "write_arrow",
]  # fmt: skip

"""Units by Spark: each of some partitions makes its share of the units one after another, with one model.

    encode(spark, ["in"], Job("/shared/out", {"id_or_path": folder}), partitions=8)

Every machine must reach the inputs and the folder by the same paths or URLs. A task that Spark runs again finds what is
finished. `with_vectors` is for a DataFrame whose rows must pass through Spark.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from ..corpus.job import VECTOR, Job
from ..corpus.units import Unit, plan, shares_of


def encode(spark: Any, inputs: Sequence[str], job: Job, *, partitions: int) -> list[dict[str, Any]]:
    """Makes what is missing; the receipts of that.

    Args:
        partitions: how many. Each loads the model, so there should not be more than Spark can run at once.

    Raises: InputError with the first unit that failed, after the others; ValueError without a partition.
    """
    if partitions < 1:
        raise ValueError(f"partitions must be at least 1, got {partitions}")
    from ..corpus.manifest import Manifest
    from ..corpus.run import expect_done

    job, units = plan(inputs, job)
    missing = Manifest(job.out).missing(units)
    if not missing:
        return []
    shares = shares_of(missing, units, min(partitions, len(missing)))
    # A DataFrame of the numbers of the shares, one in each partition. Rows that Spark distributes itself end up with
    # six in one partition and four in another.
    numbers = spark.range(0, len(shares), numPartitions=len(shares))
    rows = numbers.mapInArrow(partial(_make, job, shares), "outcome binary").collect()
    return expect_done(pickle.loads(row.outcome) for row in rows)


def _make(job: Job, shares: Sequence[Sequence[Unit]], batches: Iterable[Any]) -> Iterator[Any]:
    """In a worker of Spark: the outcomes of a partition's units, pickled."""
    import pyarrow as pa

    from ..corpus.run import CorpusEncoder
    from ..encoding.workers import limit_tokenizer_threads

    limit_tokenizer_threads()
    units = [unit for batch in batches for number in batch.column("id").to_pylist() for unit in shares[number]]
    for outcome in CorpusEncoder(job).encode(units) if units else ():
        yield pa.RecordBatch.from_pydict({"outcome": [pickle.dumps(outcome)]})


def with_vectors(frame: Any, encoder: Mapping[str, Any], text: str = "text") -> Any:
    """The DataFrame with a column "embedding" of arrays of float, null where the text is.

    encoder: arguments of `Encoder.from_pretrained`.
    """
    from pyspark.sql import types

    schema = types.StructType([*frame.schema.fields, types.StructField(VECTOR, types.ArrayType(types.FloatType()))])
    return frame.mapInArrow(_adding(dict(encoder), text, schema.names), schema)


def _adding(encoder: dict[str, Any], text: str, names: Sequence[str]) -> Callable[[Iterable[Any]], Iterator[Any]]:
    def add(batches: Iterable[Any]) -> Iterator[Any]:
        import pyarrow as pa

        from .batches import BatchEncoder

        encode_batch = BatchEncoder(encoder, text, fixed_size=False)
        for batch in batches:
            # Spark takes columns by their position, whatever they are called.
            yield from encode_batch(pa.Table.from_batches([batch])).select(names).to_batches()

    return add

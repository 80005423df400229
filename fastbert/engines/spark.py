"""Units by Spark: each of some partitions makes its units one after another, with one model.

    encode(spark, ["in"], Job("/shared/out", {"id_or_path": folder}), partitions=8)

Every machine must reach the inputs and the folder by the same paths or URLs. A task that Spark runs again finds what is
finished. `with_vectors` is for a DataFrame whose rows must pass through Spark.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from ..corpus.job import VECTOR, Job
from ..corpus.units import Unit, plan


def encode(spark: Any, inputs: Sequence[str], job: Job, *, partitions: int) -> list[dict[str, Any]]:
    """Makes what is missing; the receipts of that.

    Raises: InputError with the first unit that failed, after the others.
    """
    from ..corpus.manifest import Manifest
    from ..corpus.run import Done, Failed, expect_done

    job, units = plan(inputs, job)
    rows = [(json.dumps(unit.to_dict()),) for unit in Manifest(job.out).missing(units)]
    if not rows:
        return []
    shared = spark.createDataFrame(rows, "unit string").repartition(partitions)
    found = [json.loads(row.outcome) for row in shared.mapInArrow(partial(_make, job), "outcome string").collect()]
    made = [
        (Failed if "reason" in outcome else Done, {**outcome, "unit": Unit(**outcome["unit"])}) for outcome in found
    ]
    return expect_done(kind(**outcome) for kind, outcome in made)


def _make(job: Job, batches: Iterable[Any]) -> Iterator[Any]:
    """In a worker of Spark: the outcomes of a partition's units, as JSON."""
    import pyarrow as pa

    from ..corpus.run import CorpusEncoder

    units = [Unit(**json.loads(told)) for batch in batches for told in batch.column("unit").to_pylist()]
    for outcome in CorpusEncoder(job).encode(units) if units else ():
        yield pa.RecordBatch.from_pydict({"outcome": [json.dumps(asdict(outcome))]})


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

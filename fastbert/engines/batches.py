"""Vectors of rows that pass through an engine: the functions that maps of Ray and Spark call.

For those whose data must pass through the engine; `fastbert.corpus` reads and writes files itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from ..corpus.job import VECTOR
from ..encoding.encoder import Encoder


class BatchEncoder:
    """A table with a column of texts -> the same table with a column "embedding" at its end.

        dataset.map_batches(BatchEncoder, fn_constructor_args=(dict(id_or_path=folder),), batch_format="pyarrow")

    Args:
        encoder: arguments of `Encoder.from_pretrained`.
        text: the column of texts; where it is null, so is the vector.
        fixed_size: whether a vector is a FixedSizeList of C float32, or a list, which engines without the former take.
    """

    def __init__(self, encoder: Mapping[str, Any], text: str = "text", fixed_size: bool = True):
        self.encoder, self.text = Encoder.from_pretrained(**encoder), text
        element = pa.field("element", pa.float32())
        self.kind = pa.list_(element, self.encoder.dimension) if fixed_size else pa.list_(element)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Raises: TypeError for batches of another kind; KeyError, ValueError for a table without texts, or with
        vectors."""
        if not isinstance(table, pa.Table):
            raise TypeError(
                f'batches must be pyarrow tables (batch_format="pyarrow" in Ray), got {type(table).__name__}'
            )
        if VECTOR in table.column_names:
            raise ValueError(f"there is a column {VECTOR!r} already")
        if self.text not in table.column_names:
            raise KeyError(f"no column {self.text!r} in {table.column_names}")
        texts = table.column(self.text).to_pylist()
        vectors = iter(self.encoder.encode([text for text in texts if text is not None]).numpy())
        rows = pa.array([None if text is None else next(vectors) for text in texts], self.kind)
        return table.append_column(pa.field(VECTOR, self.kind), rows)

"""DeBERTa's attention, whose scores depend on distances between tokens by a table of learned vectors."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn as nn
from torch import Tensor

from .. import functional as F
from .description import Distances, Part
from .shared import Pass
from .steps import can_fuse, lay_out


class Table(NamedTuple):
    """The table of distances in a pass.

    Attributes:
        rows: [R, C], the vectors of the distances that a batch of this width can have.
        lut: [2 S - 1] int32, the row for each distance i - j from -(S - 1) up.
    """

    rows: Tensor
    lut: Tensor


def _project(part: Part, rows: Tensor, head_dim: int, shared: Pass) -> Tensor:
    """rows [R, C] -> [R, H, D]. A module that is called gets [1, R, C], as in the original."""
    if not can_fuse(part):
        return part.module(rows[None])[0].unflatten(-1, (-1, head_dim))
    linear = part.module
    lay_out(shared, linear)
    y = F.linear(rows, linear.weight, linear.bias, impl=F.products_beside(shared.impl))
    return y.unflatten(-1, (-1, head_dim))


def attend(
    q: Tensor, k: Tensor, v: Tensor, distances: Distances, table_dropout: float, dropout_p: float, shared: Pass,
    stream: int,
) -> Tensor:  # fmt: skip
    """q, k, v [T, H, D] -> [T, H * D]. table_dropout: probability of the dropout on the table, drawn in every layer."""
    rows, lut = shared.distances
    rows = nn.functional.dropout(rows, table_dropout) if table_dropout > 0.0 else rows
    pk, pq = (
        None if part is None else _project(part, rows, q.shape[-1], shared) for part in (distances.key, distances.query)
    )
    batch, options = shared.batch, shared.dropout_of_probabilities(dropout_p, stream)
    if not shared.padded:
        o = F.disentangled_attention(
            q, k, v, pk, pq, lut, batch.cu_seqlens, batch.max_seqlen, schedule=shared.schedule, impl=shared.impl,
            **options,
        )  # fmt: skip
        return o.flatten(1)
    q, k, v = (t.unflatten(0, batch.padded_shape) for t in (q, k, v))
    return F.disentangled_attention_padded(q, k, v, pk, pq, lut, shared.real(), **options).flatten(0, 1).flatten(1)

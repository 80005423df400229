"""DeBERTa's attention, whose scores depend on the distance between two tokens by a table of learned vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import _disentangled_native
from ..kernels._checks import expect_sequences
from ._choice import Impl, resolve
from ._expect import expect_cu_seqlens, expect_dropout, expect_integers, expect_one_device

__all__ = ["disentangled_attention", "disentangled_attention_padded"]


def disentangled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pk: Tensor | None,
    pq: Tensor | None,
    lut: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    sequence_ids: Tensor | None = None,
    scale: float | None = None,
    schedule: Any = None,
    impl: Impl | None = None,
) -> Tensor:
    """Disentangled attention (He et al., arXiv:2006.03654) of each packed sequence over itself.

        s[i, j] = scale * (q[i] . k[j] + q[i] . pk[lut[i - j]] + k[j] . pq[lut[i - j]])
        o = dropout(softmax(s)) v

    Args:
        q, k, v: [T, H, D], any strides with the last dimension contiguous.
        pk, pq: [R, H, D], the vectors of distances as keys (content to position) and as queries (position to content);
            None if the model lacks that term. Differentiable, as are q, k and v.
        lut: [2 S - 1] int32, S >= max_seqlen: entry S - 1 + i - j is the row of pk and pq for the distance i - j.
        cu_seqlens: [B + 1] int32, starts at 0, ends at T.
        max_seqlen: at least the longest sequence's length.
        dropout_p, seed, stream, sequence_ids, schedule: as in `attention`.
        scale: by default 1 / sqrt(D (1 + terms)), where terms is the number of given tables.
        impl: see the module. The Triton kernels take heads of at most 64, and None chooses "native" for wider ones.

    Returns: o [T, H, D] in q's dtype.
    Raises: ValueError on shapes, dtypes or devices that do not fit; on a CPU also if lut has an entry outside of the
        rows of pk or pq.
    """
    op = "disentangled_attention"
    if q.dim() != 3:
        raise ValueError(f"{op}: q must be [T, H, D], got {tuple(q.shape)}")
    _expect_tables(op, q, k, v, pk, pq, lut, max_seqlen)
    expect_dropout(op, dropout_p, seed)
    expect_cu_seqlens(op, cu_seqlens)
    if schedule is None:  # otherwise `attention_schedule` has checked them
        expect_sequences(op, "cu_seqlens", cu_seqlens, q.shape[0], max_seqlen)
    expect_integers(op, "sequence_ids", sequence_ids, cu_seqlens.shape[0] - 1)
    if impl is None and q.shape[-1] > _disentangled_native.WIDEST_IN_TRITON:
        impl, schedule = "native", None  # the schedule was made for Triton kernels
    return resolve(op, impl, q)(
        q, k, v, pk, pq, lut, cu_seqlens, max_seqlen,
        dropout_p=dropout_p, seed=seed, stream=stream, sequence_ids=sequence_ids, scale=scale,
        schedule=schedule,
    )  # fmt: skip


def disentangled_attention_padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pk: Tensor | None,
    pq: Tensor | None,
    lut: Tensor,
    real: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    sequence_ids: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`disentangled_attention` of padded sequences in all rows, by plain products as DeBERTa computes it.

    Args:
        q, k, v: [B, S, H, D].
        real: [B, S] bool, True at tokens; by default everywhere. Tokens see tokens only; a row of padding attends
            equally to all columns of its sequence, including padding.
        All others as in `disentangled_attention`.

    Returns: o [B, S, H, D].
    Raises: ValueError on shapes, dtypes or devices that do not fit.
    """
    op = "disentangled_attention_padded"
    if q.dim() != 4:
        raise ValueError(f"{op}: q must be [B, S, H, D], got {tuple(q.shape)}")
    _expect_tables(op, q, k, v, pk, pq, lut, q.shape[1])
    expect_dropout(op, dropout_p, seed)
    if real is not None and (real.dtype != torch.bool or real.shape != q.shape[:2]):
        raise ValueError(f"{op}: real must be {tuple(q.shape[:2])} bool, got {tuple(real.shape)} {real.dtype}")
    expect_integers(op, "sequence_ids", sequence_ids, q.shape[0])
    return _disentangled_native.disentangled_attention_padded(
        q, k, v, pk, pq, lut, real,
        dropout_p=dropout_p, seed=seed, stream=stream, sequence_ids=sequence_ids, scale=scale,
    )  # fmt: skip


def _expect_tables(op: str, q, k, v, pk, pq, lut, longest: int) -> None:
    if not q.shape == k.shape == v.shape or len({q.dtype, k.dtype, v.dtype}) != 1:
        found = [(t.dtype, tuple(t.shape)) for t in (q, k, v)]
        raise ValueError(f"{op}: q, k and v must be alike, got {found}")
    tables = [t for t in (pk, pq) if t is not None]
    if any(t.dim() != 3 or t.shape[1:] != q.shape[-2:] or t.dtype != q.dtype for t in tables):
        found = [(t.dtype, tuple(t.shape)) for t in tables]
        raise ValueError(f"{op}: pk and pq must be [R, {q.shape[-2]}, {q.shape[-1]}] {q.dtype}, got {found}")
    if lut.dtype != torch.int32 or lut.dim() != 1 or lut.shape[0] % 2 == 0 or lut.shape[0] < 2 * longest - 1:
        raise ValueError(f"{op}: lut must be [2 S - 1] int32 with S >= {longest}, got {lut.dtype} {tuple(lut.shape)}")
    expect_one_device(op, q=q, k=k, v=v, pk=pk, pq=pq, lut=lut)
    if tables and lut.is_cpu and not torch.compiler.is_compiling():
        least, most = (int(t) for t in lut.aminmax())
        rows = min(t.shape[0] for t in tables)
        if least < 0 or most >= rows:
            raise ValueError(f"{op}: lut must name rows of pk and pq, 0 to {rows - 1}, got {least} to {most}")

"""Device code of disentangled attention. Equations are in `disentangled.py`, functions shared with plain attention in
`_attention_common.py`.

A tile of scores has BLOCK rows and BLOCK columns, so it has 2 BLOCK - 1 successive distances i - j. Their rows of a
table are gathered by `lut`; one product computes the scores of all these distances, and row m and column n of the tile
read theirs at distance index w:

    w = m - n + BLOCK - 1
    q pk^T [BLOCK, 2 BLOCK] at (m, w),   pq k^T [2 BLOCK, BLOCK] at (w, n)

The backward pass inverts this: the gradient at (m, w) is that of the score at column n = m - w + BLOCK - 1.

Loops are compiled with disable_licm, so that invariants are not computed before the loop: positions within a tile, and
along a diagonal the rows of the tables, would occupy registers that the products need.
"""

import triton
import triton.language as tl

from ._attention_common import (
    LN_2,
    Dropout,
    Head,
    _columns,
    _dot,
    _dropout_keys,
    _load_lse_log2,
    _load_rows,
    _origins,
    _scheduled_block,
    _span,
    _store_rows,
)
from ._random_triton import _keep_mask

RUNTIME_INTS = ["first_entry", "tokens", "stream_id", "threshold", "reach"]


@triton.jit
def _table_rows(
    table_ptr, lut_ptr, reach, stride, first,
    BLOCK_W: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The rows of one head of a table for the distances from `first` on [BLOCK_W, BLOCK_D]; zero past its reach."""
    distances = first + tl.arange(0, BLOCK_W)
    exists = (distances > -reach) & (distances < reach)
    slots = tl.load(lut_ptr + (reach - 1) + distances, mask=exists, other=0)
    cols, mask_d = _columns(HEAD_DIM, BLOCK_D, False)
    ptrs = table_ptr + slots[:, None].to(tl.int64) * stride + cols[None, :]
    return tl.load(ptrs, mask=exists[:, None] & mask_d[None, :], other=0.0)


@triton.jit
def _places(BLOCK: tl.constexpr):
    """w of each element of a tile [BLOCK, BLOCK]."""
    m, n = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    return m[:, None] - n[None, :] + (BLOCK - 1)


@triton.jit
def _products(q, k, pk, pq, HAS_PK: tl.constexpr, HAS_PQ: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """q k^T plus the terms of the distances, [BLOCK, BLOCK]; pk, pq [2 BLOCK, D] by distance."""
    qk = _dot(q, tl.trans(k), None, PRECISION)
    if HAS_PK:
        qk += tl.gather(_dot(q, tl.trans(pk), None, PRECISION), _places(BLOCK), 1)
    if HAS_PQ:
        qk += tl.gather(_dot(pq, tl.trans(k), None, PRECISION), _places(BLOCK), 0)
    return qk


@triton.jit
def _products_transposed(
    q, k, pk, pq, HAS_PK: tl.constexpr, HAS_PQ: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr
):
    """The transpose of `_products`: a row for each key."""
    kq = _dot(k, tl.trans(q), None, PRECISION)
    if HAS_PK:
        kq += tl.gather(_dot(pk, tl.trans(q), None, PRECISION), tl.trans(_places(BLOCK)), 0)
    if HAS_PQ:
        kq += tl.gather(_dot(k, tl.trans(pq), None, PRECISION), tl.trans(_places(BLOCK)), 1)
    return kq


@triton.jit
def _by_distance(ds, BLOCK: tl.constexpr, OF_ROWS: tl.constexpr):
    """ds [BLOCK, BLOCK] arranged by distance: [BLOCK, 2 BLOCK], zero at distances without a column. OF_ROWS: the rows
    of ds are queries, along which w falls; otherwise keys."""
    own, w = tl.arange(0, BLOCK)[:, None], tl.arange(0, 2 * BLOCK)[None, :]
    other = own - w + (BLOCK - 1) if OF_ROWS else own + w - (BLOCK - 1)
    exists = (other >= 0) & (other < BLOCK)
    return tl.where(exists, tl.gather(ds, tl.where(exists, other, 0), 1), 0.0)


@triton.jit
def _distances_by_row(ds, BLOCK: tl.constexpr, OF_ROWS: tl.constexpr):
    """The transpose of `_by_distance` of the transpose of ds: [2 BLOCK, BLOCK]."""
    own, w = tl.arange(0, BLOCK)[None, :], tl.arange(0, 2 * BLOCK)[:, None]
    other = own - w + (BLOCK - 1) if OF_ROWS else own + w - (BLOCK - 1)
    exists = (other >= 0) & (other < BLOCK)
    return tl.where(exists, tl.gather(ds, tl.where(exists, other, 0), 0), 0.0)


@triton.jit(do_not_specialize=RUNTIME_INTS)
def _disentangled_fwd_kernel(
    q_ptr, k_ptr, v_ptr, spans_ptr, schedule_ptr,         # in:  [T, H, D] x 3, cu_seqlens [B + 1], [n, 2]
    pk_ptr, pq_ptr, lut_ptr, seed_ptr, sequence_ids_ptr,  # in:  [R, H, D] x 2, [2 reach - 1], [1], [B]
    o_ptr, lse_ptr,                                       # out: [T, H, D], [H, T]
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    first_entry, n_heads, tokens, reach, scale_log2, keep_scale, stream_id, threshold,
    HAS_PK: tl.constexpr, HAS_PQ: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_IDS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o and lse of BLOCK rows of one sequence and head."""
    sequence, row, head = _scheduled_block(schedule_ptr, first_entry, n_heads, BLOCK, TILE)
    if sequence < 0:
        return
    start, length = _span(spans_ptr, sequence, False)
    if row >= length:
        return
    h = head.to(tl.int64)
    q_head = Head(q_ptr + (start * stride_qt + h * stride_qh), length, stride_qt)
    k_head = Head(k_ptr + (start * stride_kt + h * stride_kh), length, stride_kt)
    v_head = Head(v_ptr + (start * stride_vt + h * stride_vh), length, stride_vt)
    stride_table = n_heads * HEAD_DIM
    if HAS_PK:
        pk_ptr += h * HEAD_DIM
    if HAS_PQ:
        pq_ptr += h * HEAD_DIM

    rows = row + tl.arange(0, BLOCK)
    q = _load_rows(q_head, rows, HEAD_DIM, BLOCK_D, False, True)
    keys = rows
    if HAS_DROPOUT:
        keys = _dropout_keys(Dropout(seed_ptr, stream_id, sequence_ids_ptr), h, sequence, rows, HAS_IDS)
    acc = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
    m_i = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    l_i = tl.zeros((BLOCK,), dtype=tl.float32)
    for col in tl.range(0, length, BLOCK, disable_licm=True):
        cols = col + tl.arange(0, BLOCK)
        k = _load_rows(k_head, cols, HEAD_DIM, BLOCK_D, False, True)
        v = _load_rows(v_head, cols, HEAD_DIM, BLOCK_D, False, True)
        first = row - col - (BLOCK - 1)
        if HAS_PK:
            pk_rows = _table_rows(pk_ptr, lut_ptr, reach, stride_table, first, 2 * BLOCK, HEAD_DIM, BLOCK_D)
        else:
            pk_rows = k
        if HAS_PQ:
            pq_rows = _table_rows(pq_ptr, lut_ptr, reach, stride_table, first, 2 * BLOCK, HEAD_DIM, BLOCK_D)
        else:
            pq_rows = k
        s = _products(q, k, pk_rows, pq_rows, HAS_PK, HAS_PQ, BLOCK, PRECISION) * scale_log2
        s = tl.where(cols[None, :] < length, s, float("-inf"))

        m_new = tl.maximum(m_i, tl.max(s, 1))
        p = tl.exp2(s - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        m_i = m_new
        l_i = l_i * alpha + tl.sum(p, 1)
        if HAS_DROPOUT:
            p = tl.where(_keep_mask(keys[:, None], cols[None, :], threshold), p, 0.0)
        acc = _dot(p.to(v.dtype), v, acc * alpha[:, None], PRECISION)

    o_origin, lse_origin = _origins(sequence, start, head, n_heads, tokens, HEAD_DIM, False)
    o = acc * (keep_scale / l_i)[:, None]
    _store_rows(Head(o_ptr + o_origin, length, n_heads * HEAD_DIM), o, rows, HEAD_DIM, BLOCK_D, False)
    tl.store(lse_ptr + lse_origin + rows, (m_i + tl.log2(l_i)) * LN_2, mask=rows < length)


@triton.jit(do_not_specialize=RUNTIME_INTS)
def _disentangled_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, spans_ptr, schedule_ptr,         # in:  as in the forward kernel
    pk_ptr, pq_ptr, lut_ptr, seed_ptr, sequence_ids_ptr,
    o_ptr, lse_ptr, do_ptr,                               # in:  [T, H, D], [H, T], [T, H, D]
    dq_ptr, delta_ptr,                                    # out: [T, H, D], [H, T]
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    first_entry, n_heads, tokens, reach, scale, scale_log2, keep_scale, stream_id, threshold,
    HAS_PK: tl.constexpr, HAS_PQ: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_IDS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """delta and dq of BLOCK rows of one sequence and head. The rows of pk contribute to dq like keys."""
    sequence, row, head = _scheduled_block(schedule_ptr, first_entry, n_heads, BLOCK, TILE)
    if sequence < 0:
        return
    start, length = _span(spans_ptr, sequence, False)
    if row >= length:
        return
    h = head.to(tl.int64)
    q_head = Head(q_ptr + (start * stride_qt + h * stride_qh), length, stride_qt)
    k_head = Head(k_ptr + (start * stride_kt + h * stride_kh), length, stride_kt)
    v_head = Head(v_ptr + (start * stride_vt + h * stride_vh), length, stride_vt)
    stride_table = n_heads * HEAD_DIM
    if HAS_PK:
        pk_ptr += h * HEAD_DIM
    if HAS_PQ:
        pq_ptr += h * HEAD_DIM
    o_origin, lse_origin = _origins(sequence, start, head, n_heads, tokens, HEAD_DIM, False)

    rows = row + tl.arange(0, BLOCK)
    q = _load_rows(q_head, rows, HEAD_DIM, BLOCK_D, False, True)
    keys = rows
    if HAS_DROPOUT:
        keys = _dropout_keys(Dropout(seed_ptr, stream_id, sequence_ids_ptr), h, sequence, rows, HAS_IDS)
    do = _load_rows(Head(do_ptr + o_origin, length, n_heads * HEAD_DIM), rows, HEAD_DIM, BLOCK_D, False, True)
    o = _load_rows(Head(o_ptr + o_origin, length, n_heads * HEAD_DIM), rows, HEAD_DIM, BLOCK_D, False, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + lse_origin + rows, delta, mask=rows < length)
    lse_log2 = _load_lse_log2(lse_ptr + lse_origin, rows, length)

    dq = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
    for col in tl.range(0, length, BLOCK, disable_licm=True):
        cols = col + tl.arange(0, BLOCK)
        k = _load_rows(k_head, cols, HEAD_DIM, BLOCK_D, False, True)
        v = _load_rows(v_head, cols, HEAD_DIM, BLOCK_D, False, True)
        first = row - col - (BLOCK - 1)
        if HAS_PK:
            pk_rows = _table_rows(pk_ptr, lut_ptr, reach, stride_table, first, 2 * BLOCK, HEAD_DIM, BLOCK_D)
        else:
            pk_rows = k
        if HAS_PQ:
            pq_rows = _table_rows(pq_ptr, lut_ptr, reach, stride_table, first, 2 * BLOCK, HEAD_DIM, BLOCK_D)
        else:
            pq_rows = k
        s = _products(q, k, pk_rows, pq_rows, HAS_PK, HAS_PQ, BLOCK, PRECISION) * scale_log2
        p = tl.where(cols[None, :] < length, tl.exp2(s - lse_log2[:, None]), 0.0)
        dp = _dot(do, tl.trans(v), None, PRECISION)
        if HAS_DROPOUT:
            dp = tl.where(_keep_mask(keys[:, None], cols[None, :], threshold), dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        dq = _dot(ds.to(k.dtype), k, dq, PRECISION)
        if HAS_PK:
            dq = _dot(_by_distance(ds, BLOCK, True).to(k.dtype), pk_rows, dq, PRECISION)

    _store_rows(Head(dq_ptr + o_origin, length, n_heads * HEAD_DIM), dq * scale, rows, HEAD_DIM, BLOCK_D, False)


@triton.jit(do_not_specialize=RUNTIME_INTS)
def _disentangled_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, spans_ptr, schedule_ptr,         # in:  as in the forward kernel
    pk_ptr, pq_ptr, lut_ptr, seed_ptr, sequence_ids_ptr,
    lse_ptr, do_ptr, delta_ptr,                           # in:  [H, T], [T, H, D], [H, T]
    dk_ptr, dv_ptr,                                       # out: [T, H, D] x 2
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    first_entry, n_heads, tokens, reach, scale, scale_log2, keep_scale, stream_id, threshold,
    HAS_PK: tl.constexpr, HAS_PQ: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_IDS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK keys of one sequence and head. The rows of pq contribute to dk like queries."""
    sequence, col, head = _scheduled_block(schedule_ptr, first_entry, n_heads, BLOCK, TILE)
    if sequence < 0:
        return
    start, length = _span(spans_ptr, sequence, False)
    if col >= length:
        return
    h = head.to(tl.int64)
    q_head = Head(q_ptr + (start * stride_qt + h * stride_qh), length, stride_qt)
    k_head = Head(k_ptr + (start * stride_kt + h * stride_kh), length, stride_kt)
    v_head = Head(v_ptr + (start * stride_vt + h * stride_vh), length, stride_vt)
    stride_table = n_heads * HEAD_DIM
    if HAS_PK:
        pk_ptr += h * HEAD_DIM
    if HAS_PQ:
        pq_ptr += h * HEAD_DIM
    o_origin, lse_origin = _origins(sequence, start, head, n_heads, tokens, HEAD_DIM, False)
    do_head = Head(do_ptr + o_origin, length, n_heads * HEAD_DIM)

    cols = col + tl.arange(0, BLOCK)
    k = _load_rows(k_head, cols, HEAD_DIM, BLOCK_D, False, True)
    v = _load_rows(v_head, cols, HEAD_DIM, BLOCK_D, False, True)
    dk = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
    # rows past the end have lse = inf, so that their p is zero; keys past the end are not stored
    for row in tl.range(0, length, BLOCK, disable_licm=True):
        rows = row + tl.arange(0, BLOCK)
        q = _load_rows(q_head, rows, HEAD_DIM, BLOCK_D, False, True)
        do = _load_rows(do_head, rows, HEAD_DIM, BLOCK_D, False, True)
        first = row - col - (BLOCK - 1)
        if HAS_PK:
            pk_rows = _table_rows(pk_ptr, lut_ptr, reach, stride_table, first, 2 * BLOCK, HEAD_DIM, BLOCK_D)
        else:
            pk_rows = k
        if HAS_PQ:
            pq_rows = _table_rows(pq_ptr, lut_ptr, reach, stride_table, first, 2 * BLOCK, HEAD_DIM, BLOCK_D)
        else:
            pq_rows = k
        s = _products_transposed(q, k, pk_rows, pq_rows, HAS_PK, HAS_PQ, BLOCK, PRECISION) * scale_log2
        p = tl.exp2(s - _load_lse_log2(lse_ptr + lse_origin, rows, length)[None, :])
        dp = _dot(v, tl.trans(do), None, PRECISION)
        kept = p
        if HAS_DROPOUT:
            keys = _dropout_keys(Dropout(seed_ptr, stream_id, sequence_ids_ptr), h, sequence, rows, HAS_IDS)
            keep = _keep_mask(keys[None, :], cols[:, None], threshold)
            kept = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        delta = tl.load(delta_ptr + lse_origin + rows, mask=rows < length, other=0.0)
        dv = _dot(kept.to(do.dtype), do, dv, PRECISION)
        ds = p * (dp - delta[None, :])
        dk = _dot(ds.to(q.dtype), q, dk, PRECISION)
        if HAS_PQ:
            dk = _dot(_by_distance(ds, BLOCK, False).to(q.dtype), pq_rows, dk, PRECISION)

    _store_rows(Head(dk_ptr + o_origin, length, n_heads * HEAD_DIM), dk * scale, cols, HEAD_DIM, BLOCK_D, False)
    _store_rows(Head(dv_ptr + o_origin, length, n_heads * HEAD_DIM), dv * keep_scale, cols, HEAD_DIM, BLOCK_D, False)


@triton.jit(do_not_specialize=["n_sequences", "n_parts", "n_tiles", "tokens", "stream_id", "threshold", "reach"])
def _disentangled_bwd_diagonal_kernel(
    q_ptr, k_ptr, v_ptr, spans_ptr,                       # in:  as in the forward kernel
    pk_ptr, pq_ptr, lut_ptr, seed_ptr, sequence_ids_ptr,
    lse_ptr, do_ptr, delta_ptr,                           # in:  [H, T], [T, H, D], [H, T]
    part_ptr,                                             # out: [parts, 2 n_tiles - 1, H, 2 BLOCK, D] fp32
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    n_sequences, n_parts, n_tiles, n_heads, tokens, reach, scale, scale_log2, keep_scale, stream_id, threshold,
    HAS_PK: tl.constexpr, HAS_PQ: tl.constexpr, OF_PK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HAS_IDS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The part of the gradient of pk (OF_PK) or pq that comes from one diagonal of tiles, one head, and every
    `n_parts`-th sequence. On a diagonal row tile minus column tile is constant, so all its tiles have the same
    distances."""
    pid = tl.program_id(0)
    head, place = pid % n_heads, pid // n_heads
    diagonal = place % (2 * n_tiles - 1) - (n_tiles - 1)
    part = place // (2 * n_tiles - 1)
    h = head.to(tl.int64)
    first = diagonal * BLOCK - (BLOCK - 1)
    stride_table = n_heads * HEAD_DIM
    acc = tl.zeros((2 * BLOCK, BLOCK_D), dtype=tl.float32)
    for index in tl.range(0, tl.cdiv(n_sequences - part, n_parts), disable_licm=True):
        sequence = part + index * n_parts
        start, length = _span(spans_ptr, sequence, False)
        q_head = Head(q_ptr + (start * stride_qt + h * stride_qh), length, stride_qt)
        k_head = Head(k_ptr + (start * stride_kt + h * stride_kh), length, stride_kt)
        v_head = Head(v_ptr + (start * stride_vt + h * stride_vh), length, stride_vt)
        o_origin, lse_origin = _origins(sequence, start, head, n_heads, tokens, HEAD_DIM, False)
        do_head = Head(do_ptr + o_origin, length, n_heads * HEAD_DIM)
        tiles = tl.cdiv(length, BLOCK)
        for tile in tl.range(tl.maximum(diagonal, 0), tl.minimum(tiles, tiles + diagonal), disable_licm=True):
            rows = tile * BLOCK + tl.arange(0, BLOCK)
            cols = (tile - diagonal) * BLOCK + tl.arange(0, BLOCK)
            q = _load_rows(q_head, rows, HEAD_DIM, BLOCK_D, False, True)
            do = _load_rows(do_head, rows, HEAD_DIM, BLOCK_D, False, True)
            k = _load_rows(k_head, cols, HEAD_DIM, BLOCK_D, False, True)
            v = _load_rows(v_head, cols, HEAD_DIM, BLOCK_D, False, True)
            if HAS_PK:
                pk_rows = _table_rows(
                    pk_ptr + h * HEAD_DIM, lut_ptr, reach, stride_table, first, 2 * BLOCK, HEAD_DIM, BLOCK_D
                )
            else:
                pk_rows = k
            if HAS_PQ:
                pq_rows = _table_rows(
                    pq_ptr + h * HEAD_DIM, lut_ptr, reach, stride_table, first, 2 * BLOCK, HEAD_DIM, BLOCK_D
                )
            else:
                pq_rows = k
            s = _products(q, k, pk_rows, pq_rows, HAS_PK, HAS_PQ, BLOCK, PRECISION) * scale_log2
            p = tl.exp2(s - _load_lse_log2(lse_ptr + lse_origin, rows, length)[:, None])
            p = tl.where(cols[None, :] < length, p, 0.0)
            dp = _dot(do, tl.trans(v), None, PRECISION)
            if HAS_DROPOUT:
                keys = _dropout_keys(Dropout(seed_ptr, stream_id, sequence_ids_ptr), h, sequence, rows, HAS_IDS)
                dp = tl.where(_keep_mask(keys[:, None], cols[None, :], threshold), dp * keep_scale, 0.0)
            delta = tl.load(delta_ptr + lse_origin + rows, mask=rows < length, other=0.0)
            ds = p * (dp - delta[:, None])
            if OF_PK:
                acc = _dot(_distances_by_row(tl.trans(ds), BLOCK, True).to(q.dtype), q, acc, PRECISION)
            else:
                acc = _dot(_distances_by_row(ds, BLOCK, False).to(k.dtype), k, acc, PRECISION)

    origin = (place.to(tl.int64) * n_heads + h) * (2 * BLOCK * HEAD_DIM)
    places = tl.arange(0, 2 * BLOCK)
    _store_rows(Head(part_ptr + origin, 2 * BLOCK, HEAD_DIM), acc * scale, places, HEAD_DIM, BLOCK_D, False)


@triton.jit(do_not_specialize=["n_parts", "n_tiles", "reach"])
def _disentangled_table_sum_kernel(
    part_ptr,                                             # in:  [parts, 2 n_tiles - 1, H, 2 BLOCK, D] fp32
    lut_ptr,                                              # in:  [2 reach - 1]
    dtable_ptr,                                           # out: [R, H, D]
    n_heads, n_parts, n_tiles, reach,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of a table's gradient: the sum over parts and over the row's distances, each from two diagonals."""
    slot, head = tl.program_id(0) // n_heads, tl.program_id(0) % n_heads
    n_diagonals = 2 * n_tiles - 1
    cols, mask_d = _columns(HEAD_DIM, BLOCK_D, False)
    acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for block in tl.range(0, 2 * n_tiles):
        offs = tl.arange(0, BLOCK)
        distances = (block - n_tiles) * BLOCK + 1 + offs
        exists = (distances > -reach) & (distances < reach)
        mine = exists & (tl.load(lut_ptr + (reach - 1) + distances, mask=exists, other=-1) == slot)
        if tl.max(mine.to(tl.int32), 0) > 0:
            for part in tl.range(0, n_parts):
                for half in tl.static_range(2):  # the upper half of the diagonal before, the lower of the one after
                    diagonal = block - half
                    mask = mine & (diagonal >= 0) & (diagonal < n_diagonals)
                    index = tl.cast(part * n_diagonals + diagonal, tl.int64) * n_heads + head
                    rows = index * (2 * BLOCK) + half * BLOCK + offs
                    ptrs = part_ptr + rows[:, None] * HEAD_DIM + cols[None, :]
                    acc += tl.sum(tl.load(ptrs, mask=mask[:, None] & mask_d[None, :], other=0.0), 0)
    origin = (slot.to(tl.int64) * n_heads + head) * HEAD_DIM
    tl.store(dtable_ptr + origin + cols, acc.to(dtable_ptr.dtype.element_ty), mask=mask_d)

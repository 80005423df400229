"""Device code of attention for short packed sequences with plain scores: a head is read once and stays on chip.

Up to 64 tokens, one block holds all rows and keys of a head. Of a sequence of at most 32 (16) tokens, a program takes
two (four) heads, stacked along the block, and masks the products across heads. Up to 128 tokens, the backward pass
keeps all keys and loops over the rows: five matrix products where the kernels with two loops need seven, and nothing
is read twice. Equations are in `attention.py`.

The backward kernels compute scores transposed, [keys, rows], so that p and ds can be left operands without a
transposition. dq is computed transposed as well, as k^T ds: ds^T on the left would be the transpose of a product's
result, which compilers for sm_90 have compiled wrongly (benchmarks/log/gpu.md, "The assembler").
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ._attention_common import (
    LN_2,
    RUNTIME_INTS,
    Dropout,
    Head,
    _dot,
    _dropout_keys,
    _load_lse_log2,
    _load_rows,
    _lse_log2,
    _scheduled_block,
    _span,
    _store_columns,
    _store_rows,
)
from ._random_triton import _keep_mask


class Slots(NamedTuple):
    """For each slot [BLOCK] of a block: its head, its row within the sequence, and whether it holds a row."""

    heads: Any
    rows: Any
    exists: Any


@triton.jit
def _stacked_heads(length_q, length_k, index, BLOCK: tl.constexpr):
    """(head, row within the sequence) of each slot [BLOCK] of the program `index` of a sequence."""
    longest = tl.maximum(length_q, length_k)
    shift = tl.where(longest <= BLOCK // 4, 2, tl.where(longest <= BLOCK // 2, 1, 0))  # log2(heads in a block)
    width = BLOCK >> shift
    slots = tl.arange(0, BLOCK)
    return (index << shift) + slots // width, slots % width


@triton.jit
def _load_slots(ptr, start, slots, stride_t, stride_h, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D] of [T, H, D], zero where a slot or column does not exist."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = (
        ptr
        + start * stride_t
        + (slots.rows.to(tl.int64) * stride_t + slots.heads.to(tl.int64) * stride_h)[:, None]
        + offs_d[None, :]
    )
    mask = slots.exists[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (offs_d < HEAD_DIM)[None, :]
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def _load_contiguous(ptr, start, slots, n_heads, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """`_load_slots` of contiguous [T, H, D]."""
    offs_d = tl.arange(0, BLOCK_D)
    ptr += start * n_heads * HEAD_DIM
    ptrs = ptr + ((slots.rows * n_heads + slots.heads) * HEAD_DIM)[:, None] + offs_d[None, :]
    mask = slots.exists[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (offs_d < HEAD_DIM)[None, :]
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def _store_slots(ptr, x, start, slots, stride_t, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The counterpart of `_load_slots` for [T, H, D] with contiguous heads and token stride stride_t."""
    offs_d = tl.arange(0, BLOCK_D)
    # a block spans less than 2^31 elements
    ptrs = ptr + start * stride_t + (slots.rows * stride_t + slots.heads * HEAD_DIM)[:, None] + offs_d[None, :]
    mask = slots.exists[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (offs_d < HEAD_DIM)[None, :]
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_slot_columns(ptr, x, start, slots, stride_t, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """`_store_slots` of x [BLOCK_D, BLOCK], whose columns are the slots."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + start * stride_t + (slots.rows * stride_t + slots.heads * HEAD_DIM)[None, :] + offs_d[:, None]
    mask = slots.exists[None, :]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (offs_d < HEAD_DIM)[:, None]
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _softmax_product(
    qk, v, keys, cols, scale_log2, keep_scale, threshold, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """o and lse of rows from their products with all keys, qk [M, N]; -inf where there is no key."""
    m_i = tl.max(qk, 1) * scale_log2
    shift = tl.where(m_i == float("-inf"), 0.0, m_i)  # a row without a key
    p = tl.exp2(qk * scale_log2 - shift[:, None])
    l_i = tl.sum(p, 1)
    if HAS_DROPOUT:
        p = tl.where(_keep_mask(keys, cols, threshold), p, 0.0)
    empty = l_i == 0.0
    l_i = tl.where(empty, 1.0, l_i)
    o = _dot(p.to(v.dtype), v, None, PRECISION) * (keep_scale / l_i)[:, None]
    return o, tl.where(empty, float("-inf"), (m_i + tl.log2(l_i)) * LN_2)


@triton.jit(do_not_specialize=RUNTIME_INTS)
def _attention_fwd_heads_kernel(
    q_ptr, k_ptr, v_ptr,                                  # in:  [Tq, H, D], [Tk, H, D], [Tk, H, D]
    spans_q_ptr, spans_k_ptr, schedule_ptr,               # in:  cu_seqlens [B + 1] x 2; [n, 2]
    seed_ptr, sequence_ids_ptr,                           # in:  [1], [B]
    o_ptr, lse_ptr,                                       # out: like q, contiguous; [H, Tq]
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    first_entry, n_heads, width_q, scale_log2, keep_scale, stream_id, threshold,
    HAS_DROPOUT: tl.constexpr, HAS_IDS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o and lse of one head, or of several, of a sequence of at most BLOCK_M = BLOCK_N tokens."""
    sequence, _, index = _scheduled_block(schedule_ptr, first_entry, n_heads, TILE, TILE)
    if sequence < 0:
        return
    start_q, length_q = _span(spans_q_ptr, sequence, False)
    start_k, length_k = _span(spans_k_ptr, sequence, False)
    heads, rows = _stacked_heads(length_q, length_k, index, BLOCK_M)
    if tl.min(heads) >= n_heads:
        return
    of_q = Slots(heads, rows, (rows < length_q) & (heads < n_heads))
    of_k = Slots(heads, rows, (rows < length_k) & (heads < n_heads))

    q = _load_slots(q_ptr, start_q, of_q, stride_qt, stride_qh, HEAD_DIM, BLOCK_D)
    k = _load_slots(k_ptr, start_k, of_k, stride_kt, stride_kh, HEAD_DIM, BLOCK_D)
    v = _load_slots(v_ptr, start_k, of_k, stride_vt, stride_vh, HEAD_DIM, BLOCK_D)

    qk = _dot(q, tl.trans(k), None, PRECISION)  # [BLOCK_M, BLOCK_N]
    qk = tl.where((heads[:, None] == heads[None, :]) & of_k.exists[None, :], qk, float("-inf"))
    keys = rows
    if HAS_DROPOUT:
        keys = _dropout_keys(Dropout(seed_ptr, stream_id, sequence_ids_ptr), heads, sequence, rows, HAS_IDS)
    o, lse = _softmax_product(
        qk, v, keys[:, None], rows[None, :], scale_log2, keep_scale, threshold, HAS_DROPOUT, PRECISION
    )

    _store_slots(o_ptr, o, start_q, of_q, n_heads * HEAD_DIM, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + heads.to(tl.int64) * width_q + start_q + rows, lse, mask=of_q.exists)


@triton.jit(do_not_specialize=RUNTIME_INTS)
def _attention_fwd_tile_kernel(
    q_ptr, k_ptr, v_ptr,                                  # in:  as above
    spans_q_ptr, spans_k_ptr, schedule_ptr,
    seed_ptr, sequence_ids_ptr,
    o_ptr, lse_ptr,                                       # out: like q, contiguous; [H, Tq]
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    first_entry, n_heads, width_q, scale_log2, keep_scale, stream_id, threshold,
    HAS_DROPOUT: tl.constexpr, HAS_IDS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o and lse of one head of a sequence of at most BLOCK_N = TILE tokens."""
    sequence, _, head = _scheduled_block(schedule_ptr, first_entry, n_heads, TILE, TILE)
    if sequence < 0:
        return
    start_q, length_q = _span(spans_q_ptr, sequence, False)
    start_k, length_k = _span(spans_k_ptr, sequence, False)
    h = head.to(tl.int64)
    q_head = Head(q_ptr + (start_q * stride_qt + h * stride_qh), length_q, stride_qt)
    stride_ot = n_heads * HEAD_DIM
    o_head = Head(o_ptr + (start_q * stride_ot + h * HEAD_DIM), length_q, stride_ot)
    lse_ptr += h * width_q + start_q

    cols = tl.arange(0, BLOCK_N)
    k_head = Head(k_ptr + (start_k * stride_kt + h * stride_kh), length_k, stride_kt)
    v_head = Head(v_ptr + (start_k * stride_vt + h * stride_vh), length_k, stride_vt)
    k = _load_rows(k_head, cols, HEAD_DIM, BLOCK_D, False, True)
    v = _load_rows(v_head, cols, HEAD_DIM, BLOCK_D, False, True)
    for first_row in tl.range(0, length_q, BLOCK_M):
        rows = first_row + tl.arange(0, BLOCK_M)
        q = _load_rows(q_head, rows, HEAD_DIM, BLOCK_D, False, True)
        keys = rows
        if HAS_DROPOUT:
            keys = _dropout_keys(Dropout(seed_ptr, stream_id, sequence_ids_ptr), h, sequence, rows, HAS_IDS)
        qk = tl.where((cols < length_k)[None, :], _dot(q, tl.trans(k), None, PRECISION), float("-inf"))
        o, lse = _softmax_product(
            qk, v, keys[:, None], cols[None, :], scale_log2, keep_scale, threshold, HAS_DROPOUT, PRECISION
        )
        _store_rows(o_head, o, rows, HEAD_DIM, BLOCK_D, False)
        tl.store(lse_ptr + rows, lse, mask=rows < length_q)


@triton.jit(do_not_specialize=RUNTIME_INTS)
def _attention_bwd_heads_kernel(
    q_ptr, k_ptr, v_ptr,                                  # in:  as in the forward kernel
    spans_q_ptr, spans_k_ptr, schedule_ptr,
    seed_ptr, sequence_ids_ptr,
    o_ptr, lse_ptr, do_ptr, dlse_ptr,                     # in:  like q, [H, Tq], like q, [H, Tq]; contiguous
    dq_ptr, dk_ptr, dv_ptr,                               # out: like q, like k, like v, heads contiguous
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dq, stride_dkv,
    first_entry, n_heads, width_q, scale, scale_log2, keep_scale, stream_id, threshold,
    HAS_DROPOUT: tl.constexpr, HAS_IDS: tl.constexpr, HAS_DLSE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of one head, or of several, of a sequence of at most BLOCK_M = BLOCK_N tokens."""
    sequence, _, index = _scheduled_block(schedule_ptr, first_entry, n_heads, TILE, TILE)
    if sequence < 0:
        return
    start_q, length_q = _span(spans_q_ptr, sequence, False)
    start_k, length_k = _span(spans_k_ptr, sequence, False)
    heads, rows = _stacked_heads(length_q, length_k, index, BLOCK_M)
    if tl.min(heads) >= n_heads:
        return
    of_q = Slots(heads, rows, (rows < length_q) & (heads < n_heads))
    of_k = Slots(heads, rows, (rows < length_k) & (heads < n_heads))

    do = _load_contiguous(do_ptr, start_q, of_q, n_heads, HEAD_DIM, BLOCK_D)
    o = _load_contiguous(o_ptr, start_q, of_q, n_heads, HEAD_DIM, BLOCK_D)
    lse_offs = heads.to(tl.int64) * width_q + start_q + rows
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + lse_offs, mask=of_q.exists, other=0.0)
    lse_log2 = _lse_log2(tl.load(lse_ptr + lse_offs, mask=of_q.exists, other=float("inf")))
    q = _load_slots(q_ptr, start_q, of_q, stride_qt, stride_qh, HEAD_DIM, BLOCK_D)
    k = _load_slots(k_ptr, start_k, of_k, stride_kt, stride_kh, HEAD_DIM, BLOCK_D)
    v = _load_slots(v_ptr, start_k, of_k, stride_vt, stride_vh, HEAD_DIM, BLOCK_D)

    # dv before dp and dq before dk need the fewest registers
    qk = _dot(k, tl.trans(q), None, PRECISION)  # [BLOCK_N, BLOCK_M]
    qk = tl.where((heads[:, None] == heads[None, :]) & of_k.exists[:, None], qk, float("-inf"))
    p = tl.exp2(qk * scale_log2 - lse_log2[None, :])
    kept = p
    if HAS_DROPOUT:
        keys = _dropout_keys(Dropout(seed_ptr, stream_id, sequence_ids_ptr), heads, sequence, rows, HAS_IDS)
        keep = _keep_mask(keys[None, :], rows[:, None], threshold)
        kept = tl.where(keep, p, 0.0)
    dv = _dot(kept.to(do.dtype), do, None, PRECISION) * keep_scale
    _store_slots(dv_ptr, dv, start_k, of_k, stride_dkv, HEAD_DIM, BLOCK_D)
    dp = _dot(v, tl.trans(do), None, PRECISION)
    if HAS_DROPOUT:
        dp = tl.where(keep, dp * keep_scale, 0.0)
    ds = (p * (dp - delta[None, :])).to(q.dtype)
    dq = _dot(tl.trans(k), ds, None, PRECISION) * scale  # [BLOCK_D, BLOCK_M]
    _store_slot_columns(dq_ptr, dq, start_q, of_q, stride_dq, HEAD_DIM, BLOCK_D)
    dk = _dot(ds, q, None, PRECISION) * scale
    _store_slots(dk_ptr, dk, start_k, of_k, stride_dkv, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=RUNTIME_INTS)
def _attention_bwd_tile_kernel(
    q_ptr, k_ptr, v_ptr,                                  # in:  as in the forward kernel
    spans_q_ptr, spans_k_ptr, schedule_ptr,
    seed_ptr, sequence_ids_ptr,
    o_ptr, lse_ptr, do_ptr, dlse_ptr,                     # in:  like q, [H, Tq], like q, [H, Tq]; contiguous
    dq_ptr, dk_ptr, dv_ptr,                               # out: like q, like k, like v, heads contiguous
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dq, stride_dkv,
    first_entry, n_heads, width_q, scale, scale_log2, keep_scale, stream_id, threshold,
    HAS_DROPOUT: tl.constexpr, HAS_IDS: tl.constexpr, HAS_DLSE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of one head of a sequence of at most BLOCK_N = TILE tokens."""
    sequence, _, head = _scheduled_block(schedule_ptr, first_entry, n_heads, TILE, TILE)
    if sequence < 0:
        return
    start_q, length_q = _span(spans_q_ptr, sequence, False)
    start_k, length_k = _span(spans_k_ptr, sequence, False)
    h = head.to(tl.int64)
    q_head = Head(q_ptr + (start_q * stride_qt + h * stride_qh), length_q, stride_qt)
    stride_ot = n_heads * HEAD_DIM
    o_origin, lse_origin = start_q * stride_ot + h * HEAD_DIM, h * width_q + start_q
    dq_origin = start_q * stride_dq + h * HEAD_DIM

    cols = tl.arange(0, BLOCK_N)
    k_head = Head(k_ptr + (start_k * stride_kt + h * stride_kh), length_k, stride_kt)
    v_head = Head(v_ptr + (start_k * stride_vt + h * stride_vh), length_k, stride_vt)
    k = _load_rows(k_head, cols, HEAD_DIM, BLOCK_D, False, True)
    v = _load_rows(v_head, cols, HEAD_DIM, BLOCK_D, False, True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for first_row in tl.range(0, length_q, BLOCK_M):
        rows = first_row + tl.arange(0, BLOCK_M)
        q = _load_rows(q_head, rows, HEAD_DIM, BLOCK_D, False, True)
        do = _load_rows(Head(do_ptr + o_origin, length_q, stride_ot), rows, HEAD_DIM, BLOCK_D, False, True)
        o = _load_rows(Head(o_ptr + o_origin, length_q, stride_ot), rows, HEAD_DIM, BLOCK_D, False, True)
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        if HAS_DLSE:
            delta -= tl.load(dlse_ptr + lse_origin + rows, mask=rows < length_q, other=0.0)
        lse_log2 = _load_lse_log2(lse_ptr + lse_origin, rows, length_q)

        qk = _dot(k, tl.trans(q), None, PRECISION)  # [BLOCK_N, BLOCK_M]
        p = tl.exp2(qk * scale_log2 - lse_log2[None, :])
        # keys past the end: q k = 0 there, and exp2(-lse) may be infinite
        p = tl.where((cols < length_k)[:, None], p, 0.0)
        kept = p
        if HAS_DROPOUT:
            keys = _dropout_keys(Dropout(seed_ptr, stream_id, sequence_ids_ptr), h, sequence, rows, HAS_IDS)
            keep = _keep_mask(keys[None, :], cols[:, None], threshold)
            kept = tl.where(keep, p, 0.0)
        dv = _dot(kept.to(do.dtype), do, dv, PRECISION)
        dp = _dot(v, tl.trans(do), None, PRECISION)
        if HAS_DROPOUT:
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        # this block has all keys, so a row's dq is complete
        dq = _dot(tl.trans(k), ds, None, PRECISION) * scale  # [BLOCK_D, BLOCK_M]
        dk = _dot(ds, q, dk, PRECISION)
        _store_columns(Head(dq_ptr + dq_origin, length_q, stride_dq), dq, rows, HEAD_DIM, BLOCK_D)

    origin = start_k * stride_dkv + h * HEAD_DIM
    _store_rows(Head(dk_ptr + origin, length_k, stride_dkv), dk * scale, cols, HEAD_DIM, BLOCK_D, False)
    _store_rows(Head(dv_ptr + origin, length_k, stride_dkv), dv * keep_scale, cols, HEAD_DIM, BLOCK_D, False)

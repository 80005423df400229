"""Device code of attention for short packed sequences with plain scores: everything of a head on chip, read once.

Up to 64 tokens one block holds rows and keys, and shorter ones share it: of a sequence of at most 32 (16) tokens a
program takes two (four) heads, stacked along the block, with the products across heads masked away. Up to 128 tokens
the backward pass keeps all keys and walks over the rows: five matrix products where the kernels with two loops need
seven, and no second reading. Equations are in `attention.py`.

The backward kernels compute scores transposed, [keys, rows], so that p and ds are left operands as they come. dq is
then computed transposed as well, as k^T ds, with ds on the right: ds^T on the left would be the transpose of a
product's result, which compilers for sm_90 have got wrong (LOG.md, "The assembler").
"""

import triton
import triton.language as tl

from ._attention_fwd import (
    LN_2,
    RUNTIME_INTS,
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


@triton.jit
def _stacked_heads(length_q, length_k, index, BLOCK: tl.constexpr):
    """(head, row within the sequence) of each slot [BLOCK] of the program `index` of a sequence."""
    longest = tl.maximum(length_q, length_k)
    shift = tl.where(longest <= BLOCK // 4, 2, tl.where(longest <= BLOCK // 2, 1, 0))  # log2 of the heads a block
    width = BLOCK >> shift
    slots = tl.arange(0, BLOCK)
    return (index << shift) + slots // width, slots % width


@triton.jit
def _load_slots(
    ptr, start, heads, rows, exists, stride_t, stride_h, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """[BLOCK, BLOCK_D], zero where a slot or column does not exist."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = (
        ptr
        + start * stride_t
        + (rows.to(tl.int64) * stride_t + heads.to(tl.int64) * stride_h)[:, None]
        + offs_d[None, :]
    )
    mask = exists[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (offs_d < HEAD_DIM)[None, :]
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def _load_contiguous(
    ptr, start, heads, rows, exists, n_heads, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """`_load_slots` of contiguous [T, H, D]."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + start * n_heads * HEAD_DIM + ((rows * n_heads + heads) * HEAD_DIM)[:, None] + offs_d[None, :]
    mask = exists[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (offs_d < HEAD_DIM)[None, :]
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def _store_slots(
    ptr, x, start, heads, rows, exists, stride_t, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """The counterpart of `_load_slots` for [T, H, D] whose heads are contiguous and whose tokens lie stride_t apart."""
    offs_d = tl.arange(0, BLOCK_D)
    # a block spans less than 2^31 elements
    ptrs = ptr + start * stride_t + (rows * stride_t + heads * HEAD_DIM)[:, None] + offs_d[None, :]
    mask = exists[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (offs_d < HEAD_DIM)[None, :]
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_slot_columns(
    ptr, x, start, heads, rows, exists, stride_t, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """`_store_slots` of x [BLOCK_D, BLOCK], whose columns are the slots."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + start * stride_t + (rows * stride_t + heads * HEAD_DIM)[None, :] + offs_d[:, None]
    mask = exists[None, :]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (offs_d < HEAD_DIM)[:, None]
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _softmax_product(
    qk, v, keys, cols, scale_log2, keep_scale, threshold, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """o and lse of rows whose products with all their keys are here: qk [M, N], -inf where there is no key."""
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
    is_row = (rows < length_q) & (heads < n_heads)
    is_key = (rows < length_k) & (heads < n_heads)

    q = _load_slots(q_ptr, start_q, heads, rows, is_row, stride_qt, stride_qh, HEAD_DIM, BLOCK_D)
    k = _load_slots(k_ptr, start_k, heads, rows, is_key, stride_kt, stride_kh, HEAD_DIM, BLOCK_D)
    v = _load_slots(v_ptr, start_k, heads, rows, is_key, stride_vt, stride_vh, HEAD_DIM, BLOCK_D)

    qk = _dot(q, tl.trans(k), None, PRECISION)  # [BLOCK_M, BLOCK_N]
    qk = tl.where((heads[:, None] == heads[None, :]) & is_key[None, :], qk, float("-inf"))
    keys = rows
    if HAS_DROPOUT:
        keys = _dropout_keys(seed_ptr, stream_id, heads, sequence_ids_ptr, sequence, rows, HAS_IDS)
    o, lse = _softmax_product(
        qk, v, keys[:, None], rows[None, :], scale_log2, keep_scale, threshold, HAS_DROPOUT, PRECISION
    )

    _store_slots(o_ptr, o, start_q, heads, rows, is_row, n_heads * HEAD_DIM, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + heads.to(tl.int64) * width_q + start_q + rows, lse, mask=is_row)


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
    q_ptr += start_q * stride_qt + h * stride_qh
    stride_ot = n_heads * HEAD_DIM
    o_ptr += start_q * stride_ot + h * HEAD_DIM
    lse_ptr += h * width_q + start_q

    cols = tl.arange(0, BLOCK_N)
    k_ptr += start_k * stride_kt + h * stride_kh
    v_ptr += start_k * stride_vt + h * stride_vh
    k = _load_rows(k_ptr, cols, length_k, stride_kt, HEAD_DIM, BLOCK_D, False, True)
    v = _load_rows(v_ptr, cols, length_k, stride_vt, HEAD_DIM, BLOCK_D, False, True)
    for first_row in tl.range(0, length_q, BLOCK_M):
        rows = first_row + tl.arange(0, BLOCK_M)
        q = _load_rows(q_ptr, rows, length_q, stride_qt, HEAD_DIM, BLOCK_D, False, True)
        keys = rows
        if HAS_DROPOUT:
            keys = _dropout_keys(seed_ptr, stream_id, h, sequence_ids_ptr, sequence, rows, HAS_IDS)
        qk = tl.where((cols < length_k)[None, :], _dot(q, tl.trans(k), None, PRECISION), float("-inf"))
        o, lse = _softmax_product(
            qk, v, keys[:, None], cols[None, :], scale_log2, keep_scale, threshold, HAS_DROPOUT, PRECISION
        )
        _store_rows(o_ptr, o, rows, length_q, stride_ot, HEAD_DIM, BLOCK_D, False)
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
    is_row = (rows < length_q) & (heads < n_heads)
    is_key = (rows < length_k) & (heads < n_heads)

    do = _load_contiguous(do_ptr, start_q, heads, rows, is_row, n_heads, HEAD_DIM, BLOCK_D)
    o = _load_contiguous(o_ptr, start_q, heads, rows, is_row, n_heads, HEAD_DIM, BLOCK_D)
    lse_offs = heads.to(tl.int64) * width_q + start_q + rows
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + lse_offs, mask=is_row, other=0.0)
    lse_log2 = _lse_log2(tl.load(lse_ptr + lse_offs, mask=is_row, other=float("inf")))
    q = _load_slots(q_ptr, start_q, heads, rows, is_row, stride_qt, stride_qh, HEAD_DIM, BLOCK_D)
    k = _load_slots(k_ptr, start_k, heads, rows, is_key, stride_kt, stride_kh, HEAD_DIM, BLOCK_D)
    v = _load_slots(v_ptr, start_k, heads, rows, is_key, stride_vt, stride_vh, HEAD_DIM, BLOCK_D)

    # dv before dp, dq before dk: fewest registers
    qk = _dot(k, tl.trans(q), None, PRECISION)  # [BLOCK_N, BLOCK_M]
    qk = tl.where((heads[:, None] == heads[None, :]) & is_key[:, None], qk, float("-inf"))
    p = tl.exp2(qk * scale_log2 - lse_log2[None, :])
    kept = p
    if HAS_DROPOUT:
        keys = _dropout_keys(seed_ptr, stream_id, heads, sequence_ids_ptr, sequence, rows, HAS_IDS)
        keep = _keep_mask(keys[None, :], rows[:, None], threshold)
        kept = tl.where(keep, p, 0.0)
    dv = _dot(kept.to(do.dtype), do, None, PRECISION) * keep_scale
    _store_slots(dv_ptr, dv, start_k, heads, rows, is_key, stride_dkv, HEAD_DIM, BLOCK_D)
    dp = _dot(v, tl.trans(do), None, PRECISION)
    if HAS_DROPOUT:
        dp = tl.where(keep, dp * keep_scale, 0.0)
    ds = (p * (dp - delta[None, :])).to(q.dtype)
    dq = _dot(tl.trans(k), ds, None, PRECISION) * scale  # [BLOCK_D, BLOCK_M]
    _store_slot_columns(dq_ptr, dq, start_q, heads, rows, is_row, stride_dq, HEAD_DIM, BLOCK_D)
    dk = _dot(ds, q, None, PRECISION) * scale
    _store_slots(dk_ptr, dk, start_k, heads, rows, is_key, stride_dkv, HEAD_DIM, BLOCK_D)


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
    q_ptr += start_q * stride_qt + h * stride_qh
    stride_ot = n_heads * HEAD_DIM
    o_origin, lse_origin = start_q * stride_ot + h * HEAD_DIM, h * width_q + start_q
    dq_origin = start_q * stride_dq + h * HEAD_DIM

    cols = tl.arange(0, BLOCK_N)
    k_ptr += start_k * stride_kt + h * stride_kh
    v_ptr += start_k * stride_vt + h * stride_vh
    k = _load_rows(k_ptr, cols, length_k, stride_kt, HEAD_DIM, BLOCK_D, False, True)
    v = _load_rows(v_ptr, cols, length_k, stride_vt, HEAD_DIM, BLOCK_D, False, True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for first_row in tl.range(0, length_q, BLOCK_M):
        rows = first_row + tl.arange(0, BLOCK_M)
        q = _load_rows(q_ptr, rows, length_q, stride_qt, HEAD_DIM, BLOCK_D, False, True)
        do = _load_rows(do_ptr + o_origin, rows, length_q, stride_ot, HEAD_DIM, BLOCK_D, False, True)
        o = _load_rows(o_ptr + o_origin, rows, length_q, stride_ot, HEAD_DIM, BLOCK_D, False, True)
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
            keys = _dropout_keys(seed_ptr, stream_id, h, sequence_ids_ptr, sequence, rows, HAS_IDS)
            keep = _keep_mask(keys[None, :], cols[:, None], threshold)
            kept = tl.where(keep, p, 0.0)
        dv = _dot(kept.to(do.dtype), do, dv, PRECISION)
        dp = _dot(v, tl.trans(do), None, PRECISION)
        if HAS_DROPOUT:
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        # every key is here, so a row's dq is whole
        dq = _dot(tl.trans(k), ds, None, PRECISION) * scale  # [BLOCK_D, BLOCK_M]
        dk = _dot(ds, q, dk, PRECISION)
        _store_columns(dq_ptr + dq_origin, dq, rows, length_q, stride_dq, HEAD_DIM, BLOCK_D)

    origin = start_k * stride_dkv + h * HEAD_DIM
    _store_rows(dk_ptr + origin, dk * scale, cols, length_k, stride_dkv, HEAD_DIM, BLOCK_D, False)
    _store_rows(dv_ptr + origin, dv * keep_scale, cols, length_k, stride_dkv, HEAD_DIM, BLOCK_D, False)

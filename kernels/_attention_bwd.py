"""Device code of attention's backward pass: dq (with delta), dk and dv, dbias. Equations are in `attention.py`.

Two kernels recompute the scores, one along rows (dq) and one along columns (dk, dv): seven matrix products where
five would do, but no atomics, so that the same input gives the same bits. A short sequence fits on chip as a whole
and has its own kernel with five.
"""

import triton
import triton.language as tl

from ._attention_common import (
    LOG2_E,
    RUNTIME_INTS,
    Dropout,
    Head,
    Modifiers,
    Rotary,
    _dot,
    _dropout_keys,
    _gradient_origin,
    _key_range,
    _load_lse_log2,
    _load_rows,
    _origins,
    _padding_end,
    _product_in_chunks,
    _rotate,
    _scheduled_block,
    _scores,
    _span,
    _store_columns,
    _store_rows,
    _zero_rows,
)
from ._random_triton import _keep_mask

CHUNK = tl.constexpr(32)  # columns of `_product_in_chunks`


@triton.jit(do_not_specialize=RUNTIME_INTS)
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr,                                  # in:  as in the forward kernel
    spans_q_ptr, spans_k_ptr, schedule_ptr,               # in:  schedule over q
    bias_ptr, mask_ptr, slopes_ptr,
    cos_ptr, sin_ptr, seed_ptr, sequence_ids_ptr,
    o_ptr, lse_ptr, do_ptr, dlse_ptr,                     # in:  like q, [H, Tq], like q, [H, Tq]; contiguous
    dq_ptr, delta_ptr,                                    # out: like q, tokens stride_dq apart; [H, Tq]
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_dq,
    stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k,
    stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k, stride_cos, stride_sin,
    first_entry, n_heads, width_q, scale, scale_log2, keep_scale, stream_id, threshold, window_left, window_right,
    PADDED: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_ROTARY: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_IDS: tl.constexpr, HAS_DLSE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, SHORT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """delta and dq of BLOCK_M rows of one sequence and head, a sum over the sequence's keys in order."""
    sequence, row, head = _scheduled_block(schedule_ptr, first_entry, n_heads, BLOCK_M, TILE)
    if sequence < 0:
        return
    start_q, length_q = _span(spans_q_ptr, sequence, PADDED)
    start_k, length_k = _span(spans_k_ptr, sequence, PADDED)
    n_out = width_q if PADDED else length_q
    if row >= n_out:
        return
    b, h = sequence.to(tl.int64), head.to(tl.int64)
    q_head = Head(q_ptr + (b * stride_qb + start_q * stride_qt + h * stride_qh), length_q, stride_qt)
    k_head = Head(k_ptr + (b * stride_kb + start_k * stride_kt + h // GROUP * stride_kh), length_k, stride_kt)
    v_head = Head(v_ptr + (b * stride_vb + start_k * stride_vt + h // GROUP * stride_vh), length_k, stride_vt)
    rotary = Rotary(cos_ptr, sin_ptr, stride_cos, stride_sin)
    if HAS_BIAS:
        bias_ptr += b * stride_bias_b + h * stride_bias_h
    if HAS_MASK:
        mask_ptr += b * stride_mask_b + h * stride_mask_h
    o_origin, lse_origin = _origins(sequence, start_q, head, n_heads, width_q, HEAD_DIM, PADDED)
    stride_ot = n_heads * HEAD_DIM

    rows = row + tl.arange(0, BLOCK_M)
    q = _load_rows(q_head, rows, HEAD_DIM, BLOCK_D, HAS_ROTARY, True)
    q = _rotate(q, rotary, rows, length_q, False, HAS_ROTARY, HEAD_DIM, BLOCK_D)
    modifiers = Modifiers(
        bias_ptr, stride_bias_q, stride_bias_k, mask_ptr, stride_mask_q, stride_mask_k,
        tl.load(slopes_ptr + head).to(tl.float32) * LOG2_E if HAS_ALIBI else 0.0, window_left, window_right,
    )  # fmt: skip
    keys = rows
    if HAS_DROPOUT:
        keys = _dropout_keys(Dropout(seed_ptr, stream_id, sequence_ids_ptr), h, sequence, rows, HAS_IDS)

    # This kernel computes delta because it loads o and do; the dk, dv kernel, launched after it, reads delta.
    do_head = Head(do_ptr + o_origin, length_q, stride_ot)
    do = _load_rows(do_head, rows, HEAD_DIM, BLOCK_D, False, True)
    o = _load_rows(Head(o_ptr + o_origin, length_q, stride_ot), rows, HEAD_DIM, BLOCK_D, False, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + lse_origin + rows, mask=rows < length_q, other=0.0)
    tl.store(delta_ptr + lse_origin + rows, delta, mask=rows < n_out)
    lse_log2 = _load_lse_log2(lse_ptr + lse_origin, rows, length_q)

    IN_CHUNKS: tl.constexpr = PRECISION == "ieee" and BLOCK_D > 128 and not HAS_ROTARY
    LOADS_FIRST: tl.constexpr = PRECISION != "ieee"  # see the forward kernel
    dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    low, high = _key_range(row, length_q, length_k, window_left, window_right, HAS_WINDOW, BLOCK_M, BLOCK_N)
    whole = tl.minimum(high + BLOCK_N - 1, length_k) // BLOCK_N * BLOCK_N
    for CROSSES_END in tl.static_range(2):
        first, last = (tl.maximum(low, whole), high) if CROSSES_END else (low, whole)
        for first_col in tl.range(first, last, BLOCK_N):
            cols = first_col + tl.arange(0, BLOCK_N)
            k = _load_rows(k_head, cols, HEAD_DIM, BLOCK_D, HAS_ROTARY, CROSSES_END)
            if LOADS_FIRST:
                v = _load_rows(v_head, cols, HEAD_DIM, BLOCK_D, False, CROSSES_END)
            k = _rotate(k, rotary, cols, length_k, False, HAS_ROTARY, HEAD_DIM, BLOCK_D)
            if IN_CHUNKS:
                qk = _product_in_chunks(q_head, rows, k_head, cols, HEAD_DIM, CHUNK)
            else:
                qk = _dot(q, tl.trans(k), None, PRECISION)  # [BLOCK_M, BLOCK_N]
            s = _scores(
                qk, rows[:, None], cols[None, :], length_q, length_k, scale_log2, modifiers,
                HAS_BIAS, HAS_MASK, HAS_ALIBI, HAS_WINDOW, CROSSES_END, not CROSSES_END,
            )  # fmt: skip
            p = tl.exp2(s - lse_log2[:, None])

            if not LOADS_FIRST:
                v = _load_rows(v_head, cols, HEAD_DIM, BLOCK_D, False, CROSSES_END)
            if IN_CHUNKS:
                dp = _product_in_chunks(do_head, rows, v_head, cols, HEAD_DIM, CHUNK)
            else:
                dp = _dot(do, tl.trans(v), None, PRECISION)
            if HAS_DROPOUT:
                dp = tl.where(_keep_mask(keys[:, None], cols[None, :], threshold), dp * keep_scale, 0.0)
            ds = p * (dp - delta[:, None])
            dq = _dot(ds.to(k.dtype), k, dq, PRECISION)

    dq = _rotate(dq * scale, rotary, rows, length_q, True, HAS_ROTARY, HEAD_DIM, BLOCK_D)
    dq_ptr += _gradient_origin(sequence, start_q, head, width_q, stride_dq, HEAD_DIM, PADDED)
    _store_rows(Head(dq_ptr, n_out, stride_dq), dq, rows, HEAD_DIM, BLOCK_D, HAS_ROTARY)
    if PADDED:
        end = _padding_end(row, length_q, length_k, n_out, SHORT)
        _zero_rows(Head(dq_ptr, end, stride_dq), TILE, HEAD_DIM, BLOCK_M, BLOCK_D)


@triton.jit(do_not_specialize=[*RUNTIME_INTS, "width_k"])
def _attention_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr,                                  # in:  as in the forward kernel
    spans_q_ptr, spans_k_ptr, schedule_ptr,               # in:  schedule over k
    bias_ptr, mask_ptr, slopes_ptr,
    cos_ptr, sin_ptr, seed_ptr, sequence_ids_ptr,
    lse_ptr, do_ptr, delta_ptr,                           # in:  [H, Tq], like q, [H, Tq]; contiguous
    dk_ptr, dv_ptr,                                       # out: like k, tokens stride_dkv apart
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_dkv,
    stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k,
    stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k, stride_cos, stride_sin,
    first_entry, n_heads, width_q, width_k, scale, scale_log2, keep_scale, stream_id, threshold,
    window_left, window_right,
    PADDED: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_ROTARY: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_IDS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, SHORT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one sequence and key head, a sum over its query heads and rows in order."""
    n_kv_heads = n_heads // GROUP
    sequence, col, kv_head = _scheduled_block(schedule_ptr, first_entry, n_kv_heads, BLOCK_N, TILE)
    if sequence < 0:
        return
    start_q, length_q = _span(spans_q_ptr, sequence, PADDED)
    start_k, length_k = _span(spans_k_ptr, sequence, PADDED)
    n_out = width_k if PADDED else length_k
    if col >= n_out:
        return
    b = sequence.to(tl.int64)
    cols = col + tl.arange(0, BLOCK_N)
    k_head = Head(k_ptr + (b * stride_kb + start_k * stride_kt + kv_head.to(tl.int64) * stride_kh), length_k, stride_kt)
    v_head = Head(v_ptr + (b * stride_vb + start_k * stride_vt + kv_head.to(tl.int64) * stride_vh), length_k, stride_vt)
    rotary = Rotary(cos_ptr, sin_ptr, stride_cos, stride_sin)
    dropout = Dropout(seed_ptr, stream_id, sequence_ids_ptr)
    k = _load_rows(k_head, cols, HEAD_DIM, BLOCK_D, HAS_ROTARY, True)
    k = _rotate(k, rotary, cols, length_k, False, HAS_ROTARY, HEAD_DIM, BLOCK_D)
    v = _load_rows(v_head, cols, HEAD_DIM, BLOCK_D, False, True)

    IN_CHUNKS: tl.constexpr = PRECISION == "ieee" and BLOCK_D > 128 and not HAS_ROTARY
    LOADS_FIRST: tl.constexpr = PRECISION != "ieee"  # see the forward kernel
    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    # seen from a key, the window's sides are swapped
    low, high = _key_range(col, length_k, length_q, window_right, window_left, HAS_WINDOW, BLOCK_N, BLOCK_M)
    for member in tl.range(0, GROUP):
        head = kv_head * GROUP + member
        h = head.to(tl.int64)
        q_head = Head(q_ptr + b * stride_qb + start_q * stride_qt + h * stride_qh, length_q, stride_qt)
        do_origin, lse_origin = _origins(sequence, start_q, head, n_heads, width_q, HEAD_DIM, PADDED)
        slope_log2 = tl.load(slopes_ptr + head).to(tl.float32) * LOG2_E if HAS_ALIBI else 0.0
        modifiers = Modifiers(
            bias_ptr + (b * stride_bias_b + h * stride_bias_h) if HAS_BIAS else bias_ptr, stride_bias_q, stride_bias_k,
            mask_ptr + (b * stride_mask_b + h * stride_mask_h) if HAS_MASK else mask_ptr, stride_mask_q, stride_mask_k,
            slope_log2, window_left, window_right,
        )  # fmt: skip
        # rows past the end are loaded as zeros with lse = inf, so no score needs a mask and all blocks run in one loop
        for first_row in tl.range(low, high, BLOCK_M):
            rows = first_row + tl.arange(0, BLOCK_M)
            q = _load_rows(q_head, rows, HEAD_DIM, BLOCK_D, HAS_ROTARY, True)
            if LOADS_FIRST:
                do_head = Head(do_ptr + do_origin, length_q, n_heads * HEAD_DIM)
                do = _load_rows(do_head, rows, HEAD_DIM, BLOCK_D, False, True)
            q = _rotate(q, rotary, rows, length_q, False, HAS_ROTARY, HEAD_DIM, BLOCK_D)
            # transposed, so that p and ds come out as left operands of the products below
            if IN_CHUNKS:
                qk = _product_in_chunks(k_head, cols, q_head, rows, HEAD_DIM, CHUNK)
            else:
                qk = _dot(k, tl.trans(q), None, PRECISION)  # [BLOCK_N, BLOCK_M]
            s = _scores(
                qk, rows[None, :], cols[:, None], length_q, length_k, scale_log2, modifiers,
                HAS_BIAS, HAS_MASK, HAS_ALIBI, HAS_WINDOW, False, False,
            )  # fmt: skip
            p = tl.exp2(s - _load_lse_log2(lse_ptr + lse_origin, rows, length_q)[None, :])

            if not LOADS_FIRST:
                do_head = Head(do_ptr + do_origin, length_q, n_heads * HEAD_DIM)
                do = _load_rows(do_head, rows, HEAD_DIM, BLOCK_D, False, True)
            delta = tl.load(delta_ptr + lse_origin + rows, mask=rows < length_q, other=0.0)
            if IN_CHUNKS:
                dp = _product_in_chunks(v_head, cols, do_head, rows, HEAD_DIM, CHUNK)
            else:
                dp = _dot(v, tl.trans(do), None, PRECISION)
            kept = p
            if HAS_DROPOUT:
                keys = _dropout_keys(dropout, h, sequence, rows, HAS_IDS)
                keep = _keep_mask(keys[None, :], cols[:, None], threshold)
                kept = tl.where(keep, p, 0.0)
                dp = tl.where(keep, dp * keep_scale, 0.0)
            dv = _dot(kept.to(do.dtype), do, dv, PRECISION)
            ds = p * (dp - delta[None, :])
            dk = _dot(ds.to(q.dtype), q, dk, PRECISION)

    # columns past the end have arbitrary values; padding must be written as zero
    exists = (cols < length_k)[:, None]
    dk = tl.where(exists, dk * scale, 0.0)
    dv = tl.where(exists, dv * keep_scale, 0.0)
    dk = _rotate(dk, rotary, cols, length_k, True, HAS_ROTARY, HEAD_DIM, BLOCK_D)
    origin = _gradient_origin(sequence, start_k, kv_head, width_k, stride_dkv, HEAD_DIM, PADDED)
    _store_rows(Head(dk_ptr + origin, n_out, stride_dkv), dk, cols, HEAD_DIM, BLOCK_D, HAS_ROTARY)
    _store_rows(Head(dv_ptr + origin, n_out, stride_dkv), dv, cols, HEAD_DIM, BLOCK_D, False)
    if PADDED:
        end = _padding_end(col, length_q, length_k, n_out, SHORT)
        _zero_rows(Head(dk_ptr + origin, end, stride_dkv), TILE, HEAD_DIM, BLOCK_N, BLOCK_D)
        _zero_rows(Head(dv_ptr + origin, end, stride_dkv), TILE, HEAD_DIM, BLOCK_N, BLOCK_D)


@triton.jit(do_not_specialize=[*RUNTIME_INTS, "width_k"])
def _attention_bwd_short_kernel(
    q_ptr, k_ptr, v_ptr,                                  # in:  as in the forward kernel
    spans_q_ptr, spans_k_ptr, schedule_ptr,               # in:  its entries of short sequences
    bias_ptr, mask_ptr, slopes_ptr,
    cos_ptr, sin_ptr, seed_ptr, sequence_ids_ptr,
    o_ptr, lse_ptr, do_ptr, dlse_ptr,                     # in:  like q, [H, Tq], like q, [H, Tq]; contiguous
    dq_ptr, dk_ptr, dv_ptr, delta_ptr,                    # out: like q, like k, like v; [H, Tq]
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_dq, stride_dkv,
    stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k,
    stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k, stride_cos, stride_sin,
    first_entry, n_heads, width_q, width_k,
    scale, scale_log2, keep_scale, stream_id, threshold, window_left, window_right,
    PADDED: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_ROTARY: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_IDS: tl.constexpr, HAS_DLSE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of one key head of a sequence that fits one block: everything is read once, five products."""
    n_kv_heads = n_heads // GROUP
    sequence, _, kv_head = _scheduled_block(schedule_ptr, first_entry, n_kv_heads, TILE, TILE)
    if sequence < 0:
        return
    start_q, length_q = _span(spans_q_ptr, sequence, PADDED)
    start_k, length_k = _span(spans_k_ptr, sequence, PADDED)
    n_rows = width_q if PADDED else length_q
    n_cols = width_k if PADDED else length_k
    b = sequence.to(tl.int64)
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    k_head = Head(k_ptr + (b * stride_kb + start_k * stride_kt + kv_head.to(tl.int64) * stride_kh), length_k, stride_kt)
    v_head = Head(v_ptr + (b * stride_vb + start_k * stride_vt + kv_head.to(tl.int64) * stride_vh), length_k, stride_vt)
    rotary = Rotary(cos_ptr, sin_ptr, stride_cos, stride_sin)
    dropout = Dropout(seed_ptr, stream_id, sequence_ids_ptr)
    k = _load_rows(k_head, cols, HEAD_DIM, BLOCK_D, HAS_ROTARY, True)
    k = _rotate(k, rotary, cols, length_k, False, HAS_ROTARY, HEAD_DIM, BLOCK_D)
    v = _load_rows(v_head, cols, HEAD_DIM, BLOCK_D, False, True)

    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for member in tl.range(0, GROUP):
        head = kv_head * GROUP + member
        h = head.to(tl.int64)
        o_origin, lse_origin = _origins(sequence, start_q, head, n_heads, width_q, HEAD_DIM, PADDED)
        stride_ot = n_heads * HEAD_DIM
        slope_log2 = tl.load(slopes_ptr + head).to(tl.float32) * LOG2_E if HAS_ALIBI else 0.0
        modifiers = Modifiers(
            bias_ptr + (b * stride_bias_b + h * stride_bias_h) if HAS_BIAS else bias_ptr, stride_bias_q, stride_bias_k,
            mask_ptr + (b * stride_mask_b + h * stride_mask_h) if HAS_MASK else mask_ptr, stride_mask_q, stride_mask_k,
            slope_log2, window_left, window_right,
        )  # fmt: skip

        q_head = Head(q_ptr + b * stride_qb + start_q * stride_qt + h * stride_qh, length_q, stride_qt)
        q = _load_rows(q_head, rows, HEAD_DIM, BLOCK_D, HAS_ROTARY, True)
        q = _rotate(q, rotary, rows, length_q, False, HAS_ROTARY, HEAD_DIM, BLOCK_D)
        do = _load_rows(Head(do_ptr + o_origin, length_q, stride_ot), rows, HEAD_DIM, BLOCK_D, False, True)
        o = _load_rows(Head(o_ptr + o_origin, length_q, stride_ot), rows, HEAD_DIM, BLOCK_D, False, True)
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        if HAS_DLSE:
            delta -= tl.load(dlse_ptr + lse_origin + rows, mask=rows < length_q, other=0.0)
        tl.store(delta_ptr + lse_origin + rows, delta, mask=rows < n_rows)

        qk = _dot(k, tl.trans(q), None, PRECISION)  # [BLOCK_N, BLOCK_M]
        s = _scores(
            qk, rows[None, :], cols[:, None], length_q, length_k, scale_log2, modifiers,
            HAS_BIAS, HAS_MASK, HAS_ALIBI, HAS_WINDOW, True, False,
        )  # fmt: skip
        p = tl.exp2(s - _load_lse_log2(lse_ptr + lse_origin, rows, length_q)[None, :])
        dp = _dot(v, tl.trans(do), None, PRECISION)
        kept = p
        if HAS_DROPOUT:
            keys = _dropout_keys(dropout, h, sequence, rows, HAS_IDS)
            keep = _keep_mask(keys[None, :], cols[:, None], threshold)
            kept = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        dv = _dot(kept.to(do.dtype), do, dv, PRECISION)
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dq = _dot(tl.trans(k), ds, None, PRECISION) * scale  # [BLOCK_D, BLOCK_M], see `_attention_short.py`
        dq_origin = _gradient_origin(sequence, start_q, head, width_q, stride_dq, HEAD_DIM, PADDED)
        dq_head = Head(dq_ptr + dq_origin, n_rows, stride_dq)
        if HAS_ROTARY:
            dq = _rotate(tl.trans(dq), rotary, rows, length_q, True, HAS_ROTARY, HEAD_DIM, BLOCK_D)
            _store_rows(dq_head, dq, rows, HEAD_DIM, BLOCK_D, True)
        else:
            _store_columns(dq_head, dq, rows, HEAD_DIM, BLOCK_D)
        dk = _dot(ds, q, dk, PRECISION)
        if PADDED:
            _zero_rows(dq_head, BLOCK_M, HEAD_DIM, BLOCK_M, BLOCK_D)

    dk *= scale
    dv *= keep_scale
    dk = _rotate(dk, rotary, cols, length_k, True, HAS_ROTARY, HEAD_DIM, BLOCK_D)
    origin = _gradient_origin(sequence, start_k, kv_head, width_k, stride_dkv, HEAD_DIM, PADDED)
    dk_head = Head(dk_ptr + origin, n_cols, stride_dkv)
    _store_rows(dk_head, dk, cols, HEAD_DIM, BLOCK_D, HAS_ROTARY)
    dv_head = Head(dv_ptr + origin, n_cols, stride_dkv)
    _store_rows(dv_head, dv, cols, HEAD_DIM, BLOCK_D, False)
    if PADDED:
        _zero_rows(dk_head, BLOCK_N, HEAD_DIM, BLOCK_N, BLOCK_D)
        _zero_rows(dv_head, BLOCK_N, HEAD_DIM, BLOCK_N, BLOCK_D)


@triton.jit(do_not_specialize=[*RUNTIME_INTS, "bias_rows", "bias_cols", "batch"])
def _attention_bwd_bias_kernel(
    q_ptr, k_ptr, v_ptr,                                  # in:  as in the forward kernel
    spans_q_ptr, spans_k_ptr,
    bias_ptr, mask_ptr, slopes_ptr,
    cos_ptr, sin_ptr, seed_ptr, sequence_ids_ptr,
    lse_ptr, do_ptr, delta_ptr,                           # in:  [H, Tq], like q, [H, Tq]; contiguous
    dbias_ptr,                                            # out: [1 | B, 1 | H, bias_rows, bias_cols], contiguous
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k,
    stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k, stride_cos, stride_sin,
    n_heads, width_q, scale_log2, keep_scale, stream_id, threshold, window_left, window_right,
    bias_rows, bias_cols, batch,
    PADDED: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_ROTARY: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_IDS: tl.constexpr,
    OF_BATCH: tl.constexpr, OF_HEADS: tl.constexpr,       # sum over sequences, over heads
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_M, BLOCK_N] block of dbias: ds summed, in order, over the sequences and heads that share it."""
    blocks_n = tl.cdiv(bias_cols, BLOCK_N)
    blocks = tl.cdiv(bias_rows, BLOCK_M) * blocks_n
    pid = tl.program_id(0)
    plane = pid // blocks  # of dbias: sequence and head where it has them
    rows = pid % blocks // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n_heads_each = n_heads if OF_HEADS else 1
    n_each = (batch if OF_BATCH else 1) * n_heads_each
    first_sequence = plane * 0 if OF_BATCH else (plane if OF_HEADS else plane // n_heads)
    first_head = plane * 0 if OF_HEADS else plane % n_heads

    rotary = Rotary(cos_ptr, sin_ptr, stride_cos, stride_sin)
    dropout = Dropout(seed_ptr, stream_id, sequence_ids_ptr)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for index in tl.range(0, n_each):
        sequence = first_sequence + index // n_heads_each
        head = first_head + index % n_heads_each
        b, h = sequence.to(tl.int64), head.to(tl.int64)
        start_q, length_q = _span(spans_q_ptr, sequence, PADDED)
        start_k, length_k = _span(spans_k_ptr, sequence, PADDED)
        q_head = Head(q_ptr + (b * stride_qb + start_q * stride_qt + h * stride_qh), length_q, stride_qt)
        k_head = Head(k_ptr + (b * stride_kb + start_k * stride_kt + h // GROUP * stride_kh), length_k, stride_kt)
        v_head = Head(v_ptr + (b * stride_vb + start_k * stride_vt + h // GROUP * stride_vh), length_k, stride_vt)
        bias_head_ptr = bias_ptr + (b * stride_bias_b + h * stride_bias_h)
        mask_head_ptr = mask_ptr + (b * stride_mask_b + h * stride_mask_h) if HAS_MASK else mask_ptr
        do_origin, lse_origin = _origins(sequence, start_q, head, n_heads, width_q, HEAD_DIM, PADDED)
        slope_log2 = tl.load(slopes_ptr + head).to(tl.float32) * LOG2_E if HAS_ALIBI else 0.0
        modifiers = Modifiers(
            bias_head_ptr, stride_bias_q, stride_bias_k, mask_head_ptr, stride_mask_q, stride_mask_k,
            slope_log2, window_left, window_right,
        )  # fmt: skip

        q = _load_rows(q_head, rows, HEAD_DIM, BLOCK_D, HAS_ROTARY, True)
        k = _load_rows(k_head, cols, HEAD_DIM, BLOCK_D, HAS_ROTARY, True)
        q = _rotate(q, rotary, rows, length_q, False, HAS_ROTARY, HEAD_DIM, BLOCK_D)
        k = _rotate(k, rotary, cols, length_k, False, HAS_ROTARY, HEAD_DIM, BLOCK_D)
        qk = _dot(q, tl.trans(k), None, PRECISION)
        s = _scores(
            qk, rows[:, None], cols[None, :], length_q, length_k, scale_log2, modifiers,
            HAS_BIAS, HAS_MASK, HAS_ALIBI, HAS_WINDOW, True, False,
        )  # fmt: skip
        p = tl.exp2(s - _load_lse_log2(lse_ptr + lse_origin, rows, length_q)[:, None])

        v = _load_rows(v_head, cols, HEAD_DIM, BLOCK_D, False, True)
        do_head = Head(do_ptr + do_origin, length_q, n_heads * HEAD_DIM)
        do = _load_rows(do_head, rows, HEAD_DIM, BLOCK_D, False, True)
        delta = tl.load(delta_ptr + lse_origin + rows, mask=rows < length_q, other=0.0)
        dp = _dot(do, tl.trans(v), None, PRECISION)
        if HAS_DROPOUT:
            keys = _dropout_keys(dropout, h, sequence, rows, HAS_IDS)
            dp = tl.where(_keep_mask(keys[:, None], cols[None, :], threshold), dp * keep_scale, 0.0)
        dbias += p * (dp - delta[:, None])

    dbias_ptrs = dbias_ptr + (plane.to(tl.int64) * bias_rows + rows[:, None]) * bias_cols + cols[None, :]
    mask = (rows < bias_rows)[:, None] & (cols < bias_cols)[None, :]
    tl.store(dbias_ptrs, dbias.to(dbias_ptr.dtype.element_ty), mask=mask)

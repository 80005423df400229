"""Device code of attention's forward pass for sequences of any length. Equations are in `attention.py`, what is shared
with the other kernels in `_attention_common.py`."""

import triton
import triton.language as tl

from ._attention_common import (
    LN_2,
    LOG2_E,
    RUNTIME_INTS,
    Dropout,
    Head,
    Modifiers,
    Rotary,
    _dot,
    _dropout_keys,
    _key_range,
    _load_rows,
    _origins,
    _padding_end,
    _proxy_fence,
    _rotate,
    _scheduled_block,
    _scores,
    _span,
    _store_rows,
    _zero_rows,
)
from ._random_triton import _keep_mask


@triton.jit(do_not_specialize=RUNTIME_INTS)
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr,                                  # in:  [Tq, H, D], [Tk, Hk, D], [Tk, Hk, D], or [B, S, ...]
    spans_q_ptr, spans_k_ptr,                             # in:  cu_seqlens [B + 1], PADDED: lengths [B]
    schedule_ptr,                                         # in:  [n, 2], (sequence, tile) of each program
    bias_ptr, mask_ptr, slopes_ptr,                       # in:  [B, H, Sq, Sk], same, [H]
    cos_ptr, sin_ptr, seed_ptr, sequence_ids_ptr,         # in:  [S, D / 2] x 2, [1], [B]
    o_ptr, lse_ptr,                                       # out: like q, contiguous; [H, Tq] or [B, H, Sq]
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k,
    stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k, stride_cos, stride_sin,
    first_entry, n_heads, width_q, scale_log2, keep_scale, stream_id, threshold, window_left, window_right,
    PADDED: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_ROTARY: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_IDS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, SHORT: tl.constexpr, PRECISION: tl.constexpr, FENCED: tl.constexpr,
):  # fmt: skip
    """o and lse of BLOCK_M rows of one sequence and head."""
    sequence, row, head = _scheduled_block(schedule_ptr, first_entry, n_heads, BLOCK_M, TILE)
    if sequence < 0:
        return
    start_q, length_q = _span(spans_q_ptr, sequence, PADDED)
    start_k, length_k = _span(spans_k_ptr, sequence, PADDED)
    n_out = width_q if PADDED else length_q  # padding rows are written too, as zeros
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

    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    m_i = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    l_i = tl.zeros((BLOCK_M,), dtype=tl.float32)
    low, high = _key_range(row, length_q, length_k, window_left, window_right, HAS_WINDOW, BLOCK_M, BLOCK_N)
    # Whole blocks need no mask. The block that crosses the sequence's end comes last, with a mask; a short sequence has
    # only that block.
    IS_SHORT: tl.constexpr = TILE == SHORT
    # On Hopper and Blackwell a product reads shared memory through the asynchronous proxy, so it needs a proxy fence
    # after the wait for its operand's copy. Triton 3.7 places the wait at the load, and omits the fence if there is one
    # between the copy's start and the wait (findings/triton_fence_before_wait.sh). So a loop loads all its tiles before
    # its first product; not in float32, where the tiles would occupy registers. On Blackwell (FENCED) Triton still
    # moves v's copy and wait behind the first product of q and k; there the product of p and v has its own fence.
    LOADS_FIRST: tl.constexpr = PRECISION != "ieee"
    whole = low if IS_SHORT else tl.minimum(high + BLOCK_N - 1, length_k) // BLOCK_N * BLOCK_N
    for CROSSES_END in tl.static_range(1 if IS_SHORT else 0, 2):
        first, last = (tl.maximum(low, whole), high) if CROSSES_END else (low, whole)
        for first_col in tl.range(first, last, BLOCK_N):
            cols = first_col + tl.arange(0, BLOCK_N)
            k = _load_rows(k_head, cols, HEAD_DIM, BLOCK_D, HAS_ROTARY, CROSSES_END)
            if LOADS_FIRST:
                v = _load_rows(v_head, cols, HEAD_DIM, BLOCK_D, False, CROSSES_END)
            k = _rotate(k, rotary, cols, length_k, False, HAS_ROTARY, HEAD_DIM, BLOCK_D)
            qk = _dot(q, tl.trans(k), None, PRECISION)  # [BLOCK_M, BLOCK_N]

            if HAS_BIAS or HAS_MASK or HAS_ALIBI or HAS_WINDOW:
                s = _scores(
                    qk, rows[:, None], cols[None, :], length_q, length_k, scale_log2, modifiers,
                    HAS_BIAS, HAS_MASK, HAS_ALIBI, HAS_WINDOW, CROSSES_END, not CROSSES_END,
                )  # fmt: skip
                m_new = tl.maximum(m_i, tl.max(s, 1))
            else:
                # the scale is positive: with the maximum taken before it, s - m is one fused multiply-add
                if CROSSES_END:
                    qk = tl.where(cols[None, :] < length_k, qk, float("-inf"))
                m_new = tl.maximum(m_i, tl.max(qk, 1) * scale_log2)
                s = qk * scale_log2
            # a row that saw no key yet has m = -inf, and -inf + inf is NaN
            shift = m_new
            if HAS_BIAS or HAS_MASK or HAS_WINDOW:
                shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(s - shift[:, None])
            alpha = tl.exp2(m_i - shift)
            if FENCED:
                alpha = _proxy_fence(alpha)
            m_i = m_new
            l_i = l_i * alpha + tl.sum(p, 1)
            if HAS_DROPOUT:
                p = tl.where(_keep_mask(keys[:, None], cols[None, :], threshold), p, 0.0)

            if not LOADS_FIRST:
                v = _load_rows(v_head, cols, HEAD_DIM, BLOCK_D, False, CROSSES_END)
            acc = _dot(p.to(v.dtype), v, acc * alpha[:, None], PRECISION)

    # a row without a key has l = 0: zeros, and lse = -inf
    empty = (l_i == 0.0) | (rows >= length_q)
    l_i = tl.where(empty, 1.0, l_i)
    o = tl.where(empty[:, None], 0.0, acc * (keep_scale / l_i)[:, None])
    lse = tl.where(empty, float("-inf"), (m_i + tl.log2(l_i)) * LN_2)

    o_origin, lse_origin = _origins(sequence, start_q, head, n_heads, width_q, HEAD_DIM, PADDED)
    _store_rows(Head(o_ptr + o_origin, n_out, n_heads * HEAD_DIM), o, rows, HEAD_DIM, BLOCK_D, False)
    tl.store(lse_ptr + lse_origin + rows, lse, mask=rows < n_out)
    if PADDED:
        end = _padding_end(row, length_q, length_k, n_out, SHORT)
        _zero_rows(Head(o_ptr + o_origin, end, n_heads * HEAD_DIM), TILE, HEAD_DIM, BLOCK_M, BLOCK_D)
        for first_row in tl.range(TILE, end, BLOCK_M):
            rows = first_row + tl.arange(0, BLOCK_M)
            tl.store(lse_ptr + lse_origin + rows, tl.zeros_like(lse) - float("inf"), mask=rows < end)

"""Device code of attention: what forward and backward share, then the forward kernel.

Equations, shapes and what is saved are in `attention.py`. All kernels take packed and padded tensors alike: a
sequence's rows begin at `ptr + sequence * stride_b + start * stride_t`, where packed has stride_b = 0 and
start = cu_seqlens[sequence], and padded has start = 0.
"""

import triton
import triton.language as tl

from . import _device
from ._random_triton import HEAD_STREAMS, _keep_mask, _row_keys

LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2_E), and exp2 is one instruction
LN_2 = tl.constexpr(0.6931471805599453)
# Triton's interpreter multiplies bfloat16 tiles as if their bits were integers: there they are widened first.
WIDEN_BFLOAT16 = tl.constexpr(_device.INTERPRETING)
# Integers that change from call to call without changing the machine code: never specialised on.
RUNTIME_INTS = ["first_entry", "width_q", "stream_id", "threshold", "window_left", "window_right"]


# ---- what all attention kernels share ------------------------------------------------------------------------


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """a b + acc in fp32; acc may be None."""
    if WIDEN_BFLOAT16 and a.dtype == tl.bfloat16:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _product_in_chunks(
    a_ptr, rows, n_rows, stride_a, b_ptr, cols, n_cols, stride_b, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """a b^T [len(rows), len(cols)] exactly in fp32, a few columns at a time, read anew.

    Outside the matrix units a lane holds whole rows of both operands: at head_dim 256 they would not fit its registers.
    """
    acc = tl.zeros((rows.shape[0], cols.shape[0]), dtype=tl.float32)
    for first in tl.range(0, HEAD_DIM, CHUNK):
        offs_d = first + tl.arange(0, CHUNK)
        a_ptrs = a_ptr + rows[:, None].to(tl.int64) * stride_a + offs_d[None, :]
        b_ptrs = b_ptr + cols[:, None].to(tl.int64) * stride_b + offs_d[None, :]
        a = tl.load(a_ptrs, mask=(rows < n_rows)[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=(cols < n_cols)[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    return acc


@triton.jit
def _scheduled_block(schedule_ptr, first_entry, n_heads, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """This program's (sequence, first row, head) from the list of tiles; sequence is -1 for a surplus program.

    A block of less than a TILE takes several programs an entry; a short sequence fits one block (TILE = BLOCK).

    Heads are innermost, so that over all heads together the longest sequences start first.
    """
    pid = tl.program_id(0)
    head = pid % n_heads
    block = pid // n_heads
    entry = first_entry + block // (TILE // BLOCK)
    sequence = tl.load(schedule_ptr + 2 * entry)
    tile = tl.load(schedule_ptr + 2 * entry + 1)
    return sequence, tile * TILE + block % (TILE // BLOCK) * BLOCK, head


@triton.jit
def _span(spans_ptr, sequence, PADDED: tl.constexpr):
    """(start, length) of a sequence, from its padded length or from cu_seqlens."""
    if PADDED:
        return tl.full((), 0, tl.int64), tl.load(spans_ptr + sequence)
    else:
        start = tl.load(spans_ptr + sequence)
        return start.to(tl.int64), tl.load(spans_ptr + sequence + 1) - start


@triton.jit
def _origins(sequence, start, head, n_heads, width, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr):
    """Where a sequence and head begin in contiguous [T, H, D] and [H, T]; padded: [B, S, H, D] and [B, H, S].

    width is T or S.
    """
    b, h = sequence.to(tl.int64), head.to(tl.int64)
    if PADDED:
        return (b * width * n_heads + h) * HEAD_DIM, (b * n_heads + h) * width
    else:
        return (start * n_heads + h) * HEAD_DIM, h * width + start


@triton.jit
def _gradient_origin(sequence, start, head, width, stride_t, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr):
    """Where a sequence and head begin in dq, dk or dv [T, H, D], or [B, S, H, D], of tokens that lie stride_t apart."""
    first = sequence.to(tl.int64) * width if PADDED else start
    return first * stride_t + head.to(tl.int64) * HEAD_DIM


@triton.jit
def _columns(HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_ROTARY: tl.constexpr):
    """Column in memory of each on-chip column [BLOCK_D], and which of them exist.

    Rotary needs both halves of a head at equal distance, so there each half has its own padding.
    """
    offs_d = tl.arange(0, BLOCK_D)
    if HAS_ROTARY and HEAD_DIM < BLOCK_D:
        in_half = offs_d % (BLOCK_D // 2)
        return offs_d // (BLOCK_D // 2) * (HEAD_DIM // 2) + in_half, in_half < HEAD_DIM // 2
    else:
        return offs_d, offs_d < HEAD_DIM


@triton.jit
def _load_rows(
    ptr, rows, n_rows, stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_ROTARY: tl.constexpr, MASK_ROWS: tl.constexpr,
):  # fmt: skip
    """Rows of one head as [len(rows), BLOCK_D], zero where there is none. MASK_ROWS False: all rows exist."""
    cols, mask_d = _columns(HEAD_DIM, BLOCK_D, HAS_ROTARY)
    ptrs = ptr + rows[:, None].to(tl.int64) * stride + cols[None, :]
    if MASK_ROWS and HEAD_DIM < BLOCK_D:
        return tl.load(ptrs, mask=(rows < n_rows)[:, None] & mask_d[None, :], other=0.0)
    elif MASK_ROWS:
        return tl.load(ptrs, mask=(rows < n_rows)[:, None], other=0.0)
    elif HEAD_DIM < BLOCK_D:
        return tl.load(ptrs, mask=mask_d[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def _store_rows(
    ptr, x, rows, n_rows, stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_ROTARY: tl.constexpr,
):  # fmt: skip
    """The counterpart of `_load_rows`: stores the rows below n_rows in ptr's dtype."""
    cols, mask_d = _columns(HEAD_DIM, BLOCK_D, HAS_ROTARY)
    ptrs = ptr + rows[:, None].to(tl.int64) * stride + cols[None, :]
    mask = (rows < n_rows)[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & mask_d[None, :]
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_columns(ptr, x, rows, n_rows, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """`_store_rows` of x [BLOCK_D, len(rows)], whose columns are the rows of memory."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + rows[None, :].to(tl.int64) * stride + offs_d[:, None]
    mask = (rows < n_rows)[None, :]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (offs_d < HEAD_DIM)[:, None]
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _padding_end(row, length_q, length_k, n_rows, SHORT: tl.constexpr):
    """Up to which row the program of this block writes padding past its TILE: a short sequence has one entry only."""
    return tl.where((row == 0) & (tl.maximum(length_q, length_k) <= SHORT), n_rows, 0)


@triton.jit
def _zero_rows(ptr, row, n_rows, stride, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Zeros into rows [row, n_rows) of one head."""
    zeros = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
    for first_row in tl.range(row, n_rows, BLOCK):
        _store_rows(ptr, zeros, first_row + tl.arange(0, BLOCK), n_rows, stride, HEAD_DIM, BLOCK_D, False)


@triton.jit
def _rotate(
    x, cos_ptr, sin_ptr, rows, n_rows, stride_cos, stride_sin,
    INVERSE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rotary embedding of x [len(rows), BLOCK_D] in fp32: (x1, x2) -> (x1 c - x2 s, x2 c + x1 s), or back."""
    HALF: tl.constexpr = BLOCK_D // 2
    offs_d = tl.arange(0, HALF)
    mask = (rows < n_rows)[:, None] & (offs_d < HEAD_DIM // 2)[None, :]
    rows = rows[:, None].to(tl.int64)
    c = tl.load(cos_ptr + rows * stride_cos + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    s = tl.load(sin_ptr + rows * stride_sin + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    if INVERSE:
        s = -s

    x1, x2 = tl.split(tl.permute(tl.reshape(x.to(tl.float32), (x.shape[0], 2, HALF)), (0, 2, 1)))
    y = tl.join(x1 * c - x2 * s, x2 * c + x1 * s)  # [rows, HALF, 2]
    return tl.reshape(tl.permute(y, (0, 2, 1)), (x.shape[0], BLOCK_D))


@triton.jit
def _dropout_keys(seed_ptr, stream_id, heads, sequence_ids_ptr, sequence, rows, HAS_IDS: tl.constexpr):
    """Keys for dropout of the rows of a sequence; heads: one, or one a row."""
    # names may be of 32 bits: wide before they are moved out of the way of a row's number
    name = tl.load(sequence_ids_ptr + sequence).to(tl.int64) if HAS_IDS else sequence.to(tl.int64)
    streams = tl.cast(stream_id, tl.int64) * HEAD_STREAMS + heads.to(tl.int64)
    return _row_keys(seed_ptr, streams, (name << 32) | rows.to(tl.int64))


@triton.jit
def _scores(
    qk, rows, cols, n_rows, n_cols,
    scale_log2, slope_log2, bias_ptr, stride_bias_q, stride_bias_k, mask_ptr, stride_mask_q, stride_mask_k,
    window_left, window_right,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_WINDOW: tl.constexpr,
    MASK_COLS: tl.constexpr, COLS_EXIST: tl.constexpr,
):  # fmt: skip
    """s * log2(e), -inf where forbidden. rows and cols broadcast to qk: [M, 1], [1, N], or transposed [1, M], [N, 1].

    MASK_COLS: scores past n_cols have to be -inf. COLS_EXIST: no column lies past n_cols, so that a lane may load
    neighbours at once, 16 bytes where strides allow. bias_ptr and mask_ptr point at this sequence and head.
    """
    s = qk * scale_log2
    exists = rows < n_rows
    if not COLS_EXIST:
        exists = exists & (cols < n_cols)
    if HAS_BIAS:
        bias_ptrs = bias_ptr + rows.to(tl.int64) * stride_bias_q + cols.to(tl.int64) * stride_bias_k
        s += tl.load(bias_ptrs, mask=exists, other=0.0).to(tl.float32) * LOG2_E
    if HAS_ALIBI:
        s -= slope_log2 * tl.abs(rows - cols).to(tl.float32)
    if HAS_WINDOW:
        s = tl.where((cols >= rows - window_left) & (cols <= rows + window_right), s, float("-inf"))
    if HAS_MASK:
        mask_ptrs = mask_ptr + rows.to(tl.int64) * stride_mask_q + cols.to(tl.int64) * stride_mask_k
        allowed = tl.load(mask_ptrs, mask=exists, other=0)
        s = tl.where(allowed != 0, s, float("-inf"))
    if MASK_COLS:
        s = tl.where(cols < n_cols, s, float("-inf"))
    return s


@triton.jit
def _key_range(
    row, length_q, length_k, window_left, window_right,
    HAS_WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Columns [low, high) that rows [row, row + BLOCK_M) may see; low is a multiple of BLOCK_N."""
    low = row * 0
    high = tl.where(row < length_q, length_k, 0)
    if HAS_WINDOW:
        low = tl.maximum(row - window_left, 0) // BLOCK_N * BLOCK_N
        high = tl.minimum(high, row + BLOCK_M + window_right)
    return low, high


@triton.jit
def _lse_log2(lse):
    """lse * log2(e), where a row that saw no key (-inf) gets +inf, which makes its p zero."""
    return tl.where(lse == float("-inf"), float("inf"), lse) * LOG2_E


@triton.jit
def _load_lse_log2(lse_ptr, rows, n_rows):
    """lse * log2(e) [len(rows)]; +inf for a row that saw no key or does not exist."""
    return _lse_log2(tl.load(lse_ptr + rows, mask=rows < n_rows, other=float("inf")))


@triton.jit
def _proxy_fence(x):
    """x [rows] in fp32, unchanged. A product that needs x reads from shared memory what was copied there before x was
    computed. (To the compiler this is arithmetic: it stays between what computes x and what uses it.)"""
    asm: tl.constexpr = "fence.proxy.async.shared::cta; mov.b32 $0, $1;"
    return tl.inline_asm_elementwise(asm, "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


# ---- forward -------------------------------------------------------------------------------------------------


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
    q_ptr += b * stride_qb + start_q * stride_qt + h * stride_qh
    k_ptr += b * stride_kb + start_k * stride_kt + h // GROUP * stride_kh
    v_ptr += b * stride_vb + start_k * stride_vt + h // GROUP * stride_vh
    if HAS_BIAS:
        bias_ptr += b * stride_bias_b + h * stride_bias_h
    if HAS_MASK:
        mask_ptr += b * stride_mask_b + h * stride_mask_h

    rows = row + tl.arange(0, BLOCK_M)
    q = _load_rows(q_ptr, rows, length_q, stride_qt, HEAD_DIM, BLOCK_D, HAS_ROTARY, True)
    if HAS_ROTARY:
        q = _rotate(q, cos_ptr, sin_ptr, rows, length_q, stride_cos, stride_sin, False, HEAD_DIM, BLOCK_D).to(q.dtype)
    slope_log2 = tl.load(slopes_ptr + head).to(tl.float32) * LOG2_E if HAS_ALIBI else 0.0
    keys = rows
    if HAS_DROPOUT:
        keys = _dropout_keys(seed_ptr, stream_id, h, sequence_ids_ptr, sequence, rows, HAS_IDS)

    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    m_i = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    l_i = tl.zeros((BLOCK_M,), dtype=tl.float32)
    low, high = _key_range(row, length_q, length_k, window_left, window_right, HAS_WINDOW, BLOCK_M, BLOCK_N)
    # whole blocks need no mask; the block that crosses the end comes after, on its own. A short sequence is all end
    IS_SHORT: tl.constexpr = TILE == SHORT
    # On Hopper and Blackwell a product reads shared memory through the asynchronous proxy, and needs a proxy fence
    # after the wait for the copy that brought its operand. Triton 3.7 waits where a load stands in the program, and
    # takes a fence between the start of a copy and its wait for one that covers the copy: see
    # findings/triton_fence_before_wait.sh. So a loop loads its tiles before its first product; not in float32, whose
    # tiles would take registers until then. For Blackwell (FENCED) Triton delays v's copy and wait to behind the first
    # product of q and k all the same: there the product of p and v has a fence of its own.
    LOADS_FIRST: tl.constexpr = PRECISION != "ieee"
    whole = low if IS_SHORT else tl.minimum(high + BLOCK_N - 1, length_k) // BLOCK_N * BLOCK_N
    for CROSSES_END in tl.static_range(1 if IS_SHORT else 0, 2):
        first, last = (tl.maximum(low, whole), high) if CROSSES_END else (low, whole)
        for first_col in tl.range(first, last, BLOCK_N):
            cols = first_col + tl.arange(0, BLOCK_N)
            k = _load_rows(k_ptr, cols, length_k, stride_kt, HEAD_DIM, BLOCK_D, HAS_ROTARY, CROSSES_END)
            if LOADS_FIRST:
                v = _load_rows(v_ptr, cols, length_k, stride_vt, HEAD_DIM, BLOCK_D, False, CROSSES_END)
            if HAS_ROTARY:
                k = _rotate(k, cos_ptr, sin_ptr, cols, length_k, stride_cos, stride_sin, False, HEAD_DIM, BLOCK_D)
            qk = _dot(q, tl.trans(k.to(q.dtype)), None, PRECISION)  # [BLOCK_M, BLOCK_N]

            if HAS_BIAS or HAS_MASK or HAS_ALIBI or HAS_WINDOW:
                s = _scores(
                    qk, rows[:, None], cols[None, :], length_q, length_k, scale_log2, slope_log2,
                    bias_ptr, stride_bias_q, stride_bias_k, mask_ptr, stride_mask_q, stride_mask_k,
                    window_left, window_right, HAS_BIAS, HAS_MASK, HAS_ALIBI, HAS_WINDOW, CROSSES_END, not CROSSES_END,
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
                v = _load_rows(v_ptr, cols, length_k, stride_vt, HEAD_DIM, BLOCK_D, False, CROSSES_END)
            acc = _dot(p.to(v.dtype), v, acc * alpha[:, None], PRECISION)

    # a row without a key has l = 0: zeros, and lse = -inf
    empty = (l_i == 0.0) | (rows >= length_q)
    l_i = tl.where(empty, 1.0, l_i)
    o = tl.where(empty[:, None], 0.0, acc * (keep_scale / l_i)[:, None])
    lse = tl.where(empty, float("-inf"), (m_i + tl.log2(l_i)) * LN_2)

    o_origin, lse_origin = _origins(sequence, start_q, head, n_heads, width_q, HEAD_DIM, PADDED)
    _store_rows(o_ptr + o_origin, o, rows, n_out, n_heads * HEAD_DIM, HEAD_DIM, BLOCK_D, False)
    tl.store(lse_ptr + lse_origin + rows, lse, mask=rows < n_out)
    if PADDED:
        end = _padding_end(row, length_q, length_k, n_out, SHORT)
        _zero_rows(o_ptr + o_origin, TILE, end, n_heads * HEAD_DIM, HEAD_DIM, BLOCK_M, BLOCK_D)
        for first_row in tl.range(TILE, end, BLOCK_M):
            rows = first_row + tl.arange(0, BLOCK_M)
            tl.store(lse_ptr + lse_origin + rows, tl.zeros_like(lse) - float("inf"), mask=rows < end)

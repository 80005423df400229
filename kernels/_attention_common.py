"""Device code that attention's kernels share, and the groups in which it takes its arguments.

Equations, shapes and what is saved are in `attention.py`. All kernels take packed and padded tensors alike: a
sequence's rows begin at `ptr + sequence * stride_b + start * stride_t`, where packed has stride_b = 0 and
start = cu_seqlens[sequence], and padded has start = 0.

A kernel's arguments are not grouped. `do_not_specialize` has no effect on a tuple's members, so Triton would compile
again when a number in a tuple becomes 1 or a multiple of 16. All kernels use the order of `_attention_arguments.py`:

    q, k, v, their spans, the schedule                            in:  `Sequences`, the entries of `Tiles`
    bias, mask, slopes, cos, sin, seed, sequence_ids              in:  `Options`
    o, lse, do, dlse, delta                                       in:  `Saved`
    o, lse or dq, dk, dv, delta                                   out
    strides of q, k, v, gradients; of bias, mask; of cos, sin
    first_entry, sizes, scales; keep_scale, stream_id, threshold; window_left, window_right
    PADDED, GROUP; HAS_...; HEAD_DIM, BLOCK_...; TILE, SHORT; PRECISION, FENCED

A kernel's first lines put run-time arguments into the groups below; the compiled code has no groups. Constants stay
outside, because assigning a tuple would turn its constants into run-time values.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import _device
from ._random_triton import HEAD_STREAMS, _row_keys

LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2_E), and exp2 is one instruction
LN_2 = tl.constexpr(0.6931471805599453)
# Triton's interpreter multiplies bfloat16 tiles as if their bits were integers: there they are widened first.
WIDEN_BFLOAT16 = tl.constexpr(_device.INTERPRETING)
# Integers that change from call to call without changing the machine code. Triton must not specialise on them.
RUNTIME_INTS = ["first_entry", "width_q", "stream_id", "threshold", "window_left", "window_right"]


# ---- groups of arguments -------------------------------------------------------------------------------------


class Head(NamedTuple):
    """The rows of one sequence and head in q, k, v, o or a gradient: [n_rows, HEAD_DIM], `stride` elements apart."""

    ptr: Any
    n_rows: Any
    stride: Any


class Rotary(NamedTuple):
    """The tables of the rotary embedding, [S, HEAD_DIM / 2] each."""

    cos_ptr: Any
    sin_ptr: Any
    stride_cos: Any
    stride_sin: Any


class Modifiers(NamedTuple):
    """The modifiers of one sequence's and head's scores; bias_ptr and mask_ptr point at its [Sq, Sk]."""

    bias_ptr: Any
    stride_bias_q: Any
    stride_bias_k: Any
    mask_ptr: Any
    stride_mask_q: Any
    stride_mask_k: Any
    slope_log2: Any
    window_left: Any
    window_right: Any


class Dropout(NamedTuple):
    """The inputs from which dropout's keys are computed."""

    seed_ptr: Any
    stream_id: Any
    sequence_ids_ptr: Any


# ---- functions -----------------------------------------------------------------------------------------------


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """a b + acc in fp32; acc may be None."""
    if WIDEN_BFLOAT16 and a.dtype == tl.bfloat16:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _product_in_chunks(a, rows, b, cols, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr):
    """a[rows] b[cols]^T of two Heads, [len(rows), len(cols)], exactly in fp32. Loads a few columns of both at a time.

    Without matrix units a lane holds whole rows of both operands; at head_dim 256 its registers could not hold them.
    """
    acc = tl.zeros((rows.shape[0], cols.shape[0]), dtype=tl.float32)
    for first in tl.range(0, HEAD_DIM, CHUNK):
        offs_d = first + tl.arange(0, CHUNK)
        a_ptrs = a.ptr + rows[:, None].to(tl.int64) * a.stride + offs_d[None, :]
        b_ptrs = b.ptr + cols[:, None].to(tl.int64) * b.stride + offs_d[None, :]
        of_a = tl.load(a_ptrs, mask=(rows < a.n_rows)[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
        of_b = tl.load(b_ptrs, mask=(cols < b.n_rows)[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
        acc = tl.dot(of_a, tl.trans(of_b), acc, input_precision="ieee")
    return acc


@triton.jit
def _scheduled_block(schedule_ptr, first_entry, n_heads, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """This program's (sequence, first row, head) from the list of tiles; sequence is -1 for a surplus program.

    If a block is less than a TILE, an entry has several programs; a short sequence fits one block (TILE = BLOCK).

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
    """Offsets of a sequence and head in contiguous [T, H, D] and [H, T]; padded: [B, S, H, D] and [B, H, S].

    width is T or S.
    """
    b, h = sequence.to(tl.int64), head.to(tl.int64)
    if PADDED:
        return (b * width * n_heads + h) * HEAD_DIM, (b * n_heads + h) * width
    else:
        return (start * n_heads + h) * HEAD_DIM, h * width + start


@triton.jit
def _gradient_origin(sequence, start, head, width, stride_t, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr):
    """Offset of a sequence and head in dq, dk or dv, [T, H, D] or [B, S, H, D], with token stride stride_t."""
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
    head, rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_ROTARY: tl.constexpr, MASK_ROWS: tl.constexpr
):  # fmt: skip
    """Rows of a Head as [len(rows), BLOCK_D], zero where there is none. MASK_ROWS False: all rows exist."""
    cols, mask_d = _columns(HEAD_DIM, BLOCK_D, HAS_ROTARY)
    ptrs = head.ptr + rows[:, None].to(tl.int64) * head.stride + cols[None, :]
    if MASK_ROWS and HEAD_DIM < BLOCK_D:
        return tl.load(ptrs, mask=(rows < head.n_rows)[:, None] & mask_d[None, :], other=0.0)
    elif MASK_ROWS:
        return tl.load(ptrs, mask=(rows < head.n_rows)[:, None], other=0.0)
    elif HEAD_DIM < BLOCK_D:
        return tl.load(ptrs, mask=mask_d[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def _store_rows(head, x, rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_ROTARY: tl.constexpr):
    """The counterpart of `_load_rows`: stores the rows that exist in the Head's dtype."""
    cols, mask_d = _columns(HEAD_DIM, BLOCK_D, HAS_ROTARY)
    ptrs = head.ptr + rows[:, None].to(tl.int64) * head.stride + cols[None, :]
    mask = (rows < head.n_rows)[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & mask_d[None, :]
    tl.store(ptrs, x.to(head.ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_columns(head, x, rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """`_store_rows` of x [BLOCK_D, len(rows)], whose columns are the rows of memory."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = head.ptr + rows[None, :].to(tl.int64) * head.stride + offs_d[:, None]
    mask = (rows < head.n_rows)[None, :]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (offs_d < HEAD_DIM)[:, None]
    tl.store(ptrs, x.to(head.ptr.dtype.element_ty), mask=mask)


@triton.jit
def _padding_end(row, length_q, length_k, n_rows, SHORT: tl.constexpr):
    """The row up to which this block's program writes padding. A short sequence's only program writes all of it."""
    return tl.where((row == 0) & (tl.maximum(length_q, length_k) <= SHORT), n_rows, 0)


@triton.jit
def _zero_rows(head, row, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Zeros into the rows of a Head from `row` on."""
    zeros = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
    for first_row in tl.range(row, head.n_rows, BLOCK):
        _store_rows(head, zeros, first_row + tl.arange(0, BLOCK), HEAD_DIM, BLOCK_D, False)


@triton.jit
def _rotate(
    x, rotary, rows, n_rows,
    INVERSE: tl.constexpr, HAS_ROTARY: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rotary embedding of x [len(rows), BLOCK_D] in x's dtype, with INVERSE its inverse; without rotary, x itself."""
    if HAS_ROTARY:
        return _rotated(x, rotary, rows, n_rows, INVERSE, HEAD_DIM, BLOCK_D).to(x.dtype)
    else:
        return x


@triton.jit
def _rotated(
    x, rotary, rows, n_rows, INVERSE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """(x1, x2) -> (x1 c - x2 s, x2 c + x1 s) in fp32."""
    HALF: tl.constexpr = BLOCK_D // 2
    offs_d = tl.arange(0, HALF)
    mask = (rows < n_rows)[:, None] & (offs_d < HEAD_DIM // 2)[None, :]
    rows = rows[:, None].to(tl.int64)
    c = tl.load(rotary.cos_ptr + rows * rotary.stride_cos + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    s = tl.load(rotary.sin_ptr + rows * rotary.stride_sin + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    if INVERSE:
        s = -s

    x1, x2 = tl.split(tl.permute(tl.reshape(x.to(tl.float32), (x.shape[0], 2, HALF)), (0, 2, 1)))
    y = tl.join(x1 * c - x2 * s, x2 * c + x1 * s)  # [rows, HALF, 2]
    return tl.reshape(tl.permute(y, (0, 2, 1)), (x.shape[0], BLOCK_D))


@triton.jit
def _dropout_keys(dropout, heads, sequence, rows, HAS_IDS: tl.constexpr):
    """Keys for dropout of the rows of a sequence. heads: one head, or one for each row."""
    # ids may be 32-bit: widened before the shift that makes room for the row's number
    name = tl.load(dropout.sequence_ids_ptr + sequence).to(tl.int64) if HAS_IDS else sequence.to(tl.int64)
    streams = tl.cast(dropout.stream_id, tl.int64) * HEAD_STREAMS + heads.to(tl.int64)
    return _row_keys(dropout.seed_ptr, streams, (name << 32) | rows.to(tl.int64))


@triton.jit
def _scores(
    qk, rows, cols, n_rows, n_cols, scale_log2, modifiers,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_WINDOW: tl.constexpr,
    MASK_COLS: tl.constexpr, COLS_EXIST: tl.constexpr,
):  # fmt: skip
    """s * log2(e), -inf where forbidden. rows and cols broadcast to qk: [M, 1], [1, N], or transposed [1, M], [N, 1].

    MASK_COLS: scores past n_cols have to be -inf. COLS_EXIST: no column lies past n_cols, so that a lane may load
    neighbours at once, 16 bytes where strides allow.
    """
    of = modifiers
    s = qk * scale_log2
    exists = rows < n_rows
    if not COLS_EXIST:
        exists = exists & (cols < n_cols)
    if HAS_BIAS:
        bias_ptrs = of.bias_ptr + rows.to(tl.int64) * of.stride_bias_q + cols.to(tl.int64) * of.stride_bias_k
        s += tl.load(bias_ptrs, mask=exists, other=0.0).to(tl.float32) * LOG2_E
    if HAS_ALIBI:
        s -= of.slope_log2 * tl.abs(rows - cols).to(tl.float32)
    if HAS_WINDOW:
        s = tl.where((cols >= rows - of.window_left) & (cols <= rows + of.window_right), s, float("-inf"))
    if HAS_MASK:
        mask_ptrs = of.mask_ptr + rows.to(tl.int64) * of.stride_mask_q + cols.to(tl.int64) * of.stride_mask_k
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
    """x [rows] in fp32, unchanged, after a proxy fence: a product that uses x then sees all data that was copied to
    shared memory before. (The compiler treats the instruction as arithmetic on x, so it cannot move the fence before
    the computation of x, or behind the first use.)"""
    asm: tl.constexpr = "fence.proxy.async.shared::cta; mov.b32 $0, $1;"
    return tl.inline_asm_elementwise(asm, "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)

"""The device code of the matrix product: a persistent loop over tiles, and the epilogues before a tile is stored."""

import triton
import triton.language as tl

from . import _device
from ._activation import _act_and_grad, _act_backward_tile, _load_tile, _store_tile

# Triton's interpreter multiplies bfloat16 tiles as if their bits were integers: there they are widened first.
WIDEN_BFLOAT16 = tl.constexpr(_device.INTERPRETING)

# ---- device code: the product ----------------------------------------------------------------------------


@triton.jit
def _tile_at(tile, n_tiles_m, n_tiles_n, GROUP_M: tl.constexpr):
    """(row, column) of a tile in grouped order: GROUP_M tiles down, then one right, so both bands stay in L2."""
    per_group = GROUP_M * n_tiles_n
    first_m = tile // per_group * GROUP_M
    group_m = tl.minimum(n_tiles_m - first_m, GROUP_M)
    return first_m + tile % per_group % group_m, tile % per_group // group_m


@triton.jit
def _load_block(src, stride, row, col, n_rows, n_cols, ROWS: tl.constexpr, COLS: tl.constexpr, BULK: tl.constexpr):
    """Block [ROWS, COLS] at (row, col) of a row-major matrix, zero outside. `src`: descriptor if BULK, else pointer."""
    if BULK:
        return src.load([row, col])
    else:
        offs_r = row + tl.arange(0, ROWS)
        offs_c = col + tl.arange(0, COLS)
        ptrs = src + offs_r.to(tl.int64)[:, None] * stride + offs_c[None, :]
        return tl.load(ptrs, mask=(offs_r < n_rows)[:, None] & (offs_c < n_cols)[None, :], other=0.0)


@triton.jit
def _load_operand(
    src, stride, row, k0, n_rows, k,
    K_FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """Block [ROWS, BLOCK_K] at (row, k0) of an operand stored as [n_rows, k]; K_FIRST: stored as [k, n_rows]."""
    if K_FIRST:
        return _load_block(src, stride, k0, row, k, n_rows, BLOCK_K, ROWS, BULK).T
    else:
        return _load_block(src, stride, row, k0, n_rows, k, ROWS, BLOCK_K, BULK)


@triton.jit
def _dot(a_block, b_block, acc):
    """acc + a_block b_block^T, products exact in the operands' type, sums in float32."""
    if WIDEN_BFLOAT16 and a_block.dtype == tl.bfloat16:
        a_block, b_block = a_block.to(tl.float32), b_block.to(tl.float32)
    return tl.dot(a_block, b_block.T, acc, input_precision="ieee")


@triton.jit
def _product(
    tile, a, b, stride_a, stride_b, m, n, k,
    LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    BULK: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """One tile: (its row of tiles, its first column, op(A) op(B)^T in float32, a second accumulator).

    GATED: the second accumulator is the tile n columns to the right; otherwise zeros, which are not used.
    """
    pid_m, pid_n = _tile_at(tile, tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M)
    m0, n0 = pid_m * BLOCK_M, pid_n * BLOCK_N

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc2 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in tl.range(0, k, BLOCK_K):
        a_block = _load_operand(a, stride_a, m0, k0, m, k, LAYOUT == "tn", BLOCK_M, BLOCK_K, BULK)
        b_block = _load_operand(b, stride_b, n0, k0, n, k, LAYOUT != "nt", BLOCK_N, BLOCK_K, BULK)
        acc = _dot(a_block, b_block, acc)
        if GATED:
            b2_block = _load_operand(b, stride_b, n + n0, k0, 2 * n, k, LAYOUT != "nt", BLOCK_N, BLOCK_K, BULK)
            acc2 = _dot(a_block, b2_block, acc2)
    return pid_m, n0, acc, acc2


@triton.jit
def _halves(tile):
    """[M, N] -> its left and its right half."""
    pair = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    return tl.split(tl.permute(pair, (0, 2, 1)))


# ---- device code: forward --------------------------------------------------------------------------------


@triton.jit
def _forward_epilogue(
    acc, acc2, bias_ptr, y_ptr, h_ptr, stride_y, stride_h, offs_m, n0, m, n,
    ACTIVATION: tl.constexpr, ACCUMULATE: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """h = acc + bias;  y = act(h) [+ y], in slices of columns, so that only a slice needs additional registers."""
    width: tl.constexpr = acc.shape[1]
    GATED: tl.constexpr = ACTIVATION == "geglu"
    if width > SLICE:
        left, right = _halves(acc)
        left2, right2 = (_halves(acc2)) if GATED else (left, right)
        _forward_epilogue(
            left, left2, bias_ptr, y_ptr, h_ptr, stride_y, stride_h, offs_m, n0, m, n,
            ACTIVATION, ACCUMULATE, SLICE,
        )  # fmt: skip
        _forward_epilogue(
            right, right2, bias_ptr, y_ptr, h_ptr, stride_y, stride_h, offs_m, n0 + width // 2, m, n,
            ACTIVATION, ACCUMULATE, SLICE,
        )  # fmt: skip
    else:
        offs_n = n0 + tl.arange(0, width)
        h, h2 = acc, acc2
        if bias_ptr is not None:
            h += tl.load(bias_ptr + offs_n, mask=offs_n < n, other=0.0).to(tl.float32)[None, :]
            if GATED:
                h2 += tl.load(bias_ptr + n + offs_n, mask=offs_n < n, other=0.0).to(tl.float32)[None, :]
        if h_ptr is not None:
            _store_tile(h_ptr, stride_h, h, offs_m, offs_n, m, n)
            if GATED:
                _store_tile(h_ptr + n, stride_h, h2, offs_m, offs_n, m, n)

        y, _ = _act_and_grad(h, ACTIVATION, y_ptr.dtype.element_ty == tl.float32)
        if GATED:
            y *= h2
        if ACCUMULATE:
            y += _load_tile(y_ptr, stride_y, offs_m, offs_n, m, n)
        _store_tile(y_ptr, stride_y, y, offs_m, offs_n, m, n)


@triton.jit(do_not_specialize=["m"])
def _linear_act_kernel(
    a, b, bias_ptr,                    # in:  op(A), op(B): descriptors if BULK, else pointers; [N] (geglu [2N]) or None
    y_ptr, h_ptr,                      # out: [M, N], [M, N] (geglu [M, 2N]) or None
    stride_a, stride_b, stride_y, stride_h,
    m, n, k,
    LAYOUT: tl.constexpr, ACTIVATION: tl.constexpr, ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SLICE: tl.constexpr,
    BULK: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N)
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=FLATTEN):
        pid_m, n0, acc, acc2 = _product(
            tile, a, b, stride_a, stride_b, m, n, k,
            LAYOUT, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, BULK, ACTIVATION == "geglu",
        )  # fmt: skip

        offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        _forward_epilogue(
            acc, acc2, bias_ptr, y_ptr, h_ptr, stride_y, stride_h, offs_m, n0, m, n,
            ACTIVATION, ACCUMULATE, SLICE,
        )  # fmt: skip


# ---- device code: backward -------------------------------------------------------------------------------


@triton.jit
def _backward_epilogue(
    g, h_ptr, dh_ptr, act_ptr, dbias_ptr, stride_h, stride_dh, stride_act, offs_m, n0, m, n,
    ACTIVATION: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """a = act(h), dh = g * act'(h), and the column sums of dh; in slices of columns, as in the forward."""
    width: tl.constexpr = g.shape[1]
    if width > SLICE:
        left, right = _halves(g)
        _backward_epilogue(
            left, h_ptr, dh_ptr, act_ptr, dbias_ptr, stride_h, stride_dh, stride_act, offs_m, n0, m, n,
            ACTIVATION, SLICE,
        )  # fmt: skip
        _backward_epilogue(
            right, h_ptr, dh_ptr, act_ptr, dbias_ptr, stride_h, stride_dh, stride_act, offs_m, n0 + width // 2, m, n,
            ACTIVATION, SLICE,
        )  # fmt: skip
    else:
        offs_n = n0 + tl.arange(0, width)
        _act_backward_tile(
            g, h_ptr, dh_ptr, act_ptr, dbias_ptr, stride_h, stride_dh, stride_act, offs_m, offs_n, m, n, ACTIVATION
        )


@triton.jit(do_not_specialize=["m"])
def _dact_kernel(
    a, b, h_ptr,                       # in:  dy [M, K], weight [K, N]: descriptors if BULK; [M, N] (geglu [M, 2N])
    dh_ptr, act_ptr, dbias_part_ptr,   # out: like h; [M, N] or None; [tiles of M, N (geglu 2N)] float32 or None
    stride_a, stride_b, stride_h, stride_dh, stride_act, stride_dbias,
    m, n, k,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SLICE: tl.constexpr,
    BULK: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N)
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=FLATTEN):
        pid_m, n0, g, _ = _product(
            tile, a, b, stride_a, stride_b, m, n, k, "nn", BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, BULK, False
        )

        offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        dbias_ptr = None if dbias_part_ptr is None else dbias_part_ptr + pid_m.to(tl.int64) * stride_dbias
        _backward_epilogue(
            g, h_ptr, dh_ptr, act_ptr, dbias_ptr, stride_h, stride_dh, stride_act, offs_m, n0, m, n,
            ACTIVATION, SLICE,
        )  # fmt: skip

"""The one matrix product: C = op(A) op(B)^T with whatever follows it done before the tile leaves the chip.

    nt   c[m, n] = sum_k a[m, k] b[n, k]     forward:          x [M, K],  weight [N, K]
    nn   c[m, n] = sum_k a[m, k] b[k, n]     input gradient:   dy [M, K], weight [K, N]
    tn   c[m, n] = sum_k a[k, m] b[k, n]     weight gradient:  dy [K, M], x [K, N]

Epilogues, on the float32 accumulator:

    forward    h = c + bias;  y = act(h)                      [M, N];  geglu: h [M, 2N], y = gelu(h1) * h2
    accumulate y += c                                         [M, N] in float32
    backward   g = c;  a = act(h), dh = g * act'(h)           [M, N];  geglu: dh [M, 2N]
               dbias_part = column sums of dh, a row of them per row of tiles, in float32

Order of summation: K in steps of BLOCK_K, first to last, in one accumulator (no split-K, no atomics). The tile
comes from (n, k, dtype, device), never from M, so the bits of a row depend on nothing but that row.

The grid is persistent: a fixed number of programs walk the tiles in an order that keeps a band of A and a band of
B in L2. On Hopper and newer the operands come by tensor descriptors (the bulk copy engine), elsewhere, or where a
row is not a multiple of 16 bytes, by pointers; both sum in the same order.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _device
from ._compile import CompileCase
from ._gemm_config import FLOAT32, UNALIGNED, GemmConfig, accumulating, gemm_config, ladder_of
from ._library import register

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Triton's interpreter multiplies bfloat16 tiles as if their bits were integers: there they are widened first.
WIDEN_BFLOAT16 = tl.constexpr(_device.INTERPRETING)

# In kernels these stand to the right of a tensor: to the left, the interpreter takes the tensor for a constant too.
LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2_E)
SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
GELU_CUBIC = tl.constexpr(0.044715)  # tanh form: u = sqrt(2 / pi) (h + 0.044715 h^3)

# log2(Phi(-x)) = log2(erfc(x / sqrt 2) / 2) for x >= 0, minimax: relative error of Phi(-x) under 5e-6 up to x = 4 and
# 8e-5 up to x = 6, falling to zero beyond; exactly 1/2 at 0.
TAIL_1 = tl.constexpr(-1.1512051820755005)
TAIL_2 = tl.constexpr(-0.4585839807987213)
TAIL_3 = tl.constexpr(-0.053828585892915726)
TAIL_4 = tl.constexpr(0.008436127565801144)
TAIL_5 = tl.constexpr(-0.00091013521887362)
TAIL_6 = tl.constexpr(5.8721885579871014e-05)
TAIL_7 = tl.constexpr(-1.6762462564656744e-06)


# ---- device code: activations ----------------------------------------------------------------------------


@triton.jit
def _gelu_and_grad(h, EXACT: tl.constexpr):
    """gelu(h) = h Phi(h) and its derivative Phi(h) + h phi(h).

    EXACT: by erf, some 25 instructions. Else, for results that are rounded to 16 bits: by one exponential of a
    polynomial, some 10, with an error a hundredth of that rounding, and no cancellation for large negative h.
    """
    if EXACT:
        cdf = 0.5 * (1.0 + tl.erf(h * SQRT_HALF))
    else:
        x = tl.minimum(tl.abs(h), 16.0)  # the tail is zero by then, and the polynomial of inf NaN
        p = x * TAIL_7 + TAIL_6
        p = p * x + TAIL_5
        p = p * x + TAIL_4
        p = p * x + TAIL_3
        p = p * x + TAIL_2
        p = p * x + TAIL_1
        tail = tl.exp2(p * x - 1.0)  # Phi(-|h|)
        cdf = tl.where(h < 0.0, tail, 1.0 - tail)
    pdf = tl.exp2(h * h * (-0.5 * LOG2_E)) * INV_SQRT_2PI
    # a product, so that -inf and NaN give NaN, as in torch
    return h * cdf, cdf + h * pdf


@triton.jit
def _act_and_grad(h, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """act(h) and act'(h), float32; what the caller does not use, the compiler drops."""
    if ACTIVATION == "none":
        return h, tl.full(h.shape, 1.0, h.dtype)
    elif ACTIVATION == "relu":
        return tl.where(h < 0.0, 0.0, h), tl.where(h <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(h)
        return h * s, s * (1.0 + h * (1.0 - s))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(u)) = sigmoid(2u): one exponential, and no cancellation for large negative h
        h2 = h * h
        s = tl.sigmoid(h * (h2 * GELU_CUBIC + 1.0) * (2.0 * SQRT_2_OVER_PI))
        du = (h2 * (3.0 * GELU_CUBIC) + 1.0) * (2.0 * SQRT_2_OVER_PI)
        return h * s, s + h * s * (1.0 - s) * du
    else:
        tl.static_assert(ACTIVATION == "gelu" or ACTIVATION == "geglu")
        return _gelu_and_grad(h, EXACT)


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
def _load_a(a, stride_a, m0, k0, m, k, LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BULK: tl.constexpr):  # fmt: skip  # noqa: E501
    if LAYOUT == "tn":
        return _load_block(a, stride_a, k0, m0, k, m, BLOCK_K, BLOCK_M, BULK).T
    else:
        return _load_block(a, stride_a, m0, k0, m, k, BLOCK_M, BLOCK_K, BULK)


@triton.jit
def _load_b(b, stride_b, n0, k0, n, k, LAYOUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BULK: tl.constexpr):  # fmt: skip  # noqa: E501
    if LAYOUT == "nt":
        return _load_block(b, stride_b, n0, k0, n, k, BLOCK_N, BLOCK_K, BULK).T
    else:
        return _load_block(b, stride_b, k0, n0, k, n, BLOCK_K, BLOCK_N, BULK)


@triton.jit
def _dot(a_block, b_block, acc):
    """acc + a_block b_block, products exact in the operands' type, sums in float32."""
    if WIDEN_BFLOAT16 and a_block.dtype == tl.bfloat16:
        a_block, b_block = a_block.to(tl.float32), b_block.to(tl.float32)
    return tl.dot(a_block, b_block, acc, input_precision="ieee")


@triton.jit
def _accumulate(
    a, b, stride_a, stride_b, m0, n0, m, n, k,
    LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BULK: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """The tile at (m0, n0) of op(A) op(B)^T in float32; GATED: and the one n columns further on (else the same)."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc2 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in tl.range(0, k, BLOCK_K):
        a_block = _load_a(a, stride_a, m0, k0, m, k, LAYOUT, BLOCK_M, BLOCK_K, BULK)
        b_block = _load_b(b, stride_b, n0, k0, n, k, LAYOUT, BLOCK_N, BLOCK_K, BULK)
        acc = _dot(a_block, b_block, acc)
        if GATED:
            b2_block = _load_b(b, stride_b, n + n0, k0, 2 * n, k, LAYOUT, BLOCK_N, BLOCK_K, BULK)
            acc2 = _dot(a_block, b2_block, acc2)
    return acc, acc2


@triton.jit
def _load_tile(ptr, stride, offs_m, offs_n, m, n):
    """Tile [BLOCK_M, BLOCK_N] in float32, zero outside."""
    ptrs = ptr + offs_m.to(tl.int64)[:, None] * stride + offs_n[None, :]
    return tl.load(ptrs, mask=(offs_m < m)[:, None] & (offs_n < n)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store_tile(ptr, stride, tile, offs_m, offs_n, m, n):
    """Store tile [BLOCK_M, BLOCK_N], rounded to the matrix's type."""
    ptrs = ptr + offs_m.to(tl.int64)[:, None] * stride + offs_n[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=(offs_m < m)[:, None] & (offs_n < n)[None, :])


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
    """h = acc + bias;  y = act(h) [+ y], in slices of columns: only a slice needs registers beside the accumulator."""
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
    n_tiles_m, n_tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)

    for tile in tl.range(tl.program_id(0), n_tiles_m * n_tiles_n, tl.num_programs(0), flatten=FLATTEN):
        pid_m, pid_n = _tile_at(tile, n_tiles_m, n_tiles_n, GROUP_M)
        m0, n0 = pid_m * BLOCK_M, pid_n * BLOCK_N

        acc, acc2 = _accumulate(
            a, b, stride_a, stride_b, m0, n0, m, n, k, LAYOUT, BLOCK_M, BLOCK_N, BLOCK_K, BULK, ACTIVATION == "geglu"
        )

        offs_m = m0 + tl.arange(0, BLOCK_M)
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
        h = _load_tile(h_ptr, stride_h, offs_m, offs_n, m, n)
        a, dh = _act_and_grad(h, ACTIVATION, dh_ptr.dtype.element_ty == tl.float32)
        dh *= g
        if ACTIVATION == "geglu":
            h2 = _load_tile(h_ptr + n, stride_h, offs_m, offs_n, m, n)
            dh2 = g * a
            dh *= h2
            a *= h2
            _store_tile(dh_ptr + n, stride_dh, dh2, offs_m, offs_n, m, n)
            if dbias_ptr is not None:
                tl.store(dbias_ptr + n + offs_n, tl.sum(dh2, axis=0), mask=offs_n < n)
        _store_tile(dh_ptr, stride_dh, dh, offs_m, offs_n, m, n)
        if act_ptr is not None:
            _store_tile(act_ptr, stride_act, a, offs_m, offs_n, m, n)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + offs_n, tl.sum(dh, axis=0), mask=offs_n < n)


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
    n_tiles_m, n_tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)

    for tile in tl.range(tl.program_id(0), n_tiles_m * n_tiles_n, tl.num_programs(0), flatten=FLATTEN):
        pid_m, pid_n = _tile_at(tile, n_tiles_m, n_tiles_n, GROUP_M)
        m0, n0 = pid_m * BLOCK_M, pid_n * BLOCK_N

        g, _ = _accumulate(a, b, stride_a, stride_b, m0, n0, m, n, k, "nn", BLOCK_M, BLOCK_N, BLOCK_K, BULK, False)

        offs_m = m0 + tl.arange(0, BLOCK_M)
        dbias_ptr = None if dbias_part_ptr is None else dbias_part_ptr + pid_m.to(tl.int64) * stride_dbias
        _backward_epilogue(
            g, h_ptr, dh_ptr, act_ptr, dbias_ptr, stride_h, stride_dh, stride_act, offs_m, n0, m, n,
            ACTIVATION, SLICE,
        )  # fmt: skip


# ---- launchers -------------------------------------------------------------------------------------------


def rows_of(x: Tensor) -> Tensor:
    """[..., N] as [M, N] whose rows are contiguous; a copy only where the strides force one."""
    x = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    # a row stride under N is an expanded tensor: readable by pointers, not by descriptors
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _aligned(x: Tensor) -> bool:
    """Can x [R, C] be read by 16 bytes? Base and row stride in whole 16 bytes."""
    return x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0


def _operands(a: Tensor, b: Tensor, layout: str, config: GemmConfig) -> tuple[GemmConfig, dict]:
    """The config that these operands allow, and the kernel's arguments for them."""
    if a.element_size() < 4 and not (_aligned(a) and _aligned(b)):
        config = UNALIGNED
    arguments = {"stride_a": a.stride(0), "stride_b": b.stride(0), "a": a, "b": b}
    if config.bulk:
        m, n, k = config.block_m, config.block_n, config.block_k
        arguments["a"] = TensorDescriptor.from_tensor(a, [k, m] if layout == "tn" else [m, k])
        arguments["b"] = TensorDescriptor.from_tensor(b, [n, k] if layout == "nt" else [k, n])
    blocks = {
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m, "SLICE": config.slice_n, "BULK": config.bulk, "FLATTEN": config.flatten,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    return config, arguments | blocks


def _grid(m: int, n: int, config: GemmConfig, device: torch.device) -> tuple[int]:
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    if not config.programs_per_sm:
        return (tiles,)
    return (min(tiles, config.programs_per_sm * _device.multiprocessors(device.index)),)


def gemm(
    a: Tensor, b: Tensor, bias: Tensor | None, layout: str, config: GemmConfig,
    activation: str = "none", save_h: bool = False, out: Tensor | None = None, accumulate: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(act(c + bias), c + bias if save_h) of matrices whose rows are contiguous, by our kernel. See the layouts above.

    geglu (nt): b is [2N, K], bias [2N], the saved pre-activation [M, 2N].
    out: [M, N] with contiguous rows, of any float dtype; written, or with `accumulate` added to.
    """
    m, k = (a.shape[1], a.shape[0]) if layout == "tn" else a.shape
    width = b.shape[0] if layout == "nt" else b.shape[1]
    n = width // 2 if activation == "geglu" else width
    y = a.new_empty(m, n) if out is None else out
    h = a.new_empty(m, width) if save_h else None
    if y.numel() == 0:
        return y, h
    config, operands = _operands(a, b, layout, config)
    _linear_act_kernel[_grid(m, n, config, a.device)](
        **operands, bias_ptr=bias, y_ptr=y, h_ptr=h,
        stride_y=y.stride(0), stride_h=width, m=m, n=n, k=k,
        LAYOUT=layout, ACTIVATION=activation, ACCUMULATE=accumulate,
    )  # fmt: skip
    return y, h


def gemm_dact(
    dy: Tensor, weight: Tensor, h: Tensor, activation: str, config: GemmConfig, want_a: bool, want_dbias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dh = (dy weight) * act'(h), and on request a = act(h) and the column sums of dh in float32.

    dy [M, K], weight [K, N], h [M, N] (geglu [M, 2N]), rows contiguous.
    """
    (m, k), n = dy.shape, weight.shape[1]
    dh = h.new_empty(h.shape)
    a = h.new_empty(m, n) if want_a else None
    if dh.numel() == 0:
        return dh, a, h.new_zeros(h.shape[1], dtype=torch.float32) if want_dbias else None
    config, operands = _operands(dy, weight, "nn", config)
    blocks_m = triton.cdiv(m, config.block_m)
    dbias_part = h.new_empty(blocks_m, h.shape[1], dtype=torch.float32) if want_dbias else None
    _dact_kernel[_grid(m, n, config, dy.device)](
        **operands, h_ptr=h, dh_ptr=dh, act_ptr=a, dbias_part_ptr=dbias_part,
        stride_h=h.stride(0), stride_dh=h.shape[1], stride_act=n, stride_dbias=h.shape[1],
        m=m, n=n, k=k, ACTIVATION=activation,
    )  # fmt: skip
    return dh, a, dbias_part.sum(0) if want_dbias else None


def matmul(
    a: Tensor, b: Tensor, bias: Tensor | None = None, layout: str = "nt", invariant: bool = False,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """op(A) op(B)^T + bias by whomever `gemm_config` names. `out` (without bias): [M, N], rows contiguous."""
    n, k = b.shape if layout == "nt" else (b.shape[1], a.shape[1])
    config = gemm_config(n, k, a.dtype, _device.arch(a.device.index), layout, "none", invariant)
    if not config.vendor:
        return gemm(a, b, bias, layout, config, out=out)[0]
    if out is not None:
        return torch.mm(a.t() if layout == "tn" else a, b.t() if layout == "nt" else b, out=out)
    if layout == "nt":
        return F.linear(a, b, bias)
    return torch.mm(a.t() if layout == "tn" else a, b)


def accumulate_tn(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total [M, N] float32 (+)= A^T B of a [K, M], b [K, N], whose rows are contiguous. `first` overwrites."""
    config = gemm_config(b.shape[1], a.shape[1], a.dtype, _device.arch(a.device.index), "tn", "accumulate")
    if config.vendor:
        total.addmm_(a.t(), b, beta=0.0 if first else 1.0)
    else:
        gemm(a, b, None, "tn", config, out=total, accumulate=not first)


# ---- what the operators of this floor share --------------------------------------------------------------


def cast_for_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in autocast's dtype where it is on, as F.linear would have them; gradients come back cast."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors)


def wants_grad(*tensors: Tensor | None) -> bool:
    """Will a backward pass come?"""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def expect_one_dtype(op: str, **tensors: Tensor | None) -> None:
    """Raises TypeError unless all tensors share one dtype that the kernels compute in."""
    dtypes = {name: t.dtype for name, t in tensors.items() if t is not None}
    kinds = set(dtypes.values())
    if len(kinds) > 1 or not kinds <= set(DTYPES):
        raise TypeError(f"{op}: all tensors must share one dtype of {DTYPES}, got {dtypes}")


def none_of(like: Tensor) -> Tensor:
    """What an operator returns in place of a tensor that nobody asked for."""
    return like.new_empty(0)


def column_sums(x: Tensor) -> Tensor:
    """Sums over the rows of x [M, N], taken in float32."""
    return x.sum(0, dtype=torch.float32).to(x.dtype)


def wanted_of(wants: list[bool], gradients: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """The gradients that were asked for, None for the others."""
    return tuple(g if wanted else None for g, wanted in zip(gradients, wants, strict=True))


# ---- linear, batch-invariant -----------------------------------------------------------------------------


def _launch_linear(x, weight, bias):
    return matmul(rows_of(x), rows_of(weight), bias, invariant=True).view(*x.shape[:-1], weight.shape[0])


def _fake_linear(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _launch_linear_backward(dy, x, weight, wants):
    want_dx, want_dweight, want_dbias = wants
    rows, none = rows_of(dy), none_of(x)
    return (
        matmul(rows, rows_of(weight), layout="nn", invariant=True).view(x.shape) if want_dx else none,
        matmul(rows, rows_of(x), layout="tn") if want_dweight else none_of(x),
        column_sums(rows) if want_dbias else none_of(x),
    )


def _fake_linear_backward(dy, x, weight, wants):
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return tuple(x.new_empty(s) if wanted else none_of(x) for s, wanted in zip(shapes, wants, strict=True))


_linear = register("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _launch_linear, _fake_linear)
_linear_backward = register(
    "linear_backward(Tensor dy, Tensor x, Tensor weight, bool[] wants) -> (Tensor, Tensor, Tensor)",
    _launch_linear_backward,
    _fake_linear_backward,
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        wants = list(ctx.needs_input_grad)
        return wanted_of(wants, _linear_backward(dy, x, weight, wants))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear by our GEMM: the bits of a row of x [..., C] -> [..., N], and of its gradient, depend on that row alone.

    weight [N, C], bias [N] or None, dtypes and autocast as in `feed_forward`.
    """
    x, weight, bias = cast_for_autocast(x, weight, bias)
    expect_one_dtype("linear", x=x, weight=weight, bias=bias)
    return (_Linear.apply if wants_grad(x, weight, bias) else _linear)(x, weight, bias)


# ---- for the offline compiler ----------------------------------------------------------------------------


def _forward_case(name, config, dtype, layout, activation="none", save_h=False, accumulate=False, **more):
    m, n, k = config.block_m, config.block_n, config.block_k
    blocks = ([k, m] if layout == "tn" else [m, k], [n, k] if layout == "nt" else [k, n])
    return _case(
        f"{name}[{dtype},{layout},{activation}{',h' if save_h else ''},{m}x{n}x{k}]",
        _linear_act_kernel, config, dtype, blocks,
        {"bias_ptr": f"*{dtype}", "y_ptr": "*fp32" if accumulate else f"*{dtype}", "stride_y": "i32", "stride_h": "i32"}
        | ({"h_ptr": f"*{dtype}"} if save_h else {}),
        {"LAYOUT": layout, "ACTIVATION": activation, "ACCUMULATE": accumulate} | ({} if save_h else {"h_ptr": None}),
        **more,
    )  # fmt: skip


def _backward_case(name: str, config: GemmConfig, dtype: str, activation: str, **more):
    m, n, k = config.block_m, config.block_n, config.block_k
    return _case(
        f"{name}[{dtype},{activation},{m}x{n}x{k}]",
        _dact_kernel, config, dtype, ([m, k], [k, n]),
        {"h_ptr": f"*{dtype}", "dh_ptr": f"*{dtype}", "act_ptr": f"*{dtype}", "dbias_part_ptr": "*fp32"}
        | dict.fromkeys(("stride_h", "stride_dh", "stride_act", "stride_dbias"), "i32"),
        {"ACTIVATION": activation},
        **more,
    )  # fmt: skip


def _case(name, kernel, config, dtype, blocks, signature, constexprs, aligned=True, fast=False) -> CompileCase:
    """A case of either kernel: what both have, and `signature` and `constexprs` of its own."""
    a, b = (f"tensordesc<{dtype}{block}>" for block in blocks) if config.bulk else (f"*{dtype}",) * 2
    signature = {"a": a, "b": b, "stride_a": "i32", "stride_b": "i32", "m": "i32", "n": "i32", "k": "i32"} | signature
    # m is never specialised, and a descriptor has no alignment to declare
    known = [arg for arg, kind in signature.items() if arg != "m" and not kind.startswith("tensordesc")]
    pointers = [arg for arg in known if signature[arg].startswith("*")]
    return CompileCase(
        name=name if aligned else name + "-unaligned",
        kernel=kernel, signature=signature,
        constexprs={
            "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
            "GROUP_M": config.group_m, "SLICE": config.slice_n, "BULK": config.bulk, "FLATTEN": config.flatten,
        } | constexprs,
        num_warps=config.num_warps, num_stages=config.num_stages,
        matrix=dtype != "fp32", bulk_copy=config.bulk, aligned=tuple(known if aligned else pointers), fast=fast,
    )  # fmt: skip


def compile_cases(arch: str) -> list[CompileCase]:
    """Both kernels at every config that `gemm_config` can return there, training form; the main ones also without h."""
    ladder = ladder_of(arch)
    cases = []
    for rung, (_, _, config) in enumerate(ladder["act"]):
        cases += [
            _forward_case("linear_act", config, "bf16", "nt", "gelu", True, fast=rung == 0),
            _forward_case("linear_act", config, "bf16", "nt", "gelu", False),
            _forward_case("linear_act", config, "fp16", "nt", "gelu_tanh", True),
            _forward_case("linear", config, "bf16", "nt"),
            _forward_case("linear", config, "bf16", "nn"),
            _forward_case("accumulate", accumulating(config), "bf16", "tn", accumulate=True),
        ]
    for _, _, config in ladder["geglu"]:
        cases += [_forward_case("linear_act", config, "bf16", "nt", "geglu", h) for h in (True, False)]
    for rung, (_, _, config) in enumerate(ladder["dact"]):
        cases += [
            _backward_case("dact", config, "bf16", "gelu", fast=rung == 0),
            _backward_case("dact", config, "fp16", "gelu_tanh"),
            _backward_case("dact", config, "bf16", "geglu"),
        ]
    for activation in ("gelu", "geglu"):
        cases += [
            _forward_case("linear_act", UNALIGNED, "bf16", "nt", activation, True, aligned=False),
            _backward_case("dact", UNALIGNED, "bf16", activation, aligned=False),
            _forward_case("linear_act", FLOAT32, "fp32", "nt", activation, True),
            _backward_case("dact", FLOAT32, "fp32", activation),
        ]
    return [*cases, _forward_case("linear", FLOAT32, "fp32", "nn")]

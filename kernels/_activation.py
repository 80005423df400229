"""Activations and their derivatives inside kernels, and loads and stores of the tiles they are applied to."""

import triton
import triton.language as tl

# In kernels these constants must be right operands: if one is the left operand, the interpreter treats the tensor as a
# constant too.
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


@triton.jit
def _gelu_and_grad(h, EXACT: tl.constexpr):
    """gelu(h) = h Phi(h) and its derivative Phi(h) + h phi(h).

    EXACT: by erf, about 25 instructions. Otherwise, for results that are rounded to 16 bits: by one exponential of a
    polynomial, about 10 instructions. Its error is a hundredth of that rounding, without cancellation at large
    negative h.
    """
    if EXACT:
        cdf = 0.5 * (1.0 + tl.erf(h * SQRT_HALF))
    else:
        x = tl.minimum(tl.abs(h), 16.0)  # the tail is zero at 16; at infinity the polynomial would be NaN
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
    """act(h) and act'(h), float32. The compiler drops the one that a caller does not use."""
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


# ---- tiles of matrices ----------------------------------------------------------------------------------


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
def _act_backward_tile(
    g, h_ptr,                          # in:  [BLOCK_M, BLOCK_N] float32; [M, N] (geglu [M, 2N])
    dh_ptr, act_ptr, dbias_ptr,        # out: like h; [M, N] or None; this block's row of column sums, [N | 2N], or None
    stride_h, stride_dh, stride_act, offs_m, offs_n, m, n,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """a = act(h), dh = g * act'(h), and the column sums of dh."""
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

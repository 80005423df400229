"""The feed-forward layer of an encoder, and its first half alone, forward and backward.

Forward, x [M, C], up [F, C], down [C, F]:

    h = x up^T + up_bias                  [M, F]   (geglu: [M, 2F], h = h1 | h2)
    a = act(h)                            [M, F]   (geglu: gelu(h1) * h2)
    y = a down^T + down_bias              [M, C]

Backward, dy [M, C]:

    ddown = dy^T a                        [C, F]     ddown_bias = column sums of dy
    dh    = (dy down) * act'(h)           [M, F]     (geglu: (g h2 gelu'(h1) | g gelu(h1)), g = dy down)
    dup   = dh^T x                        [F, C]     dup_bias = column sums of dh
    dx    = dh up                         [M, C]

x and h are saved. `a` is not saved: the product that computes dh reads h and also writes a = act(h). With `recompute`
h is not saved either; the same product with the same tile computes it again, with the same bits. That saves M F
elements of memory for one more product (7 / 6 of the floating-point work of a training step).

Work: forward 4 M C F floating-point operations (geglu 6), backward twice that, `recompute` 2 M C F (geglu 4) more.
Products without an epilogue are computed by the vendor library; see `_gemm_config.CHOICES`.

Bytes moved, with elements of b bytes, without the weights (which stay in L2):

    forward    reads x, writes a;  reads a, writes y                        M (2 C + 2 F) b
               training: writes h                                           + M F b
    backward   reads dy, h, writes dh, a  |  ddown reads dy, a              M (2 C + 4 F) b
               dx reads dh, writes dx  |  dup reads dh, x                   M (2 C + 2 F) b
               ddown_bias reads dy                                          M C b

A perfect fusion would avoid two passes. `a` is written, and read by the second product, forward and backward: a program
of the first product has a slice of F, and the second product needs all of F. dy is read once more for ddown_bias; to
avoid that, pass down_bias=None here and the bias as `x_bias` to `add_layer_norm`, which sums its gradient without a
pass of its own. dup_bias needs no pass: the product that writes dh also writes its column sums, one row for each 128
rows. The activation needs no pass either. Where the vendor library multiplies (float32, few rows) the activation is one
more pass, which reads h and writes a, or reads g and h and writes dh and a; except in 16-bit inference, where the
vendor's epilogue has the activation (`_gemm_config.VENDOR_ACTIVATIONS`).

Adding the residual in the second product's epilogue would save no pass, because the product would read the residual
instead of `add_layer_norm`; and the dropout between the two would have to move into the vendor library's product.

`linear_act` alone is the first line of the forward pass. Its backward pass reads da and h and writes dh, and two
products read dh: M (2 C + 5 F) b. Only a fusion with the product before it could avoid the pass over da and h.

BERT-base (C 768, F 3072, bf16, 16,384 tokens) moves 252 MB forward, 59 us at 4.3 TB/s, and its products take 196 us at
790 TFLOP/s; backward 730 MB, 170 us, and 391 us.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _device
from ._activation import _act_and_grad, _act_backward_tile, _load_tile, _store_tile
from ._checks import ACTIVATIONS
from ._compile import TRITON_TYPES, CompileCall, compile_call, empty
from ._gemm import (
    COMPILED_SIZES,
    cast_for_autocast,
    column_sums,
    expect_one_dtype,
    gemm,
    gemm_dact,
    matmul,
    matrix_of,
    none_of,
    sum_of_parts,
    wanted_of,
    wants_grad,
)
from ._gemm_config import FEW_ROWS, VENDOR_ACTIVATIONS, GemmConfig, gemm_config
from ._invariance import is_batch_invariant
from ._launch import Plan, cdiv
from ._library import apply, register

# ---- device code: the activation alone -------------------------------------------------------------------


@triton.jit(do_not_specialize=["m"])
def _activate_kernel(
    h_ptr,                             # in:  [M, N] (geglu [M, 2N])
    a_ptr,                             # out: [M, N]
    stride_h, stride_a,
    m, n,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """a = act(h)."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)

    h = _load_tile(h_ptr, stride_h, offs_m, offs_n, m, n)
    a, _ = _act_and_grad(h, ACTIVATION, a_ptr.dtype.element_ty == tl.float32)
    if ACTIVATION == "geglu":
        a *= _load_tile(h_ptr + n, stride_h, offs_m, offs_n, m, n)
    _store_tile(a_ptr, stride_a, a, offs_m, offs_n, m, n)


@triton.jit(do_not_specialize=["m"])
def _activate_backward_kernel(
    g_ptr, h_ptr,                      # in:  [M, N], [M, N] (geglu [M, 2N])
    dh_ptr, a_ptr, dbias_part_ptr,     # out: like h; [M, N] or None; [blocks of M, N (geglu 2N)] float32 or None
    stride_g, stride_h, stride_dh, stride_a, stride_dbias,
    m, n,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dh = g * act'(h), a = act(h), and the column sums of dh over BLOCK_M rows."""
    pid_m = tl.program_id(0)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    dbias_ptr = dbias_part_ptr
    if dbias_part_ptr is not None:
        dbias_ptr += pid_m.to(tl.int64) * stride_dbias

    g = _load_tile(g_ptr, stride_g, offs_m, offs_n, m, n)
    _act_backward_tile(
        g, h_ptr, dh_ptr, a_ptr, dbias_ptr, stride_h, stride_dh, stride_a, offs_m, offs_n, m, n, ACTIVATION
    )


# ---- launchers -------------------------------------------------------------------------------------------

# 32 x 128: rows of 256 bytes in 16-bit types, 32 elements a lane, a row of column sums for 32 rows
POINTWISE_M, POINTWISE_N, POINTWISE_WARPS = 32, 128, 4


@functools.lru_cache(256)
def _activate_plan(n: int, stride_h: int, activation: str) -> Plan:
    return Plan(
        _activate_kernel, "h_ptr a_ptr", "m",
        {"stride_h": stride_h, "stride_a": n, "n": n, "ACTIVATION": activation}
        | {"BLOCK_M": POINTWISE_M, "BLOCK_N": POINTWISE_N},
        num_warps=POINTWISE_WARPS,
    )  # fmt: skip


@functools.lru_cache(256)
def _activate_backward_plan(n: int, stride_g: int, stride_h: int, h_width: int, activation: str) -> Plan:
    return Plan(
        _activate_backward_kernel, "g_ptr h_ptr dh_ptr a_ptr dbias_part_ptr", "m",
        {"stride_g": stride_g, "stride_h": stride_h, "stride_dh": h_width, "stride_a": n, "stride_dbias": h_width}
        | {"n": n, "ACTIVATION": activation, "BLOCK_M": POINTWISE_M, "BLOCK_N": POINTWISE_N},
        num_warps=POINTWISE_WARPS,
    )  # fmt: skip


def _width(h_width: int, activation: str) -> int:
    """Columns after the activation."""
    return h_width // 2 if activation == "geglu" else h_width


def _activate(h: Tensor, activation: str) -> Tensor:
    """act(h) of h [M, N] (geglu [M, 2N])."""
    m, n = h.shape[0], _width(h.shape[1], activation)
    a = h.new_empty(m, n)
    if a.numel() > 0:
        _activate_plan(n, h.stride(0), activation)((cdiv(m, POINTWISE_M), cdiv(n, POINTWISE_N)), (h, a), (m,))
    return a


def _activate_backward(
    g: Tensor, h: Tensor, activation: str, want_a: bool, want_dbias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Like `_gemm.gemm_dact`, for a g [M, N] that is already computed."""
    m, n = g.shape
    blocks_m = cdiv(m, POINTWISE_M)
    dh = h.new_empty(*h.shape)
    a = h.new_empty(m, n) if want_a else None
    dbias_part = h.new_empty(blocks_m, h.shape[1], dtype=torch.float32) if want_dbias else None
    if dh.numel() > 0:
        _activate_backward_plan(n, g.stride(0), h.stride(0), h.shape[1], activation)(
            (blocks_m, cdiv(n, POINTWISE_N)), (g, h, dh, a, dbias_part), (m,)
        )
    return dh, a, sum_of_parts(dbias_part, h.dtype) if want_dbias else None


def _up_config(x: Tensor, weight: Tensor, activation: str, invariant: bool, only: bool = False) -> GemmConfig:
    epilogue = "geglu" if activation == "geglu" else "act only" if only else "act"
    n, k = _width(weight.shape[0], activation), weight.shape[1]
    few_rows = x.shape[0] <= FEW_ROWS
    return gemm_config(n, k, x.dtype, _device.arch(x.device.index), "nt", epilogue, invariant, few_rows)


def up_projection(
    x, weight, bias, activation, save_h, invariant, inference, known=None
) -> tuple[Tensor, Tensor | None]:
    """(a, h or None) for x [M, C]. inference: no backward pass follows, so nothing has to compute the same bits again.

    known: as in `gemm`.
    """
    only = inference and bias is not None and x.dtype in VENDOR_ACTIVATIONS.get(activation, ())
    config = _up_config(x, weight, activation, invariant, only)
    if config.vendor_epilogue:
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=activation != "relu"), None
    if not config.vendor:
        return gemm(x, weight, bias, "nt", config, activation, save_h, known=known)
    h = torch.nn.functional.linear(x, weight, bias)
    return _activate(h, activation), h if save_h else None


def _pre_activation(x, weight, bias, activation, invariant) -> Tensor:
    """h with the bits that `up_projection` saves, from the same tile or the same library."""
    config = _up_config(x, weight, activation, invariant)
    if not config.vendor:
        return gemm(x, weight, bias, "nt", config)[0]
    return torch.nn.functional.linear(x, weight, bias)


def down_backward(dy, weight, h, activation, want_a, want_dbias, invariant, known=None):
    """(dh, a or None, column sums of dh or None) from dy [M, C]. known: as in `gemm`."""
    epilogue = "dgeglu" if activation == "geglu" else "dact"
    k, n = weight.shape
    few_rows = dy.shape[0] <= FEW_ROWS
    config = gemm_config(n, k, dy.dtype, _device.arch(dy.device.index), "nn", epilogue, invariant, few_rows)
    if not config.vendor:
        return gemm_dact(dy, weight, h, activation, config, want_a, want_dbias, known)
    g = matmul(dy, weight, layout="nn", invariant=invariant)
    return _activate_backward(g, h, activation, want_a, want_dbias)


# linear_act


def _launch_linear_act(x, weight, bias, activation, save_h, invariant):
    y, h = up_projection(matrix_of(x), matrix_of(weight), bias, activation, save_h, invariant, inference=not save_h)
    rows = x.shape[:-1]
    return y.view(*rows, y.shape[1]), none_of(x) if h is None else h.view(*rows, h.shape[1])


def _fake_linear_act(x, weight, bias, activation, save_h, invariant):
    rows, width = x.shape[:-1], weight.shape[0]
    return (
        x.new_empty(*rows, _width(width, activation)),
        x.new_empty(*rows, width) if save_h else none_of(x),
    )


def _launch_linear_act_backward(da, x, weight, h, activation, wants, invariant):
    want_dx, want_dweight, want_dbias = wants
    shape, x, weight = x.shape, matrix_of(x), matrix_of(weight)
    dh, _, dbias = _activate_backward(matrix_of(da), matrix_of(h), activation, False, want_dbias)
    return (
        matmul(dh, weight, layout="nn", invariant=invariant).view(shape) if want_dx else none_of(x),
        matmul(dh, x, layout="tn") if want_dweight else none_of(x),
        dbias if want_dbias else none_of(x),
    )


def _fake_linear_act_backward(da, x, weight, h, activation, wants, invariant):
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return tuple(x.new_empty(shape) if wanted else none_of(x) for shape, wanted in zip(shapes, wants, strict=True))


_linear_act = register(
    "linear_act(Tensor x, Tensor weight, Tensor? bias, str activation, bool save_h, bool invariant) "
    "-> (Tensor, Tensor)",
    _launch_linear_act,
    _fake_linear_act,
)
_linear_act_backward = register(
    "linear_act_backward(Tensor da, Tensor x, Tensor weight, Tensor h, str activation, bool[] wants, bool invariant) "
    "-> (Tensor, Tensor, Tensor)",
    _launch_linear_act_backward,
    _fake_linear_act_backward,
)


# feed_forward


def _launch_feed_forward(x, up_weight, up_bias, down_weight, down_bias, activation, save_h, invariant, inference):
    a, h = up_projection(matrix_of(x), matrix_of(up_weight), up_bias, activation, save_h, invariant, inference)
    y = matmul(a, matrix_of(down_weight), down_bias, invariant=invariant)
    rows = x.shape[:-1]
    return y.view(*rows, y.shape[1]), none_of(x) if h is None else h.view(*rows, h.shape[1])


def _fake_feed_forward(x, up_weight, up_bias, down_weight, down_bias, activation, save_h, invariant, inference):
    rows = x.shape[:-1]
    return (
        x.new_empty(*rows, down_weight.shape[0]),
        x.new_empty(*rows, up_weight.shape[0]) if save_h else none_of(x),
    )


def _launch_feed_forward_backward(dy, x, up_weight, up_bias, down_weight, h, activation, wants, invariant):
    want_dx, want_dup, want_dup_bias, want_ddown, want_ddown_bias = wants
    shape, dy, x = x.shape, matrix_of(dy), matrix_of(x)
    up_weight, down_weight = matrix_of(up_weight), matrix_of(down_weight)
    none = none_of(x)
    dx, dup, dup_bias, ddown = none, none, none, none
    if want_dx or want_dup or want_dup_bias or want_ddown:
        if h is None:
            h = _pre_activation(x, up_weight, up_bias, activation, invariant)
        h = matrix_of(h)
        dh, a, dup_bias = down_backward(dy, down_weight, h, activation, want_ddown, want_dup_bias, invariant)
        if want_dx:
            dx = matmul(dh, up_weight, layout="nn", invariant=invariant).view(shape)
        if want_dup:
            dup = matmul(dh, x, layout="tn")
        if want_ddown:
            ddown = matmul(dy, a, layout="tn")
    return dx, dup, none if dup_bias is None else dup_bias, ddown, column_sums(dy) if want_ddown_bias else none_of(x)


def _fake_feed_forward_backward(dy, x, up_weight, up_bias, down_weight, h, activation, wants, invariant):
    shapes = (x.shape, up_weight.shape, up_weight.shape[:1], down_weight.shape, down_weight.shape[:1])
    return tuple(x.new_empty(shape) if wanted else none_of(x) for shape, wanted in zip(shapes, wants, strict=True))


_feed_forward = register(
    "feed_forward(Tensor x, Tensor up_weight, Tensor? up_bias, Tensor down_weight, Tensor? down_bias, "
    "str activation, bool save_h, bool invariant, bool inference) -> (Tensor, Tensor)",
    _launch_feed_forward,
    _fake_feed_forward,
)
_feed_forward_backward = register(
    "feed_forward_backward(Tensor dy, Tensor x, Tensor up_weight, Tensor? up_bias, Tensor down_weight, Tensor? h, "
    "str activation, bool[] wants, bool invariant) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _launch_feed_forward_backward,
    _fake_feed_forward_backward,
)


# ---- autograd --------------------------------------------------------------------------------------------


class _LinearAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, activation, invariant):
        y, h = _linear_act(x, weight, bias, activation, True, invariant)
        ctx.save_for_backward(x, weight, h)
        ctx.activation, ctx.invariant = activation, invariant
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, h = ctx.saved_tensors
        wants = list(ctx.needs_input_grad[:3])
        return (
            *wanted_of(wants, _linear_act_backward(dy, x, weight, h, ctx.activation, wants, ctx.invariant)),
            None,
            None,
        )


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, up_weight, up_bias, down_weight, down_bias, activation, recompute, invariant):
        y, h = _feed_forward(x, up_weight, up_bias, down_weight, down_bias, activation, not recompute, invariant, False)
        ctx.save_for_backward(x, up_weight, up_bias, down_weight, None if recompute else h)
        ctx.activation, ctx.invariant = activation, invariant
        return y

    @staticmethod
    def backward(ctx, dy):
        x, up_weight, up_bias, down_weight, h = ctx.saved_tensors
        wants = list(ctx.needs_input_grad[:5])
        gradients = _feed_forward_backward(
            dy, x, up_weight, up_bias, down_weight, h, ctx.activation, wants, ctx.invariant
        )
        return *wanted_of(wants, gradients), None, None, None


# ---- public functions ------------------------------------------------------------------------------------


def _check(op: str, activation: str, **tensors: Tensor | None) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {ACTIVATIONS}, got {activation!r}")
    expect_one_dtype(op, **tensors)


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "gelu") -> Tensor:
    """act(x weight^T + bias): x [..., C], weight [F, C] (geglu: [2F, C]), bias its rows or None -> [..., F].

    Float32, bfloat16 or float16, one dtype for all; under autocast all are cast to its dtype, as for F.linear.
    """
    x, weight, bias = cast_for_autocast(x, weight, bias)
    _check("linear_act", activation, x=x, weight=weight, bias=bias)
    if wants_grad(x, weight, bias):
        return apply(_LinearAct, x, weight, bias, activation, is_batch_invariant())
    return _linear_act(x, weight, bias, activation, False, is_batch_invariant())[0]


def feed_forward(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None = None,
    activation: str = "gelu",
    recompute: bool = False,
) -> Tensor:
    """act(x up^T + up_bias) down^T + down_bias: x [..., C], up [F, C] (geglu: [2F, C]), down [C, F] -> [..., C].

    recompute: save only x, and compute the pre-activation again in the backward pass, with the same bits.
    Dtypes and autocast as in `linear_act`.
    """
    tensors = cast_for_autocast(x, up_weight, up_bias, down_weight, down_bias)
    x, up_weight, up_bias, down_weight, down_bias = tensors
    _check(
        "feed_forward", activation,
        x=x, up_weight=up_weight, up_bias=up_bias, down_weight=down_weight, down_bias=down_bias,
    )  # fmt: skip
    if wants_grad(*tensors):
        return apply(_FeedForward, *tensors, activation, recompute, is_batch_invariant())
    return _feed_forward(*tensors, activation, False, is_batch_invariant(), True)[0]


# ---- for the offline compiler ----------------------------------------------------------------------------


def compile_calls() -> list[CompileCall]:
    """Both operators with every tile and every activation, with and without optional arguments."""

    def call(function, dtype, size, activation, biases=True, fast=False, **more):
        n, k = COMPILED_SIZES[size]
        up, down = empty(2 * n if activation == "geglu" else n, k, dtype=dtype), empty(k, n, dtype=dtype)
        bias = (lambda weight: empty(weight.shape[0], dtype=dtype)) if biases else (lambda weight: None)
        form = ",".join((TRITON_TYPES[dtype], size, activation, *(["no_bias"] * (not biases)), *map(str, more)))
        weights = (up, bias(up)) if function is linear_act else (up, bias(up), down, bias(down))
        x = empty(FEW_ROWS + 16, k, dtype=dtype)
        return compile_call(function, form, x, *weights, activation, fast=fast, **more)

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    return [
        *(
            call(feed_forward, bf16, size, activation, fast=(size, activation) == ("wide", "gelu"))
            for size in COMPILED_SIZES
            for activation in ("gelu", "geglu")
        ),
        *(call(feed_forward, bf16, "wide", activation) for activation in ACTIVATIONS if activation[:2] != "ge"),
        *(call(feed_forward, dtype, "wide", name) for dtype in (fp16, fp32) for name in ("gelu_tanh", "geglu")),
        call(feed_forward, fp32, "wide", "gelu"),
        call(feed_forward, bf16, "wide", "gelu", biases=False, grads=(0,)),
        call(feed_forward, fp32, "wide", "gelu", biases=False, grads=(0,)),
        call(feed_forward, bf16, "wide", "gelu", recompute=True),
        *(call(linear_act, dtype, "wide", name) for dtype in (bf16, fp16, fp32) for name in ("gelu", "geglu")),
    ]

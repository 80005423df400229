"""Bias + dropout + residual + normalisation, the end of every encoder block, forward and backward.

Forward, x and residual [M, N], statistics in fp32:

    z = dropout(x + x_bias) + residual                      [M, N]
    y = (z - mean) * rstd * weight + bias                   [M, N];  mean, rstd = 1 / sqrt(var + eps): [M]

RMSNorm is the same with mean = 0 and no bias. The variance is computed from the centred row, which is in registers, so
there is no cancellation. The mean is two fp32 numbers, its rounded value and the mean of the remainders, so that rows
of nearly equal elements are centred too. Backward, with x_hat = (z - mean) * rstd and g = dy * weight:

    dz      = rstd * (g - avg(g) - x_hat * avg(g * x_hat)) + dz_out      [M, N];  RMSNorm has no avg(g)
    dx      = dz where kept, / (1 - p);   dresidual = dz                 [M, N]
    dweight = sum over rows of dy * x_hat;  dbias of dy;  dx_bias of dx  [N]

x, residual, mean and rstd are saved; the backward pass computes z and the dropout mask again. Saving z instead of x and
residual would move as many bytes (one more write forward, one less read backward) and need as much memory (the block
before keeps residual anyway). But z would be rounded, and the forward pass would depend on whether a gradient follows.
If z is an output (`add_layer_norm_sum`), z is saved, x and residual are not, and y is the norm of the rounded z.

Bytes moved, with elements of b bytes: forward reads x, residual and writes y: 3 M N b (with z as output 4 M N b).
Backward reads dy, x, residual and writes dz: 4 M N b, with dropout also dx: 5 M N b. With z as output it reads dy,
dz_out, z instead, as many bytes. Nothing is read twice. With P programs, partial sums add 8 P N bytes for each of
dweight, dbias, dx_bias. At 4.3 TB/s the norm at the end of a BERT-base layer with 16,384 tokens in bf16 takes at least
18 us forward and 23 us backward.

There are no atomics: row m belongs to program (m // BLOCK_M) mod P, a program adds its rows in order, and one small
kernel adds the P partial sums in order. (For rows wider than 4,096 dbias and dx_bias are torch.sum over dy and dx,
because their fp32 sums do not fit in registers. These are the only extra passes.) A row's results depend on that row
only. No result depends on which outputs a call wants: unwanted outputs are computed but not written (`_rows` says why).
Inputs that are not contiguous are copied. The device code is in `_layer_norm_kernels.py`.
"""

import functools

import torch

from . import _device
from ._compile import TRITON_TYPES, CompileCall, compile_call, empty
from ._launch import Plan, cdiv
from ._layer_norm_kernels import _WANTS, _add_norm_bwd_kernel, _add_norm_fwd_kernel
from ._library import apply, once, register
from ._rows import (
    EXACT,
    MAX_FUSED_WIDTH,
    MAX_WIDTH,
    NormConfig,
    dropout_constants,
    norm_bwd_config,
    norm_fwd_config,
    packed,
    sum_parts,
    unwanted,
)

# ---- launchers -------------------------------------------------------------------------------------------


@functools.lru_cache(256)
def _fwd_plan(config: NormConfig, n_cols: int, eps: float, dropout_p: float, rms: bool) -> Plan:
    return Plan(
        _add_norm_fwd_kernel,
        "x_ptr residual_ptr x_bias_ptr weight_ptr bias_ptr seed_ptr row_ids_ptr y_ptr z_ptr mean_ptr rstd_ptr",
        "n_rows stream_id want_stats",
        {"eps": eps, **dropout_constants(dropout_p), "N": n_cols, "RMS": rms}
        | {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n},
        num_warps=config.num_warps, **EXACT,
    )  # fmt: skip


@functools.lru_cache(256)
def _bwd_plan(config: NormConfig, n_cols: int, dropout_p: float, rms: bool, x_is_sum: bool) -> Plan:
    return Plan(
        _add_norm_bwd_kernel,
        "dy_ptr dz_out_ptr x_ptr residual_ptr x_bias_ptr weight_ptr mean_ptr rstd_ptr seed_ptr row_ids_ptr "
        "dx_ptr dresidual_ptr dweight_part_ptr dbias_part_ptr dx_bias_part_ptr",
        f"n_rows rows_per_step stream_id {' '.join(_WANTS)}",
        {**dropout_constants(dropout_p), "N": n_cols, "RMS": rms, "X_IS_SUM": x_is_sum}
        | {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n},
        num_warps=config.num_warps, **EXACT,
    )  # fmt: skip


def launch_forward(
    x, residual, weight, bias, eps, x_bias, seed, row_ids, dropout_p, stream, rms, want_sum, want_stats, known=None
):  # fmt: skip
    """(y, z, mean, rstd), None where not wanted. known: as in `Plan`; then all tensors must also be contiguous."""
    if known is None:
        x, residual, weight, bias, x_bias, row_ids = map(packed, (x, residual, weight, bias, x_bias, row_ids))
    shape = x.shape
    n_cols = shape[-1]
    y, z, mean, rstd = torch.empty_like(x), None, None, None
    if want_sum:
        z = torch.empty_like(x, dtype=x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype))
    if want_stats:
        rows = shape[:-1]
        rstd = x.new_empty(*rows, dtype=torch.float32) if rows else x.new_empty((), dtype=torch.float32)
        mean = None if rms else x.new_empty(*rows, 2, dtype=torch.float32)
    n_rows = x.numel() // n_cols
    if n_rows:
        config = norm_fwd_config(n_cols)
        none = None if want_stats else unwanted(x.device, torch.float32)
        _fwd_plan(config, n_cols, eps, dropout_p, rms)(
            (-(-n_rows // config.block_m),),
            (
                x, residual, x_bias, weight, bias, *((None, None) if dropout_p == 0.0 else (seed, row_ids)),
                y, z, None if rms else mean if want_stats else none, rstd if want_stats else none,
            ),
            (n_rows, stream, int(want_stats)), known=known,
        )  # fmt: skip
    return y, z, mean, rstd


def _fake_fwd(
    x, residual, weight, bias, eps, x_bias, seed, row_ids, dropout_p, stream, rms, want_sum, want_stats
):  # fmt: skip
    """(y, z, mean, rstd); what is not wanted has no elements."""
    sum_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    rows, none = x.shape[:-1], (0,)
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape if want_sum else none, dtype=sum_dtype),
        x.new_empty((*rows, 2) if want_stats and not rms else none, dtype=torch.float32),
        x.new_empty(rows if want_stats else none, dtype=torch.float32),
    )


def launch_backward(
    dy, dz_out, x, residual, weight, bias, x_bias, mean, rstd, seed, row_ids,
    dropout_p, stream, rms, x_is_sum, want_dx, want_dresidual, want_params, known=None,
):  # fmt: skip
    """(dx, dresidual, dweight, dbias, dx_bias), None where not wanted. known: as in `launch_forward`."""
    if known is None:
        dy, dz_out, x, residual, weight, x_bias, row_ids = map(
            packed, (dy, dz_out, x, residual, weight, x_bias, row_ids)
        )
    n_cols = x.shape[-1]
    like_residual = x if residual is None else residual
    want_dweight, want_dbias, want_dx_bias = want_params
    params = weight, bias, x_bias
    # The fastest calls: `empty_like` for a contiguous tensor or a vector, and `new_empty` with separate numbers, which
    # takes half of the time of `new_empty` with a tuple.
    dx = torch.empty_like(dy) if want_dx else None
    dresidual = torch.empty_like(like_residual) if want_dresidual else None
    dweight = torch.empty_like(weight) if want_dweight else None
    dbias = torch.empty_like(bias) if want_dbias else None
    dx_bias = torch.empty_like(x_bias) if want_dx_bias else None
    dparams = dweight, dbias, dx_bias
    n_rows = x.numel() // n_cols
    if n_rows == 0:
        for dparam in dparams:
            if dparam is not None:
                dparam.zero_()
        return dx, dresidual, *dparams
    config = norm_bwd_config(n_cols)
    programs = min(config.programs_per_sm * _device.multiprocessors(x.device.index), cdiv(n_rows, config.block_m))

    fused = n_cols <= MAX_FUSED_WIDTH
    summed_dx = dx
    if want_dx_bias and not (want_dx or fused):
        summed_dx = torch.empty_like(dy)  # not returned, only summed for dx_bias
    # every possible sum has a place, wanted or not
    has = weight is not None, bias is not None and fused, x_bias is not None and fused
    parts = x.new_empty(sum(has), programs, n_cols, dtype=torch.float32)
    slots = iter(parts.unbind())
    parts_of_each = [next(slots) if there else None for there in has]
    # If z is an output, it may have an upstream gradient or none; the same kernel runs in both cases.
    z_gradient = None if not x_is_sum else unwanted(x.device, x.dtype) if dz_out is None else dz_out
    _bwd_plan(config, n_cols, dropout_p, rms, x_is_sum)(
        (programs,),
        (
            dy, z_gradient, x, *((None, None) if x_is_sum else (residual, x_bias)),
            weight, None if rms else mean, rstd, *((None, None) if dropout_p == 0.0 else (seed, row_ids)),
            unwanted(x.device, dy.dtype) if summed_dx is None else summed_dx,
            unwanted(x.device, like_residual.dtype) if dresidual is None else dresidual,
            *parts_of_each,
        ),
        (
            n_rows, programs * config.block_m, stream, int(dz_out is not None), int(summed_dx is not None),
            int(want_dresidual), int(want_dweight), int(want_dbias), int(want_dx_bias),
        ),
        known=known,
    )  # fmt: skip
    there = [n for n in range(3) if has[n]]
    sum_parts(parts, [dparams[n] for n in there], [params[n] for n in there], known)
    if want_dbias and not fused:
        dbias.copy_(dy.reshape(-1, n_cols).sum(0, dtype=torch.float32))
    if want_dx_bias and not fused:
        dx_bias.copy_(summed_dx.view(-1, n_cols).sum(0, dtype=torch.float32))
    return dx, dresidual, dweight, dbias, dx_bias


def _fake_bwd(
    dy, dz_out, x, residual, weight, bias, x_bias, mean, rstd, seed, row_ids,
    dropout_p, stream, rms, x_is_sum, want_dx, want_dresidual, want_params,
):  # fmt: skip
    """(dx, dresidual, dweight, dbias, dx_bias); what is not wanted has no elements."""
    return (
        dy.new_empty(x.shape if want_dx else (0,)),
        dy.new_empty(x.shape if want_dresidual else (0,), dtype=x.dtype if residual is None else residual.dtype),
        *(
            dy.new_empty(0) if t is None else t.new_empty(t.shape if wanted else (0,))
            for t, wanted in zip((weight, bias, x_bias), want_params, strict=True)
        ),
    )


_add_norm_fwd = register(
    "add_norm_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, Tensor? x_bias, Tensor? seed, "
    "Tensor? row_ids, float dropout_p, int stream, bool rms, bool want_sum, bool want_stats) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    launch_forward,
    _fake_fwd,
)
_add_norm_bwd = register(
    "add_norm_bwd(Tensor dy, Tensor? dz_out, Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, "
    "Tensor? x_bias, Tensor? mean, Tensor rstd, Tensor? seed, Tensor? row_ids, float dropout_p, int stream, bool rms, "
    "bool x_is_sum, bool want_dx, bool want_dresidual, bool[] want_params) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    launch_backward,
    _fake_bwd,
)


# ---- autograd --------------------------------------------------------------------------------------------


class _AddNorm(torch.autograd.Function):
    """y, or (y, z) where `want_sum`."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, x_bias, seed, row_ids, dropout_p, stream, rms, want_sum):
        y, z, mean, rstd = _add_norm_fwd(
            x, residual, weight, bias, eps, x_bias, seed, row_ids, dropout_p, stream, rms, want_sum, True
        )
        ctx.set_materialize_grads(False)
        ctx.options = dropout_p, stream, rms, want_sum
        ctx.save_for_backward(
            z if want_sum else x, None if want_sum else residual, weight, bias, x_bias, mean, rstd, seed, row_ids
        )
        # without dropout the gradients of x and residual are one tensor
        ctx.one_gradient = dropout_p == 0.0 and (residual is None or residual.dtype == x.dtype)
        return (y, z) if want_sum else y

    @staticmethod
    @once
    def backward(ctx, dy, dz_out=None):
        x, residual, weight, bias, x_bias, mean, rstd, seed, row_ids = ctx.saved_tensors
        dropout_p, stream, rms, want_sum = ctx.options
        need_x, need_residual, need_weight, need_bias, _, need_x_bias = ctx.needs_input_grad[:6]
        if dy is None:
            dy = torch.zeros_like(dz_out)
        dx, dresidual, dweight, dbias, dx_bias = _add_norm_bwd(
            dy, dz_out, x, residual, weight, bias, x_bias, mean, rstd, seed, row_ids, dropout_p, stream, rms, want_sum,
            need_x or (ctx.one_gradient and need_residual), need_residual and not ctx.one_gradient,
            [need_weight, need_bias, need_x_bias],
        )  # fmt: skip
        return (
            dx if need_x else None,
            (dx if ctx.one_gradient else dresidual) if need_residual else None,
            dweight if need_weight else None,
            dbias if need_bias else None,
            None,
            dx_bias if need_x_bias else None,
            *(None,) * 6,
        )


def _add_norm(x, residual, weight, bias, eps, x_bias, dropout_p, seed, stream, row_ids, rms, want_sum):
    n_cols = x.shape[-1]
    if not 1 <= n_cols <= MAX_WIDTH:
        raise ValueError(f"the Triton normalisation takes rows of 1 to {MAX_WIDTH} elements, got {n_cols}")
    if dropout_p == 0.0:
        seed = row_ids = None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, weight, bias, x_bias)):
        return apply(_AddNorm, x, residual, weight, bias, eps, x_bias, seed, row_ids, dropout_p, stream, rms, want_sum)
    y, z, _, _ = _add_norm_fwd(
        x, residual, weight, bias, eps, x_bias, seed, row_ids, dropout_p, stream, rms, want_sum, False
    )
    return (y, z) if want_sum else y


# ---- public ----------------------------------------------------------------------------------------------


def add_layer_norm(
    x, residual, weight, bias, eps=1e-12, *, x_bias=None, dropout_p=0.0, seed=None, stream=0, row_ids=None
):
    """LayerNorm(dropout(x + x_bias) + residual): [..., N], N up to 8,192, in x's dtype; see `functional`."""
    return _add_norm(x, residual, weight, bias, eps, x_bias, dropout_p, seed, stream, row_ids, False, False)


def add_layer_norm_sum(
    x, residual, weight, bias, eps=1e-12, *, x_bias=None, dropout_p=0.0, seed=None, stream=0, row_ids=None
):
    """(y, z) of `add_layer_norm`: y in x's dtype, z in the wider of x's and residual's."""
    if residual is None and x_bias is None and dropout_p == 0.0:
        return add_layer_norm(x, None, weight, bias, eps), x
    return _add_norm(x, residual, weight, bias, eps, x_bias, dropout_p, seed, stream, row_ids, False, True)


def add_rms_norm(x, residual, weight, eps=1e-6, *, x_bias=None, dropout_p=0.0, seed=None, stream=0, row_ids=None):
    """z / sqrt(mean(z^2) + eps) * weight: [..., N], N up to 8,192, in x's dtype; see `functional`."""
    return _add_norm(x, residual, weight, None, eps, x_bias, dropout_p, seed, stream, row_ids, True, False)


# ---- for the offline compiler ----------------------------------------------------------------------------

# one width for each choice of tile, and the widths of BERT-base, large and MiniLM
_WIDTHS = (16, 32, 64, 128, 256, 384, 512, 768, 1000, 1024, 2048, 4096, 8192)
_ROWS = 48


def compile_calls() -> list[CompileCall]:
    """Every config with all inputs and dropout, which need the most registers, then every combination of inputs."""
    dropout = {"dropout_p": 0.1, "seed": empty(1, dtype=torch.int64), "row_ids": empty(_ROWS, dtype=torch.int64)}

    def call(name, function, n_cols=768, dtype=torch.bfloat16, absent=(), **more):
        rows, vector = (empty(_ROWS, n_cols, dtype=dtype) for _ in range(2)), empty(n_cols, dtype=dtype)
        given = dict(zip(("x", "residual"), rows, strict=True)) | dict.fromkeys(("weight", "bias", "x_bias"), vector)
        if function is add_rms_norm:
            del given["bias"]
        given |= dropout | dict.fromkeys(absent)
        if "seed" in absent:
            given["dropout_p"] = 0.0
        wide = (_add_norm_fwd_kernel, _add_norm_bwd_kernel) if n_cols >= 128 else ()
        return compile_call(
            function, f"{name},N={n_cols}", wide_loads=wide, inference=n_cols in (384, 768), **given, **more
        )

    bare = ("residual", "weight", "bias", "x_bias", "seed", "row_ids")
    return [
        *(
            call(TRITON_TYPES[dtype], add_layer_norm, n_cols, dtype, fast=n_cols == 768 and dtype == torch.bfloat16)
            for dtype in (torch.bfloat16, torch.float32)
            for n_cols in _WIDTHS
        ),
        call("fp16", add_layer_norm, dtype=torch.float16),
        call("bf16,bare", add_layer_norm, absent=bare),
        call("bf16,without_dropout", add_layer_norm, absent=("x_bias", "seed", "row_ids"), fast=True),
        call("bf16,without_row_ids", add_layer_norm, absent=("row_ids",)),
        call("bf16,only_weight", add_layer_norm, grads=("weight",)),
        call("bf16,sum", add_layer_norm_sum),
        call("bf16,rms", add_rms_norm, fast=True),
        call("bf16,rms,bare", add_rms_norm, absent=("residual", "weight", "x_bias", "seed", "row_ids")),
    ]

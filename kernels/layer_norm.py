"""Bias + dropout + residual + normalisation, the end of every encoder block, forward and backward.

Forward, x and residual [M, N], statistics in fp32:

    z = dropout(x + x_bias) + residual                      [M, N]
    y = (z - mean) * rstd * weight + bias                   [M, N];  mean, rstd = 1 / sqrt(var + eps): [M]

RMSNorm is the same with mean = 0 and no bias. The variance is taken from the centred row, which is in registers,
so it does not cancel. Backward, with x_hat = (z - mean) * rstd and g = dy * weight:

    dz      = rstd * (g - avg(g) - x_hat * avg(g * x_hat)) + dz_out      [M, N];  RMSNorm has no avg(g)
    dx      = dz where kept, / (1 - p);   dresidual = dz                 [M, N]
    dweight = sum over rows of dy * x_hat;  dbias of dy;  dx_bias of dx  [N]

Saved: x, residual, mean, rstd; z and the dropout mask are made again. Saving z in place of x and residual moves as
many bytes (one more write forward, one less read backward) and holds as much memory (the block before keeps
residual anyway), but rounds z, and would make the forward pass depend on whether a gradient follows. Where z is an
output (`add_layer_norm_sum`) it is saved, and x and residual are not; y is then the norm of the rounded z.

Bytes moved, b an element: forward reads x, residual and writes y: 3 M N b (the sum form 4 M N b). Backward reads
dy, x, residual and writes dz: 4 M N b, and with dropout dx too: 5 M N b; the sum form reads dy, dz_out, z: the
same. Nothing is read twice. The partial sums add 8 P N bytes for each of dweight, dbias, dx_bias, P programs. At
4.3 TB/s a BERT-base layer end over 16,384 tokens in bf16 cannot take less than 18 us forward, 23 us backward.

No atomics: row m belongs to program (m // BLOCK_M) mod P, a program adds its rows in order, and one small kernel
adds the P partial sums in order. (Rows wider than 4,096 leave dbias and dx_bias to torch.sum over dy and dx, one
more read each, the only extra passes: their fp32 sums no longer fit in registers.) A row's own results depend on
nothing but that row.
"""

import torch
import triton
import triton.language as tl

from . import _device
from ._compile import TRITON_TYPES, CompileCase
from ._library import register
from ._rows import (
    MAX_FUSED_WIDTH,
    MAX_WIDTH,
    _dropout_mask,
    _norm_backward,
    _norm_forward,
    _row_block,
    _store_part,
    _store_statistics,
    dropout_arguments,
    norm_bwd_config,
    norm_fwd_config,
    rows_of,
    sum_parts,
)

# ---- device code -----------------------------------------------------------------------------------------


@triton.jit
def _load_sum(
    x_ptr, residual_ptr, x_bias_ptr,   # in: [M, N], [M, N] or None, [N] or None
    rows, cols, mask,                  # [BLOCK_M], [BLOCK_N], [BLOCK_M, BLOCK_N]
    stride_xm, stride_rm,
    keep, keep_scale,                  # [BLOCK_M, BLOCK_N] or None
):  # fmt: skip
    """z = dropout(x + x_bias) + residual in fp32, zero where mask is false."""
    z = tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if x_bias_ptr is not None:
        z += tl.load(x_bias_ptr + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if keep is not None:
        z = tl.where(keep, z * keep_scale, 0.0)
    if residual_ptr is not None:
        z += tl.load(residual_ptr + rows[:, None] * stride_rm + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    return z


# N is a compile-time number: a model has one or two widths, and knowing it lets the compiler prove that a mask is
# whole over 16 bytes (so loads stay 128 bits wide at 768 or 1,000) and drop it where N fills the block. Numbers
# that change from call to call are not specialised on, or a second kernel would be built when one of them is 1.
_VARYING = ["n_rows", "stream_id", "threshold", "rows_per_step"]


@triton.jit(do_not_specialize=_VARYING[:3])
def _add_norm_fwd_kernel(
    x_ptr, residual_ptr, x_bias_ptr, weight_ptr, bias_ptr,   # in: [M, N], [M, N], [N], [N], [N]; None if absent
    seed_ptr, row_ids_ptr,                                   # in: [1], [M]; None without dropout, without names
    y_ptr, z_ptr, mean_ptr, rstd_ptr,                        # out: [M, N], [M, N], [M], [M]; None if not wanted
    n_rows, stride_xm, stride_rm,
    eps, stream_id, threshold, keep_scale,
    N: tl.constexpr, RMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_N)
    rows, mask_m, mask = _row_block(tl.program_id(0).to(tl.int64) * BLOCK_M, n_rows, cols, N, BLOCK_M)

    keep = None
    if seed_ptr is not None:
        keep = _dropout_mask(seed_ptr, row_ids_ptr, stream_id, threshold, rows, mask_m, cols)
    z = _load_sum(x_ptr, residual_ptr, x_bias_ptr, rows, cols, mask, stride_xm, stride_rm, keep, keep_scale)
    if z_ptr is not None:
        # y belongs to the z that is returned, and so agrees with the backward pass, which reads that z
        z = z.to(z_ptr.dtype.element_ty).to(tl.float32)

    y, mean, rstd = _norm_forward(z, mask, weight_ptr, bias_ptr, cols, eps, N, RMS)

    offsets = rows[:, None] * N + cols[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    if z_ptr is not None:
        tl.store(z_ptr + offsets, z.to(z_ptr.dtype.element_ty), mask=mask)
    _store_statistics(mean_ptr, rstd_ptr, mean, rstd, rows, mask_m)


@triton.jit(do_not_specialize=_VARYING)
def _add_norm_bwd_kernel(
    dy_ptr, dz_out_ptr, x_ptr, residual_ptr, x_bias_ptr, weight_ptr,   # in: [M, N] x 4, [N], [N]; None if absent
    mean_ptr, rstd_ptr, seed_ptr, row_ids_ptr,                         # in: [M], [M], [1], [M]
    dx_ptr, dresidual_ptr,                                             # out: [M, N]; None if not wanted
    dweight_part_ptr, dbias_part_ptr, dx_bias_part_ptr,                # out: [P, N] fp32; None if not wanted
    n_rows, rows_per_step, stride_dym, stride_dzm, stride_xm, stride_rm,
    stream_id, threshold, keep_scale,
    N: tl.constexpr, RMS: tl.constexpr,
    X_IS_SUM: tl.constexpr,                                            # x holds z already
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)

    dweight = tl.zeros((BLOCK_N,), tl.float32)
    dbias = tl.zeros((BLOCK_N,), tl.float32)
    dx_bias = tl.zeros((BLOCK_N,), tl.float32)

    for row in range(pid * BLOCK_M, n_rows, rows_per_step):
        rows, mask_m, mask = _row_block(row, n_rows, cols, N, BLOCK_M)

        keep = None
        if seed_ptr is not None:
            keep = _dropout_mask(seed_ptr, row_ids_ptr, stream_id, threshold, rows, mask_m, cols)
        dy = tl.load(dy_ptr + rows[:, None] * stride_dym + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        z = _load_sum(
            x_ptr, residual_ptr, x_bias_ptr, rows, cols, mask, stride_xm, stride_rm,
            None if X_IS_SUM else keep, keep_scale,
        )  # fmt: skip
        dz, dweight, dbias = _norm_backward(
            dy, z, mean_ptr, rstd_ptr, weight_ptr, dweight, dbias, rows, mask_m, cols,
            N, RMS, dweight_part_ptr is not None, dbias_part_ptr is not None,
        )  # fmt: skip
        if dz_out_ptr is not None:
            dz += tl.load(dz_out_ptr + rows[:, None] * stride_dzm + cols[None, :], mask=mask, other=0.0).to(tl.float32)

        offsets = rows[:, None] * N + cols[None, :]
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + offsets, dz.to(dresidual_ptr.dtype.element_ty), mask=mask)

        dx = dz
        if seed_ptr is not None:
            dx = tl.where(keep, dz * keep_scale, 0.0)
        if dx_ptr is not None:
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dx_bias_part_ptr is not None:
            # rows past the end have dy = 0 and rstd = 0, so dz = 0
            dx_bias += tl.sum(dx, axis=0)

    _store_part(dweight_part_ptr, dweight, pid, cols, N)
    _store_part(dbias_part_ptr, dbias, pid, cols, N)
    _store_part(dx_bias_part_ptr, dx_bias, pid, cols, N)


# ---- launchers -------------------------------------------------------------------------------------------


def _launch_fwd(
    x, residual, weight, bias, eps, x_bias, seed, row_ids, dropout_p, stream, rms, want_sum, want_stats
):  # fmt: skip
    n_cols = x.shape[-1]
    y, z, mean, rstd = _fake_fwd(
        x, residual, weight, bias, eps, x_bias, seed, row_ids, dropout_p, stream, rms, want_sum, want_stats
    )
    if x.numel() == 0:
        return y, z, mean, rstd
    x, residual = rows_of(x, n_cols), rows_of(residual, n_cols)
    config = norm_fwd_config(n_cols)
    _add_norm_fwd_kernel[(triton.cdiv(x.shape[0], config.block_m),)](
        x_ptr=x, residual_ptr=residual, x_bias_ptr=x_bias, weight_ptr=weight, bias_ptr=bias,
        y_ptr=y, z_ptr=z if want_sum else None,
        mean_ptr=mean if want_stats and not rms else None, rstd_ptr=rstd if want_stats else None,
        n_rows=x.shape[0], stride_xm=x.stride(0), stride_rm=0 if residual is None else residual.stride(0),
        eps=eps, **dropout_arguments(dropout_p, seed, row_ids, stream),
        N=n_cols, RMS=rms, BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps,
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
        x.new_empty(rows if want_stats and not rms else none, dtype=torch.float32),
        x.new_empty(rows if want_stats else none, dtype=torch.float32),
    )


def _launch_bwd(
    dy, dz_out, x, residual, weight, bias, x_bias, mean, rstd, seed, row_ids,
    dropout_p, stream, rms, x_is_sum, want_dx, want_dresidual, want_params,
):  # fmt: skip
    n_cols = x.shape[-1]
    dx, dresidual, dweight, dbias, dx_bias = outs = _fake_bwd(
        dy, dz_out, x, residual, weight, bias, x_bias, mean, rstd, seed, row_ids,
        dropout_p, stream, rms, x_is_sum, want_dx, want_dresidual, want_params,
    )  # fmt: skip
    if x.numel() == 0:
        for dparam in outs[2:]:
            dparam.zero_()
        return outs
    dy, dz_out, x, residual = (rows_of(t, n_cols) for t in (dy, dz_out, x, residual))
    config = norm_bwd_config(n_cols)
    programs = min(
        config.programs_per_sm * _device.multiprocessors(x.device.index), triton.cdiv(x.shape[0], config.block_m)
    )

    want_dweight, want_dbias, want_dx_bias = want_params
    fused = n_cols <= MAX_FUSED_WIDTH
    if want_dx_bias and not (want_dx or fused):
        dx = torch.empty_like(dy)  # only to be summed
    sums = (dweight, want_dweight), (dbias, want_dbias and fused), (dx_bias, want_dx_bias and fused)
    parts = x.new_empty((sum(wanted for _, wanted in sums), programs, n_cols), dtype=torch.float32)
    slots = iter(parts)
    dweight_part, dbias_part, dx_bias_part = (next(slots) if wanted else None for _, wanted in sums)
    _add_norm_bwd_kernel[(programs,)](
        dy_ptr=dy, dz_out_ptr=dz_out, x_ptr=x, residual_ptr=None if x_is_sum else residual,
        x_bias_ptr=None if x_is_sum else x_bias, weight_ptr=weight,
        mean_ptr=None if rms else mean, rstd_ptr=rstd,
        dx_ptr=dx if dx.numel() else None, dresidual_ptr=dresidual if want_dresidual else None,
        dweight_part_ptr=dweight_part, dbias_part_ptr=dbias_part, dx_bias_part_ptr=dx_bias_part,
        n_rows=x.shape[0], rows_per_step=programs * config.block_m,
        stride_dym=dy.stride(0), stride_dzm=0 if dz_out is None else dz_out.stride(0),
        stride_xm=x.stride(0), stride_rm=0 if residual is None else residual.stride(0),
        **dropout_arguments(dropout_p, seed, row_ids, stream),
        N=n_cols, RMS=rms, X_IS_SUM=x_is_sum,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps,
    )  # fmt: skip
    sum_parts(parts, [out for out, wanted in sums if wanted])
    if want_dbias and not fused:
        dbias.copy_(dy.sum(0, dtype=torch.float32))
    if want_dx_bias and not fused:
        dx_bias.copy_(dx.view(-1, n_cols).sum(0, dtype=torch.float32))
    return outs


def _fake_bwd(
    dy, dz_out, x, residual, weight, bias, x_bias, mean, rstd, seed, row_ids,
    dropout_p, stream, rms, x_is_sum, want_dx, want_dresidual, want_params,
):  # fmt: skip
    """(dx, dresidual, dweight, dbias, dx_bias); what is not wanted has no elements."""
    return (
        dy.new_empty(x.shape if want_dx else (0,)),
        dy.new_empty(x.shape if want_dresidual else (0,), dtype=x.dtype if residual is None else residual.dtype),
        *(
            dy.new_empty(t.shape, dtype=t.dtype) if wanted else dy.new_empty(0)
            for t, wanted in zip((weight, bias, x_bias), want_params, strict=True)
        ),
    )


_add_norm_fwd = register(
    "add_norm_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, Tensor? x_bias, Tensor? seed, "
    "Tensor? row_ids, float dropout_p, int stream, bool rms, bool want_sum, bool want_stats) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _launch_fwd,
    _fake_fwd,
)
_add_norm_bwd = register(
    "add_norm_bwd(Tensor dy, Tensor? dz_out, Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, "
    "Tensor? x_bias, Tensor? mean, Tensor rstd, Tensor? seed, Tensor? row_ids, float dropout_p, int stream, bool rms, "
    "bool x_is_sum, bool want_dx, bool want_dresidual, bool[] want_params) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _launch_bwd,
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
    @torch.autograd.function.once_differentiable
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
        return _AddNorm.apply(x, residual, weight, bias, eps, x_bias, seed, row_ids, dropout_p, stream, rms, want_sum)
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

# one width for every step of the two ladders, and those of BERT-base, large and MiniLM
_WIDTHS = (16, 32, 64, 128, 256, 384, 512, 768, 1000, 1024, 2048, 4096, 8192)


def compile_cases(arch: str) -> list[CompileCase]:
    """Every config of the ladders, with all inputs and dropout: the most registers a launch can need."""
    return [
        case
        for dtype in (torch.bfloat16, torch.float32)
        for n_cols in _WIDTHS
        for case in (
            _forward_case(dtype, n_cols, saves=False),
            _forward_case(dtype, n_cols, saves=True),
            _backward_case(dtype, n_cols),
        )
    ]


def _forward_case(dtype: torch.dtype, n_cols: int, saves: bool) -> CompileCase:
    d = f"*{TRITON_TYPES[dtype]}"
    outputs = {"y_ptr": d} | (dict.fromkeys(("mean_ptr", "rstd_ptr"), "*fp32") if saves else {})
    return _case(
        f"add_layer_norm_fwd[{d[1:]},N={n_cols}{',saves' * saves}]", _add_norm_fwd_kernel, norm_fwd_config(n_cols),
        dtype, n_cols,
        {"bias_ptr": d, "eps": "fp32", "stride_xm": "i32", "stride_rm": "i32"} | outputs,
        {name: None for name in ("z_ptr", "mean_ptr", "rstd_ptr") if name not in outputs},
        fast=not saves,
    )  # fmt: skip


def _backward_case(dtype: torch.dtype, n_cols: int) -> CompileCase:
    d = f"*{TRITON_TYPES[dtype]}"
    parts = ("dweight_part_ptr", "dbias_part_ptr", "dx_bias_part_ptr")
    summed = parts if n_cols <= MAX_FUSED_WIDTH else parts[:1]
    return _case(
        f"add_layer_norm_bwd[{d[1:]},N={n_cols}]", _add_norm_bwd_kernel, norm_bwd_config(n_cols), dtype, n_cols,
        dict.fromkeys(("dy_ptr", "dx_ptr", "dresidual_ptr"), d)
        | dict.fromkeys(("mean_ptr", "rstd_ptr", *summed), "*fp32")
        | dict.fromkeys(("rows_per_step", "stride_dym", "stride_dzm", "stride_xm", "stride_rm"), "i32"),
        {"X_IS_SUM": False, "dz_out_ptr": None} | {name: None for name in parts if name not in summed},
    )  # fmt: skip


def _case(name, kernel, config, dtype, n_cols, signature, constexprs, fast=True) -> CompileCase:
    """A case of either kernel: what both have, and `signature` and `constexprs` of its own."""
    signature = (
        dict.fromkeys(("x_ptr", "residual_ptr", "x_bias_ptr", "weight_ptr"), f"*{TRITON_TYPES[dtype]}")
        | {"seed_ptr": "*i64", "row_ids_ptr": "*i64", "stream_id": "i32", "threshold": "i64", "keep_scale": "fp32"}
        | {"n_rows": "i32"} | signature
    )  # fmt: skip
    return CompileCase(
        name=name, kernel=kernel, signature=signature,
        constexprs={"N": n_cols, "RMS": False, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n} | constexprs,
        num_warps=config.num_warps, num_stages=3, wide_loads=n_cols >= 128,
        aligned=tuple(n for n in signature if n.endswith("_ptr") or (n.startswith("stride") and n != "stride_dzm")),
        fast=fast and n_cols in (384, 768, 1024, 8192) and dtype == torch.bfloat16,
    )  # fmt: skip

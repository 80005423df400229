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
more read each: their fp32 sums no longer fit in registers.) A row's own results depend on nothing but that row.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _device
from ._compile import TRITON_TYPES, CompileCase
from ._library import register
from ._random import keep_threshold
from ._random_triton import _keep_mask, _row_keys

MAX_WIDTH = 8192
# up to here the backward kernel sums dbias and dx_bias on the way; in wider rows the registers for them would spill
MAX_FUSED_WIDTH = 4096

# ---- configs ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NormConfig:
    """A program's tile [block_m, block_n] and its warps; `programs_per_sm` bounds the backward grid."""

    block_m: int
    block_n: int
    num_warps: int
    programs_per_sm: int = 0


def norm_fwd_config(n_cols: int) -> NormConfig:
    """The forward tile, from the width alone, so that the bits of a row do not depend on how many rows there are.

    32 elements a lane: four 16-byte loads of bf16 in flight from each input. Up to 1,024 columns a row then
    belongs to one warp, whose sums need shuffles but no barrier; narrower rows share a warp, wider ones take more.
    At 64 to 80 registers an SM holds 25 to 32 one-warp programs, which have some 100 KB in flight, several times
    what hides memory latency.
    """
    block_n = max(16, triton.next_power_of_2(n_cols))
    return NormConfig(block_m=max(1, 1024 // block_n), block_n=block_n, num_warps=max(1, block_n // 1024))


def norm_bwd_config(n_cols: int) -> NormConfig:
    """The backward tile: 16 elements a lane, because a lane also keeps fp32 sums for three parameter gradients.

    From 257 to 1,024 columns that is two rows of 8 columns a lane: they share a round of barriers and double the
    bytes in flight. Programs loop over rows, 16 warps an SM: at most 128 registers a lane, all resident at once,
    enough to cover latency and few enough that the partial sums stay small beside the rows.
    """
    block_n = max(16, triton.next_power_of_2(n_cols))
    num_warps = min(16, max(1, block_n // 256))
    block_m = min(4, 512 // block_n) if block_n <= 256 else 2 if block_n <= 1024 else 1
    return NormConfig(block_m, block_n, num_warps, programs_per_sm=16 // num_warps)


# ---- device code -----------------------------------------------------------------------------------------


@triton.jit
def _dropout_mask(seed_ptr, row_ids_ptr, stream, threshold, rows, mask_m, cols):
    """Keep mask [BLOCK_M, BLOCK_N]. Rows are named by row_ids, or by their number where that is None."""
    if row_ids_ptr is None:
        names = rows
    else:
        names = tl.load(row_ids_ptr + rows, mask=mask_m, other=0).to(tl.int64)
    keys = _row_keys(seed_ptr, stream, names)
    return _keep_mask(keys[:, None], cols[None, :], threshold)


@triton.jit
def _moments(z, mask, eps, N: tl.constexpr, RMS: tl.constexpr):
    """(mean [M] or None, z - mean, rstd [M]) of fp32 rows z [M, BLOCK_N], zero where mask is false."""
    mean = None if RMS else tl.sum(z, axis=1) / N
    centred = z if RMS else tl.where(mask, z - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / N + eps)
    return mean, centred, rstd


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
_VARYING = ["n_rows", "stream", "threshold", "n_parts", "rows_per_step"]


@triton.jit(do_not_specialize=_VARYING[:3])
def _add_norm_fwd_kernel(
    x_ptr, residual_ptr, x_bias_ptr, weight_ptr, bias_ptr,   # in: [M, N], [M, N], [N], [N], [N]; None if absent
    seed_ptr, row_ids_ptr,                                   # in: [1], [M]; None without dropout, without names
    y_ptr, z_ptr, mean_ptr, rstd_ptr,                        # out: [M, N], [M, N], [M], [M]; None if not wanted
    n_rows, stride_xm, stride_rm,
    eps, stream, threshold, keep_scale,
    N: tl.constexpr, RMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    mask_m = rows < n_rows
    mask = mask_m[:, None] & (cols < N)[None, :]

    keep = None
    if seed_ptr is not None:
        keep = _dropout_mask(seed_ptr, row_ids_ptr, stream, threshold, rows, mask_m, cols)
    z = _load_sum(x_ptr, residual_ptr, x_bias_ptr, rows, cols, mask, stride_xm, stride_rm, keep, keep_scale)
    if z_ptr is not None:
        # y belongs to the z that is returned, and so agrees with the backward pass, which reads that z
        z = z.to(z_ptr.dtype.element_ty).to(tl.float32)

    mean, centred, rstd = _moments(z, mask, eps, N, RMS)
    y = centred * rstd[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + cols[None, :], mask=(cols < N)[None, :], other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols[None, :], mask=(cols < N)[None, :], other=0.0).to(tl.float32)

    offsets = rows[:, None] * N + cols[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    if z_ptr is not None:
        tl.store(z_ptr + offsets, z.to(z_ptr.dtype.element_ty), mask=mask)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + rows, rstd, mask=mask_m)
    if mean_ptr is not None:
        tl.store(mean_ptr + rows, mean, mask=mask_m)


@triton.jit(do_not_specialize=_VARYING)
def _add_norm_bwd_kernel(
    dy_ptr, dz_out_ptr, x_ptr, residual_ptr, x_bias_ptr, weight_ptr,   # in: [M, N] x 4, [N], [N]; None if absent
    mean_ptr, rstd_ptr, seed_ptr, row_ids_ptr,                         # in: [M], [M], [1], [M]
    dx_ptr, dresidual_ptr,                                             # out: [M, N]; None if not wanted
    dweight_part_ptr, dbias_part_ptr, dx_bias_part_ptr,                # out: [P, N] fp32; None if not wanted
    n_rows, rows_per_step, stride_dym, stride_dzm, stride_xm, stride_rm,
    stream, threshold, keep_scale,
    N: tl.constexpr, RMS: tl.constexpr,
    X_IS_SUM: tl.constexpr,                                            # x holds z already
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    mask_n = (cols < N)[None, :]

    dweight = tl.zeros((BLOCK_N,), tl.float32)
    dbias = tl.zeros((BLOCK_N,), tl.float32)
    dx_bias = tl.zeros((BLOCK_N,), tl.float32)

    for row in range(pid * BLOCK_M, n_rows, rows_per_step):
        rows = row + tl.arange(0, BLOCK_M)
        mask_m = rows < n_rows
        mask = mask_m[:, None] & mask_n

        keep = None
        if seed_ptr is not None:
            keep = _dropout_mask(seed_ptr, row_ids_ptr, stream, threshold, rows, mask_m, cols)
        dy = tl.load(dy_ptr + rows[:, None] * stride_dym + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        z = _load_sum(
            x_ptr, residual_ptr, x_bias_ptr, rows, cols, mask, stride_xm, stride_rm,
            None if X_IS_SUM else keep, keep_scale,
        )  # fmt: skip
        rstd = tl.load(rstd_ptr + rows, mask=mask_m, other=0.0)

        if RMS:
            x_hat = z * rstd[:, None]
        else:
            mean = tl.load(mean_ptr + rows, mask=mask_m, other=0.0)
            # not zero past N, but everything it meets there is
            x_hat = (z - mean[:, None]) * rstd[:, None]
        # summed here, before the reductions, so that dy is not held across them
        if dweight_part_ptr is not None:
            dweight += tl.sum(dy * x_hat, axis=0)
        if dbias_part_ptr is not None:
            dbias += tl.sum(dy, axis=0)

        g = dy
        if weight_ptr is not None:
            # from the cache every time: held across the loop it would cost up to 16 registers a lane
            g = dy * tl.load(weight_ptr + cols[None, :], mask=mask_n, other=0.0).to(tl.float32)
        dz = g - x_hat * (tl.sum(g * x_hat, axis=1) / N)[:, None]
        if not RMS:
            dz -= (tl.sum(g, axis=1) / N)[:, None]
        dz *= rstd[:, None]
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

    offsets = pid * N + cols
    if dweight_part_ptr is not None:
        tl.store(dweight_part_ptr + offsets, dweight, mask=cols < N)
    if dbias_part_ptr is not None:
        tl.store(dbias_part_ptr + offsets, dbias, mask=cols < N)
    if dx_bias_part_ptr is not None:
        tl.store(dx_bias_part_ptr + offsets, dx_bias, mask=cols < N)


@triton.jit(do_not_specialize=_VARYING)
def _sum_parts_kernel(
    parts_ptr,                                  # in:  [K, P, N] fp32
    out0_ptr, out1_ptr, out2_ptr, out3_ptr,     # out: K vectors [N]; the others None
    n_parts,
    N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out_k = sum over p of parts[k, p], always in the same order."""
    k = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = cols < N

    acc = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, n_parts, BLOCK_P):
        parts = start + tl.arange(0, BLOCK_P)
        ptrs = parts_ptr + (k.to(tl.int64) * n_parts + parts)[:, None] * N + cols[None, :]
        acc += tl.load(ptrs, mask=(parts < n_parts)[:, None] & mask_n[None, :], other=0.0)
    total = tl.sum(acc, axis=0)

    tl.store(out0_ptr + cols, total.to(out0_ptr.dtype.element_ty), mask=mask_n & (k == 0))
    if out1_ptr is not None:
        tl.store(out1_ptr + cols, total.to(out1_ptr.dtype.element_ty), mask=mask_n & (k == 1))
    if out2_ptr is not None:
        tl.store(out2_ptr + cols, total.to(out2_ptr.dtype.element_ty), mask=mask_n & (k == 2))
    if out3_ptr is not None:
        tl.store(out3_ptr + cols, total.to(out3_ptr.dtype.element_ty), mask=mask_n & (k == 3))


# ---- launchers -------------------------------------------------------------------------------------------


def rows_of(t: Tensor | None, n_cols: int) -> Tensor | None:
    """t [..., N] as [M, N] with contiguous rows; a view where the strides allow it."""
    if t is None:
        return None
    t = t.reshape(-1, n_cols)
    return t if t.stride(1) == 1 or n_cols == 1 else t.contiguous()


def dropout_arguments(dropout_p: float, seed: Tensor | None, row_ids: Tensor | None, stream: int) -> dict:
    """A kernel's arguments for dropout; a seed of None compiles it without."""
    active = dropout_p > 0.0
    return {
        "seed_ptr": seed if active else None,
        "row_ids_ptr": row_ids.reshape(-1).contiguous() if active and row_ids is not None else None,
        "stream": stream,
        "threshold": keep_threshold(dropout_p),
        "keep_scale": 1.0 / (1.0 - dropout_p),
    }


def sum_parts(parts: Tensor, outs: list[Tensor]) -> None:
    """outs[k] [N] = sum over P of parts[k], for parts [K, P, N] fp32 with K at most 4: one launch, one order."""
    if not outs:
        return
    n_cols = parts.shape[2]
    out0, out1, out2, out3 = (*outs, None, None, None)[:4]
    # 32 columns x 64 parts a step: 128-byte rows, and enough programs to spread a few short vectors over the machine
    _sum_parts_kernel[(triton.cdiv(n_cols, 32), len(outs))](
        parts_ptr=parts, out0_ptr=out0, out1_ptr=out1, out2_ptr=out2, out3_ptr=out3, n_parts=parts.shape[1],
        N=n_cols, BLOCK_P=64, BLOCK_N=32, num_warps=4,
    )  # fmt: skip


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
    cases = []
    for dtype in (torch.bfloat16, torch.float32):
        d = f"*{TRITON_TYPES[dtype]}"
        for n_cols in _WIDTHS:
            fast = n_cols in (384, 768, 1024, 8192) and dtype == torch.bfloat16
            inputs = dict.fromkeys(("x_ptr", "residual_ptr", "x_bias_ptr", "weight_ptr"), d)
            dropout = {"seed_ptr": "*i64", "row_ids_ptr": "*i64"}
            numbers = {"stream": "i32", "threshold": "i64", "keep_scale": "fp32"}
            strides = ("stride_xm", "stride_rm")
            config = norm_fwd_config(n_cols)
            for what, gradient in (("", False), (",saves", True)):
                outputs = {"y_ptr": d, "mean_ptr": "*fp32", "rstd_ptr": "*fp32"} if gradient else {"y_ptr": d}
                signature = (
                    inputs | {"bias_ptr": d} | dropout | outputs | numbers
                    | {"n_rows": "i32", "eps": "fp32"} | dict.fromkeys(strides, "i32")
                )  # fmt: skip
                cases.append(
                    CompileCase(
                        name=f"add_layer_norm_fwd[{d[1:]},N={n_cols}{what}]",
                        kernel=_add_norm_fwd_kernel,
                        signature=signature,
                        constexprs={
                            "N": n_cols,
                            "RMS": False,
                            "BLOCK_M": config.block_m,
                            "BLOCK_N": config.block_n,
                            **{name: None for name in ("z_ptr", "mean_ptr", "rstd_ptr") if name not in outputs},
                        },
                        num_warps=config.num_warps,
                        num_stages=3,
                        aligned=(*(name for name in signature if name.endswith("_ptr")), *strides),
                        fast=fast and not gradient,
                    )
                )
            config = norm_bwd_config(n_cols)
            strides = ("stride_dym", "stride_xm", "stride_rm")
            parts = ["dweight_part_ptr", "dbias_part_ptr", "dx_bias_part_ptr"]
            summed = parts if n_cols <= MAX_FUSED_WIDTH else parts[:1]
            signature = (
                inputs | {"dy_ptr": d, "mean_ptr": "*fp32", "rstd_ptr": "*fp32"} | dropout
                | {"dx_ptr": d, "dresidual_ptr": d} | dict.fromkeys(summed, "*fp32") | numbers
                | {"n_rows": "i32", "rows_per_step": "i32", "stride_dzm": "i32"} | dict.fromkeys(strides, "i32")
            )  # fmt: skip
            cases.append(
                CompileCase(
                    name=f"add_layer_norm_bwd[{d[1:]},N={n_cols}]",
                    kernel=_add_norm_bwd_kernel,
                    signature=signature,
                    constexprs={
                        "N": n_cols,
                        "RMS": False,
                        "X_IS_SUM": False,
                        "dz_out_ptr": None,
                        "BLOCK_M": config.block_m,
                        "BLOCK_N": config.block_n,
                        **{name: None for name in parts if name not in summed},
                    },
                    num_warps=config.num_warps,
                    num_stages=3,
                    aligned=(*(name for name in signature if name.endswith("_ptr")), *strides),
                    fast=fast,
                )
            )
        cases.append(
            CompileCase(
                name=f"sum_parts[{d[1:]}]",
                kernel=_sum_parts_kernel,
                signature={
                    "parts_ptr": "*fp32",
                    "out0_ptr": d,
                    "out1_ptr": d,
                    "out2_ptr": d,
                    "out3_ptr": d,
                    "n_parts": "i32",
                },
                constexprs={"N": 768, "BLOCK_P": 64, "BLOCK_N": 32},
                num_warps=4,
                num_stages=3,
                aligned=("parts_ptr", "out0_ptr", "out1_ptr", "out2_ptr", "out3_ptr"),
                fast=dtype == torch.bfloat16,
            )
        )
    return cases

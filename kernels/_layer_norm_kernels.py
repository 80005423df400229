"""The device code of `layer_norm.py`, whose docstring has the equations."""

import triton
import triton.language as tl

from ._rows import (
    _dropout_mask,
    _norm_backward,
    _norm_forward,
    _row_block,
    _store_part,
    _store_statistics,
)


@triton.jit
def _load_sum(
    x_ptr, residual_ptr, x_bias_ptr,   # in: [M, N], [M, N] or None, [N] or None
    offsets, cols, mask,               # [BLOCK_M, BLOCK_N], [BLOCK_N], [BLOCK_M, BLOCK_N]
    keep, keep_scale,                  # [BLOCK_M, BLOCK_N] or None
):  # fmt: skip
    """z = dropout(x + x_bias) + residual in fp32, zero where mask is false."""
    z = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if x_bias_ptr is not None:
        z += tl.load(x_bias_ptr + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if keep is not None:
        z = tl.where(keep, z * keep_scale, 0.0)
    if residual_ptr is not None:
        z += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return z


# N is a compile-time number, because a model has one or two widths. The compiler can then prove that a mask is constant
# over 16 bytes (so loads stay 128 bits wide at 768 or 1,000), and drop the mask where N fills the block. Triton must
# not specialise on numbers that change from call to call, or it would build a second kernel when one of them is 1.
_VARYING = ["n_rows", "stream_id", "threshold"]


@triton.jit(do_not_specialize=[*_VARYING, "want_stats"])
def _add_norm_fwd_kernel(
    x_ptr, residual_ptr, x_bias_ptr, weight_ptr, bias_ptr,   # in: [M, N], [M, N], [N], [N], [N]; None if absent
    seed_ptr, row_ids_ptr,                                   # in: [1], [M]; None without dropout, without names
    y_ptr, z_ptr, mean_ptr, rstd_ptr,                        # out: [M, N], [M, N] or None, [M, 2] (RMS: None), [M]
    n_rows,
    eps, stream_id, threshold, keep_scale,
    want_stats,
    N: tl.constexpr, RMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_N)
    rows, mask_m, mask = _row_block(tl.program_id(0).to(tl.int64) * BLOCK_M, n_rows, cols, N, BLOCK_M)

    keep = None
    if seed_ptr is not None:
        keep = _dropout_mask(seed_ptr, row_ids_ptr, stream_id, threshold, rows, mask_m, cols)
    offsets = rows[:, None] * N + cols[None, :]
    z = _load_sum(x_ptr, residual_ptr, x_bias_ptr, offsets, cols, mask, keep, keep_scale)
    if z_ptr is not None:
        # y is computed from the rounded z that is returned, as the backward pass, which reads that z, assumes
        z = z.to(z_ptr.dtype.element_ty).to(tl.float32)

    y, mean, rest, rstd = _norm_forward(z, mask, weight_ptr, bias_ptr, cols, eps, N, RMS)

    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    if z_ptr is not None:
        tl.store(z_ptr + offsets, z.to(z_ptr.dtype.element_ty), mask=mask)
    _store_statistics(mean_ptr, rstd_ptr, mean, rest, rstd, rows, mask_m, want_stats)


_WANTS = ["has_dz_out", "want_dx", "want_dresidual", "want_dweight", "want_dbias", "want_dx_bias"]


@triton.jit(do_not_specialize=[*_VARYING, "rows_per_step", *_WANTS])
def _add_norm_bwd_kernel(
    dy_ptr, dz_out_ptr, x_ptr, residual_ptr, x_bias_ptr, weight_ptr,   # in: [M, N] x 4, [N], [N]; None if absent
    mean_ptr, rstd_ptr, seed_ptr, row_ids_ptr,                         # in: [M, 2], [M], [1], [M]
    dx_ptr, dresidual_ptr,                                             # out: [M, N]
    dweight_part_ptr, dbias_part_ptr, dx_bias_part_ptr,                # out: [P, N] fp32; None if there is no such sum
    n_rows, rows_per_step,
    stream_id, threshold, keep_scale,
    has_dz_out, want_dx, want_dresidual, want_dweight, want_dbias, want_dx_bias,
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
        offsets = rows[:, None] * N + cols[None, :]
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        z = _load_sum(x_ptr, residual_ptr, x_bias_ptr, offsets, cols, mask, None if X_IS_SUM else keep, keep_scale)
        dz, dweight, dbias = _norm_backward(
            dy, z, mean_ptr, rstd_ptr, weight_ptr, dweight, dbias, rows, mask_m, cols,
            N, RMS, dweight_part_ptr is not None, dbias_part_ptr is not None,
        )  # fmt: skip
        if dz_out_ptr is not None:
            dz += tl.load(dz_out_ptr + offsets, mask=mask & (has_dz_out != 0), other=0.0).to(tl.float32)

        if want_dresidual != 0:
            tl.store(dresidual_ptr + offsets, dz.to(dresidual_ptr.dtype.element_ty), mask=mask)

        dx = dz
        if seed_ptr is not None:
            dx = tl.where(keep, dz * keep_scale, 0.0)
        if want_dx != 0:
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dx_bias_part_ptr is not None:
            # rows past the end have dy = 0 and rstd = 0, so dz = 0
            dx_bias += tl.sum(dx, axis=0)

    _store_part(dweight_part_ptr, dweight, pid, cols, want_dweight, N)
    _store_part(dbias_part_ptr, dbias, pid, cols, want_dbias, N)
    _store_part(dx_bias_part_ptr, dx_bias, pid, cols, want_dx_bias, N)

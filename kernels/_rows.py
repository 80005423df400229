"""What the operators on whole rows share: LayerNorm, RMSNorm and the embeddings.

A program takes blocks of BLOCK_M rows; a row of N elements lies in BLOCK_N lanes, the next power of two, so its
statistics need no second look at it. Sums over all rows (gradients of weight, bias, ...) are made in two steps, without
atomics: every program adds the rows it meets, in order, to a row of a [P, N] matrix in fp32, and `sum_parts` adds
those P rows in order.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._compile import TRITON_TYPES, CompileCase
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
def _row_block(first, n_rows, cols, N: tl.constexpr, BLOCK_M: tl.constexpr):
    """(rows [BLOCK_M], which of them exist, which elements [BLOCK_M, BLOCK_N] exist), from row `first` (int64) on."""
    rows = first + tl.arange(0, BLOCK_M)
    mask_m = rows < n_rows
    return rows, mask_m, mask_m[:, None] & (cols < N)[None, :]


@triton.jit
def _dropout_mask(seed_ptr, row_ids_ptr, stream_id, threshold, rows, mask_m, cols):
    """Keep mask [BLOCK_M, BLOCK_N]. Rows are named by row_ids, or by their number where that is None."""
    if row_ids_ptr is None:
        names = rows
    else:
        names = tl.load(row_ids_ptr + rows, mask=mask_m, other=0).to(tl.int64)
    keys = _row_keys(seed_ptr, stream_id, names)
    return _keep_mask(keys[:, None], cols[None, :], threshold)


@triton.jit
def _moments(z, mask, eps, N: tl.constexpr, RMS: tl.constexpr):
    """(mean [M], z - mean, rstd [M]) of fp32 rows z [M, BLOCK_N], zero where mask is false; RMS: with mean 0."""
    # zeros, not None: a jit function that is called as such cannot return None
    mean = tl.zeros((z.shape[0],), tl.float32) if RMS else tl.sum(z, axis=1) / N
    centred = z if RMS else tl.where(mask, z - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / N + eps)
    return mean, centred, rstd


@triton.jit
def _norm_forward(z, mask, weight_ptr, bias_ptr, cols, eps, N: tl.constexpr, RMS: tl.constexpr):
    """(y, mean [M], rstd [M]) of fp32 rows z [M, BLOCK_N], zero where mask is false; weight, bias: if any."""
    mean, centred, rstd = _moments(z, mask, eps, N, RMS)
    y = centred * rstd[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + cols[None, :], mask=(cols < N)[None, :], other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols[None, :], mask=(cols < N)[None, :], other=0.0).to(tl.float32)
    return y, mean, rstd


@triton.jit
def _norm_backward(
    dy, z, mean_ptr, rstd_ptr, weight_ptr,   # [BLOCK_M, BLOCK_N] fp32 x 2, zero past the end; [M] (RMS: None), [M], [N]
    dweight, dbias,                          # sums so far, [BLOCK_N]
    rows, mask_m, cols,
    N: tl.constexpr, RMS: tl.constexpr, WANT_DWEIGHT: tl.constexpr, WANT_DBIAS: tl.constexpr,
):  # fmt: skip
    """(dz, dweight, dbias): the gradient of the rows, zero past the end, and the sums with these rows added."""
    rstd = tl.load(rstd_ptr + rows, mask=mask_m, other=0.0)
    if RMS:
        x_hat = z * rstd[:, None]
    else:
        mean = tl.load(mean_ptr + rows, mask=mask_m, other=0.0)
        # not zero past N, but everything it meets there is
        x_hat = (z - mean[:, None]) * rstd[:, None]
    # summed here, before the reductions, so that dy is not held across them
    if WANT_DWEIGHT:
        dweight += tl.sum(dy * x_hat, axis=0)
    if WANT_DBIAS:
        dbias += tl.sum(dy, axis=0)

    g = dy
    if weight_ptr is not None:
        # from the cache every time: held across the loop it would cost up to 16 registers a lane
        g = dy * tl.load(weight_ptr + cols[None, :], mask=(cols < N)[None, :], other=0.0).to(tl.float32)
    dz = g - x_hat * (tl.sum(g * x_hat, axis=1) / N)[:, None]
    if not RMS:
        dz -= (tl.sum(g, axis=1) / N)[:, None]
    return dz * rstd[:, None], dweight, dbias


@triton.jit
def _store_statistics(mean_ptr, rstd_ptr, mean, rstd, rows, mask_m):
    """Whichever of mean and rstd [M] are wanted."""
    if rstd_ptr is not None:
        tl.store(rstd_ptr + rows, rstd, mask=mask_m)
    if mean_ptr is not None:
        tl.store(mean_ptr + rows, mean, mask=mask_m)


@triton.jit
def _store_part(part_ptr, part, pid, cols, N: tl.constexpr):
    """Row pid of the partial sums [P, N], if they are wanted."""
    if part_ptr is not None:
        tl.store(part_ptr + pid * N + cols, part, mask=cols < N)


@triton.jit(do_not_specialize=["n_parts"])
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
        "stream_id": stream,
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


# ---- for the offline compiler ----------------------------------------------------------------------------


def compile_cases(arch: str) -> list[CompileCase]:
    """The sum of partial sums, for outputs of 16 and 32 bits."""
    outs = ("out0_ptr", "out1_ptr", "out2_ptr", "out3_ptr")
    return [
        CompileCase(
            name=f"sum_parts[{TRITON_TYPES[dtype]}]",
            kernel=_sum_parts_kernel,
            signature={"parts_ptr": "*fp32", "n_parts": "i32"} | dict.fromkeys(outs, f"*{TRITON_TYPES[dtype]}"),
            constexprs={"N": 768, "BLOCK_P": 64, "BLOCK_N": 32},
            num_warps=4,
            num_stages=3,
            aligned=("parts_ptr", *outs),
            fast=dtype == torch.bfloat16,
        )
        for dtype in (torch.bfloat16, torch.float32)
    ]

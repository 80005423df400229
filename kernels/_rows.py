"""Shared code of the operators on whole rows: LayerNorm, RMSNorm and the embeddings.

A program processes blocks of BLOCK_M rows. A row of N elements is held in BLOCK_N columns, the next power of two, so
its statistics need no second load. Sums over all rows (gradients of weight, bias, ...) take two steps, without atomics:
each program adds its rows, in order, to its row of a [P, N] matrix in fp32, and `sum_parts` adds these P rows in order.

For an output that a call does not want (the gradient of a frozen weight, unused statistics), a run-time number
(`want_...`, or a bit of `wanted`) suppresses the store. If the pointer were None instead, the compiler would build
another kernel, whose layouts sum in another order, and the other outputs would have other bits. The pointer of an
unwanted output is that of an empty tensor of the same dtype and alignment.
"""

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Plan, cdiv
from ._random import keep_threshold
from ._random_triton import _keep_mask, _row_keys

MAX_WIDTH = 8192
# Widest rows for which the backward kernel itself sums dbias and dx_bias; in wider rows these sums would spill.
MAX_FUSED_WIDTH = 4096

# ---- configs ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NormConfig:
    """A program's tile [block_m, block_n] and its warps; `programs_per_sm` bounds the backward grid."""

    block_m: int
    block_n: int
    num_warps: int
    programs_per_sm: int = 0


@functools.cache
def norm_fwd_config(n_cols: int) -> NormConfig:
    """The forward tile. It depends on the width only, so that a row's bits do not depend on the number of rows.

    32 elements a lane: four 16-byte loads of bf16 in flight from each input. Up to 1,024 columns a row then
    belongs to one warp, whose sums need shuffles but no barrier; narrower rows share a warp, wider ones take more.
    At 64 to 80 registers an SM holds 25 to 32 one-warp programs, which have some 100 KB in flight, several times
    what hides memory latency.
    """
    block_n = max(16, triton.next_power_of_2(n_cols))
    return NormConfig(block_m=max(1, 1024 // block_n), block_n=block_n, num_warps=max(1, block_n // 1024))


@functools.cache
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
    """(rows [BLOCK_M], which of them exist, which elements [BLOCK_M, BLOCK_N] exist), from row `first` on."""
    rows = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_M)  # a loop's counter has 32 bits under the interpreter
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
    """(mean [M], rest [M], z - mean - rest, rstd [M]) of fp32 rows z [M, BLOCK_N], zero where mask is false; RMS: with
    mean 0. rest is the rounding error of mean: in a row of nearly equal elements it could exceed the deviations."""
    # zeros, not None: a jit function that is called as such cannot return None
    mean = tl.zeros((z.shape[0],), tl.float32)
    rest = mean
    centred = z
    if not RMS:
        mean = tl.sum(z, axis=1) / N
        centred = tl.where(mask, z - mean[:, None], 0.0)
        # division rounds to nearest, so that a constant row becomes zeros
        rest = tl.div_rn(tl.sum(centred, axis=1), tl.full((z.shape[0],), N, tl.float32))
        centred = tl.where(mask, centred - rest[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / N + eps)
    return mean, rest, centred, rstd


@triton.jit
def _norm_forward(z, mask, weight_ptr, bias_ptr, cols, eps, N: tl.constexpr, RMS: tl.constexpr):
    """(y, mean [M], rest [M], rstd [M]) of fp32 rows z [M, BLOCK_N], zero where mask is false; weight, bias: if any."""
    mean, rest, centred, rstd = _moments(z, mask, eps, N, RMS)
    y = centred * rstd[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + cols[None, :], mask=(cols < N)[None, :], other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols[None, :], mask=(cols < N)[None, :], other=0.0).to(tl.float32)
    return y, mean, rest, rstd


@triton.jit
def _norm_backward(
    dy, z,                                   # [BLOCK_M, BLOCK_N] fp32, zero past the end
    mean_ptr, rstd_ptr, weight_ptr,          # [M, 2] (RMS: None), [M], [N]
    dweight, dbias,                          # sums so far, [BLOCK_N]
    rows, mask_m, cols,
    N: tl.constexpr, RMS: tl.constexpr, SUM_DWEIGHT: tl.constexpr, SUM_DBIAS: tl.constexpr,
):  # fmt: skip
    """(dz, dweight, dbias): the gradient of the rows, zero past the end, and the sums with these rows added."""
    rstd = tl.load(rstd_ptr + rows, mask=mask_m, other=0.0)
    if RMS:
        x_hat = z * rstd[:, None]
    else:
        mean = tl.load(mean_ptr + 2 * rows, mask=mask_m, other=0.0)
        rest = tl.load(mean_ptr + 2 * rows + 1, mask=mask_m, other=0.0)
        # not zero past N, but all factors of it are zero there
        x_hat = (z - mean[:, None] - rest[:, None]) * rstd[:, None]
    # summed before the reductions, so that dy need not stay in registers during them
    if SUM_DWEIGHT:
        dweight += tl.sum(dy * x_hat, axis=0)
    if SUM_DBIAS:
        dbias += tl.sum(dy, axis=0)

    g = dy
    if weight_ptr is not None:
        # loaded from the cache in every iteration; kept across the loop it would take up to 16 registers a lane
        g = dy * tl.load(weight_ptr + cols[None, :], mask=(cols < N)[None, :], other=0.0).to(tl.float32)
    dz = g - x_hat * (tl.sum(g * x_hat, axis=1) / N)[:, None]
    if not RMS:
        dz -= (tl.sum(g, axis=1) / N)[:, None]
    return dz * rstd[:, None], dweight, dbias


@triton.jit
def _store_statistics(mean_ptr, rstd_ptr, mean, rest, rstd, rows, mask_m, want):
    """rstd [M], and (mean, rest) [M, 2] unless its pointer is None, where `want` is not 0."""
    if want != 0:
        tl.store(rstd_ptr + rows, rstd, mask=mask_m)
        if mean_ptr is not None:
            tl.store(mean_ptr + 2 * rows, mean, mask=mask_m)
            tl.store(mean_ptr + 2 * rows + 1, rest, mask=mask_m)


@triton.jit
def _store_part(part_ptr, part, pid, cols, want, N: tl.constexpr):
    """Row pid of the partial sums [P, N], if there are such sums and `want` is not 0."""
    if part_ptr is not None:
        tl.store(part_ptr + pid * N + cols, part, mask=(cols < N) & (want != 0))


_OUTS = ["out0_ptr", "out1_ptr", "out2_ptr", "out3_ptr"]


# Outputs are not specialised on alignment: a row of a table may have any address, and an unwanted output has address 0.
@triton.jit(do_not_specialize=["n_parts", "wanted"], do_not_specialize_on_alignment=_OUTS)
def _sum_parts_kernel(
    parts_ptr,                                  # in:  [K, P, N] fp32
    out0_ptr, out1_ptr, out2_ptr, out3_ptr,     # out: K vectors [N]; the others None
    n_parts, wanted,
    N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out_k = sum over p of parts[k, p], always in the same order, where bit k of `wanted` is set."""
    k = tl.program_id(1)
    if (wanted >> k) & 1 == 0:
        return

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


# Compiler options of the kernels on rows. Without them the compiler fuses a product with the addition of another lane's
# product. Two lanes that add the same two products would then round differently, and the statistics of a row, which
# every lane of the row holds, would not be the same number. The cost is up to 5% more instructions, in kernels that
# wait for memory.
EXACT = {"enable_fp_fusion": False}


def packed(t: Tensor | None) -> Tensor | None:
    """t, or a copy if t is not contiguous or its address is not a multiple of 16.

    For another alignment the compiler would build another kernel, which adds in another order.
    """
    if t is None or (t.is_contiguous() and not t.data_ptr() & 15):
        return t
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


@functools.lru_cache(64)
def unwanted(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The argument for an output that a call does not want. Its pointer is never used."""
    return torch.empty(0, dtype=dtype, device=device)


def rows_of(t: Tensor | None, n_cols: int) -> Tensor | None:
    """t [..., N] as [M, N] with contiguous rows; a view where the strides allow it."""
    if t is None:
        return None
    t = t.reshape(-1, n_cols)
    return t if t.stride(1) == 1 or n_cols == 1 else t.contiguous()


def dropout_constants(dropout_p: float) -> dict:
    """The kernel arguments that follow from dropout's probability."""
    return {"threshold": keep_threshold(dropout_p), "keep_scale": 1.0 / (1.0 - dropout_p)}


def dropout_tensors(
    dropout_p: float, seed: Tensor | None, row_ids: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """(seed, row_ids) for a kernel; a seed of None compiles it without dropout."""
    return (None, None) if dropout_p == 0.0 else (seed, packed(row_ids))


@functools.lru_cache(256)
def _sum_plan(n_cols: int) -> Plan:
    # 32 columns x 64 parts in a step: rows of 128 bytes, and enough programs to use the GPU for a few short vectors
    return Plan(
        _sum_parts_kernel,
        "parts_ptr out0_ptr out1_ptr out2_ptr out3_ptr",
        "n_parts wanted",
        {"N": n_cols, "BLOCK_P": 64, "BLOCK_N": 32},
        num_warps=4,
    )


def sum_parts(parts: Tensor, outs: list[Tensor | None], like: Sequence[Tensor], known: Hashable = None) -> None:
    """outs[k] [N] = sum over P of parts[k], for parts [K, P, N] fp32 with K at most 4 ([P, N] if K = 1), in one launch
    and always in the same order.

    outs[k] may be None: that sum is not stored, and like[k] gives its dtype. known: as in `Plan`.
    """
    wanted = 0
    tensors = [parts, None, None, None, None]
    for k, out in enumerate(outs):
        if out is None:
            tensors[k + 1] = unwanted(parts.device, like[k].dtype)
        else:
            tensors[k + 1] = out
            wanted |= 1 << k
    if wanted:
        n_parts, n_cols = parts.shape[-2:]
        _sum_plan(n_cols)((cdiv(n_cols, 32), len(outs)), tensors, (n_parts, wanted), known=known)

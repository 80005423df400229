"""One vector for each packed sequence, forward and backward: mean, first token, maximum, and an optional L2 norm.

Forward, x [T, N], sequence b being tokens cu_seqlens[b] to cu_seqlens[b + 1], n of them, all sums in fp32:

    p = sum over its tokens / n | its first token | max over its tokens      [B, N];  0 where n = 0
    y = p / max(|p|, 1e-12) with normalize, else p                           [B, N]

Backward:

    dp = (dy - p (p . dy) / |p|^2) / |p|; where |p| < 1e-12, dy / 1e-12; without normalize, dy             [B, N]
    dx[t] = dp / n | dp at the first token, else 0 | dp / ties where x[t] = p, else 0                       [T, N]

with ties [B, N], the number of tokens that hold the maximum: they share its gradient evenly, as in torch.amax. For mean
and cls only cu_seqlens is saved, with normalize also p in fp32, for max also x, p and ties.

Mean and max take two steps, because one sequence may have 8,192 tokens and others five. Each sequence is cut, from its
own start, into chunks of 128 tokens. A program sums the columns of one chunk, and then one program for each sequence
adds its chunks' sums in order. The cut depends on the sequence only, so a vector's bits do too.

The host reads no length. Chunk c of sequence b has slot cu_seqlens[b] // CHUNK + b + c: different sequences have
different slots, and there are at most T // CHUNK + B, which is the grid. A program finds its sequence by bisection.

Bytes moved, with elements of b bytes: forward reads x and writes y: (T + B) N b, plus at least 8 B N and about
8 N (T / CHUNK + B / 2) bytes of partial sums; cls reads and writes only B N b. Backward writes dx: T N b (max also
reads x), plus dy and p once for each chunk of 32 tokens. x is read once; the partial sums, 1 / 32 of x at 128 tokens a
chunk in bf16, are the only extra. At 4.3 TB/s mean over 16,384 tokens of 768 in bf16 takes at least 6 us forward and
6 us backward, max 12 us backward.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ._compile import TRITON_TYPES, CompileCall, compile_call, empty
from ._launch import Plan, cdiv
from ._library import apply, once, register
from ._rows import MAX_WIDTH, rows_of

MODES = ("mean", "cls", "max")

# ---- configs ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PoolConfig:
    """Tokens in a chunk, tokens loaded at once, columns of a program, warps."""

    chunk: int
    block_m: int
    block_n: int
    num_warps: int


@functools.cache
def pool_fwd_config(n_cols: int) -> PoolConfig:
    """Tiles of 32 tokens x 128 columns: four 16-byte loads of bf16 a lane, in rows of 256 bytes.

    Programs are narrow because a single sequence of 8,192 tokens and 768 columns must still occupy the GPU: 6 column
    blocks x 64 chunks are 384 programs of four tiles each.
    """
    return PoolConfig(chunk=128, block_m=32, block_n=min(128, max(16, triton.next_power_of_2(n_cols))), num_warps=4)


@functools.cache
def pool_row_config(n_cols: int) -> PoolConfig:
    """Whole rows, because the norm needs them. Chunks are short because they only divide the writes and hold no sums.

    8 columns a lane up to 4,096, and at most 32 elements a lane, because a maximum keeps three tiles in registers.
    """
    block_n = max(16, triton.next_power_of_2(n_cols))
    num_warps = min(16, max(1, block_n // 256))
    block_m = min(32, 1024 // block_n) if block_n <= 256 else max(1, min(4, 4096 // block_n))
    return PoolConfig(chunk=32, block_m=block_m, block_n=block_n, num_warps=num_warps)


# ---- device code -----------------------------------------------------------------------------------------


@triton.jit
def _nan_max(a, b):
    """Elementwise maximum that keeps NaN, as torch.amax does."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _nan_max_rows(acc):
    """Maximum over the rows of acc [M, N] that keeps NaN, where tl.max drops it."""
    poisoned = tl.max(tl.where(acc == acc, 0, 1), axis=0) > 0
    return tl.where(poisoned, float("nan"), tl.max(acc, axis=0))


@triton.jit
def _find_chunk(cu_seqlens_ptr, slot, last, n_seqs, n_tokens, CHUNK: tl.constexpr):
    """(first token, end, sequence) of the chunk in this slot, with sequence at most `last`. An empty slot has
    first >= end.

    Sequence n_seqs means tokens past the last sequence, if there are any.
    """
    # the last sequence whose first slot is at most this one; that of sequence 0 is 0
    low, high = slot * 0, slot * 0 + last
    while low < high:
        middle = (low + high + 1) // 2
        fits = tl.load(cu_seqlens_ptr + middle) // CHUNK + middle <= slot
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle - 1)
    seq_start = tl.load(cu_seqlens_ptr + low)
    seq_end = tl.load(cu_seqlens_ptr + low + 1, mask=low < n_seqs, other=n_tokens)
    first = seq_start + (slot - seq_start // CHUNK - low) * CHUNK
    return first, tl.minimum(first + CHUNK, seq_end), low


@triton.jit(do_not_specialize=["n_seqs", "n_tokens"])
def _pool_chunks_kernel(
    x_ptr, cu_seqlens_ptr,         # in:  [T, N], [B + 1]
    part_ptr, ties_part_ptr,       # out: [slots, N] fp32: sums, or maxima and how many tokens hold them
    n_seqs, n_tokens, stride_xm,
    N: tl.constexpr, MAX: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    first, end, _ = _find_chunk(cu_seqlens_ptr, slot, n_seqs - 1, n_seqs, n_tokens, CHUNK)
    if first >= end:
        return

    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = cols < N
    # lane m of acc takes every BLOCK_M-th token of the chunk
    acc = tl.full((BLOCK_M, BLOCK_N), float("-inf") if MAX else 0.0, tl.float32)
    ties = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for token in range(first, end, BLOCK_M):
        tokens = token + tl.arange(0, BLOCK_M)
        mask = (tokens < end)[:, None] & mask_n[None, :]
        x_ptrs = x_ptr + tokens.to(tl.int64)[:, None] * stride_xm + cols[None, :]
        if MAX:
            x = tl.load(x_ptrs, mask=mask, other=float("-inf")).to(tl.float32)
            higher = _nan_max(acc, x)
            if ties_part_ptr is not None:
                ties = tl.where(acc == higher, ties, 0.0) + tl.where(mask & (x == higher), 1.0, 0.0)
            acc = higher
        else:
            acc += tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)

    offsets = slot.to(tl.int64) * N + cols
    if MAX:
        highest = _nan_max_rows(acc)
        tl.store(part_ptr + offsets, highest, mask=mask_n)
        if ties_part_ptr is not None:
            ties = tl.where(acc == highest[None, :], ties, 0.0)
            tl.store(ties_part_ptr + offsets, tl.sum(ties, axis=0), mask=mask_n)
    else:
        tl.store(part_ptr + offsets, tl.sum(acc, axis=0), mask=mask_n)


@triton.jit
def _pool_rows_kernel(
    x_ptr, cu_seqlens_ptr, part_ptr, ties_part_ptr,   # in:  [T, N] for cls, [B + 1], [slots, N]; None if absent
    y_ptr, pooled_ptr, ties_ptr,                      # out: [B, N]; the last two fp32, None if not wanted
    stride_xm,
    N: tl.constexpr, MODE: tl.constexpr, NORMALIZE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    seq = tl.program_id(0).to(tl.int64)
    seq_start = tl.load(cu_seqlens_ptr + seq).to(tl.int64)
    seqlen = tl.load(cu_seqlens_ptr + seq + 1).to(tl.int64) - seq_start
    cols = tl.arange(0, BLOCK_N)
    mask_n = cols < N

    if MODE == "cls":
        pooled = tl.load(x_ptr + seq_start * stride_xm + cols, mask=mask_n & (seqlen > 0), other=0.0).to(tl.float32)
    else:
        slot = seq_start // CHUNK + seq
        end = slot + (seqlen + CHUNK - 1) // CHUNK
        acc = tl.full((BLOCK_M, BLOCK_N), float("-inf") if MODE == "max" else 0.0, tl.float32)
        ties = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first in range(slot, end, BLOCK_M):
            slots = first + tl.arange(0, BLOCK_M)
            mask = (slots < end)[:, None] & mask_n[None, :]
            offsets = slots[:, None] * N + cols[None, :]
            if MODE == "max":
                part = tl.load(part_ptr + offsets, mask=mask, other=float("-inf"))
                higher = _nan_max(acc, part)
                if ties_ptr is not None:
                    ties_part = tl.load(ties_part_ptr + offsets, mask=mask, other=0.0)
                    ties = tl.where(acc == higher, ties, 0.0) + tl.where(part == higher, ties_part, 0.0)
                acc = higher
            else:
                acc += tl.load(part_ptr + offsets, mask=mask, other=0.0)
        if MODE == "max":
            pooled = tl.where(mask_n & (seqlen > 0), _nan_max_rows(acc), 0.0)
            if ties_ptr is not None:
                ties = tl.where(acc == pooled[None, :], ties, 0.0)
                tl.store(ties_ptr + seq * N + cols, tl.sum(ties, axis=0), mask=mask_n)
        else:
            pooled = tl.sum(acc, axis=0) / tl.maximum(seqlen, 1).to(tl.float32)

    y = pooled
    if NORMALIZE:
        y = pooled / tl.maximum(tl.sqrt_rn(tl.sum(pooled * pooled, axis=0)), 1e-12)
    tl.store(y_ptr + seq * N + cols, y.to(y_ptr.dtype.element_ty), mask=mask_n)
    if pooled_ptr is not None:
        tl.store(pooled_ptr + seq * N + cols, pooled, mask=mask_n)


@triton.jit(do_not_specialize=["n_seqs", "n_tokens"])
def _pool_bwd_kernel(
    dy_ptr, cu_seqlens_ptr, x_ptr, pooled_ptr, ties_ptr,   # in:  [B, N], [B + 1], [T, N], [B, N], [B, N]
    dx_ptr,                                                # out: [T, N]
    n_seqs, n_tokens, stride_dyb, stride_xm,
    N: tl.constexpr, MODE: tl.constexpr, NORMALIZE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    first, end, seq = _find_chunk(cu_seqlens_ptr, tl.program_id(0), n_seqs, n_seqs, n_tokens, CHUNK)
    if first >= end:
        return

    seq = seq.to(tl.int64)
    seq_start = tl.load(cu_seqlens_ptr + seq)
    seqlen = tl.load(cu_seqlens_ptr + seq + 1, mask=seq < n_seqs, other=n_tokens) - seq_start
    cols = tl.arange(0, BLOCK_N)
    mask_n = cols < N

    # tokens past the last sequence have dp = 0
    mask_dp = mask_n & (seq < n_seqs)
    dp = tl.load(dy_ptr + seq * stride_dyb + cols, mask=mask_dp, other=0.0).to(tl.float32)
    if MODE == "max" or NORMALIZE:
        pooled = tl.load(pooled_ptr + seq * N + cols, mask=mask_dp, other=0.0)
    if NORMALIZE:
        norm = tl.sqrt_rn(tl.sum(pooled * pooled, axis=0))
        inverse = 1.0 / tl.maximum(norm, 1e-12)
        along = tl.where(norm >= 1e-12, tl.sum(pooled * dp, axis=0) * inverse * inverse, 0.0)
        dp = (dp - pooled * along) * inverse
    if MODE == "mean":
        dp /= seqlen.to(tl.float32)
    if MODE == "max":
        dp /= tl.load(ties_ptr + seq * N + cols, mask=mask_dp, other=1.0)

    for token in range(first, end, BLOCK_M):
        tokens = token + tl.arange(0, BLOCK_M)
        mask = (tokens < end)[:, None] & mask_n[None, :]
        dx = tl.broadcast_to(dp[None, :], (BLOCK_M, BLOCK_N))
        if MODE == "cls":
            dx = tl.where((tokens == seq_start)[:, None], dx, 0.0)
        if MODE == "max":
            x_ptrs = x_ptr + tokens.to(tl.int64)[:, None] * stride_xm + cols[None, :]
            x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
            dx = tl.where(x == pooled[None, :], dx, 0.0)
        dx_ptrs = dx_ptr + tokens.to(tl.int64)[:, None] * N + cols[None, :]
        tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


# ---- launchers -------------------------------------------------------------------------------------------


@functools.lru_cache(256)
def _chunk_plan(config: PoolConfig, n_cols: int, stride_xm: int, is_max: bool) -> Plan:
    return Plan(
        _pool_chunks_kernel,
        "x_ptr cu_seqlens_ptr part_ptr ties_part_ptr",
        "n_seqs n_tokens",
        {"stride_xm": stride_xm, "N": n_cols, "MAX": is_max, "CHUNK": config.chunk}
        | {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n},
        num_warps=config.num_warps,
    )


@functools.lru_cache(256)
def _row_plan(config: PoolConfig, n_cols: int, stride_xm: int, mode: str, normalize: bool, chunk: int) -> Plan:
    return Plan(
        _pool_rows_kernel,
        "x_ptr cu_seqlens_ptr part_ptr ties_part_ptr y_ptr pooled_ptr ties_ptr",
        "",
        {"stride_xm": stride_xm, "N": n_cols, "MODE": mode, "NORMALIZE": normalize, "CHUNK": chunk}
        | {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n},
        num_warps=config.num_warps,
    )


@functools.lru_cache(256)
def _bwd_plan(config: PoolConfig, n_cols: int, stride_dyb: int, stride_xm: int, mode: str, normalize: bool) -> Plan:
    return Plan(
        _pool_bwd_kernel,
        "dy_ptr cu_seqlens_ptr x_ptr pooled_ptr ties_ptr dx_ptr",
        "n_seqs n_tokens",
        {"stride_dyb": stride_dyb, "stride_xm": stride_xm, "N": n_cols, "MODE": mode, "NORMALIZE": normalize}
        | {"CHUNK": config.chunk, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n},
        num_warps=config.num_warps,
    )


def _launch_fwd(x, cu_seqlens, mode, normalize, want_saved):
    y, pooled, ties = outs = _fake_fwd(x, cu_seqlens, mode, normalize, want_saved)
    n_seqs, n_cols = y.shape
    if n_seqs == 0:
        return outs
    x, cu_seqlens = rows_of(x, n_cols), cu_seqlens.contiguous()
    want_ties = want_saved and mode == "max"
    chunks, rows = pool_fwd_config(n_cols), pool_row_config(n_cols)
    part = ties_part = None
    if mode != "cls":
        slots = x.shape[0] // chunks.chunk + n_seqs
        part = x.new_empty((slots, n_cols), dtype=torch.float32)
        ties_part = torch.empty_like(part) if want_ties else None
        _chunk_plan(chunks, n_cols, x.stride(0), mode == "max")(
            (slots, cdiv(n_cols, chunks.block_n)), (x, cu_seqlens, part, ties_part), (n_seqs, x.shape[0])
        )
    _row_plan(rows, n_cols, x.stride(0), mode, normalize, chunks.chunk)(
        (n_seqs,),
        (
            x if mode == "cls" else None, cu_seqlens, part, ties_part,
            y, pooled if pooled.numel() else None, ties if want_ties else None,
        ),
    )  # fmt: skip
    return outs


def _fake_fwd(x, cu_seqlens, mode, normalize, want_saved):
    """(y, pooled, ties); what is not wanted has no elements."""
    shape = (cu_seqlens.shape[0] - 1, x.shape[1])
    want_pooled = want_saved and (normalize or mode == "max")
    return (
        x.new_empty(shape),
        x.new_empty(shape if want_pooled else (0,), dtype=torch.float32),
        x.new_empty(shape if want_saved and mode == "max" else (0,), dtype=torch.float32),
    )


def _launch_bwd(dy, cu_seqlens, x, pooled, ties, n_tokens, mode, normalize):
    dx = _fake_bwd(dy, cu_seqlens, x, pooled, ties, n_tokens, mode, normalize)
    n_seqs, n_cols = dy.shape
    if dx.numel() == 0 or n_seqs == 0:
        return dx.zero_()
    dy, x, cu_seqlens = rows_of(dy, n_cols), rows_of(x, n_cols), cu_seqlens.contiguous()
    config = pool_row_config(n_cols)
    stride_xm = 0 if x is None else x.stride(0)
    _bwd_plan(config, n_cols, dy.stride(0), stride_xm, mode, normalize)(
        (n_tokens // config.chunk + n_seqs + 1,), (dy, cu_seqlens, x, pooled, ties, dx), (n_seqs, n_tokens)
    )
    return dx


def _fake_bwd(dy, cu_seqlens, x, pooled, ties, n_tokens, mode, normalize):
    return dy.new_empty((n_tokens, dy.shape[1]))


_pool_fwd = register(
    "pool_fwd(Tensor x, Tensor cu_seqlens, str mode, bool normalize, bool want_saved) -> (Tensor, Tensor, Tensor)",
    _launch_fwd,
    _fake_fwd,
)
_pool_bwd = register(
    "pool_bwd(Tensor dy, Tensor cu_seqlens, Tensor? x, Tensor? pooled, Tensor? ties, SymInt n_tokens, str mode, "
    "bool normalize) -> Tensor",
    _launch_bwd,
    _fake_bwd,
)


# ---- autograd --------------------------------------------------------------------------------------------


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cu_seqlens, mode, normalize):
        y, pooled, ties = _pool_fwd(x, cu_seqlens, mode, normalize, True)
        is_max = mode == "max"
        ctx.save_for_backward(
            cu_seqlens, x if is_max else None, pooled if is_max or normalize else None, ties if is_max else None
        )
        ctx.options = x.shape[0], mode, normalize
        return y

    @staticmethod
    @once
    def backward(ctx, dy):
        return _pool_bwd(dy, *ctx.saved_tensors, *ctx.options), None, None, None


# ---- public ----------------------------------------------------------------------------------------------


def pool(x, cu_seqlens, mode="mean", normalize=False):
    """One vector for each sequence: x [T, N], cu_seqlens [B + 1] -> [B, N] in x's dtype, N up to 8,192; see
    `functional`."""
    if mode not in MODES:
        raise ValueError(f"pool: mode must be one of {MODES}, got {mode!r}")
    if not 1 <= x.shape[1] <= MAX_WIDTH:
        raise ValueError(f"the Triton pool takes rows of 1 to {MAX_WIDTH} elements, got {x.shape[1]}")
    if torch.is_grad_enabled() and x.requires_grad:
        return apply(_Pool, x, cu_seqlens, mode, normalize)
    return _pool_fwd(x, cu_seqlens, mode, normalize, False)[0]


# ---- for the offline compiler ----------------------------------------------------------------------------

# one width for each choice of tile, and the widths of BERT-base, large and MiniLM
_WIDTHS = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 2048, 4096, 8192)


def compile_calls() -> list[CompileCall]:
    """Every config in the modes that need the most registers; the other modes at one width."""

    def call(mode, normalize, n_cols=768, dtype=torch.bfloat16, fast=False):
        x, cu_seqlens = empty(200, n_cols, dtype=dtype), torch.tensor([0, 150, 200], dtype=torch.int32, device="cpu")
        form = f"{TRITON_TYPES[dtype]},{mode}{',normalize' * normalize},N={n_cols}"
        is_base = n_cols == 768
        return compile_call(pool, form, x, cu_seqlens, mode, normalize, fast=fast, inference=is_base)

    return [
        *(
            call(mode, True, n_cols, dtype, n_cols == 768 and dtype == torch.bfloat16 and mode == "mean")
            for dtype in (torch.bfloat16, torch.float32)
            for n_cols in _WIDTHS
            for mode in ("mean", "max")
        ),
        *(call(mode, False) for mode in MODES),
        call("cls", True),
        call("mean", True, dtype=torch.float16),
    ]

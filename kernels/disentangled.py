"""Disentangled attention over packed sequences, forward and backward (He et al., arXiv:2006.03654).

Forward, per sequence and head (q, k, v [S, D]; tables of distances pk, pq [R, D]; lut over i - j):

    s   = scale * (q k^T + q pk[lut]^T + k pq[lut]^T)           [S, S]
    lse = logsumexp(s)                                          [S] fp32, natural log; saved, with o
    o   = (p * keep / (1 - dropout_p)) v                        [S, D],  p = exp(s - lse)

Backward, with delta = rowsum(o * do) and ds as in `attention.py`:

    dq[i] = scale * sum_j ds[i, j] (k[j] + pk[lut[i - j]])      in the kernel over rows
    dk[j] = scale * sum_i ds[i, j] (q[i] + pq[lut[i - j]])      in the kernel over keys
    dpk[r] = scale * sum of ds[i, j] q[i] where lut[i - j] = r
    dpq[r] = scale * sum of ds[i, j] k[j] where lut[i - j] = r

All tiles on one diagonal of the scores have the same distances. So a program for dpk or dpq processes one diagonal of
some sequences and sums the gradient of each distance. Another kernel adds these sums for each row of a table. There are
no atomics: the same input gives the same bits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from . import _device
from ._arch import hardware
from ._attention_arguments import unit_stride
from ._attention_config import TILE
from ._attention_schedule import attention_schedule
from ._compile import CompileCall, compile_call, empty
from ._disentangled_kernels import (
    _disentangled_bwd_diagonal_kernel,
    _disentangled_bwd_dkv_kernel,
    _disentangled_bwd_dq_kernel,
    _disentangled_fwd_kernel,
    _disentangled_table_sum_kernel,
)
from ._disentangled_native import WIDEST_IN_TRITON
from ._launch import Plan, cdiv
from ._library import apply, once, register
from ._random import keep_threshold
from .attention import expect_made_for

LOG2_E = 1.4426950408889634
PROGRAMS = 32  # least programs of a head for the gradients of the tables, if there are enough sequences


# ---- launches ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DisentangledConfig:
    """How one kernel is launched. block: rows and columns of its tiles, a divisor of TILE."""

    block: int
    num_warps: int
    num_stages: int = 1


def disentangled_config(dtype: torch.dtype, arch: str, direction: str) -> DisentangledConfig:
    """The launch parameters of one kernel: "fwd", "bwd_dq", "bwd_dkv" or "bwd_diagonal".

    There is one stage, because asynchronous copies cannot gather the rows of a table ahead of time. All else was chosen
    by the registers that the compiler reports without a GPU, and has not been measured on a GPU.
    """
    if dtype == torch.float32:
        # In four warps the gradient of q spills six on NVIDIA's GPUs. On AMD's eight have more threads than a tile has
        # entries, and Triton 3.7's gather then does not compile.
        eight = direction == "bwd_dq" and hardware(arch).matrix != "mfma"
        return DisentangledConfig(16, num_warps=8 if eight else 4)
    if direction == "bwd_diagonal":
        # products of 16 rows cannot use asynchronous instructions; 32 rows spill on GPUs without these
        block, warps = (16, 4) if hardware(arch).matrix in ("mma.sync", "mfma") else (32, 8)
        return DisentangledConfig(block, num_warps=warps)
    return DisentangledConfig(32, num_warps=4)


@functools.lru_cache(1024)
def _plan(
    kernel: Any, tensors: str, numbers: str, config: DisentangledConfig, dtype: torch.dtype, heads: int,
    head_dim: int, strides: tuple[int, ...], has_pk: bool, has_pq: bool, of_pk: bool, dropout_p: float, ids: bool,
    scale: float,
) -> Plan:  # fmt: skip
    names = ("stride_qt", "stride_qh", "stride_kt", "stride_kh", "stride_vt", "stride_vh")
    constants = dict(zip(names, strides, strict=True)) | {
        "n_heads": heads, "scale": scale, "scale_log2": scale * LOG2_E, "keep_scale": 1.0 / (1.0 - dropout_p),
        "threshold": keep_threshold(dropout_p), "HAS_PK": has_pk, "HAS_PQ": has_pq, "OF_PK": of_pk,
        "HAS_DROPOUT": dropout_p > 0.0, "HAS_IDS": ids, "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK": config.block, "TILE": TILE, "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }  # fmt: skip
    constants = {name: value for name, value in constants.items() if name in set(kernel.arg_names)}
    return Plan(kernel, tensors, numbers, constants, num_warps=config.num_warps, num_stages=config.num_stages)


_PACKED = "q_ptr k_ptr v_ptr spans_ptr"
_TABLES = "pk_ptr pq_ptr lut_ptr seed_ptr sequence_ids_ptr"
_OF_TILES = "first_entry tokens reach stream_id"
_OF_DIAGONALS = "n_sequences n_parts n_tiles tokens reach stream_id"


def _launches(q, k, v, pk, pq, sequence_ids, dropout_p, scale):
    """A function that returns the plan and the config of a kernel for this call."""
    heads, head_dim = q.shape[-2:]
    arch = _device.arch(q.device.index)
    strides = tuple(step for t in (q, k, v) for step in t.stride()[:2])

    def of(
        kernel: Any, tensors: str, numbers: str, direction: str, of_pk: bool = False
    ) -> tuple[Plan, DisentangledConfig]:  # fmt: skip
        config = disentangled_config(q.dtype, arch, direction)
        plan = _plan(
            kernel, tensors, numbers, config, q.dtype, heads, head_dim, strides, pk is not None, pq is not None,
            of_pk, dropout_p, sequence_ids is not None, scale,
        )  # fmt: skip
        return plan, config

    return of


def launch_forward(
    q, k, v, spans, entries, pk, pq, lut, seed, sequence_ids, dropout_p, stream, scale
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(o, lse). The arguments are those of the operator's schema."""
    q, k, v = unit_stride(q, k, v)
    o, lse = forward_outputs(q)
    if entries.shape[0] == 0:
        return o, lse
    of = _launches(q, k, v, pk, pq, sequence_ids, dropout_p, scale)
    plan, config = of(
        _disentangled_fwd_kernel, f"{_PACKED} schedule_ptr {_TABLES} o_ptr lse_ptr", _OF_TILES, "fwd"
    )  # fmt: skip
    reach = lut.shape[0] // 2 + 1
    plan(
        (entries.shape[0] * (TILE // config.block) * q.shape[1],),
        (q, k, v, spans, entries, pk, pq, lut, seed, sequence_ids, o, lse), (0, q.shape[0], reach, stream),
    )  # fmt: skip
    return o, lse


def forward_outputs(q, *_):
    """o like q but contiguous; lse [H, T] in fp32."""
    return q.new_empty(*q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


def launch_backward(
    do, o, lse, q, k, v, spans, entries, pk, pq, lut, seed, sequence_ids, longest, dropout_p, stream, scale
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dq, dk, dv, dpk, dpq; the last two are None without that table."""
    do = do.contiguous()
    q, k, v = unit_stride(q, k, v)
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    dpk, dpq = (None if t is None else t.new_zeros(t.shape) for t in (pk, pq))
    if entries.shape[0] == 0:
        return dq, dk, dv, dpk, dpq
    tokens, heads, head_dim = q.shape
    of = _launches(q, k, v, pk, pq, sequence_ids, dropout_p, scale)
    packed, tables = (q, k, v, spans), (pk, pq, lut, seed, sequence_ids)
    reach, delta = lut.shape[0] // 2 + 1, torch.empty_like(lse)

    # dq runs first because it also writes delta, which the others read
    plan, config = of(
        _disentangled_bwd_dq_kernel, f"{_PACKED} schedule_ptr {_TABLES} o_ptr lse_ptr do_ptr dq_ptr delta_ptr",
        _OF_TILES, "bwd_dq",
    )  # fmt: skip
    programs = entries.shape[0] * heads
    numbers = (0, tokens, reach, stream)
    plan((programs * (TILE // config.block),), (*packed, entries, *tables, o, lse, do, dq, delta), numbers)
    plan, config = of(
        _disentangled_bwd_dkv_kernel, f"{_PACKED} schedule_ptr {_TABLES} lse_ptr do_ptr delta_ptr dk_ptr dv_ptr",
        _OF_TILES, "bwd_dkv",
    )  # fmt: skip
    plan((programs * (TILE // config.block),), (*packed, entries, *tables, lse, do, delta, dk, dv), numbers)

    for table, of_pk in ((dpk, True), (dpq, False)):
        if table is None:
            continue
        plan, config = of(
            _disentangled_bwd_diagonal_kernel, f"{_PACKED} {_TABLES} lse_ptr do_ptr delta_ptr part_ptr",
            _OF_DIAGONALS, "bwd_diagonal", of_pk=of_pk,
        )  # fmt: skip
        sequences, tiles = spans.shape[0] - 1, max(1, cdiv(longest, config.block))
        diagonals = 2 * tiles - 1
        parts = max(1, min(sequences, cdiv(PROGRAMS, diagonals)))
        part = q.new_empty(parts, diagonals, heads, 2 * config.block, head_dim, dtype=torch.float32)
        plan(
            (parts * diagonals * heads,), (*packed, *tables, lse, do, delta, part),
            (sequences, parts, tiles, tokens, reach, stream),
        )  # fmt: skip
        _sum_plan(heads, head_dim, config.block)(
            (table.shape[0] * heads,), (part, lut, table), (parts, tiles, reach)
        )  # fmt: skip
    return dq, dk, dv, dpk, dpq


@functools.lru_cache(64)
def _sum_plan(heads: int, head_dim: int, block: int) -> Plan:
    constants = {
        "n_heads": heads, "HEAD_DIM": head_dim, "BLOCK_D": max(16, triton.next_power_of_2(head_dim)), "BLOCK": block
    }  # fmt: skip
    return Plan(
        _disentangled_table_sum_kernel, "part_ptr lut_ptr dtable_ptr", "n_parts n_tiles reach", constants, num_warps=4
    )


def _backward_outputs(do, o, lse, q, k, v, spans, entries, pk, pq, *_):
    tables = (q.new_empty(0) if t is None else t.new_empty(t.shape) for t in (pk, pq))
    return (*(q.new_empty(q.shape) for _ in range(3)), *tables)


# ---- registration and autograd -------------------------------------------------------------------------------

_DROPOUT = "Tensor? seed, Tensor? sequence_ids"
_forward_op = register(
    "disentangled_forward(Tensor q, Tensor k, Tensor v, Tensor spans, Tensor entries, Tensor? pk, Tensor? pq, "
    f"Tensor lut, {_DROPOUT}, float dropout_p, SymInt stream, float scale) -> (Tensor, Tensor)",
    launch=launch_forward,
    fake=forward_outputs,
)
_backward_op = register(
    "disentangled_backward(Tensor do, Tensor o, Tensor lse, Tensor q, Tensor k, Tensor v, Tensor spans, "
    f"Tensor entries, Tensor? pk, Tensor? pq, Tensor lut, {_DROPOUT}, SymInt longest, float dropout_p, SymInt stream, "
    "float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    launch=launch_backward,
    fake=_backward_outputs,
)


class _Disentangled(torch.autograd.Function):
    """Saves q, k, v, the tables, o and lse."""

    @staticmethod
    def forward(ctx, q, k, v, pk, pq, spans, entries, lut, seed, sequence_ids, longest, *options):
        o, lse = _forward_op(q, k, v, spans, entries, pk, pq, lut, seed, sequence_ids, *options)
        ctx.longest, ctx.options = longest, options
        ctx.save_for_backward(o, lse, q, k, v, spans, entries, pk, pq, lut, seed, sequence_ids)
        return o

    @staticmethod
    @once
    def backward(ctx, do):
        *grads, dpk, dpq = _backward_op(do, *ctx.saved_tensors, ctx.longest, *ctx.options)
        pk, pq = ctx.saved_tensors[7:9]
        return *grads, None if pk is None else dpk, None if pq is None else dpq, *(None,) * (6 + len(ctx.options))


# ---- public --------------------------------------------------------------------------------------------------


def disentangled_attention(
    q, k, v, pk, pq, lut, cu_seqlens, max_seqlen, *,
    dropout_p=0.0, seed=None, stream=0, sequence_ids=None, scale=None, schedule=None,
):  # fmt: skip
    """Disentangled attention; the arguments are those of `fastbert.functional.disentangled_attention`.

    Raises: TypeError on dtypes other than float32, bfloat16, float16; ValueError on a head_dim over 64.
    """
    op = "disentangled_attention"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{op}: q, k, v must be float32, bfloat16 or float16, got {q.dtype}")
    if q.shape[-1] > WIDEST_IN_TRITON:
        raise ValueError(f"{op}: head_dim must be at most {WIDEST_IN_TRITON}, got {q.shape[-1]}")
    scale = (q.shape[-1] * (1 + (pk is not None) + (pq is not None))) ** -0.5 if scale is None else scale
    if schedule is None:
        schedule = attention_schedule(cu_seqlens, q.shape[0])
    expect_made_for(op, schedule, q, cu_seqlens)
    pk, pq, sequence_ids = (None if t is None else t.contiguous() for t in (pk, pq, sequence_ids))
    spans, lut = cu_seqlens.contiguous(), lut.contiguous()
    options = (dropout_p, stream, scale)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, pk, pq)):
        return apply(
            _Disentangled, q, k, v, pk, pq, spans, schedule.entries, lut, seed, sequence_ids, max_seqlen, *options
        )  # fmt: skip
    return _forward_op(q, k, v, spans, schedule.entries, pk, pq, lut, seed, sequence_ids, *options)[0]


# ---- for the offline compiler --------------------------------------------------------------------------------


def compile_calls() -> list[CompileCall]:
    """Both terms in every dtype; one term alone; dropout."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    return [
        *(_call("bf16", bf16, head_dim=d, fast=d == 64) for d in (32, 64)),
        *(_call("fp16", fp16, head_dim=d) for d in (32, 64)),
        *(_call("fp32", fp32, head_dim=d) for d in (32, 64)),
        _call("bf16,c2p", bf16, has_pq=False),
        _call("bf16,p2c", bf16, has_pk=False),
        _call("bf16,dropout", bf16, dropout=True),
        _call("bf16,dropout,ids", bf16, dropout=True, ids=True),
        _call("fp32,dropout", fp32, dropout=True),
    ]


def _call(name, dtype, *, head_dim=64, has_pk=True, has_pq=True, dropout=False, ids=False, fast=False) -> CompileCall:
    lengths, heads, rows = [40, 100, 304], 12, 512
    q, k, v = empty(sum(lengths), 3, heads, head_dim, dtype=dtype).unbind(1)
    pk, pq = (empty(rows, heads, head_dim, dtype=dtype) if has else None for has in (has_pk, has_pq))
    lut = empty(2 * max(lengths) - 1, dtype=torch.int32)
    spans = torch.tensor([0, 40, 140, 444], dtype=torch.int32, device="cpu")
    options = {"dropout_p": 0.1, "seed": empty(1, dtype=torch.int64)} if dropout else {}
    if ids:
        options["sequence_ids"] = empty(len(lengths), dtype=torch.int64)
    grads = tuple(n for n, t in enumerate((q, k, v, pk, pq)) if t is not None)
    return compile_call(
        disentangled_attention, f"{name},D={head_dim}", q, k, v, pk, pq, lut, spans, max(lengths),
        grads=grads, fast=fast, **options,
    )  # fmt: skip

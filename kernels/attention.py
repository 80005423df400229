"""Bidirectional attention over packed or padded sequences, forward and backward, without a score matrix in memory.

Forward, per sequence and head (q [Sq, D], k, v [Sk, D]; grouped heads share k and v):

    s   = scale * rot(q) rot(k)^T + bias - slope * |i - j|      [Sq, Sk], -inf where mask or window forbids
    lse = logsumexp(s)                                          [Sq] fp32, natural log: all that is saved beside o
    p   = exp(s - lse)                                          recomputed in the backward pass
    o   = (p * keep / (1 - dropout_p)) v                        [Sq, D]

Backward, with p~ = p * keep / (1 - dropout_p) and the gradients do, dlse:

    delta = rowsum(o * do) - dlse                               [Sq] fp32
    dv    = p~^T do
    ds    = p * (keep / (1 - dropout_p) * (do v^T) - delta)     [Sq, Sk];  dbias sums it over what bias broadcasts
    dq    = scale * rot^-1(ds rot(k));   dk = scale * rot^-1(ds^T rot(q))

Online softmax: Milakov, Gimelshein, arXiv:1805.02867. Tiling and recomputation: Dao et al., arXiv:2205.14135.

Work is a list of real tiles, longest sequence first (`attention_schedule`). Each tile belongs to one sequence
and is reduced in a fixed order without atomics, so a sequence gets the same bits whatever shares its batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from . import _device
from ._attention_bwd import (
    _attention_bwd_bias_kernel,
    _attention_bwd_dkv_kernel,
    _attention_bwd_dq_kernel,
    _attention_bwd_short_kernel,
)
from ._attention_fwd import _attention_fwd_kernel
from ._compile import CompileCase
from ._library import register
from ._random import keep_threshold

LOG2_E = 1.4426950408889634
TILE = 128  # rows of one entry of a schedule; kernels with smaller blocks run several programs an entry
SHORT = 64  # a sequence up to this long, in q and k, is one block: its kernels need no loop
MAX_HEAD_DIM = 256
UNBOUNDED = 1 << 29  # no window; sums with a position stay within int32


# ---- configuration -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionConfig:
    """How one kernel is launched. block_m counts query rows, block_n keys; both divide TILE."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # a lane's; given where the compiler takes more than it needs (NVIDIA only)

    @property
    def options(self) -> dict:
        """Further options of Triton's compiler."""
        return {} if self.max_registers is None else {"maxnreg": self.max_registers}


def attention_config(
    head_dim: int, dtype: torch.dtype, arch: str, direction: str, traits: frozenset[str] = frozenset()
) -> AttentionConfig | None:
    """The launch of one kernel: "fwd", "fwd_short", "bwd_dq", "bwd_dkv", "bwd_short" or "bwd_bias".

    traits: what takes registers beside the products: "dropout"; "modified" scores (bias, mask, ALiBi, window, rotary);
    "grouped" heads. None for a "short" kernel: there the kernels with loops take short sequences too. Depends on
    nothing that differs between the batches of one model, so a sequence's bits do not either.
    """
    if dtype == torch.float32:
        return _float32_config(head_dim, arch, direction)
    if arch.startswith("gfx") or (arch in ("sm_86", "sm_89", "sm_120") and head_dim > 64):
        return _small_shared_config(head_dim, direction, traits)
    if arch == "sm_80" and traits & {"modified", "grouped"}:
        return _sm_80_crowded_config(head_dim, direction, traits)
    return _config(head_dim, arch, direction, traits)


def _config(head_dim: int, arch: str, direction: str, traits: frozenset[str]) -> AttentionConfig | None:
    """16-bit types where a program may take over 160 KB of shared memory. Registers are those of sm_90 in bf16."""
    is_modified = "modified" in traits
    is_crowded = is_modified or arch == "sm_80"  # HMMA wants its operands in registers
    if direction == "fwd":
        # 128 rows share each load of k and v: 64 rows would ask L2 for 5 TB/s at 340 TFLOP/s. Eight warps rather than
        # four with twice the rows: 127 registers at head_dim 64, so two programs (four warp groups) fit a
        # multiprocessor and one's exp2, as long as its products there, runs under another's. Four warps: 239.
        # head_dim 128: 171 registers, one program; 128 keys would take 249, and any variant would spill.
        if arch == "sm_80" and head_dim > 128:
            return AttentionConfig(64, 64, num_warps=8, num_stages=1)
        # sm_100: three stages spill 5 registers at head_dim 64, two take 136 and none.
        stages = 2 if arch == "sm_100" and head_dim <= 64 else 3
        return AttentionConfig(128, 64 if head_dim <= 128 else 32, num_warps=8, num_stages=stages)
    if direction == "fwd_short":
        # latency decides, so many small programs: 125 registers and 16 KB at head_dim 64, four a multiprocessor
        return AttentionConfig(SHORT, SHORT, num_warps=4 if head_dim <= 128 else 8, num_stages=1)
    if direction == "bwd_dq":
        # as forward: 128 registers and 80 KB at head_dim 64, two programs; with two stages it takes 150, and one fits
        if head_dim <= 64 or (head_dim <= 128 and not is_crowded):
            # sm_100 spills a few with modified scores at any number of stages: half the rows
            rows = 64 if arch == "sm_100" and is_modified else 128
            return AttentionConfig(rows, 64, num_warps=8, num_stages=3)
        # head_dim 256: 218 registers, 64 keys spill; 80 with rotary: 32 keys spill
        return AttentionConfig(64, 16 if is_modified else 32, num_warps=8, num_stages=2)
    if direction == "bwd_dkv":
        # two accumulators and two score tiles: 128 keys take over 200 registers at any number of warps, one program.
        # 64 keys by 64 rows take 196 left alone, but plain scores do with 168 without a spill, and three programs fit
        if head_dim <= 64 and "grouped" in traits and not is_modified:
            return AttentionConfig(64, 64, num_warps=8, num_stages=1)  # the loop over heads: 182, four warps spill
        if head_dim <= 64:
            most = 168 if not traits and arch == "sm_90" else None
            return AttentionConfig(32 if is_modified else 64, 64, num_warps=4, num_stages=2, max_registers=most)
        rows = 64 if head_dim <= 128 and not is_modified else 32  # 218 registers at 128, 250 at 256
        return AttentionConfig(rows, 64, num_warps=8, num_stages=2)
    if direction == "bwd_short":
        # 154 registers and 33 KB at head_dim 64, three programs; head_dim 256 would spill, and so would all variants
        if head_dim > 128 or traits >= {"modified", "dropout"}:
            return None
        return AttentionConfig(SHORT, SHORT, num_warps=4 if head_dim <= 64 and not is_crowded else 8, num_stages=1)
    return AttentionConfig(64, 64, num_warps=4 if head_dim <= 128 else 8, num_stages=1)  # bwd_bias


def _sm_80_crowded_config(head_dim: int, direction: str, traits: frozenset[str]) -> AttentionConfig | None:
    """16-bit types on sm_80 with modified scores or grouped heads: the largest tiles found that do not spill."""
    if "modified" not in traits:  # grouped alone: only dk and dv loop over heads
        if direction == "bwd_short":
            return None
        if direction == "bwd_dkv":
            return AttentionConfig(32 if head_dim <= 64 else 16, 64, num_warps=8, num_stages=1)
        return _config(head_dim, "sm_80", direction, traits - {"grouped"})
    if direction.endswith("short"):
        return None
    if direction == "fwd":
        return AttentionConfig(*((128, 32) if head_dim <= 64 else (64, 64)), num_warps=8, num_stages=1)
    if direction == "bwd_dq":
        return AttentionConfig(32, 32, num_warps=8, num_stages=1)  # 232 registers with every variant at once
    if direction == "bwd_dkv" and head_dim > 64:
        return AttentionConfig(16, 16, num_warps=4, num_stages=1)
    return AttentionConfig(32 if direction == "bwd_dkv" else 64, 32, num_warps=8, num_stages=1)  # bwd_dkv, bwd_bias


def _small_shared_config(head_dim: int, direction: str, traits: frozenset[str]) -> AttentionConfig | None:
    """16-bit types with 64 to 100 KB of shared memory: fewer stages and narrower blocks, no kernels for short ones."""
    if direction.endswith("short"):
        if head_dim > 64 or traits & {"modified", "grouped"}:
            return None
        return AttentionConfig(SHORT, SHORT, num_warps=4, num_stages=1)
    warps = 8 if "modified" in traits else 4  # every variant at once spills in four
    if head_dim > 64:
        block = 32 if head_dim <= 128 and not traits & {"modified", "grouped"} else 16
        return AttentionConfig(2 * block, block, num_warps=warps, num_stages=1)
    if direction == "fwd" and "modified" not in traits:
        return AttentionConfig(128, 32, num_warps=4, num_stages=1)  # gfx942: 64 keys spill, 32 take 123 registers
    if direction == "bwd_dkv":
        rows = 16 if traits >= {"modified", "dropout"} else 32 if traits else 64
        return AttentionConfig(rows, 32 if traits else 64, num_warps=warps, num_stages=1)
    if direction == "bwd_dq" and "modified" in traits:
        return AttentionConfig(32, 32, num_warps=warps, num_stages=1)
    return AttentionConfig(64, 32, num_warps=warps, num_stages=1)  # gfx942: dq with 64 keys spills, 32 take 119


def _float32_config(head_dim: int, arch: str, direction: str) -> AttentionConfig | None:
    """Exact products run outside the matrix units with operands in registers: the smallest blocks, to fit."""
    if direction.endswith("short"):
        return None
    if head_dim <= 64:
        # four warps spill in the backward pass
        return AttentionConfig(64 if arch == "sm_80" and direction == "fwd" else 32, 32, num_warps=8, num_stages=1)
    block = 32 if arch == "sm_90" and direction == "fwd" and head_dim <= 128 else 16
    return AttentionConfig(block, block, num_warps=8, num_stages=1)


# ---- schedule ------------------------------------------------------------------------------------------------


def _schedule(spans: Tensor, other_spans: Tensor | None, size: int, padded: bool) -> Tensor:
    """The tiles of q (or of k) as [n, 2] int32 entries (sequence, tile), longest sequence first. No synchronisation.

    First come the tiles of long sequences, then one entry for each short one (at most SHORT rows in q and in k);
    (-1, 0) fills both parts up to a length that the host knows. spans: cu_seqlens [B + 1] and size = total tokens, or
    padded: lengths [B] and size = width, where tiles of padding count too, since someone has to write their zeros.
    other_spans: those of k (or of q) in cross-attention.
    """
    n_long, n_short = _schedule_sizes(spans, other_spans, size, padded)
    if n_short == 0:
        return spans.new_full((n_long, 2), -1)
    lengths, order = (spans if padded else spans.diff()).sort(descending=True, stable=True)
    is_short = lengths <= SHORT
    if other_spans is not None:
        is_short &= (other_spans if padded else other_spans.diff())[order] <= SHORT

    tiles = torch.full_like(lengths, triton.cdiv(size, TILE)) if padded else (lengths + (TILE - 1)) // TILE
    tiles = tiles.masked_fill(is_short, 0)
    ends = tiles.cumsum(0)
    index = torch.arange(n_long, device=spans.device)
    rank = torch.searchsorted(ends, index, right=True)  # whose tile this is; past the last one: a surplus entry
    surplus = rank == n_short
    rank = rank.clamp(max=n_short - 1)
    sequence, tile = order[rank].masked_fill(surplus, -1), (index - (ends - tiles)[rank]).masked_fill(surplus, 0)

    short = torch.stack((order.masked_fill(~is_short, -1), torch.zeros_like(order)), dim=1)
    return torch.cat((torch.stack((sequence, tile), dim=1), short)).to(torch.int32)


def _schedule_sizes(spans: Tensor, other_spans: Tensor | None, size: int, padded: bool) -> tuple[int, int]:
    """Entries for tiles of long sequences, at least as many as there can be, and for short sequences."""
    if padded:
        return spans.shape[0] * ((size + TILE - 1) // TILE), spans.shape[0]
    batch = spans.shape[0] - 1
    n_long = size // TILE + batch  # as if the last tile of each held one token
    if other_spans is None:
        n_long = torch.sym_min(n_long, size // SHORT)  # but a long sequence has over SHORT tokens for each of its tiles
    # never one entry in all: on a size of one torch.compile would specialise
    return n_long + 1, batch


_schedule_op = register(
    "attention_schedule(Tensor spans, Tensor? other_spans, SymInt size, bool padded) -> Tensor",
    launch=_schedule,
    fake=lambda *arguments: arguments[0].new_empty((sum(_schedule_sizes(*arguments)), 2)),
)


def attention_schedule(cu_seqlens: Tensor, total_tokens: int) -> Tensor:
    """The list of tiles of a packed batch, [n, 2] int32, to be shared by all layers as `schedule=`."""
    return _schedule_op(cu_seqlens, None, total_tokens, False)


# ---- launchers -----------------------------------------------------------------------------------------------


def _batch(q: Tensor, spans: Tensor) -> int:
    """Number of sequences: spans are lengths where q is padded, else cu_seqlens."""
    return spans.shape[0] if q.dim() == 4 else spans.shape[0] - 1


def _unit_stride(*tensors: Tensor) -> list[Tensor]:
    """The kernels step freely over rows and heads, but read a row's elements one after another."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _shared_arguments(
    q, k, v, spans_q, spans_k, bias, mask, alibi_slopes, cos, sin, seed, sequence_ids,
    window_left, window_right, dropout_p, stream, scale,
) -> dict:  # fmt: skip
    """What every kernel here takes: inputs, their strides, sizes and flags, by name."""
    padded = q.dim() == 4
    arguments = {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "spans_q_ptr": spans_q, "spans_k_ptr": spans_k,
        "bias_ptr": bias, "mask_ptr": None if mask is None else mask.view(torch.uint8), "slopes_ptr": alibi_slopes,
        "cos_ptr": cos, "sin_ptr": sin, "seed_ptr": seed, "sequence_ids_ptr": sequence_ids,
        "stride_cos": 0 if cos is None else cos.stride(0), "stride_sin": 0 if sin is None else sin.stride(0),
        "n_heads": q.shape[-2], "width_q": q.shape[-3],
        "scale_log2": scale * LOG2_E, "keep_scale": 1.0 / (1.0 - dropout_p),
        "stream": stream, "threshold": keep_threshold(dropout_p),
        "window_left": window_left, "window_right": window_right,
        "PADDED": padded, "GROUP": q.shape[-2] // k.shape[-2],
        "HAS_BIAS": bias is not None, "HAS_MASK": mask is not None, "HAS_ALIBI": alibi_slopes is not None,
        "HAS_WINDOW": min(window_left, window_right) < UNBOUNDED, "HAS_ROTARY": cos is not None,
        "HAS_DROPOUT": dropout_p > 0.0, "HAS_IDS": sequence_ids is not None,
        "HEAD_DIM": q.shape[-1], "BLOCK_D": max(16, triton.next_power_of_2(q.shape[-1])),
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",  # means nothing for 16-bit types
    }  # fmt: skip
    for name, t in (("q", q), ("k", k), ("v", v)):
        # packed tensors have no sequence stride: cu_seqlens says where a sequence begins
        arguments[f"stride_{name}b"] = t.stride(0) if padded else 0
        arguments[f"stride_{name}t"], arguments[f"stride_{name}h"] = t.stride(-3), t.stride(-2)
    for name, t in (("bias", bias), ("mask", mask)):
        # a dimension of one is shared by all sequences or heads
        strides = [0] * 4 if t is None else [0 if n == 1 else step for n, step in zip(t.shape, t.stride(), strict=True)]
        arguments.update(zip((f"stride_{name}_{axis}" for axis in "bhqk"), strides, strict=True))
    return arguments


@dataclass(frozen=True)
class _Launch:
    """One kernel launch, ready to run, or to be compiled without a device (`compile_cases`)."""

    kernel: triton.runtime.JITFunction
    n_programs: int
    config: AttentionConfig
    arguments: dict

    def run(self) -> None:
        if self.n_programs == 0:
            return
        self.kernel[(self.n_programs,)](
            **self.arguments,
            BLOCK_M=self.config.block_m,
            BLOCK_N=self.config.block_n,
            num_warps=self.config.num_warps,
            num_stages=self.config.num_stages,
            **self.config.options,
        )


def _traits(arguments: dict) -> frozenset[str]:
    """What `attention_config` has to know of a launch's options."""
    is_modified = any(arguments[f"HAS_{option}"] for option in ("BIAS", "MASK", "ALIBI", "WINDOW", "ROTARY"))
    has = {"modified": is_modified, "dropout": arguments["HAS_DROPOUT"], "grouped": arguments["GROUP"] > 1}
    return frozenset(trait for trait, present in has.items() if present)


def _parts(schedule: Tensor, batch: int, longest: int, has_short: bool) -> tuple[dict, int, dict, int]:
    """(where, number of entries) for the kernels with loops, then for those of short sequences, if there are such."""
    n_long = schedule.shape[0] - batch
    long = {"schedule_ptr": schedule, "first_entry": 0, "TILE": TILE}
    if not has_short:
        return long, schedule.shape[0], {}, 0
    short = {"schedule_ptr": schedule, "first_entry": n_long, "TILE": SHORT}
    return long, n_long if longest > SHORT else 0, short, batch


def _plan_forward(arch, o, lse, q, k, v, spans_q, spans_k, schedule, longest, *options) -> list[_Launch]:
    heads, head_dim = q.shape[-2:]
    arguments = _shared_arguments(q, k, v, spans_q, spans_k, *options)
    arguments |= {"o_ptr": o, "lse_ptr": lse, "SHORT": SHORT}
    traits = _traits(arguments)
    config, short_config = (attention_config(head_dim, q.dtype, arch, d, traits) for d in ("fwd", "fwd_short"))
    long, n_long, short, n_short = _parts(schedule, _batch(q, spans_q), longest, short_config is not None)
    return [
        _Launch(_attention_fwd_kernel, n_long * (TILE // config.block_m) * heads, config, arguments | long),
        _Launch(_attention_fwd_kernel, n_short * heads, short_config, arguments | short),
    ]


def _plan_backward(
    arch, dq, dk, dv, delta, do, dlse, o, lse, q, k, v, spans_q, spans_k, schedule_q, schedule_k, longest, *options
) -> list[_Launch]:
    """dq before dk and dv: it also writes delta, which they read."""
    heads, kv_heads, head_dim = q.shape[-2], k.shape[-2], q.shape[-1]
    arguments = _shared_arguments(q, k, v, spans_q, spans_k, *options)
    arguments |= {"lse_ptr": lse, "do_ptr": do, "delta_ptr": delta, "scale": options[-1]}
    for_dq = {"o_ptr": o, "dq_ptr": dq, "dlse_ptr": dlse, "HAS_DLSE": dlse is not None}
    for_dkv = {"dk_ptr": dk, "dv_ptr": dv, "width_k": k.shape[-3]}

    traits = _traits(arguments)
    of_dq, of_dkv, of_short = (
        attention_config(head_dim, q.dtype, arch, direction, traits) for direction in ("bwd_dq", "bwd_dkv", "bwd_short")
    )
    batch = _batch(q, spans_q)
    long_q, n_long_q, short, n_short = _parts(schedule_q, batch, longest, of_short is not None)
    long_k, n_long_k, _, _ = _parts(schedule_k, batch, longest, of_short is not None)
    n_dq = n_long_q * (TILE // of_dq.block_m) * heads
    n_dkv = n_long_k * (TILE // of_dkv.block_n) * kv_heads
    return [
        _Launch(_attention_bwd_dq_kernel, n_dq, of_dq, arguments | for_dq | long_q | {"SHORT": SHORT}),
        _Launch(_attention_bwd_dkv_kernel, n_dkv, of_dkv, arguments | for_dkv | long_k | {"SHORT": SHORT}),
        _Launch(_attention_bwd_short_kernel, n_short * kv_heads, of_short, arguments | for_dq | for_dkv | short),
    ]


def _plan_backward_bias(arch, dbias, do, lse, delta, q, k, v, spans_q, spans_k, bias, *options) -> _Launch:
    planes_b, planes_h, rows, cols = bias.shape
    arguments = _shared_arguments(q, k, v, spans_q, spans_k, bias, *options)
    config = attention_config(q.shape[-1], q.dtype, arch, "bwd_bias", _traits(arguments))
    return _Launch(
        _attention_bwd_bias_kernel,
        planes_b * planes_h * triton.cdiv(rows, config.block_m) * triton.cdiv(cols, config.block_n),
        config,
        arguments
        | {"lse_ptr": lse, "do_ptr": do, "delta_ptr": delta, "dbias_ptr": dbias}
        | {"bias_rows": rows, "bias_cols": cols, "batch": _batch(q, spans_q)}
        | {"OF_BATCH": planes_b == 1, "OF_HEADS": planes_h == 1},
    )


def _launch_forward(q, k, v, *rest):
    o, lse = _forward_outputs(q)
    for launch in _plan_forward(_device.arch(q.device.index), o, lse, *_unit_stride(q, k, v), *rest):
        launch.run()
    return o, lse


def _forward_outputs(q, *_):
    """o like q but contiguous; lse [H, Tq] or [B, H, Sq] in fp32."""
    *rows, heads, _ = q.shape
    lse_shape = (heads, *rows) if len(rows) == 1 else (rows[0], heads, rows[1])
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)


def _launch_backward(do, dlse, o, lse, q, k, v, *rest):
    outputs = _backward_outputs(do, dlse, o, lse, q, k, v)
    do, dlse = do.contiguous(), None if dlse is None else dlse.contiguous()
    for launch in _plan_backward(
        _device.arch(q.device.index), *outputs, do, dlse, o, lse, *_unit_stride(q, k, v), *rest
    ):
        launch.run()
    return outputs


def _backward_outputs(do, dlse, o, lse, q, k, v, *_):
    """dq, dk, dv contiguous; delta like lse."""
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), lse.new_empty(lse.shape)


def _launch_backward_bias(do, lse, delta, q, k, v, spans_q, spans_k, bias, *options):
    dbias = bias.new_empty(bias.shape)
    _plan_backward_bias(
        _device.arch(q.device.index),
        dbias,
        do.contiguous(),
        lse,
        delta,
        *_unit_stride(q, k, v),
        spans_q,
        spans_k,
        bias,
        *options,
    ).run()
    return dbias


# ---- registration --------------------------------------------------------------------------------------------

_OPTIONS = (
    "Tensor? mask, Tensor? alibi_slopes, Tensor? cos, Tensor? sin, Tensor? seed, Tensor? sequence_ids, "
    "SymInt window_left, SymInt window_right, float dropout_p, SymInt stream, float scale"
)
_forward_op = register(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor spans_q, Tensor spans_k, Tensor schedule, SymInt longest, "
    f"Tensor? bias, {_OPTIONS}) -> (Tensor, Tensor)",
    launch=_launch_forward,
    fake=_forward_outputs,
)
_backward_op = register(
    "attention_backward(Tensor do, Tensor? dlse, Tensor o, Tensor lse, Tensor q, Tensor k, Tensor v, "
    "Tensor spans_q, Tensor spans_k, Tensor schedule_q, Tensor schedule_k, SymInt longest, "
    f"Tensor? bias, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    launch=_launch_backward,
    fake=_backward_outputs,
)
_backward_bias_op = register(
    "attention_backward_bias(Tensor do, Tensor lse, Tensor delta, Tensor q, Tensor k, Tensor v, "
    f"Tensor spans_q, Tensor spans_k, Tensor bias, {_OPTIONS}) -> Tensor",
    launch=_launch_backward_bias,
    fake=lambda do, lse, delta, q, k, v, spans_q, spans_k, bias, *_: bias.new_empty(bias.shape),
)


# ---- autograd ------------------------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    """Saves q, k, v, o and lse, and what the call was given."""

    @staticmethod
    def forward(ctx, q, k, v, bias, spans_q, spans_k, schedule, longest, *options):
        o, lse = _forward_op(q, k, v, spans_q, _first(spans_k, spans_q), schedule, longest, bias, *options)
        *tensors, ctx.window_left, ctx.window_right, ctx.dropout_p, ctx.stream, ctx.scale = options
        ctx.longest = longest
        ctx.save_for_backward(q, k, v, o, lse, bias, spans_q, spans_k, schedule, *tensors)
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx, do, dlse):
        q, k, v, o, lse, bias, spans_q, spans_k, schedule, *tensors = ctx.saved_tensors
        options = (*tensors, ctx.window_left, ctx.window_right, ctx.dropout_p, ctx.stream, ctx.scale)
        if do is None:
            do = torch.zeros_like(o)
        schedule_k = schedule  # in self-attention one list of tiles serves rows and keys
        if spans_k is not None:
            schedule_k = _schedule_op(spans_k, spans_q, k.shape[-3], k.dim() == 4)
        spans_k = _first(spans_k, spans_q)
        dq, dk, dv, delta = _backward_op(
            do, dlse, o, lse, q, k, v, spans_q, spans_k, schedule, schedule_k, ctx.longest, bias, *options
        )
        dbias = None
        if ctx.needs_input_grad[3]:
            dbias = _backward_bias_op(do, lse, delta, q, k, v, spans_q, spans_k, bias, *options)
        return dq, dk, dv, dbias, *(None,) * (4 + len(options))


def _first(*choices):
    return next(choice for choice in choices if choice is not None)


# ---- public --------------------------------------------------------------------------------------------------


def attention(
    q, k, v, cu_seqlens, max_seqlen=None, *, cu_seqlens_k=None, max_seqlen_k=None, bias=None, mask=None,
    alibi_slopes=None, window=None, rotary=None, dropout_p=0.0, seed=None, stream=0, sequence_ids=None, scale=None,
    return_lse=False, schedule=None,
):  # fmt: skip
    """Attention over packed sequences: q [Tq, H, D], k, v [Tk, Hk, D] -> o [Tq, H, D] (and lse [H, Tq] float32).

    Arguments are those of `fastbert.functional.attention`. Gradients: q, k, v and bias; lse may be differentiated.
    dbias recomputes the scores once more and needs no memory beyond itself.

    Raises: TypeError on dtypes other than float32, bfloat16, float16; ValueError on a head_dim over 256, a scale
        that is not positive, a bias, mask or rotary table smaller than max_seqlen, or one that wants a gradient
        where there is none (alibi_slopes, rotary).
    """
    if cu_seqlens_k is None:
        max_seqlen_k = max_seqlen
    _expect_covering("attention", max_seqlen, max_seqlen_k, bias, mask, rotary)
    if schedule is None:
        schedule = _schedule_op(cu_seqlens, cu_seqlens_k, q.shape[0], False)
    longest = UNBOUNDED if max_seqlen is None or max_seqlen_k is None else torch.sym_max(max_seqlen, max_seqlen_k)
    return _attend(
        "attention", q, k, v, cu_seqlens, cu_seqlens_k, schedule, longest,
        bias, mask, alibi_slopes, window, rotary, dropout_p, seed, stream, sequence_ids, scale, return_lse,
    )  # fmt: skip


def attention_padded(
    q, k, v, seqlens=None, seqlens_k=None, *, bias=None, mask=None, alibi_slopes=None, window=None, rotary=None,
    dropout_p=0.0, seed=None, stream=0, sequence_ids=None, scale=None, return_lse=False,
):  # fmt: skip
    """The same over q [B, Sq, H, D], k, v [B, Sk, Hk, D] in place: o like q, zero past each length.

    Arguments are those of `fastbert.functional.attention_padded`; what raises is as in `attention`.
    """
    batch, width_q, width_k = q.shape[0], q.shape[1], k.shape[1]
    _expect_covering("attention_padded", width_q, width_k, bias, mask, rotary)
    if seqlens_k is None and width_q != width_k:
        seqlens_k = torch.full((batch,), width_k, dtype=torch.int32, device=k.device)
    if seqlens is None:
        seqlens = torch.full((batch,), width_q, dtype=torch.int32, device=q.device)
    return _attend(
        "attention_padded", q, k, v, seqlens, seqlens_k,
        _schedule_op(seqlens, seqlens_k, width_q, True), torch.sym_max(width_q, width_k),
        bias, mask, alibi_slopes, window, rotary, dropout_p, seed, stream, sequence_ids, scale, return_lse,
    )  # fmt: skip


def _expect_covering(op, max_seqlen, max_seqlen_k, bias, mask, rotary) -> None:
    """Tables that are indexed by position must reach as far as the sequences do."""
    for name, t in (("bias", bias), ("mask", mask)):
        for axis, longest in ((2, max_seqlen), (3, max_seqlen_k)):
            if t is not None and longest is not None and t.shape[axis] < longest:
                raise ValueError(f"{op}: {name} has size {t.shape[axis]} in dimension {axis}, expected {longest}")
    for longest in (max_seqlen, max_seqlen_k):
        if rotary is not None and longest is not None and min(t.shape[0] for t in rotary) < longest:
            raise ValueError(f"{op}: rotary has {[t.shape[0] for t in rotary]} positions, expected {longest}")


def _expect_supported(op, q, scale, alibi_slopes, rotary) -> None:
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{op}: q, k, v must be float32, bfloat16 or float16, got {q.dtype}")
    if q.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"{op}: head_dim must be at most {MAX_HEAD_DIM}, got {q.shape[-1]}")
    if not scale > 0.0:
        raise ValueError(f"{op}: scale must be positive, got {scale}")
    for name, tensors in (("alibi_slopes", [alibi_slopes]), ("rotary", rotary or [])):
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            raise ValueError(f"{op}: {name} requires a gradient, which this operator does not give")


def _attend(
    op, q, k, v, spans_q, spans_k, schedule, longest,
    bias, mask, alibi_slopes, window, rotary, dropout_p, seed, stream, sequence_ids, scale, return_lse,
):  # fmt: skip
    if torch.is_autocast_enabled(q.device.type) and q.dtype == torch.float32:
        q, k, v = (t.to(torch.get_autocast_dtype(q.device.type)) for t in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    _expect_supported(op, q, scale, alibi_slopes, rotary)
    cos, sin = (None, None) if rotary is None else _unit_stride(*rotary)
    left, right = (UNBOUNDED, UNBOUNDED) if window is None else (min(side, UNBOUNDED) for side in window)

    options = (mask, alibi_slopes, cos, sin, seed, sequence_ids, left, right, dropout_p, stream, scale)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, bias)):
        o, lse = _Attention.apply(q, k, v, bias, spans_q, spans_k, schedule, longest, *options)
    else:
        o, lse = _forward_op(q, k, v, spans_q, _first(spans_k, spans_q), schedule, longest, bias, *options)
    return (o, lse) if return_lse else o


# ---- offline compilation -------------------------------------------------------------------------------------

_TRITON_TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8",
}  # fmt: skip

# variant -> what differs from plain packed bf16 self-attention at head_dim 64
_VARIANTS = {
    "dropout": {"dropout_p": 0.1},
    "padded": {"padded": True},
    "bias": {"bias": True},
    "mask": {"mask": True},
    "alibi": {"alibi": True},
    "window": {"window": 64},
    "rotary": {"rotary": True},
    "rotary,D=80": {"rotary": True, "head_dim": 80},
    "grouped": {"groups": 4},
    "lse_grad": {"dlse": True},
    "all": {"dropout_p": 0.1, "bias": True, "mask": True, "alibi": True, "window": 64, "rotary": True, "groups": 4},
}


def compile_cases(arch: str) -> list[CompileCase]:
    """Every config of the ladder on plain attention, and every variant at head_dim 64."""
    cases = []
    for head_dim in (32, 64, 80, 96, 128, 256):
        cases += _compile_cases(arch, "bf16", head_dim=head_dim)
    cases += _compile_cases(arch, "fp16", dtype=torch.float16)
    for head_dim in (64, 128, 256):
        cases += _compile_cases(arch, "fp32", dtype=torch.float32, head_dim=head_dim)
    for name, changes in _VARIANTS.items():
        cases += _compile_cases(arch, f"bf16,{name}", **changes)
    return cases


def _compile_cases(
    arch, name, *, dtype=torch.bfloat16, head_dim=64, groups=1, padded=False, dropout_p=0.0, bias=False, mask=False,
    alibi=False, window=UNBOUNDED, rotary=False, dlse=False,
):  # fmt: skip
    """The launches of one forward and backward pass over tensors without data, as the launchers would make them."""
    batch, heads, width = 8, 12, 512

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    rows = (batch, width) if padded else (batch * width,)
    qkv = empty(*rows, heads + 2 * (heads // groups), head_dim)  # one fused projection
    q, k, v = qkv.split([heads, heads // groups, heads // groups], dim=-2)
    spans = empty(batch if padded else batch + 1, dtype=torch.int32)
    schedule = empty(2 * batch, 2, dtype=torch.int32)
    plane = (batch, heads, width, width)
    bias = empty(*plane) if bias else None
    table = empty(width, head_dim // 2, dtype=torch.float32) if rotary else None
    options = (
        empty(*plane, dtype=torch.uint8) if mask else None,
        empty(heads, dtype=torch.float32) if alibi else None,
        table, table,
        empty(1, dtype=torch.int64) if dropout_p else None,
        empty(batch, dtype=torch.int64) if dropout_p else None,
        window, window, dropout_p, 2, head_dim**-0.5,
    )  # fmt: skip
    o, lse = _forward_outputs(q)
    dlse = lse if dlse else None
    outputs = _backward_outputs(o, dlse, o, lse, q, k, v)
    launches = [
        *_plan_forward(arch, o, lse, q, k, v, spans, spans, schedule, width, bias, *options),
        *_plan_backward(
            arch, *outputs, o, dlse, o, lse, q, k, v, spans, spans, schedule, schedule, width, bias, *options
        ),
    ]
    if bias is not None:
        launches.append(_plan_backward_bias(arch, bias, o, lse, lse, q, k, v, spans, spans, bias, *options))
    fast = name == "bf16" and head_dim == 64
    return [
        _compile_case(launch, name, matrix=dtype != torch.float32, fast=fast) for launch in launches if launch.config
    ]


def _compile_case(launch: _Launch, name: str, matrix: bool, fast: bool) -> CompileCase:
    """What Triton's launcher would derive from the arguments: types, constants, divisibility by 16."""
    config = launch.config
    signature, constexprs, aligned = {}, {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}, []
    free = {p.name for p in launch.kernel.params if p.do_not_specialize}
    for key, value in launch.arguments.items():
        if isinstance(value, Tensor):
            signature[key] = "*" + _TRITON_TYPES[value.dtype]
            aligned.append(key)
        elif key.isupper() or value is None or (value == 1 and key not in free):
            constexprs[key] = value
        else:
            signature[key] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
            if signature[key] != "fp32" and value % 16 == 0 and key not in free:
                aligned.append(key)
    kernel = launch.kernel.__name__.removeprefix("_").removesuffix("_kernel")
    blocks = f"{config.block_m}x{config.block_n}"
    # Exact float32 products keep whole rows of operands in registers: at head_dim 256 no backward tile fits. Right, but
    # slow; no encoder has such heads in float32.
    too_wide = not matrix and launch.arguments["HEAD_DIM"] > 128 and "bwd" in kernel
    return CompileCase(
        name=f"{kernel}[{name},D={launch.arguments['HEAD_DIM']},{blocks}]",
        kernel=launch.kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        matrix=matrix,
        aligned=tuple(aligned),
        known_spills=400 if too_wide else 0,
        fast=fast,
        options=config.options,
    )

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

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from . import _device
from ._attention_bwd import _attention_bwd_bias_kernel, _attention_bwd_dkv_kernel, _attention_bwd_dq_kernel
from ._attention_fwd import _attention_fwd_kernel
from ._library import register
from ._random import keep_threshold

LOG2_E = 1.4426950408889634
TILE = 128  # rows of one entry of a schedule; kernels with smaller blocks run several programs an entry
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


def attention_config(head_dim: int, dtype: torch.dtype, arch: str, direction: str) -> AttentionConfig:
    """The launch of one kernel: direction is "fwd", "bwd_dq", "bwd_dkv" or "bwd_bias". Depends on nothing else."""
    if dtype == torch.float32:
        return AttentionConfig(block_m=64, block_n=32, num_warps=4, num_stages=1)
    if head_dim <= 64:
        return AttentionConfig(block_m=128, block_n=64, num_warps=8, num_stages=3)
    if head_dim <= 128:
        return AttentionConfig(block_m=128, block_n=64, num_warps=8, num_stages=3)
    return AttentionConfig(block_m=64, block_n=64, num_warps=4, num_stages=2)


def _arch(device: torch.device) -> str:
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = _device.capability(device.index)
    return f"sm_{major}{minor}"


# ---- schedule ------------------------------------------------------------------------------------------------


def _schedule(spans: Tensor, size: int, padded: bool) -> Tensor:
    """The list of tiles as [n, 2] int32 (sequence, tile), longest sequence first; (-1, 0) fills up. No sync.

    Packed: spans = cu_seqlens, size = total tokens. Padded: spans = lengths, size = padded width; there every tile
    is listed, padding too, since someone has to write its zeros.
    """
    lengths = spans if padded else spans.diff()
    order = lengths.argsort(descending=True, stable=True)
    index = torch.arange(_schedule_size(spans, size, padded), device=spans.device)
    if padded:
        tiles = max(1, triton.cdiv(size, TILE))
        return torch.stack((order[index // tiles], index % tiles), dim=1).to(torch.int32)
    if lengths.shape[0] == 0:
        return index.to(torch.int32).new_full((index.shape[0], 2), -1)
    tiles = (lengths[order] + (TILE - 1)) // TILE
    ends = tiles.cumsum(0)
    rank = torch.searchsorted(ends, index, right=True)  # whose tile this is; past the last one: a surplus entry
    surplus = rank == lengths.shape[0]
    rank = rank.clamp(max=lengths.shape[0] - 1)
    sequence, tile = order[rank], index - (ends - tiles)[rank]
    return torch.stack((sequence.masked_fill(surplus, -1), tile.masked_fill(surplus, 0)), dim=1).to(torch.int32)


def _schedule_size(spans: Tensor, size: int, padded: bool) -> int:
    """How many entries: known on the host, at least the number of tiles there can be."""
    if padded:
        return spans.shape[0] * triton.cdiv(size, TILE)
    return size // TILE + spans.shape[0] - 1


_schedule_op = register(
    "attention_schedule(Tensor spans, SymInt size, bool padded) -> Tensor",
    launch=_schedule,
    fake=lambda spans, size, padded: spans.new_empty((_schedule_size(spans, size, padded), 2), dtype=torch.int32),
)


def attention_schedule(cu_seqlens: Tensor, total_tokens: int) -> Tensor:
    """The list of tiles of a packed batch, [n, 2] int32, to be shared by all layers as `schedule=`."""
    return _schedule_op(cu_seqlens, total_tokens, False)


# ---- launchers -----------------------------------------------------------------------------------------------


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
        # triton launches on the current device, which need not be the tensors'
        device = self.arguments["q_ptr"].device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[(self.n_programs,)](
                **self.arguments,
                BLOCK_M=self.config.block_m,
                BLOCK_N=self.config.block_n,
                num_warps=self.config.num_warps,
                num_stages=self.config.num_stages,
            )


def _plan_forward(arch, o, lse, q, k, v, spans_q, spans_k, schedule, *options) -> _Launch:
    config = attention_config(q.shape[-1], q.dtype, arch, "fwd")
    return _Launch(
        _attention_fwd_kernel,
        schedule.shape[0] * (TILE // config.block_m) * q.shape[-2],
        config,
        _shared_arguments(q, k, v, spans_q, spans_k, *options)
        | {"schedule_ptr": schedule, "o_ptr": o, "lse_ptr": lse, "TILE": TILE},
    )


def _plan_backward(
    arch, dq, dk, dv, delta, do, dlse, o, lse, q, k, v, spans_q, spans_k, schedule_q, schedule_k, *options
) -> tuple[_Launch, _Launch]:
    """dq first: it also writes delta, which the other reads."""
    head_dim = q.shape[-1]
    shared = _shared_arguments(q, k, v, spans_q, spans_k, *options)
    shared |= {"lse_ptr": lse, "do_ptr": do, "delta_ptr": delta, "scale": options[-1], "TILE": TILE}
    config_dq = attention_config(head_dim, q.dtype, arch, "bwd_dq")
    config_dkv = attention_config(head_dim, q.dtype, arch, "bwd_dkv")
    return (
        _Launch(
            _attention_bwd_dq_kernel,
            schedule_q.shape[0] * (TILE // config_dq.block_m) * q.shape[-2],
            config_dq,
            shared
            | {"schedule_ptr": schedule_q, "o_ptr": o, "dq_ptr": dq, "dlse_ptr": dlse, "HAS_DLSE": dlse is not None},
        ),
        _Launch(
            _attention_bwd_dkv_kernel,
            schedule_k.shape[0] * (TILE // config_dkv.block_n) * k.shape[-2],
            config_dkv,
            shared | {"schedule_ptr": schedule_k, "dk_ptr": dk, "dv_ptr": dv, "width_k": k.shape[-3]},
        ),
    )


def _plan_backward_bias(arch, dbias, do, lse, delta, q, k, v, spans_q, spans_k, bias, *options) -> _Launch:
    planes_b, planes_h, rows, cols = bias.shape
    config = attention_config(q.shape[-1], q.dtype, arch, "bwd_bias")
    return _Launch(
        _attention_bwd_bias_kernel,
        planes_b * planes_h * triton.cdiv(rows, config.block_m) * triton.cdiv(cols, config.block_n),
        config,
        _shared_arguments(q, k, v, spans_q, spans_k, bias, *options)
        | {"lse_ptr": lse, "do_ptr": do, "delta_ptr": delta, "dbias_ptr": dbias}
        | {"bias_rows": rows, "bias_cols": cols, "batch": spans_q.shape[0] - (q.dim() == 3)}
        | {"OF_BATCH": planes_b == 1, "OF_HEADS": planes_h == 1},
    )


def _launch_forward(q, k, v, *rest):
    o, lse = _forward_outputs(q)
    _plan_forward(_arch(q.device), o, lse, *_unit_stride(q, k, v), *rest).run()
    return o, lse


def _forward_outputs(q, *_):
    """o like q but contiguous; lse [H, Tq] or [B, H, Sq] in fp32."""
    *rows, heads, _ = q.shape
    lse_shape = (heads, *rows) if len(rows) == 1 else (rows[0], heads, rows[1])
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)


def _launch_backward(do, dlse, o, lse, q, k, v, *rest):
    outputs = _backward_outputs(do, dlse, o, lse, q, k, v)
    do, dlse = do.contiguous(), None if dlse is None else dlse.contiguous()
    for launch in _plan_backward(_arch(q.device), *outputs, do, dlse, o, lse, *_unit_stride(q, k, v), *rest):
        launch.run()
    return outputs


def _backward_outputs(do, dlse, o, lse, q, k, v, *_):
    """dq, dk, dv contiguous; delta like lse."""
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), lse.new_empty(lse.shape)


def _launch_backward_bias(do, lse, delta, q, k, v, spans_q, spans_k, bias, *options):
    dbias = bias.new_empty(bias.shape)
    _plan_backward_bias(
        _arch(q.device), dbias, do.contiguous(), lse, delta, *_unit_stride(q, k, v), spans_q, spans_k, bias, *options
    ).run()
    return dbias


# ---- registration --------------------------------------------------------------------------------------------

_OPTIONS = (
    "Tensor? mask, Tensor? alibi_slopes, Tensor? cos, Tensor? sin, Tensor? seed, Tensor? sequence_ids, "
    "SymInt window_left, SymInt window_right, float dropout_p, SymInt stream, float scale"
)
_forward_op = register(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor spans_q, Tensor spans_k, Tensor schedule, "
    f"Tensor? bias, {_OPTIONS}) -> (Tensor, Tensor)",
    launch=_launch_forward,
    fake=_forward_outputs,
)
_backward_op = register(
    "attention_backward(Tensor do, Tensor? dlse, Tensor o, Tensor lse, Tensor q, Tensor k, Tensor v, "
    f"Tensor spans_q, Tensor spans_k, Tensor schedule_q, Tensor schedule_k, Tensor? bias, {_OPTIONS}) "
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
    """Saves q, k, v, o and lse. Gradients for q, k, v and bias, each [0] element of an upstream gradient optional."""

    @staticmethod
    def forward(ctx, q, k, v, bias, spans_q, spans_k, schedule, *options):
        o, lse = _forward_op(q, k, v, spans_q, spans_k, schedule, bias, *options)
        mask, slopes, cos, sin, seed, ids, *ctx.numbers = options
        ctx.save_for_backward(q, k, v, o, lse, bias, spans_q, spans_k, schedule, mask, slopes, cos, sin, seed, ids)
        # self-attention: one list of tiles serves rows and keys
        ctx.one_schedule = spans_q is spans_k and q.shape[-3] == k.shape[-3]
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx, do, dlse):
        q, k, v, o, lse, bias, spans_q, spans_k, schedule, *tensors = ctx.saved_tensors
        options = (*tensors, *ctx.numbers)
        if do is None:
            do = torch.zeros_like(o)
        schedule_k = schedule if ctx.one_schedule else _schedule_op(spans_k, k.shape[-3], k.dim() == 4)
        dq, dk, dv, delta = _backward_op(
            do, dlse, o, lse, q, k, v, spans_q, spans_k, schedule, schedule_k, bias, *options
        )
        dbias = None
        if ctx.needs_input_grad[3]:
            dbias = _backward_bias_op(do, lse, delta, q, k, v, spans_q, spans_k, bias, *options)
        return dq, dk, dv, dbias, *(None,) * (3 + len(options))


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
    if max_seqlen_k is None and cu_seqlens_k is None:
        max_seqlen_k = max_seqlen
    _expect_covering("attention", max_seqlen, max_seqlen_k, bias, mask, rotary)
    if schedule is None:
        schedule = attention_schedule(cu_seqlens, q.shape[0])
    return _attend(
        "attention", q, k, v, cu_seqlens, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k, schedule,
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
    if seqlens_k is None and (seqlens is None or width_q != width_k):
        seqlens_k = torch.full((batch,), width_k, dtype=torch.int32, device=k.device)
    if seqlens is None:
        seqlens = torch.full((batch,), width_q, dtype=torch.int32, device=q.device)
    return _attend(
        "attention_padded", q, k, v, seqlens, seqlens if seqlens_k is None else seqlens_k,
        _schedule_op(seqlens, width_q, True),
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
    op, q, k, v, spans_q, spans_k, schedule,
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
        o, lse = _Attention.apply(q, k, v, bias, spans_q, spans_k, schedule, *options)
    else:
        o, lse = _forward_op(q, k, v, spans_q, spans_k, schedule, bias, *options)
    return (o, lse) if return_lse else o

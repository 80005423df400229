"""Bidirectional attention over packed or padded sequences, forward and backward, without a score matrix in memory.

Forward, per sequence and head (q [Sq, D], k, v [Sk, D]; grouped heads share k and v):

    s   = scale * rot(q) rot(k)^T + bias - slope * |i - j|      [Sq, Sk], -inf where mask or window forbids
    lse = logsumexp(s)                                          [Sq] fp32, natural log; saved, with o
    p   = exp(s - lse)                                          recomputed in the backward pass
    o   = (p * keep / (1 - dropout_p)) v                        [Sq, D]

Backward, with p~ = p * keep / (1 - dropout_p) and the gradients do, dlse:

    delta = rowsum(o * do) - dlse                               [Sq] fp32
    dv    = p~^T do
    ds    = p * (keep / (1 - dropout_p) * (do v^T) - delta)     [Sq, Sk];  dbias sums it over what bias broadcasts
    dq    = scale * rot^-1(ds rot(k));   dk = scale * rot^-1(ds^T rot(q))

Online softmax: Milakov, Gimelshein, arXiv:1805.02867. Tiling and recomputation: Dao et al., arXiv:2205.14135.

Work is a list of tiles without padding, longest sequence first (`attention_schedule`). Each tile belongs to one
sequence and is reduced in a fixed order without atomics, so a sequence's bits do not depend on its batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._attention_arguments import UNBOUNDED, Options, unit_stride
from ._attention_config import MAX_HEAD_DIM
from ._attention_launch import (
    backward_outputs,
    forward_outputs,
    launch_backward,
    launch_backward_bias,
    launch_forward,
)
from ._attention_schedule import Schedule, attention_schedule
from ._attention_schedule import attention_entries as attention_entries
from ._compile import CompileCall, compile_call, empty
from ._library import apply, register

# ---- registration --------------------------------------------------------------------------------------------

_OPTIONS = (
    "Tensor? mask, Tensor? alibi_slopes, Tensor? cos, Tensor? sin, Tensor? seed, Tensor? sequence_ids, "
    "SymInt window_left, SymInt window_right, float dropout_p, SymInt stream, float scale"
)
_forward_op = register(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor spans_q, Tensor spans_k, Tensor schedule, SymInt[] parts, "
    f"Tensor? bias, {_OPTIONS}) -> (Tensor, Tensor)",
    launch=launch_forward,
    fake=forward_outputs,
)
_backward_op = register(
    "attention_backward(Tensor do, Tensor? dlse, Tensor o, Tensor lse, Tensor q, Tensor k, Tensor v, "
    "Tensor spans_q, Tensor spans_k, Tensor schedule_q, Tensor schedule_k, SymInt[] parts_q, SymInt[] parts_k, "
    f"Tensor? bias, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    launch=launch_backward,
    fake=backward_outputs,
)
_backward_bias_op = register(
    "attention_backward_bias(Tensor do, Tensor lse, Tensor delta, Tensor q, Tensor k, Tensor v, "
    f"Tensor spans_q, Tensor spans_k, Tensor bias, {_OPTIONS}) -> Tensor",
    launch=launch_backward_bias,
    fake=lambda do, lse, delta, q, k, v, spans_q, spans_k, bias, *_: bias.new_empty(bias.shape),
)


# ---- autograd ------------------------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    """Saves q, k, v, o, lse and the other arguments of the call."""

    @staticmethod
    def forward(ctx, q, k, v, bias, spans_q, spans_k, entries, parts, *options):
        o, lse = _forward_op(q, k, v, spans_q, _first(spans_k, spans_q), entries, parts, bias, *options)
        *tensors, ctx.window_left, ctx.window_right, ctx.dropout_p, ctx.stream, ctx.scale = options
        ctx.parts = parts
        ctx.save_for_backward(q, k, v, o, lse, bias, spans_q, spans_k, entries, *tensors)
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx, do, dlse):
        q, k, v, o, lse, bias, spans_q, spans_k, entries, *tensors = ctx.saved_tensors
        options = (*tensors, ctx.window_left, ctx.window_right, ctx.dropout_p, ctx.stream, ctx.scale)
        if do is None:
            do = torch.zeros_like(o)
        entries_k, parts_k = entries, ctx.parts  # in self-attention rows and keys have the same list of tiles
        if spans_k is not None:
            of_k = attention_schedule(spans_k, k.shape[-3], spans_q, k.dim() == 4)
            entries_k, parts_k = of_k.entries, of_k.parts(ctx.parts[2])
        spans_k = _first(spans_k, spans_q)
        dq, dk, dv, delta = _backward_op(
            do, dlse, o, lse, q, k, v, spans_q, spans_k, entries, entries_k, ctx.parts, parts_k, bias, *options
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

    Arguments are those of `fastbert.functional.attention`. q, k, v and bias get gradients; o and lse may have upstream
    gradients. dbias recomputes the scores and needs no memory beyond itself.

    Raises: TypeError on dtypes other than float32, bfloat16, float16; ValueError on a head_dim over 256, a bias, mask
        or rotary table smaller than max_seqlen, or if alibi_slopes or rotary require a gradient.
    """
    if cu_seqlens_k is None:
        max_seqlen_k = max_seqlen
    _expect_covering("attention", max_seqlen, max_seqlen_k, bias, mask, rotary)
    if schedule is None:
        schedule = attention_schedule(cu_seqlens, q.shape[0], cu_seqlens_k)
    longest = UNBOUNDED if max_seqlen is None or max_seqlen_k is None else torch.sym_max(max_seqlen, max_seqlen_k)
    options = _options(q, bias, mask, alibi_slopes, window, rotary, dropout_p, seed, stream, sequence_ids, scale)
    o, lse = _attend("attention", q, k, v, cu_seqlens, cu_seqlens_k, schedule, longest, options)
    return (o, lse) if return_lse else o


def attention_padded(
    q, k, v, seqlens=None, seqlens_k=None, *, bias=None, mask=None, alibi_slopes=None, window=None, rotary=None,
    dropout_p=0.0, seed=None, stream=0, sequence_ids=None, scale=None, return_lse=False, schedule=None,
):  # fmt: skip
    """Attention over padded q [B, Sq, H, D], k, v [B, Sk, Hk, D], without packing: o like q, zero past each length.

    Arguments are those of `fastbert.functional.attention_padded`. Raises like `attention`.
    """
    batch, width_q, width_k = q.shape[0], q.shape[1], k.shape[1]
    _expect_covering("attention_padded", width_q, width_k, bias, mask, rotary)
    if seqlens_k is None and width_q != width_k:
        seqlens_k = torch.full((batch,), width_k, dtype=torch.int32, device=k.device)
    if seqlens is None:
        seqlens = torch.full((batch,), width_q, dtype=torch.int32, device=q.device)
    if schedule is None:
        schedule = attention_schedule(seqlens, width_q, seqlens_k, padded=True)
    options = _options(q, bias, mask, alibi_slopes, window, rotary, dropout_p, seed, stream, sequence_ids, scale)
    longest = torch.sym_max(width_q, width_k)
    o, lse = _attend("attention_padded", q, k, v, seqlens, seqlens_k, schedule, longest, options)
    return (o, lse) if return_lse else o


def _expect_covering(op, max_seqlen, max_seqlen_k, bias, mask, rotary) -> None:
    """Raises ValueError for a table that is indexed by position and has fewer positions than the longest sequence."""
    for name, t in (("bias", bias), ("mask", mask)):
        for axis, longest in ((2, max_seqlen), (3, max_seqlen_k)):
            if t is not None and longest is not None and t.shape[axis] < longest:
                raise ValueError(f"{op}: {name} has size {t.shape[axis]} in dimension {axis}, expected {longest}")
    for longest in (max_seqlen, max_seqlen_k):
        if rotary is not None and longest is not None and min(t.shape[0] for t in rotary) < longest:
            raise ValueError(f"{op}: rotary has {[t.shape[0] for t in rotary]} positions, expected {longest}")


def _expect_supported(op: str, q: Tensor, options: Options) -> None:
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{op}: q, k, v must be float32, bfloat16 or float16, got {q.dtype}")
    if q.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"{op}: head_dim must be at most {MAX_HEAD_DIM}, got {q.shape[-1]}")
    for name, tensors in (("alibi_slopes", [options.alibi_slopes]), ("rotary", [options.cos, options.sin])):
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            raise ValueError(f"{op}: {name} requires a gradient, which this operator does not compute")


def expect_made_for(op, schedule, q, spans_q) -> None:
    """Raises TypeError or ValueError unless the schedule was made for this batch. q: [B, S, H, D] padded, or T rows."""
    padded = q.dim() == 4
    wanted = spans_q.shape[0] - (not padded), q.shape[1] if padded else q.shape[0], padded
    if not isinstance(schedule, Schedule):
        raise TypeError(f"{op}: schedule must come from attention_schedule for these kernels, got {type(schedule)}")
    if (schedule.sequences, schedule.size, schedule.padded) != wanted:
        raise ValueError(
            f"{op}: schedule was made for {schedule.sequences} sequences, size {schedule.size}, "
            f"padded {schedule.padded}, but the call has {wanted[0]}, {wanted[1]}, {wanted[2]}"
        )


def _options(
    q, bias, mask, alibi_slopes, window, rotary, dropout_p, seed, stream, sequence_ids, scale
) -> Options:  # fmt: skip
    """The arguments of a public function in the form of the operators."""
    cos, sin = (None, None) if rotary is None else unit_stride(*rotary)
    # the kernels use the strides of other tensors, but read these two as contiguous
    alibi_slopes, sequence_ids = (None if t is None else t.contiguous() for t in (alibi_slopes, sequence_ids))
    left, right = (UNBOUNDED, UNBOUNDED) if window is None else (min(side, UNBOUNDED) for side in window)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return Options(bias, mask, alibi_slopes, cos, sin, seed, sequence_ids, left, right, dropout_p, stream, scale)


def _attend(
    op: str, q: Tensor, k: Tensor, v: Tensor, spans_q: Tensor, spans_k: Tensor | None, schedule: Schedule, longest: int,
    options: Options,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(o, lse). spans_k: None in self-attention, where keys have the spans of q."""
    if torch.is_autocast_enabled(q.device.type) and q.dtype == torch.float32:
        q, k, v = (t.to(torch.get_autocast_dtype(q.device.type)) for t in (q, k, v))
    _expect_supported(op, q, options)
    expect_made_for(op, schedule, q, spans_q)
    if not options.scale > 0.0:  # the kernels need a positive scale: the greatest product is then the greatest score
        q, options = q * options.scale, Options(*options[:-1], scale=1.0)
    spans_q, spans_k = spans_q.contiguous(), None if spans_k is None else spans_k.contiguous()
    entries, parts, bias = schedule.entries, schedule.parts(longest), options.bias
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, bias)):
        return apply(_Attention, q, k, v, bias, spans_q, spans_k, entries, parts, *options[1:])
    return _forward_op(q, k, v, spans_q, _first(spans_k, spans_q), entries, parts, *options)


# ---- for the offline compiler --------------------------------------------------------------------------------

_EVERYTHING = {
    "bias": True, "mask": True, "alibi": True, "window": (64, 64), "rotary": True, "groups": 4, "dropout": True,
    "ids": True, "return_lse": True,
}  # fmt: skip

# variant -> what differs from plain packed self-attention in bfloat16 at head_dim 64
_VARIANTS = {
    "dropout": {"dropout": True},
    "padded": {"padded": True, "dropout": True, "return_lse": True},
    "bias": {"bias": True},
    "mask": {"mask": True},
    "bias,S=300": {"bias": True, "longest": 300},  # rows of bias and mask that do not begin at multiples of 16 bytes
    "mask,S=300": {"mask": True, "longest": 300},
    "alibi": {"alibi": True},
    "window": {"window": (64, 64)},
    "rotary": {"rotary": True},
    "rotary,D=80": {"rotary": True, "head_dim": 80},
    "grouped": {"groups": 4},
    "decoder": {"window": (UNBOUNDED, 0), "rotary": True, "groups": 4},
    "ids": {"ids": True, "dropout": True},
    "padded,ids": {"padded": True, "ids": True, "dropout": True},
    "lse_grad": {"return_lse": True},
    "cross": {"cross": True},
    "all": _EVERYTHING,
    "all,padded": {**_EVERYTHING, "padded": True, "bias_planes": 3},
}


def compile_calls() -> list[CompileCall]:
    """Plain attention with every config, and every variant at head_dim 64."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    return [
        *(_call("bf16", bf16, head_dim=d, fast=d == 64) for d in (32, 64, 80, 96, 128, 256)),
        _call("fp16", fp16),
        *(_call("fp32", fp32, head_dim=d) for d in (64, 128, 256)),
        *(_call(f"bf16,{name}", bf16, **changes) for name, changes in _VARIANTS.items()),
        _call("fp16,all", fp16, **_EVERYTHING),
        _call("fp32,all", fp32, **_EVERYTHING),
    ]


def _call(
    name, dtype, *, head_dim=64, groups=1, padded=False, dropout=False, bias=False, bias_planes=1, mask=False,
    alibi=False, rotary=False, ids=False, cross=False, longest=304, fast=False, **options,
) -> CompileCall:  # fmt: skip
    """A call over sequences of one block, of one tile and longer, with q, k and v views of one fused projection."""
    lengths, heads = [40, 100, longest], 12
    batch, width = len(lengths), max(lengths)
    rows = (batch, width) if padded else (sum(lengths),)
    qkv = empty(*rows, heads + 2 * (heads // groups), head_dim, dtype=dtype)
    q, k, v = qkv.split([heads, heads // groups, heads // groups], dim=-2)
    if bias:
        options["bias"] = empty(bias_planes, heads if bias_planes == 1 else 1, width, width, dtype=dtype)
    if mask:
        options["mask"] = empty(1, 1, width, width, dtype=torch.bool)
    if alibi:
        options["alibi_slopes"] = empty(heads, dtype=torch.float32)
    if rotary:
        options["rotary"] = (empty(width, head_dim // 2, dtype=torch.float32),) * 2
    if dropout:
        options |= {"dropout_p": 0.1, "seed": empty(1, dtype=torch.int64)}
    if ids:
        options["sequence_ids"] = empty(batch, dtype=torch.int64)
    spans = torch.tensor(lengths if padded else [0, 40, 140, sum(lengths)], dtype=torch.int32, device="cpu")
    if cross:
        options |= {"cu_seqlens_k": spans, "max_seqlen_k": width}
    given = (q, k, v, spans) if padded else (q, k, v, spans, width)
    return compile_call(
        attention_padded if padded else attention, f"{name},D={head_dim}", *given,
        grads=(0, 1, 2, "bias") if bias else (0, 1, 2), fast=fast, **options,
    )  # fmt: skip

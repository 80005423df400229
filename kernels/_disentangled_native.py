"""DeBERTa's attention without Triton: in C++ on CPUs that have it (`cpu/disentangled.py`), else by explicit products.

Arguments are described in `fastbert.functional`; the equations are those of `reference.disentangled_attention`.
"""

import torch

from . import reference
from ._attention_native import _keep, attention_schedule
from ._library import by_torch, plain_gradients
from .cpu import attention as cpu_attention
from .cpu import disentangled as cpp_disentangled
from .cpu import operators as cpp

# Widest heads of the Triton kernels: wider ones spill in the gradients of the tables. All DeBERTa models have 64.
WIDEST_IN_TRITON = 64


def _attend(
    q, k, v, pk, pq, lut, scale, real=None, dropout_p=0.0, seed=None, stream=0, sequence_ids=None
):  # fmt: skip
    """Sequences of one width: q, k, v [n, S, H, D] views -> [n, S, H, D]. real: [n, S] bool, true for tokens. A row of
    padding attends to all columns equally, as in the original model. In float16 the products could overflow before
    they are scaled, so they are of float32."""
    kind = v.dtype
    if kind == torch.float16:
        q, k, pk, pq = (None if t is None else t.float() for t in (q, k, pk, pq))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    width = q.shape[2]
    rows = torch.arange(width, dtype=torch.int64, device=q.device)
    slots = lut[(rows[:, None] - rows + lut.shape[0] // 2)].to(torch.int64)  # [S, S], over i - j
    precise = torch.promote_types(q.dtype, torch.float32)
    s = (q @ k.mT).to(precise)
    if pk is not None:  # [n, H, S, R], of which each row i takes the slots of its distances
        s = s + (q @ pk.permute(1, 2, 0)).gather(-1, slots.expand(s.shape))
    if pq is not None:
        s = s + (k @ pq.permute(1, 2, 0)).gather(-1, slots.mT.expand(s.shape)).mT
    s = s * scale
    if real is not None:
        allowed = real[:, None, :, None] & real[:, None, None, :]
        s = s.masked_fill(~allowed, torch.finfo(precise).min)
    p = s.softmax(-1)
    if dropout_p:
        p = torch.where(_keep(*p.shape[1:], dropout_p, seed, stream, sequence_ids), p / (1.0 - dropout_p), 0.0)
    return (p.to(kind) @ v).transpose(1, 2)


def _in_runs(q, k, v, pk, pq, lut, runs, scale, sequence_ids=None, **dropout):
    """Batched products for each run of adjacent sequences of one length: q, k, v [T, H, D] -> [T, H, D]."""
    if not runs:
        return reference.attention_of_nothing(q, k, v, pk, pq)
    outputs = []
    for start, count, length, first in runs:
        of_run = (t[start : start + count * length].unflatten(0, (count, length)) for t in (q, k, v))
        names = None if sequence_ids is None else sequence_ids[first : first + count]
        outputs.append(_attend(*of_run, pk, pq, lut, scale, sequence_ids=names, **dropout).flatten(0, 1))
    return torch.cat(outputs)


class _Disentangled(torch.autograd.Function):
    """The operator in C++, with or without dropout, and its gradients, including those of pk and pq."""

    @staticmethod
    def forward(ctx, q, k, v, pk, pq, lut, cu_seqlens, scale, dropout):
        stats = torch.empty(2, q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
        o = cpp_disentangled.attention(q, k, v, pk, pq, lut, cu_seqlens, scale, dropout, stats)
        ctx.save_for_backward(q, k, v, pk, pq, stats, lut, cu_seqlens)
        ctx.scale, ctx.dropout = scale, dropout
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, pk, pq, stats, lut, cu_seqlens = ctx.saved_tensors
        if not by_torch(do):
            grads = cpp_disentangled.attention_backward(
                do, q, k, v, pk, pq, lut, stats, cu_seqlens, ctx.scale, ctx.dropout
            )
        else:  # a second derivative may be wanted, which only torch's operators have
            options = {} if ctx.dropout is None else ctx.dropout.options
            runs = attention_schedule(cu_seqlens, q.shape[0])

            def plain(q, k, v, pk, pq):
                return _in_runs(q, k, v, pk, pq, lut, runs, ctx.scale, **options)

            grads = plain_gradients(plain, (q, k, v, pk, pq), ctx.needs_input_grad[:5], do)
        return *grads, None, None, None, None


def _with_names(batch, device, dropout_p, seed, stream, sequence_ids):
    """The dropout arguments with sequence_ids; empty without dropout."""
    if not dropout_p:
        return {}
    if sequence_ids is None:
        sequence_ids = torch.arange(batch, dtype=torch.int64, device=device)
    return {"dropout_p": dropout_p, "seed": seed, "stream": stream, "sequence_ids": sequence_ids}


def disentangled_attention(
    q, k, v, pk, pq, lut, cu_seqlens, max_seqlen=None, *,
    dropout_p=0.0, seed=None, stream=0, sequence_ids=None, scale=None, schedule=None,
):  # fmt: skip
    """In C++ where that is built and supports the dtype, else as products over runs of sequences of one length."""
    scale = reference.disentangled_scale(q, pk, pq) if scale is None else scale
    options = _with_names(cu_seqlens.shape[0] - 1, q.device, dropout_p, seed, stream, sequence_ids)
    if torch.compiler.is_compiling():
        return reference.disentangled_attention(q, k, v, pk, pq, lut, cu_seqlens, scale=scale, **options)
    if cpp_disentangled.takes(q, k, v, pk, pq, lut, cu_seqlens, scale):
        dropout = cpu_attention.Dropout(**options) if options else None
        if cpp.want_gradients(*(t for t in (q, k, v, pk, pq) if t is not None)):
            return _Disentangled.apply(q, k, v, pk, pq, lut, cu_seqlens, scale, dropout)
        return cpp_disentangled.attention(q, k, v, pk, pq, lut, cu_seqlens, scale, dropout)
    runs = attention_schedule(cu_seqlens, q.shape[0]) if schedule is None else schedule
    return _in_runs(q, k, v, pk, pq, lut, runs, scale, **options)


def disentangled_attention_padded(
    q, k, v, pk, pq, lut, real=None, *, dropout_p=0.0, seed=None, stream=0, sequence_ids=None, scale=None
):
    """Padded sequences, by explicit products."""
    scale = reference.disentangled_scale(q, pk, pq) if scale is None else scale
    options = _with_names(q.shape[0], q.device, dropout_p, seed, stream, sequence_ids)
    return _attend(q, k, v, pk, pq, lut, scale, real, **options)

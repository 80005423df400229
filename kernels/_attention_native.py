"""Attention without Triton: C++ where it is available (`cpu/attention.py`), else torch's SDPA or explicit products.

Without C++ a packed batch is cut into runs of adjacent sequences of one length (`attention_schedule`). Each run is one
batched product without padding. `native.py` exports the public functions; `fastbert.functional` describes arguments.
"""

import itertools

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import reference
from ._checks import expect_sequences
from ._library import by_torch, plain_gradients
from ._random import HEAD_STREAMS, keep_mask, row_keys
from .cpu import attention as cpu_attention
from .cpu import operators as cpp


def attention_schedule(cu_seqlens, total_tokens, lengths=None):
    """Runs of adjacent sequences of one length: [(first row, count, length, first sequence)], without empty sequences.

    A run is one batched product. Texts sorted by length make few runs.
    """
    if torch.compiler.is_compiling():
        return None  # in a trace lengths are data: `_attention_opaque` reads them when the graph runs
    starts = expect_sequences("attention", "cu_seqlens", cu_seqlens, total_tokens)
    if starts is None and lengths is None:
        starts = cu_seqlens.tolist()
    if starts is not None:
        found = [end - begin for begin, end in itertools.pairwise(starts)]
        if lengths is not None and list(lengths) != found:
            raise ValueError(f"attention: lengths must be those of cu_seqlens, {found}, got {list(lengths)}")
        lengths = found
    runs, start, sequence = [], 0, 0
    for length, run in itertools.groupby(lengths):
        count = sum(1 for _ in run)
        if length:
            runs.append((start, count, length, sequence))
        start += count * length
        sequence += count
    return runs


def _sdpa(q, k, v, scale, attn_mask=None, is_causal=False):
    """[n, L, H, D] views -> [n, L, H, D]; grouped heads allowed. A row whose mask excludes every key gives zeros."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )
    return o.transpose(1, 2)


def _rotate(x, cos, sin):
    """Rotary embedding of x [n, S, H, D] by cos, sin [>= S, D / 2], computed in their precision or a higher one."""
    x1, x2 = x.chunk(2, dim=-1)
    c, s = cos[: x.shape[1], None], sin[: x.shape[1], None]
    return torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), dim=-1).to(x.dtype)


def _rotated(q, k, cu_seqlens, cos, sin):
    """`_rotate` of packed q and k [T, H, D], each token by its position in its sequence."""
    tokens = torch.arange(q.shape[0], dtype=torch.int64, device=q.device)
    starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=q.shape[0])
    places = tokens - starts
    cos, sin = cos[places], sin[places]
    return _rotate(q[None], cos, sin)[0], _rotate(k[None], cos, sin)[0]


def _probabilities_with_dropout(q, k, added, allowed, p, seed, stream, sequence_ids, scale):
    """dropout(softmax(scale q k^T + added)) [n, H, Sq, Sk] of q, k [n, H, S, D]; a row with no key is zero.

    The product is of float32, as in torch's SDPA with dropout: in float16 it would overflow before the scale.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    s = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * scale
    if added is not None:
        s = s + added
    dead = None
    if allowed is not None:
        dead = ~allowed.any(-1, keepdim=True)
        s = s.masked_fill(~allowed & ~dead, float("-inf"))
    keep = _keep(*s.shape[1:], p, seed, stream, sequence_ids)
    probabilities = torch.where(keep, s.softmax(-1) / (1.0 - p), 0.0)
    return probabilities if dead is None else probabilities.masked_fill(dead, 0.0)


def _keep(heads, width_q, width_k, p, seed, stream, sequence_ids):
    """Dropout's keep mask [n, H, Sq, Sk] for n sequences with these ids."""
    heads, rows = (torch.arange(n, dtype=torch.int64, device=sequence_ids.device) for n in (heads, width_q))
    names = (sequence_ids.to(torch.int64)[:, None, None] << 32) | rows
    return keep_mask(row_keys(seed, stream * HEAD_STREAMS + heads[:, None], names), width_k, p)


def _attend(
    q, k, v, scale, bias=None, mask=None, alibi_slopes=None, window=None, rotary=None,
    dropout_p=0.0, seed=None, stream=0, sequence_ids=None,
):  # fmt: skip
    """Any variant over sequences of one length: q [n, Sq, H, D], k, v [n, Sk, Hk, D] views -> [n, Sq, H, D].

    bias and mask have shape [1 | n, 1 | H, >= Sq, >= Sk]. A row that may see no key is zero.
    """
    if rotary is not None:
        q, k = _rotate(q, *rotary), _rotate(k, *rotary)
    width_q, width_k = q.shape[1], k.shape[1]
    # The window only excludes later tokens: with is_causal SDPA skips their part of the products.
    causal = window is not None and window[1] == 0 and window[0] >= width_q - 1 and width_q == width_k
    if causal and bias is mask is alibi_slopes is None and dropout_p == 0.0:
        return _sdpa(q, k, v, scale, is_causal=True)
    columns, rows = (torch.arange(width, dtype=torch.int64, device=q.device) for width in (width_k, width_q))
    distance = columns - rows[:, None]
    added = None if bias is None else bias[..., :width_q, :width_k]
    if alibi_slopes is not None:
        slope = -alibi_slopes[:, None, None] * distance.abs()
        added = slope if added is None else added + slope
    allowed = None if mask is None else mask[..., :width_q, :width_k]
    if window is not None:
        near = (distance >= -window[0]) & (distance <= window[1])
        allowed = near if allowed is None else allowed & near

    if dropout_p == 0.0:
        attn_mask = allowed
        if added is not None:
            attn_mask = (added if allowed is None else added.masked_fill(~allowed, float("-inf"))).to(q.dtype)
        return _sdpa(q, k, v, scale, attn_mask)
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    p = _probabilities_with_dropout(q, k, added, allowed, dropout_p, seed, stream, sequence_ids, scale)
    return (p.to(v.dtype) @ v).transpose(1, 2)


def _attention_in_runs(q, k, v, runs, scale, sequence_ids=None, bias=None, mask=None, **options):
    """Self-attention with one call for each run: q [T, H, D], k, v [T, Hk, D] -> [T, H, D]."""
    if not runs:
        return reference.attention_of_nothing(q, k, v, bias)
    outputs = []
    for start, count, length, first in runs:
        of_run = [x[start : start + count * length].unflatten(0, (count, length)) for x in (q, k, v)]
        if not options and bias is None and mask is None:
            outputs.append(_sdpa(*of_run, scale).flatten(0, 1))
            continue
        sequences = slice(first, first + count)
        o = _attend(
            *of_run, scale,
            *(t if t is None or t.shape[0] == 1 else t[sequences] for t in (bias, mask)),
            sequence_ids=None if sequence_ids is None else sequence_ids[sequences], **options,
        )  # fmt: skip
        outputs.append(o.flatten(0, 1))
    return torch.cat(outputs)


def _attention_of_one_query(
    q, k, v, cu_seqlens_k, max_seqlen_k, scale, dropout_p=0.0, seed=None, stream=0, sequence_ids=None
):
    """One query for each sequence over all of its keys: q [B, H, D], k, v [T, Hk, D] -> [B, H, D], zero where empty.

    Products and sums are computed for all tokens at once; only scores are padded, to [B, max_seqlen_k, H].
    """
    batch, heads, width = q.shape
    groups, scale = heads // k.shape[1], width**-0.5 if scale is None else scale
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_, k_, v_ = (x.to(dtype) for x in (q, k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)))
    sequences, tokens = (torch.arange(n, dtype=torch.int64, device=q.device) for n in (batch, k.shape[0]))
    of_token = sequences.repeat_interleave(cu_seqlens_k.diff(), output_size=k.shape[0])  # [T]
    place = of_token, tokens - cu_seqlens_k[of_token]
    s = (q_[of_token] * k_).sum(-1) * scale  # [T, H]
    p = s.new_full((batch, max_seqlen_k, heads), float("-inf")).index_put(place, s).softmax(1)[place]
    if dropout_p:
        keep = _keep(heads, 1, max_seqlen_k, dropout_p, seed, stream, sequence_ids)[:, :, 0].transpose(1, 2)[place]
        p = torch.where(keep, p / (1.0 - dropout_p), 0.0)
    return q_.new_zeros(q.shape).index_add(0, of_token, p[..., None] * v_).to(q.dtype)


def _gradients_in_runs(do, q, k, v, runs, scale, dropout_p=0.0, sequence_ids=None, **dropout):
    """dq, dk, dv of `_attention_in_runs`, with or without dropout, by explicit formulas, because autograd does not
    record inside an operator of torch.library.

        p = softmax(s),  s = scale q k^T;   dv = dropout(p)^T do;   dp = dropout(do v^T);
        ds = p (dp - sum(p dp));            dq = scale ds k;        dk = scale ds^T q
    """
    grads = [x.new_zeros(x.shape) for x in (q, k, v)]
    groups, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5 if scale is None else scale
    dtype = torch.promote_types(q.dtype, torch.float32)
    for start, count, length, first in runs:
        rows = slice(start, start + count * length)
        do_, q_, k_, v_ = (
            x[rows].to(dtype).unflatten(0, (count, length)).transpose(1, 2)  # [n, H, L, D]
            for x in (do, q, k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1))
        )
        p = (scale * (q_ @ k_.mT)).softmax(-1)
        dropped, dp = p, do_ @ v_.mT
        if dropout_p:
            names = sequence_ids[first : first + count]
            keep = _keep(*p.shape[1:], dropout_p, sequence_ids=names, **dropout)
            dropped, dp = (torch.where(keep, x / (1.0 - dropout_p), 0.0) for x in (p, dp))
        ds = scale * p * (dp - (p * dp).sum(-1, keepdim=True))
        of_run = ds @ k_, *(x.unflatten(1, (-1, groups)).sum(2) for x in (ds.mT @ q_, dropped.mT @ do_))
        for grad, x in zip(grads, of_run, strict=True):
            grad[rows] = x.transpose(1, 2).flatten(0, 1).to(grad.dtype)
    return tuple(grads)


class _Attention(torch.autograd.Function):
    """Attention in C++ with its gradients: with or without dropout, self-attention or cross-attention."""

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, scale, dropout, cu_seqlens_k, window):
        stats = torch.empty(2, q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
        o = cpu_attention.attention(q, k, v, cu_seqlens, scale, dropout, stats, cu_seqlens_k, window)
        ctx.save_for_backward(q, k, v, o, stats, cu_seqlens, cu_seqlens_k)
        ctx.scale, ctx.dropout, ctx.window = scale, dropout, window
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, o, stats, cu_seqlens, cu_seqlens_k = ctx.saved_tensors
        if not by_torch(do):
            grads = cpu_attention.attention_backward(
                do, q, k, v, o, stats, cu_seqlens, ctx.scale, ctx.dropout, cu_seqlens_k, ctx.window
            )
        else:  # a second derivative may be wanted, which only torch's operators have
            options = {} if ctx.dropout is None else ctx.dropout.options
            if cu_seqlens_k is not None:

                def plain(q, k, v):
                    options_k = {"cu_seqlens_k": cu_seqlens_k, "scale": ctx.scale}
                    return reference.attention(q, k, v, cu_seqlens, **options_k, **options)

            else:
                runs = attention_schedule(cu_seqlens, q.shape[0])

                def plain(q, k, v):
                    return _attention_in_runs(q, k, v, runs, ctx.scale, window=ctx.window, **options)

            with sdpa_kernel(SDPBackend.MATH):
                grads = plain_gradients(plain, (q, k, v), ctx.needs_input_grad[:3], do)
        return *grads, None, None, None, None, None


@torch.library.custom_op("fastbert::attention_native", mutates_args=())
def _attention_opaque(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float | None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    stream: int = 0,
    sequence_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with or without dropout as one node of a traced graph, because its loop depends on data. Returns o and
    softmax_stats [2, H, T], which are not filled where no backward pass needs them."""
    options = _dropout_of(dropout_p, seed, stream, sequence_ids)
    stats = torch.empty(2, q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    if cpu_attention.takes_attention(q, k, v, cu_seqlens, scale):
        return cpu_attention.attention(
            q, k, v, cu_seqlens, scale, cpu_attention.Dropout(**options) if options else None, stats
        ), stats
    runs = attention_schedule(cu_seqlens, q.shape[0])
    return _attention_in_runs(q, k, v, runs, scale, **options).contiguous(), stats


@_attention_opaque.register_fake
def _(q, k, v, cu_seqlens, scale, dropout_p=0.0, seed=None, stream=0, sequence_ids=None):
    return q.new_empty(q.shape), q.new_empty(2, q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("fastbert::attention_native_backward", mutates_args=())
def _attention_opaque_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    stats: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float | None,
    dropout_p: float,
    seed: torch.Tensor | None,
    stream: int,
    sequence_ids: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    options = _dropout_of(dropout_p, seed, stream, sequence_ids)
    if cpu_attention.takes_attention(q, k, v, cu_seqlens, scale):
        dropout = cpu_attention.Dropout(**options) if options else None
        return cpu_attention.attention_backward(do, q, k, v, o, stats, cu_seqlens, scale, dropout)
    return _gradients_in_runs(do, q, k, v, attention_schedule(cu_seqlens, q.shape[0]), scale, **options)


@_attention_opaque_backward.register_fake
def _(do, q, k, v, o, stats, cu_seqlens, scale, dropout_p, seed, stream, sequence_ids):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _dropout_of(dropout_p, seed, stream, sequence_ids):
    if not dropout_p:
        return {}
    return {"dropout_p": dropout_p, "seed": seed, "stream": stream, "sequence_ids": sequence_ids}


def _save_attention(ctx, inputs, output):
    q, k, v, cu_seqlens, ctx.scale, ctx.dropout_p, seed, ctx.stream, sequence_ids = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, seed, sequence_ids)


def _attention_opaque_grad(ctx, do, _):
    *tensors, seed, sequence_ids = ctx.saved_tensors
    grads = _attention_opaque_backward(do, *tensors, ctx.scale, ctx.dropout_p, seed, ctx.stream, sequence_ids)
    return *grads, *[None] * 6


_attention_opaque.register_autograd(_attention_opaque_grad, setup_context=_save_attention)


DROPOUT = {"dropout_p", "seed", "stream", "sequence_ids"}


def _variant(batch, device, options):
    """The options that differ from their defaults, and sequence_ids where there is dropout."""
    given = {name: value for name, value in options.items() if value is not None}
    if not given.get("return_lse"):
        given.pop("return_lse", None)
    if "cu_seqlens_k" not in given:
        given.pop("max_seqlen_k", None)
    if given.get("dropout_p"):
        given.setdefault("sequence_ids", torch.arange(batch, dtype=torch.int64, device=device))
    else:
        given = {name: given[name] for name in given.keys() - DROPOUT}
    return given


def attention(q, k, v, cu_seqlens, max_seqlen=None, *, scale=None, schedule=None, **options):
    """Self-attention runs in C++ where that is built, also with a window, rotary positions or dropout. Otherwise, and
    in other variants, it runs on SDPA, or with dropout as explicit products. One query for each sequence has a function
    of its own; all else runs as the specification."""
    variant = _variant(cu_seqlens.shape[0] - 1, q.device, options)
    compiling = torch.compiler.is_compiling()
    autocast = q.dtype == torch.float32 and torch.is_autocast_enabled(q.device.type)
    other_keys, window = variant.get("cu_seqlens_k"), variant.get("window")
    rotates = "rotary" in variant and other_keys is None
    plain = variant.keys() <= DROPOUT | {"cu_seqlens_k", "max_seqlen_k", "window", *(["rotary"] if rotates else [])}
    if plain and not autocast and cpu_attention.takes_attention(q, k, v, cu_seqlens, scale, other_keys, window):
        drops = {name: variant[name] for name in variant.keys() & DROPOUT}
        dropout = cpu_attention.Dropout(**drops) if drops else None
        if rotates:
            q, k = _rotated(q, k, cu_seqlens, *variant["rotary"])
        if cpp.want_gradients(q, k, v):
            return _Attention.apply(q, k, v, cu_seqlens, scale, dropout, other_keys, window)
        return cpu_attention.attention(
            q, k, v, cu_seqlens, scale, dropout, cu_seqlens_k=other_keys, window=window
        )  # fmt: skip
    one_each = "cu_seqlens_k" in variant and max_seqlen == 1 and q.shape[0] == cu_seqlens.shape[0] - 1
    if one_each and not compiling and variant.keys() <= DROPOUT | {"cu_seqlens_k", "max_seqlen_k"}:
        return _attention_of_one_query(q, k, v, scale=scale, **variant)
    if compiling and variant.keys() <= DROPOUT:
        return _attention_opaque(q, k, v, cu_seqlens, scale, **variant)[0]
    if compiling or "return_lse" in variant or "cu_seqlens_k" in variant:
        return reference.attention(q, k, v, cu_seqlens, max_seqlen, scale=scale, **options)
    runs = attention_schedule(cu_seqlens, q.shape[0]) if schedule is None else schedule
    return _attention_in_runs(q, k, v, runs, scale, **variant)


def attention_padded(q, k, v, seqlens=None, seqlens_k=None, *, scale=None, schedule=None, **options):
    """Without lengths one SDPA call, or with dropout explicit products; otherwise the specification."""
    variant = _variant(q.shape[0], q.device, options)
    if seqlens is not None or seqlens_k is not None or k.shape[1] == 0 or "return_lse" in variant:
        return reference.attention_padded(q, k, v, seqlens, seqlens_k, scale=scale, **options)
    return _attend(q, k, v, scale, **variant)

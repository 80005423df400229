"""A post-norm encoder layer as one autograd node, which launches the kernels of its operators directly.

Forward, x [T, C], H heads of width D, A = H D:

    qkv = x Wqkv^T + bqkv                                       [T, 3A]
    o   = attention(q, k, v)                                    [T, A]
    x1  = LayerNorm(dropout(o Wout^T + bout) + x)               [T, C]
    h   = x1 Wup^T + bup;   a = act(h)                          [T, F]
    y   = LayerNorm(dropout(a Wdown^T + bdown) + x1)            [T, C]

Backward. A LayerNorm has two inputs: dr is the gradient of the residual, dz that of the product.

    dr2, dz2 from dy;   dh, a from dz2 Wdown and h
    dx1 = dr2 + dh Wup                                          summed in the product
    dr1, dz1 from dx1;   do = dz1 Wout
    dqkv                                                        [T, 3A], written by attention's kernels
    dx  = dr1 + dqkv Wqkv                                       summed in the product
    dWqkv = dqkv^T x, and so on for every weight that needs a gradient; biases are column sums

`attention`, `layer_norm` and `feed_forward` have the equations and bytes, and say what is recomputed. The node saves
what these operators save: x, qkv, o, lse, both products before a LayerNorm, x1, h and four vectors of statistics.

Compared with a composition of these operators, there are seven autograd nodes fewer, dq, dk and dv are not copied into
one tensor (6 T A elements read and written), and the two residual gradients need no pass of their own (6 T C). The
forward pass has the same bits as the composition. In the backward pass dx1 and dx are rounded once, not twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from . import _attention_launch, _device
from ._attention_arguments import UNBOUNDED, Options, Saved, Sequences, Tiles, Traits
from ._attention_config import MAX_HEAD_DIM
from ._attention_launch import (
    Backward,
    Forward,
    backward_plans,
    forward_plans,
    run_backward,
    run_forward,
)
from ._attention_schedule import Schedule
from ._gemm import DTYPES, add_product, matmul, wants_grad
from ._invariance import is_batch_invariant
from ._launch import INT32, all_at_16_bytes
from ._layer import LayerOptions, LayerWeights
from ._library import PLAIN, apply_unwatched, needs_operators, on_its_device, once
from ._rows import MAX_WIDTH
from .attention import expect_made_for
from .feed_forward import ACTIVATIONS, down_backward, up_projection
from .layer_norm import launch_backward as norm_backward
from .layer_norm import launch_forward as norm_forward


class _Batch(NamedTuple):
    cu_seqlens: Tensor
    entries: Tensor  # the schedule's entries
    parts: tuple[int, int, int]
    seed: Tensor | None
    row_ids: Tensor | None
    sequence_ids: Tensor | None
    known: Hashable  # as in `Plan`, for all launches; those whose outputs vary add to it. None: nothing is known


# ---- which calls -----------------------------------------------------------------------------------------


@functools.lru_cache(256)
def _fits(width: int, shapes: tuple[tuple[int, ...] | None, ...], heads: int, activation: str) -> int:
    """A number that encodes which tensors are not None. 0 if these are not the shapes of a layer of this width, or if
    the kernels do not support its head_dim or widths."""
    of = LayerWeights(*shapes)
    if None in (of.query, of.key, of.value, of.out, of.out_norm, of.up, of.down, of.down_norm):
        return 0
    inner, hidden = of.query[0], of.up[0]
    vectors = {"query": inner, "up": hidden, "out": width, "out_norm": width, "down": width, "down_norm": width}
    fits = (
        of[:6:2] == ((inner, width),) * 3
        and len({of.query_bias, of.key_bias, of.value_bias}) == 1
        and (of.out, of.up, of.down) == ((width, inner), (hidden, width), (width, hidden))
        and (of.out_norm, of.down_norm) == ((width,),) * 2
        and all(getattr(of, f"{name}_bias") in (None, (n,)) for name, n in vectors.items())
        and inner % heads == 0
        and 0 < inner // heads <= MAX_HEAD_DIM
        and 0 < width <= MAX_WIDTH
        and activation in ACTIVATIONS
        and activation != "geglu"
    )
    return sum(1 << place for place, shape in enumerate(shapes) if shape is not None) if fits else 0


def takes(x: Tensor, weights: LayerWeights, options: LayerOptions) -> int:
    """0 if `encoder_layer` cannot replace the single operators, otherwise a number that encodes which weights exist.

    It requires plain tensors of one dtype and device, contiguous x [T, C] and weights, no autocast, and no compiler,
    tracer, mode or transformation, which would have to see single operators.
    """
    if needs_operators(x) or type(x) not in PLAIN or not PLAIN.issuperset(map(type, weights)):
        return 0
    if x.dim() != 2 or not x.is_contiguous() or not x.numel() or torch.is_autocast_enabled(x.device.type):
        return 0
    dtype, index = x.dtype, x.get_device()
    shapes = []
    for t in weights:
        if t is None:
            shapes.append(None)
        elif t.dtype != dtype or t.get_device() != index or not t.is_contiguous():
            return 0
        else:
            shapes.append(t.shape)
    return _fits(x.shape[1], tuple(shapes), options.heads, options.activation) if dtype in DTYPES else 0


# ---- the pass --------------------------------------------------------------------------------------------


def joined(weights: LayerWeights) -> tuple[Tensor, Tensor | None]:
    """(Wqkv [3A, C], bqkv [3A])."""
    bias = None if weights.query_bias is None else torch.cat(weights[1:6:2])
    return torch.cat(weights[:6:2]), bias


def _heads_of(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """[T, 3A] -> q, k, v [T, H, D], views."""
    return qkv.view(qkv.shape[0], 3, heads, -1).unbind(1)


def _attention_options(batch: _Batch, options: LayerOptions, head_dim: int) -> Options:
    seed = batch.seed if options.probs_p > 0.0 else None
    dropout = options.probs_p, options.probs_stream
    return Options(
        None, None, None, None, None, seed, batch.sequence_ids, UNBOUNDED, UNBOUNDED, *dropout, head_dim**-0.5
    )


@functools.lru_cache(1024)
def _attention_plans(
    config_of: Callable, arch: str, dtype: torch.dtype, heads: int, head_dim: int, dropout_p: float, ids: bool
) -> tuple[Forward, Backward]:
    """config_of: `attention_config`."""
    traits = Traits(
        arch, dtype, heads, heads, head_dim, padded=False, bias=None, mask=None, alibi=False, rotary=None, window=False,
        dropout_p=dropout_p, ids=ids, scale=head_dim**-0.5,
    )  # fmt: skip
    token = 3 * heads * head_dim
    strides = (0, token, head_dim) * 3
    return forward_plans(config_of, traits, strides), backward_plans(config_of, traits, strides, (token, token), False)


def _plans_of(q: Tensor, options: Options) -> tuple[Forward, Backward]:
    arch, (_, heads, head_dim), ids = _device.arch(q.device.index), q.shape, options.sequence_ids is not None
    return _attention_plans(_attention_launch.attention_config, arch, q.dtype, heads, head_dim, options.dropout_p, ids)


def _forward(x, weights, qkv_weight, qkv_bias, batch: _Batch, options: LayerOptions, invariant: bool, keep: bool):
    """(y, the tensors that the backward pass needs beside the weights; None without `keep`)."""
    qkv = matmul(x, qkv_weight, qkv_bias, invariant=invariant)
    q, k, v = _heads_of(qkv, options.heads)
    spans, entries, parts, seed, row_ids, _, known = batch
    of_attention = _attention_options(batch, options, q.shape[-1])
    plans, _ = _plans_of(q, of_attention)
    o, lse = run_forward(plans, Sequences(q, k, v, spans, spans), Tiles(entries, parts), of_attention, known)
    o = o.view(x.shape[0], -1)

    out_bias, down_bias = weights.out_bias, weights.down_bias
    in_product, in_norm = (
        ((None, None), (out_bias, down_bias)) if options.fold else ((out_bias, down_bias), (None, None))
    )
    z1 = matmul(o, weights.out, in_product[0], invariant=invariant)
    x1, _, mean1, rstd1 = norm_forward(
        z1, x, weights.out_norm, weights.out_norm_bias, options.out_eps, in_norm[0], seed, row_ids,
        options.out_p, options.out_stream, False, False, keep, known and (known, "out"),
    )  # fmt: skip
    a, h = up_projection(
        x1, weights.up, weights.up_bias, options.activation, keep, invariant, not keep, known and (known, keep)
    )
    z2 = matmul(a, weights.down, in_product[1], invariant=invariant)
    y, _, mean2, rstd2 = norm_forward(
        z2, x1, weights.down_norm, weights.down_norm_bias, options.down_eps, in_norm[1], seed, row_ids,
        options.down_p, options.down_stream, False, False, keep, known and (known, "down"),
    )  # fmt: skip
    return y, (x, q, k, v, o, lse, z1, mean1, rstd1, x1, h, z2, mean2, rstd2) if keep else None


def _norm_backward(dy, z, residual, weight, bias, x_bias, mean, rstd, batch: _Batch, p, stream, wants, which):
    """(dr, dz, dweight, dbias, dx_bias). wants: whether an earlier tensor needs a gradient, then whether each parameter
    does."""
    want_dz, *want_params = wants
    dz, dr, *dparams = norm_backward(
        dy, None, z, residual, weight, bias, x_bias, mean, rstd, batch.seed, batch.row_ids, p, stream, False, False,
        want_dz, want_dz and p > 0.0, want_params, batch.known and (batch.known, which),
    )  # fmt: skip
    return dr if p > 0.0 else dz, dz, *dparams


def _backward(dy, weights, qkv_weight, saved, batch: _Batch, options: LayerOptions, invariant: bool, wants):
    """The gradients of x and of the weights; None for those that are not wanted. wants: for x, then for each weight."""
    x, q, k, v, o, lse, z1, mean1, rstd1, x1, h, z2, mean2, rstd2 = saved
    want_x, *of_weights = wants
    want = LayerWeights(*of_weights)
    # whether a gradient is wanted at or before attention, the first LayerNorm, the feed-forward
    to_attention = want_x or any(want[:6])
    to_norm = to_attention or any(want[6:10])
    to_feed_forward = to_norm or any(want[10:13])
    # The biases of the products before a LayerNorm: their gradients come from the LayerNorm (fold) or from column sums.
    fold, columns = options.fold, not options.fold
    d = dict.fromkeys(LayerWeights._fields)

    dr, dz, d["down_norm"], d["down_norm_bias"], d["down_bias"] = _norm_backward(
        dy, z2, x1, weights.down_norm, weights.down_norm_bias, weights.down_bias if fold else None, mean2, rstd2, batch,
        options.down_p, options.down_stream,
        (to_feed_forward or (columns and want.down_bias), want.down_norm, want.down_norm_bias, fold and want.down_bias),
        "down",
    )  # fmt: skip
    if columns and want.down_bias:
        d["down_bias"] = dz.sum(0)
    if to_feed_forward:
        dh, a, d["up_bias"] = down_backward(
            dz, weights.down, h, options.activation, want.down, want.up_bias, invariant, batch.known
        )
        if want.down:
            d["down"] = matmul(dz, a, layout="tn")
        if want.up:
            d["up"] = matmul(dh, x1, layout="tn")
    if to_norm:
        dx1 = add_product(dr, dh, weights.up, invariant)  # overwrites dr, which may be dz, but dz is no longer needed
        dr, dz, d["out_norm"], d["out_norm_bias"], d["out_bias"] = _norm_backward(
            dx1, z1, x, weights.out_norm, weights.out_norm_bias, weights.out_bias if fold else None, mean1, rstd1,
            batch, options.out_p, options.out_stream,
            (to_attention or want.out or (want.out_bias and not fold),
             want.out_norm, want.out_norm_bias, want.out_bias and fold),
            "out",
        )  # fmt: skip
        if columns and want.out_bias:
            d["out_bias"] = dz.sum(0)
        if want.out:
            d["out"] = matmul(dz, o, layout="tn")
    dx = None
    if to_attention:
        dqkv = _attention_backward(
            matmul(dz, weights.out, layout="nn", invariant=invariant), q, k, v, o, lse, batch, options
        )
        _qkv_gradients(d, dqkv, x, want)
        if want_x:
            dx = add_product(dr, dqkv, qkv_weight, invariant)
    return dx, *d.values()


def _attention_backward(do, q, k, v, o, lse, batch: _Batch, options: LayerOptions) -> Tensor:
    """dqkv [T, 3A] from do [T, A]."""
    dqkv = do.new_empty(do.shape[0], 3 * do.shape[1])
    spans, entries, parts, *_, known = batch
    of_attention = _attention_options(batch, options, q.shape[-1])
    _, plans = _plans_of(q, of_attention)
    outputs, tiles = (*_heads_of(dqkv, options.heads), torch.empty_like(lse)), Tiles(entries, parts)
    run_backward(
        plans, outputs, Saved(o, lse, do, None), Sequences(q, k, v, spans, spans), tiles, tiles, of_attention, known
    )
    return dqkv


def _qkv_gradients(d: dict[str, Tensor | None], dqkv: Tensor, x: Tensor, want: LayerWeights) -> None:
    """Stores the gradients of query, key and value in d; they are slices of one product if all are wanted."""
    inner = dqkv.shape[1] // 3
    if want.query and want.key and want.value:
        d["query"], d["key"], d["value"] = matmul(dqkv, x, layout="tn").view(3, inner, -1).unbind()
    else:
        for name, part in zip(("query", "key", "value"), dqkv.split(inner, 1), strict=True):
            if getattr(want, name):
                d[name] = matmul(part, x, layout="tn")
    if want.query_bias or want.key_bias or want.value_bias:
        of_biases = dqkv.sum(0).view(3, inner).unbind()
        for name, part in zip(("query_bias", "key_bias", "value_bias"), of_biases, strict=True):
            if getattr(want, name):
                d[name] = part


_forward_there, _backward_there = on_its_device("encoder_layer", _forward), on_its_device("encoder_layer", _backward)


class _EncoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, batch, options, x, *weights):
        weights = LayerWeights(*weights)
        qkv_weight, qkv_bias = joined(weights)
        ctx.options, ctx.parts, ctx.known, ctx.invariant = options, batch.parts, batch.known, is_batch_invariant()
        y, saved = _forward_there(x, weights, qkv_weight, qkv_bias, batch, options, ctx.invariant, True)
        tensors = batch.cu_seqlens, batch.entries, batch.seed, batch.row_ids, batch.sequence_ids
        ctx.save_for_backward(*tensors, qkv_weight, *weights[6:], *saved)
        return y

    @staticmethod
    @once
    def backward(ctx, dy):
        cu_seqlens, entries, seed, row_ids, sequence_ids, qkv_weight, *rest = ctx.saved_tensors
        dy = dy.contiguous()
        # Addresses may differ from the forward pass: a parameter may have moved, or a hook has replaced a saved tensor.
        known = ctx.known if all_at_16_bytes(dy, cu_seqlens, entries, seed, row_ids, sequence_ids, *rest) else None
        batch = _Batch(cu_seqlens, entries, ctx.parts, seed, row_ids, sequence_ids, known)
        weights, saved = LayerWeights(*(None,) * 6, *rest[:10]), rest[10:]
        gradients = _backward_there(
            dy, weights, qkv_weight, saved, batch, ctx.options, ctx.invariant, ctx.needs_input_grad[2:]
        )
        return None, None, *gradients


def _lies_well(x, weights, cu_seqlens, entries, seed, row_ids, sequence_ids, options: LayerOptions) -> bool:
    """Whether all addresses that this layer's kernels get are multiples of 16, and all numbers fit 32 bits."""
    return (
        all_at_16_bytes(x, *weights, cu_seqlens, entries, seed, row_ids, sequence_ids)
        and weights.query.shape[0] * x.element_size() % 16 == 0  # the distance from q to k and from k to v in qkv
        and (row_ids is None or row_ids.is_contiguous())
        and max(options.probs_stream, options.out_stream, options.down_stream) < INT32
    )


def encoder_layer(
    x: Tensor, weights: LayerWeights, cu_seqlens: Tensor, max_seqlen: int, options: LayerOptions, *, schedule: Schedule,
    seed: Tensor | None = None, row_ids: Tensor | None = None, sequence_ids: Tensor | None = None, taken: int = 0,
    qkv: Callable[[], tuple[Tensor, Tensor | None]] | None = None,
) -> Tensor:  # fmt: skip
    """The layer's output for x [T, C].

    taken: the result of `takes`; 0 if unknown, and then each launch inspects its tensors.
    qkv: a function that returns `joined(weights)`, for calls without gradients; the caller may cache these tensors.
    """
    if options.probs_p == options.out_p == options.down_p == 0.0:
        seed = row_ids = sequence_ids = None
    if sequence_ids is not None:
        sequence_ids = sequence_ids.contiguous()
    expect_made_for("encoder_layer", schedule, x, cu_seqlens)
    known = None
    if taken and _lies_well(x, weights, cu_seqlens, schedule.entries, seed, row_ids, sequence_ids, options):
        known = taken, x.dtype, options.fold, *(None if ids is None else ids.dtype for ids in (row_ids, sequence_ids))
    batch = _Batch(cu_seqlens, schedule.entries, schedule.parts(max_seqlen), seed, row_ids, sequence_ids, known)
    if wants_grad(x, *weights):
        return apply_unwatched(_EncoderLayer, batch, options, x, *weights)
    qkv_weight, qkv_bias = joined(weights) if qkv is None else qkv()
    return _forward_there(x, weights, qkv_weight, qkv_bias, batch, options, is_batch_invariant(), False)[0]

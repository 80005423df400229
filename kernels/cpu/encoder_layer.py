"""Post-norm encoder layers for training on a CPU as one autograd node, which calls C++ for each layer.

layer_training.cpp has the equations and lists the saved tensors. The node computes with the operators of
`products.py`, `attention.py` and `norm.py` and saves what they save. In float32 and under autocast its results have
the same bits as theirs; in a bfloat16 model the node adds the two residual gradients before rounding, the operators
after. There is one difference where neither x nor query, key and value need a gradient: single operators would then
save less and use other products, which round otherwise. The node saves the same tensors as always, and its backward
pass stops where no earlier gradient is needed.

With `first_only` the output has only the row of each sequence's first token, and zeros for a sequence without tokens.
Only keys and values are then computed for the other tokens.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .. import native
from .._layer import LayerOptions, LayerWeights
from .._library import apply_unwatched, by_torch, plain_gradients
from .._random import keep_threshold
from . import library, products
from . import operators as cpp
from .library import NO_MEMORY, WIDTH
from .pointers import PLAIN, address, address_of_starts, addresses

SAVED, FORWARD, BACKWARD = range(3)  # the three buffers whose size `encoder_layer_bytes` returns


class Names(NamedTuple):
    """A batch's cu_seqlens [B + 1] int32, and the names by which its dropout masks are drawn: sequence_ids [B] and
    row_ids [T] int64, None without dropout."""

    cu_seqlens: Tensor
    sequence_ids: Tensor | None
    row_ids: Tensor | None


class _Layer(ctypes.Structure):
    """A layer's sizes, lengths and dropout options, as a C structure."""

    _fields_ = tuple((name, library.TYPES[letter]) for name, letter in library.LAYER_FIELDS)


# ---- which layers ----------------------------------------------------------------------------------------


@functools.lru_cache(256)
def _fits(width: int, shapes: tuple[torch.Size, ...], heads: int, multiple: int) -> bool:
    """Whether these are the weights' shapes of a layer of this width, and the C++ products support its sizes."""
    of = LayerWeights(*shapes)
    attended, inner = of.query[0], of.up[0]
    return (
        shapes == tuple(map(torch.Size, layer_shapes(width, attended, inner)))
        and all(size > 0 and size % multiple == 0 for size in (width, attended, inner))
        and attended % (heads * WIDTH) == 0
    )


def layer_shapes(width: int, attended: int, inner: int) -> list[tuple[int, ...]]:
    """The shapes of the tensors of `LayerWeights`, in its order."""
    of_qkv, vector = [(attended, width), (attended,)] * 3, (width,)
    return [*of_qkv, (width, attended), vector, vector, vector, (inner, width), (inner,), (width, inner), *[vector] * 3]


def takes(x: Tensor, weights: LayerWeights, options: LayerOptions) -> bool:
    """Whether `encoder_layer` can replace the single operators: x or a weight needs a gradient, every operator of the
    layer would run in C++, no bias is missing, and no dispatch mode has to see the single operators."""
    if not options.fold or options.activation not in cpp.ACTIVATION_NUMBERS or any(t is None for t in weights):
        return False
    if not products.takes(x, weights[:6:2], weights[1:6:2], options.activation, later=weights[6:]):
        return False
    if x.dtype != weights.query.dtype:
        return False
    if x.dim() != 2 or not x.is_contiguous():
        return False
    if not all(type(t) in PLAIN and t.is_cpu and t.dtype is x.dtype and t.is_contiguous() for t in weights[6:]):
        return False
    multiple = WIDTH * 4 // products.dtype_of(x).itemsize
    return _fits(x.shape[1], tuple(t.shape for t in weights), options.heads, multiple)


# ---- the calls -------------------------------------------------------------------------------------------


def _described(
    x: Tensor, weights: LayerWeights, names: Names, options: LayerOptions, seed: int, dtype: torch.dtype,
    first_only: bool,
) -> _Layer:  # fmt: skip
    """The structure that describes this layer and batch. Raises ValueError on sizes that the C++ does not support."""
    attended, width = weights.query.shape
    for what, size in (("width", width), ("width of attention", attended), ("inner width", len(weights.up))):
        cpp.expect_multiple("encoder_layer", f"the {what}", size, WIDTH * 4 // dtype.itemsize)
    if options.heads < 1 or attended % (options.heads * WIDTH):
        raise ValueError(f"encoder_layer: {options.heads} heads do not fit attention of width {attended}")
    drops, rows = (options.probs_p, options.out_p, options.down_p), x.shape[0]
    if max(drops) > 0.0 and (names.sequence_ids is None or names.row_ids is None):
        raise ValueError("encoder_layer: dropout needs sequence_ids and row_ids")
    starts, sequences = address_of_starts("cu_seqlens", names.cu_seqlens)
    of_names = (
        None if t is None else address(name, t, torch.int64, count)
        for name, t, count in (("sequence_ids", names.sequence_ids, sequences), ("row_ids", names.row_ids, rows))
    )
    return _Layer(
        starts, *of_names, seed, options.probs_stream, options.out_stream, options.down_stream,
        *map(keep_threshold, drops), *(1.0 / (1.0 - p) for p in drops), options.out_eps, options.down_eps,
        (attended // options.heads) ** -0.5, sequences, rows, width, attended, len(weights.up), options.heads,
        cpp.ACTIVATION_NUMBERS[options.activation], cpp.is_wide("x", x.dtype, dtype), first_only,
    )  # fmt: skip


def _bytes(layer: _Layer, dtype: torch.dtype, what: int) -> int:
    return cpp.call("encoder_layer_bytes", dtype, ctypes.addressof(layer), what)


def _memory(layer: _Layer, dtype: torch.dtype, what: int) -> Tensor:
    """A buffer of bytes in which the C++ places its tensors; what: SAVED, FORWARD or BACKWARD."""
    return torch.empty(_bytes(layer, dtype, what), dtype=torch.uint8, device="cpu")


def _addresses_of(weights: LayerWeights) -> array:
    attended, width = weights.query.shape
    found = addresses(weights, weights.query.dtype, layer_shapes(width, attended, len(weights.up)))
    if found is None:
        raise ValueError("encoder_layer: the weights must be contiguous on the CPU and have the shapes of a layer")
    return found


def _ran(outcome: int, rows: int, cu_seqlens: Tensor) -> None:
    if outcome == NO_MEMORY:
        raise MemoryError(f"encoder_layer: no memory beside {rows} rows")
    if outcome:
        raise ValueError(f"encoder_layer: cu_seqlens must rise from 0 to {rows}, got {cu_seqlens.tolist()}")


def forward(
    x: Tensor, weights: LayerWeights, names: Names, options: LayerOptions, seed: int, dtype: torch.dtype,
    first_only: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y [T, C] or with `first_only` [B, C], the tensors saved for the backward pass, in one uint8 buffer). Products
    are computed in `dtype`; x [T, C] and the weights are in `dtype` or float32.

    Raises: ValueError where cu_seqlens does not cut T rows into sequences, or on shapes that do not fit; MemoryError.
    """
    layer, width = _described(x, weights, names, options, seed, dtype, first_only), weights.query.shape[1]
    y = torch.empty(layer.sequences, width, dtype=x.dtype, device="cpu") if first_only else torch.empty_like(x)
    saved, work = _memory(layer, dtype, SAVED), _memory(layer, dtype, FORWARD)
    where = _addresses_of(weights)
    outcome = cpp.call(
        "encoder_layer_forward", dtype, ctypes.addressof(layer),
        address("x", x, weights.query.dtype, x.shape[0] * width), where.buffer_info()[0],
        address("y", y, x.dtype, (layer.sequences if first_only else x.shape[0]) * width),
        *(address(name, t, torch.uint8, len(t)) for name, t in (("saved", saved), ("work", work))),
    )  # fmt: skip
    _ran(outcome, x.shape[0], names.cu_seqlens)
    return y, saved


def backward(
    dy: Tensor, x: Tensor, weights: LayerWeights, saved: Tensor, names: Names, options: LayerOptions, seed: int,
    dtype: torch.dtype, wanted: Sequence[bool], first_only: bool = False,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradient of x, and of each weight in float32; None for those that are not wanted."""
    want_x, *of_weights = wanted
    layer = _described(x, weights, names, options, seed, dtype, first_only)
    size = x.shape[0] * weights.query.shape[1]
    of_output = layer.sequences * weights.query.shape[1] if first_only else size
    dx, work, where = torch.empty_like(x), _memory(layer, dtype, BACKWARD), _addresses_of(weights)
    gradients = [
        torch.empty(weight.shape, dtype=torch.float32, device="cpu") if is_wanted else None
        for weight, is_wanted in zip(weights, of_weights, strict=True)
    ]
    into = array("Q", [
        0 if gradient is None else address("a gradient", gradient, torch.float32, gradient.numel())
        for gradient in gradients
    ])  # fmt: skip
    outcome = cpp.call(
        "encoder_layer_backward", dtype, ctypes.addressof(layer), address("dy", dy, x.dtype, of_output),
        address("x", x, weights.query.dtype, size), where.buffer_info()[0],
        address("saved", saved, torch.uint8, _bytes(layer, dtype, SAVED)), into.buffer_info()[0],
        address("dx", dx, x.dtype, size), want_x, address("work", work, torch.uint8, len(work)),
    )  # fmt: skip
    _ran(outcome, x.shape[0], names.cu_seqlens)
    return dx if want_x else None, *gradients


# ---- with gradients --------------------------------------------------------------------------------------

COUNT = len(LayerWeights._fields)


def encoder_layers(
    x: Tensor, layers: Sequence[LayerWeights], cu_seqlens: Tensor, options: Sequence[LayerOptions], *,
    seed: Tensor | None, row_ids: Tensor | None, sequence_ids: Tensor | None, first_only: bool = False,
) -> Tensor:  # fmt: skip
    """The output [T, C] of layers one after another for x [T, C]; with `first_only` the last layer's is [B, C]. All are
    one autograd node. The caller has checked `takes` for each layer."""
    drawn, names = 0, Names(cu_seqlens, None, None)
    if max(max(of.probs_p, of.out_p, of.down_p) for of in options) > 0.0:
        drawn = int(seed)
        names = Names(cu_seqlens, _named(sequence_ids, len(cu_seqlens) - 1), _named(row_ids, x.shape[0]))
    weights = itertools.chain.from_iterable(layers)
    return apply_unwatched(_EncoderLayers, products.dtype_of(x), options, drawn, names, first_only, x, *weights)


def saved_bytes(x: Tensor, weights: LayerWeights) -> int:
    """About how many bytes a layer saves for its backward pass, apart from its input x [T, C]."""
    of_products = 4 * len(weights.query) + len(weights.up) + 2 * x.shape[1]
    return x.shape[0] * (of_products * products.dtype_of(x).itemsize + x.shape[1] * x.itemsize)


def _named(ids: Tensor | None, count: int) -> Tensor:
    """ids as contiguous int64; by default 0, 1, 2, ..."""
    if ids is None:
        return torch.arange(count, dtype=torch.int64, device="cpu")
    return ids.to(torch.int64).contiguous()


def _by_layer(weights: Sequence[Tensor]) -> list[LayerWeights]:
    return [LayerWeights(*weights[first : first + COUNT]) for first in range(0, len(weights), COUNT)]


class _EncoderLayers(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, dtype: torch.dtype, options: Sequence[LayerOptions], seed: int, names: Names,
        first_only: bool, x: Tensor, *weights: Tensor,
    ) -> Tensor:  # fmt: skip
        inputs, buffers, layers = [], [], _by_layer(weights)
        for i, (layer, of) in enumerate(zip(layers, options, strict=True)):
            inputs.append(x)
            x, saved = forward(x, layer, names, of, seed, dtype, first_only and i + 1 == len(layers))
            buffers.append(saved)
        ctx.dtype, ctx.options, ctx.seed, ctx.first_only = dtype, options, seed, first_only
        ctx.save_for_backward(*names, *weights, *inputs, *buffers)
        return x

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        count, of_names = len(ctx.options), len(Names._fields)
        of_weights = of_names + count * COUNT
        tensors = ctx.saved_tensors
        names, weights = Names(*tensors[:of_names]), tensors[of_names:of_weights]
        inputs, buffers = tensors[of_weights : of_weights + count], tensors[of_weights + count :]
        want_x, *wanted = ctx.needs_input_grad[5:]
        x, layers = inputs[0], _by_layer(weights)
        if by_torch(dy):  # a second derivative may be wanted, which only the single operators have

            def one_by_one(x: Tensor, *weights: Tensor) -> Tensor:
                with torch.autocast("cpu", torch.bfloat16, enabled=ctx.dtype is not x.dtype):
                    for i, (layer, of) in enumerate(zip(_by_layer(weights), ctx.options, strict=True)):
                        x = _by_operators(x, layer, names, of, ctx.seed, ctx.first_only and i + 1 == count)
                return x

            return *(None,) * 5, *plain_gradients(one_by_one, (x, *weights), (want_x, *wanted), dy)

        gradients: list[Tensor | None] = []
        for i in reversed(range(count)):
            of_layer = wanted[i * COUNT : (i + 1) * COUNT]
            goes_on = want_x or any(wanted[: i * COUNT])
            if not goes_on and not any(of_layer):
                gradients[:0] = [None] * ((i + 1) * COUNT)
                break
            dy, *found = backward(
                dy.contiguous(), inputs[i], layers[i], buffers[i], names, ctx.options[i], ctx.seed, ctx.dtype,
                (goes_on, *of_layer), ctx.first_only and i + 1 == count,
            )  # fmt: skip
            gradients[:0] = found
        gradients.insert(0, dy if want_x else None)
        return *(None,) * 5, *(g if g is None or g.dtype is x.dtype else g.to(x.dtype) for g in gradients)


def _by_operators(
    x: Tensor, weights: LayerWeights, names: Names, options: LayerOptions, seed: int, first_only: bool
) -> Tensor:
    """The same layer from single operators, which can be differentiated twice."""
    drawn = torch.tensor([seed], dtype=torch.int64, device="cpu")
    cu_seqlens, sequence_ids, row_ids = names

    def dropout(p: float, stream: int, **ids: Tensor) -> dict[str, object]:
        return {"dropout_p": p, "seed": drawn, "stream": stream, **ids} if p > 0.0 else {}

    first, starts = x, cu_seqlens
    if first_only:
        rows = cu_seqlens[:-1].long().clamp(max=max(len(x) - 1, 0))
        first, starts = x[rows], torch.arange(len(cu_seqlens), dtype=torch.int32, device="cpu")
        row_ids = None if row_ids is None else row_ids[rows]
    q, k, v = (
        native.linear(t, weight, bias).unflatten(1, (options.heads, -1))
        for t, weight, bias in zip((first, x, x), weights[:6:2], weights[1:6:2], strict=True)
    )
    of_probs = dropout(options.probs_p, options.probs_stream, sequence_ids=sequence_ids)
    o = native.attention(q, k, v, starts, cu_seqlens_k=cu_seqlens, **of_probs).flatten(1)
    x = first
    x = native.add_layer_norm(
        native.linear(o, weights.out), x, weights.out_norm, weights.out_norm_bias, options.out_eps,
        x_bias=weights.out_bias, **dropout(options.out_p, options.out_stream, row_ids=row_ids),
    )  # fmt: skip
    z = native.feed_forward(x, weights.up, weights.up_bias, weights.down, None, options.activation)
    y = native.add_layer_norm(
        z, x, weights.down_norm, weights.down_norm_bias, options.down_eps, x_bias=weights.down_bias,
        **dropout(options.down_p, options.down_stream, row_ids=row_ids),
    )  # fmt: skip
    return torch.where((cu_seqlens.diff() > 0)[:, None], y, 0.0) if first_only else y

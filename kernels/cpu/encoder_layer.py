"""Post-norm encoder layers for training on a CPU as one autograd node, with one C++ call forward and one backward.

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
from . import kept_gradients, library, products
from . import operators as cpp
from .library import NO_MEMORY, WIDTH
from .pointers import PLAIN, address, address_of_starts, addresses


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


def takes(x: Tensor, layers: Sequence[LayerWeights], options: Sequence[LayerOptions]) -> bool:
    """Whether `encoder_layers` can replace the single operators: x or a weight needs a gradient, every operator of the
    layers would run in C++, no bias is missing, and no dispatch mode has to see the single operators."""
    weights = list(itertools.chain.from_iterable(layers))
    if any(t is None for t in weights):
        return False
    if not all(of.fold and of.activation in cpp.ACTIVATION_NUMBERS for of in options):
        return False
    first = layers[0]
    if not products.takes(x, first[:6:2], first[1:6:2], options[0].activation, later=weights[6:]):
        return False
    dtype = x.dtype
    if x.dim() != 2 or not x.is_contiguous():
        return False
    if not all(type(t) in PLAIN and t.dtype is dtype and t.is_cpu and t.is_contiguous() for t in weights):
        return False
    multiple = WIDTH * 4 // products.dtype_of(x).itemsize
    return all(
        _fits(x.shape[1], tuple([t.shape for t in of_layer]), of.heads, multiple)
        for of_layer, of in zip(layers, options, strict=True)
    )


# ---- the calls -------------------------------------------------------------------------------------------


@functools.lru_cache(1024)
def _numbers(width: int, attended: int, inner: int, options: LayerOptions, dtype: torch.dtype) -> tuple[tuple, tuple]:
    """The fields of `_Layer` from `probs_stream` to `attention_scale`, and from `width` to `activation`. Raises
    ValueError on sizes that the C++ does not support."""
    for what, size in (("width", width), ("width of attention", attended), ("inner width", inner)):
        cpp.expect_multiple("encoder_layer", f"the {what}", size, WIDTH * 4 // dtype.itemsize)
    if options.heads < 1 or attended % (options.heads * WIDTH):
        raise ValueError(f"encoder_layer: {options.heads} heads do not fit attention of width {attended}")
    drops = (options.probs_p, options.out_p, options.down_p)
    of_dropout = (
        options.probs_stream, options.out_stream, options.down_stream, *map(keep_threshold, drops),
        *(1.0 / (1.0 - p) for p in drops),
    )  # fmt: skip
    return (
        (*of_dropout, options.out_eps, options.down_eps, (attended // options.heads) ** -0.5),
        (width, attended, inner, options.heads, cpp.ACTIVATION_NUMBERS[options.activation]),
    )


class _Described:
    """What the C++ gets of layers and of a batch, apart from the memory that a pass makes.

    Attributes:
        array: a `_Layer` for each layer. weights: the addresses of all weights.
        bytes: for each layer those that it saves, and of forward's and of backward's working memory.
        sizes: for each layer the number of elements of its output.

    Raises: ValueError or TypeError on tensors and sizes that the C++ does not support.
    """

    def __init__(
        self, x: Tensor, layers: Sequence[LayerWeights], names: Names, options: Sequence[LayerOptions], seed: int,
        dtype: torch.dtype, first_only: bool,
    ) -> None:  # fmt: skip
        rows, of_weights, last = x.shape[0], layers[0].query.dtype, len(layers) - 1
        starts, sequences = address_of_starts("cu_seqlens", names.cu_seqlens)
        drops = any(of.probs_p > 0.0 or of.out_p > 0.0 or of.down_p > 0.0 for of in options)
        if drops and (names.sequence_ids is None or names.row_ids is None):
            raise ValueError("encoder_layer: dropout needs sequence_ids and row_ids")
        of_sequences, of_rows = (
            None if t is None else address(name, t, torch.int64, count)
            for name, t, count in (("sequence_ids", names.sequence_ids, sequences), ("row_ids", names.row_ids, rows))
        )
        wide = cpp.is_wide("x", x.dtype, dtype)
        described, shapes, self.sizes = [], [], []
        for i, (weights, of) in enumerate(zip(layers, options, strict=True)):
            (attended, width), inner = weights.query.shape, weights.up.shape[0]
            middle, sizes = _numbers(width, attended, inner, of, dtype)
            is_first = first_only and i == last
            described.append((starts, of_sequences, of_rows, seed, *middle, sequences, rows, *sizes, wide, is_first))
            shapes += layer_shapes(width, attended, inner)
            self.sizes.append((sequences if is_first else rows) * width)
        found = addresses(list(itertools.chain.from_iterable(layers)), of_weights, shapes)
        if found is None:
            raise ValueError("encoder_layer: the weights must be contiguous on the CPU and have the shapes of a layer")
        self.array, self.weights = (_Layer * len(layers))(*described), found
        counted = array("q", bytes(24 * len(layers)))
        cpp.call(
            "trained_layers_bytes", dtype, ctypes.addressof(self.array), len(layers), counted.buffer_info()[0]
        )  # fmt: skip
        self.bytes = [counted[i : i + 3] for i in range(0, len(counted), 3)]


def _bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device="cpu")


def _of_bytes(name: str, t: Tensor) -> int:
    return address(name, t, torch.uint8, t.numel())


def _ran(outcome: int, rows: int, cu_seqlens: Tensor) -> None:
    if outcome == NO_MEMORY:
        raise MemoryError(f"encoder_layer: no memory beside {rows} rows")
    if outcome:
        raise ValueError(f"encoder_layer: cu_seqlens must rise from 0 to {rows}, got {cu_seqlens.tolist()}")


def forward(
    x: Tensor, layers: Sequence[LayerWeights], names: Names, options: Sequence[LayerOptions], seed: int,
    dtype: torch.dtype, first_only: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """(the output of each layer [T, C], the last with `first_only` [B, C]; what each layer saves for the backward pass,
    one uint8 buffer). Products are computed in `dtype`; x [T, C] and the weights are in `dtype` or float32.

    Raises: ValueError where cu_seqlens does not cut T rows into sequences, or on shapes that do not fit; MemoryError.
    """
    of = _Described(x, layers, names, options, seed, dtype, first_only)
    width = layers[0].query.shape[1]
    ys = [torch.empty(size // width, width, dtype=x.dtype, device="cpu") for size in of.sizes]
    saved, work = [_bytes(count) for count, _, _ in of.bytes], _bytes(max(count for _, count, _ in of.bytes))
    xs = array("Q", [
        address("x", x, layers[0].query.dtype, x.shape[0] * width),
        *(address("y", y, x.dtype, size) for y, size in zip(ys, of.sizes, strict=True)),
    ])  # fmt: skip
    into = array("Q", [_of_bytes("saved", t) for t in saved])
    outcome = cpp.call(
        "trained_layers_forward", dtype, ctypes.addressof(of.array), len(layers), of.weights.buffer_info()[0],
        xs.buffer_info()[0], into.buffer_info()[0], _of_bytes("work", work),
    )  # fmt: skip
    _ran(outcome, x.shape[0], names.cu_seqlens)
    return ys, saved


def backward(
    dy: Tensor, xs: Sequence[Tensor], layers: Sequence[LayerWeights], saved: Sequence[Tensor], names: Names,
    options: Sequence[LayerOptions], seed: int, dtype: torch.dtype, wanted: Sequence[bool], first_only: bool = False,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradient of the first layer's x, and of each weight in float32; None for those that are not wanted.

    xs: the input of each layer.
    """
    want_x, *of_weights = wanted
    of = _Described(xs[0], layers, names, options, seed, dtype, first_only)
    width, x_dtype = layers[0].query.shape[1], layers[0].query.dtype
    size = xs[0].shape[0] * width
    dxs = [torch.empty_like(xs[0]) for _ in range(min(2, len(layers)))]
    work = _bytes(max(count for _, _, count in of.bytes))
    gradients: list[Tensor | None] = []
    into = array("Q")
    for weight, is_wanted in zip(itertools.chain.from_iterable(layers), of_weights, strict=True):
        gradient = torch.empty(weight.shape, dtype=torch.float32, device="cpu") if is_wanted else None
        gradients.append(gradient)
        into.append(0 if gradient is None else address("a gradient", gradient, torch.float32, gradient.numel()))
    inputs = array("Q", [address("x", x, x_dtype, size) for x in xs])
    kept = array("Q", [
        address("saved", t, torch.uint8, count) for t, (count, _, _) in zip(saved, of.bytes, strict=True)
    ])  # fmt: skip
    of_inputs = array("Q", [address("dx", dx, xs[0].dtype, size) for dx in dxs])
    squares = array("d", bytes(8 * len(gradients))) if kept_gradients.is_kept() else None
    outcome = cpp.call(
        "trained_layers_backward", dtype, ctypes.addressof(of.array), len(layers),
        address("dy", dy, xs[0].dtype, of.sizes[-1]), of.weights.buffer_info()[0], inputs.buffer_info()[0],
        kept.buffer_info()[0], into.buffer_info()[0], None if squares is None else squares.buffer_info()[0],
        of_inputs.buffer_info()[0], want_x, _of_bytes("work", work),
    )  # fmt: skip
    _ran(outcome, xs[0].shape[0], names.cu_seqlens)
    if squares is not None:
        kept_gradients.note_squares(gradients, squares)
    return dxs[(len(layers) - 1) % 2] if want_x else None, *gradients


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
        ys, saved = forward(x, _by_layer(weights), names, options, seed, dtype, first_only)
        ctx.dtype, ctx.options, ctx.seed, ctx.first_only = dtype, options, seed, first_only
        ctx.save_for_backward(*names, *weights, x, *ys[:-1], *saved)
        return ys[-1]

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

        # The pass ends at the first layer with a wanted gradient.
        begin = 0 if want_x else wanted.index(True) // COUNT
        dx, *gradients = backward(
            dy.contiguous(), inputs[begin:], layers[begin:], buffers[begin:], names, ctx.options[begin:], ctx.seed,
            ctx.dtype, (want_x, *wanted[begin * COUNT :]), ctx.first_only,
        )  # fmt: skip
        found = (dx, *[None] * (begin * COUNT), *gradients)
        return *(None,) * 5, *(g if g is None or g.dtype is x.dtype else g.to(x.dtype) for g in found)


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

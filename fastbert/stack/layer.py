"""Runs a layer from its description, and several layers in one C++ call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor

from .. import functional as F
from ..inference import one_call
from ..inference.eight_bits import Int8Linear
from ..inference.weights import is_untouched
from . import distances
from .description import Drops, Layer, Part
from .shared import Pass
from .steps import (
    add_norm,
    feed_forward,
    linear_without_bias,
    multiply,
    norm_and_sum,
    norm_of_heads,
    norm_only,
    project,
)

# Up to so many tokens, all layers in one C++ call take less time than all but the last in one call and then first
# tokens through the last layer, operator by operator. MiniLM, processor time in ms: at 32 tokens 5.5 against 5.8 in
# bfloat16 and 9.6 against 9.3 in float32; at 128 tokens 17.2 against 16.1 and 31.6 against 28.5.
FEW_TOKENS = 64

# Up to so many saved bytes, all layers in training are one node of autograd. Its Python saves some 0.2 ms a layer, but
# nothing is freed before its backward pass ends.
SAVED_AT_ONCE = 64 << 20

# ---- one layer -------------------------------------------------------------------------------------------


def run(x: Tensor, layer: Layer, drops: Drops, shared: Pass, index: int, training: bool) -> Tensor:
    """x [T, C] through a layer.

    Args:
        index: the layer's number in the pass, which gives its dropouts other masks than those of other layers.
        training: the LayerNorm adds the bias of the product before it, and its backward pass also computes that bias's
            gradient. Otherwise the product adds it.
    """
    if layer.pre_norm:
        return _pre_norm(x, layer, drops, shared, index, training)
    y = as_one_operator(x, layer, drops, shared, index, training)
    return _post_norm(x, layer, drops, shared, index, training) if y is None else y


def run_for_first(x: Tensor, layer: Layer, drops: Drops, shared: Pass, index: int, training: bool) -> Tensor:
    """The rows of `run` for each sequence's first token [B, C], in a post-norm layer. Only keys and values are computed
    for the other tokens. The row of a sequence without tokens is arbitrary."""
    y = as_one_operator(x, layer, drops, shared, index, training, first_only=True)
    if y is not None:
        return y
    first = F.pool(x, shared.batch.cu_seqlens, "cls", impl=shared.impl)
    if not layer.has_heads:
        return _after_attention(_of_no_heads(first), first, layer, drops, shared.of_first(), index, training)
    if len(layer.qkv) == 3:
        parts_and_inputs = zip(layer.qkv, (first, x, x), strict=True)
        q, k, v = (multiply(part, t, shared).unflatten(-1, (-1, layer.head_dim)) for part, t in parts_and_inputs)
    else:
        q, k, v = project(x, layer.qkv, layer.joined, layer.head_dim, shared)
        q = q[shared.batch.first_tokens]
    o = shared.attend_for_first(q, k, v, drops.probs, index + 1)
    return _after_attention(o, first, layer, drops, shared.of_first(), index, training)


def _post_norm(x: Tensor, layer: Layer, drops: Drops, shared: Pass, index: int, training: bool) -> Tensor:
    return _after_attention(_attention(x, layer, drops, shared, index), x, layer, drops, shared, index, training)


def _after_attention(
    o: Tensor, x: Tensor, layer: Layer, drops: Drops, shared: Pass, index: int, training: bool
) -> Tensor:  # fmt: skip
    """The part of a post-norm layer after attention. x: the layer's input, o: attention's output."""
    first = 2 * index + 1
    y, bias = linear_without_bias(layer.out, o, training, shared)
    x = add_norm(y, bias, x, layer.out_norm, drops.out, shared, stream=first)
    y, bias = _feed_forward(x, layer, drops, shared, fold=training)
    return add_norm(y, bias, x, layer.down_norm, drops.down, shared, stream=first + 1)


def _pre_norm(x: Tensor, layer: Layer, drops: Drops, shared: Pass, index: int, training: bool) -> Tensor:
    h = norm_only(x, layer.out_norm, shared)
    fold = training and layer.after_out is None and layer.divisor == 1.0
    y, bias = linear_without_bias(layer.out, _attention(h, layer, drops, shared, index), fold, shared)
    y = _added(y, layer.after_out, layer, shared)
    h, x = norm_and_sum(y, bias, x, layer.down_norm, drops.out, shared, stream=2 * index + 1)
    y, _ = _feed_forward(h, layer, drops, shared, fold=False)
    y = _added(y, layer.after_down, layer, shared)
    return x + (nn.functional.dropout(y, drops.down) if drops.down > 0.0 else y)


def _added(y: Tensor, norm: Part | None, layer: Layer, shared: Pass) -> Tensor:
    """The value that a pre-norm block with the result y adds to x, before its dropout."""
    if norm is not None:
        y = norm_only(y, norm, shared)
    return y if layer.divisor == 1.0 else y / layer.divisor


def _attention(x: Tensor, layer: Layer, drops: Drops, shared: Pass, index: int) -> Tensor:
    """Attention of x [T, C] before its output layer: [T, A]."""
    if not layer.has_heads:
        return _of_no_heads(x)
    q, k, v = project(x, layer.qkv, layer.joined, layer.head_dim, shared)
    if layer.distances is not None:
        return distances.attend(q, k, v, layer.distances, drops.table, drops.probs, shared, index + 1)
    if layer.q_norm is not None:
        q = norm_of_heads(q, layer.q_norm, layer.norms_heads, shared)
        k = norm_of_heads(k, layer.k_norm, layer.norms_heads, shared)
    return shared.attend(q, k, v, drops.probs, index + 1, layer.kind, layer.scale, layer.bias)


def _of_no_heads(x: Tensor) -> Tensor:
    """Attention's output without heads for x [N, C]: [N, 0]."""
    return x.new_empty(len(x), 0)


def _feed_forward(x: Tensor, layer: Layer, drops: Drops, shared: Pass, fold: bool) -> tuple[Tensor, Tensor | None]:
    return feed_forward(
        x, layer.up, layer.activation, layer.activation_name, layer.down, shared,
        gated=layer.gated, gate=layer.gate, inner_dropout=drops.inner, fold=fold,
    )  # fmt: skip


def as_one_operator(
    x: Tensor, layer: Layer, drops: Drops, shared: Pass, index: int, training: bool, first_only: bool = False
) -> Tensor | None:
    """A post-norm layer by `functional.encoder_layer`; None if that operator cannot compute it."""
    if not _may_be_one_operator(x, shared, training) or (found := _operator_of(layer, drops, index, training)) is None:
        return None
    weights, options = found
    return F.encoder_layer(
        x, weights, shared.batch.cu_seqlens, shared.batch.max_seqlen, options,
        schedule=shared.schedule, seed=shared.seed, row_ids=shared.row_ids, sequence_ids=shared.batch.sequence_ids,
        impl=shared.impl, qkv=joined_by(layer), first_only=first_only,
    )  # fmt: skip


def _may_be_one_operator(x: Tensor, shared: Pass, training: bool) -> bool:
    if torch.compiler.is_compiling() or (impl := F.choose_impl(shared.impl, x.device)) == "reference":
        return False
    if impl == "native" and not (training and torch.is_grad_enabled()):
        return False
    return shared.is_plain()


def _operator_of(
    layer: Layer, drops: Drops, index: int, training: bool
) -> tuple[F.LayerWeights, F.LayerOptions] | None:  # fmt: skip
    if layer.activation_name is None or layer.gated or drops.inner > 0.0:
        return None
    if not layer.has_heads or (tensors := layer.tensors()) is None:
        return None
    first = 2 * index + 1
    options = F.LayerOptions(
        tensors[0].shape[0] // layer.head_dim, layer.activation_name, layer.out_norm.module.eps,
        layer.down_norm.module.eps, drops.probs, drops.out, drops.down, index + 1, first, first + 1, fold=training,
    )  # fmt: skip
    return F.LayerWeights(*tensors), options


def in_one_node(x: Tensor, layers: Sequence[tuple[int, Layer, Drops]], shared: Pass, first_only: bool) -> Tensor | None:
    """x after all layers in training, as one node of autograd. layers: the index, description and dropouts of each.

    Returns: None if the layers have to be called one after another, because there is none, the C++ operator does not
        compute one of them, or they save so much that it should be freed layer by layer.
    """
    if not layers or not _may_be_one_operator(x, shared, training=True):
        return None
    found = []
    for index, layer, drops in layers:
        of_layer = None if layer.pre_norm else _operator_of(layer, drops, index, True)
        if of_layer is None:
            return None
        found.append(of_layer)
    weights, options = zip(*found, strict=True)
    if sum(F.saved_bytes(x, of) for of in weights) > SAVED_AT_ONCE:
        return None
    return F.encoder_layers(
        x, weights, shared.batch.cu_seqlens, options, seed=shared.seed, row_ids=shared.row_ids,
        sequence_ids=shared.batch.sequence_ids, first_only=first_only, impl=shared.impl,
    )  # fmt: skip


def joined_by(layer: Layer) -> Callable[[], tuple[Tensor, Tensor | None]]:
    """A function that returns the joint weight [3A, C] and bias [3A] of query, key and value."""
    modules = [part.module for part in layer.qkv]
    if len(modules) == 1:
        return lambda: (modules[0].weight, modules[0].bias)
    return partial(layer.joined.joined, modules)


# ---- several layers --------------------------------------------------------------------------------------


def in_one_call(x: Tensor, layers: Iterable[Layer | None], shared: Pass) -> Tensor | None:
    """x [T, C] after the last layer, by one C++ call; None if the layers have to be called one after another: one of
    them is None, one call would be slower or cannot compute them, a dropout is on, or gradients are on."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or shared.seed is not None or not shared.is_plain():
        return None
    layers = list(layers)
    if (found := all_in_8_bits(layers)) is not None:
        is_native = x.is_cpu and F.choose_impl(shared.impl, x.device) == "native"
        return one_call.run_in_8_bits(x, *found, shared.batch.cu_seqlens) if is_native else None
    if not is_one_call_ahead(x.nbytes, x.dtype, x.device, shared.impl) or (found := in_one(layers)) is None:
        return None
    return one_call.run(x, *found, shared.batch.cu_seqlens)


def is_one_call_ahead(nbytes: int, dtype: torch.dtype, device: torch.device, impl: F.Impl | None) -> bool:
    """Whether one call is faster than the layers one by one, for hidden states of so many bytes in all."""
    return (
        one_call.is_ahead(nbytes, dtype) and device.type == "cpu" and F.choose_impl(impl, device) == "native"
    )  # fmt: skip


def in_one(layers: Iterable[Layer | None]) -> tuple[list[Tensor], F.LayerOptions] | None:
    """The arguments of `inference.one_call.run`: the tensors of all layers, and the options that they share. None if a
    layer is None or not of that kind, or if the options differ."""
    tensors: list[Tensor] = []
    numbers = set()
    for layer in layers:
        if layer is None or layer.pre_norm or layer.gated or layer.activation_name not in one_call.ACTIVATIONS_IN_CPP:
            return None
        of_layer = layer.tensors()
        if of_layer is None or any(t is None for t in of_layer):
            return None
        tensors += of_layer
        numbers.add((of_layer[0].shape[0] // layer.head_dim, *_shared(layer)))
    return (tensors, F.LayerOptions(*numbers.pop())) if len(numbers) == 1 else None


def all_in_8_bits(layers: Iterable[Layer | None]) -> tuple[list[one_call.Int8Layer], F.LayerOptions] | None:
    """`in_one` for layers whose weights are all in 8 bits. Their numbers of heads may differ."""
    found: list[one_call.Int8Layer] = []
    numbers = set()
    for layer in layers:
        if layer is None or layer.pre_norm or layer.gated or layer.activation_name not in one_call.ACTIVATIONS_IN_CPP:
            return None
        if (of_layer := in_8_bits(layer)) is None or not one_call.fit_in_one_call(of_layer):
            return None
        found.append(of_layer)
        numbers.add((layer.head_dim, *_shared(layer)))
    if len(numbers) != 1:
        return None
    return found, F.LayerOptions(found[0].heads, *numbers.pop()[1:])


def in_8_bits(layer: Layer) -> one_call.Int8Layer | None:
    """The layer as `kernels.cpu.int8` takes it; None if a weight is not in 8 bits, or a part is not plain."""
    linears = [part.module for part in (*layer.qkv, layer.out, layer.up, layer.down)]
    norms = (layer.out_norm, layer.down_norm)
    if len(linears) != 6 or not all(is_untouched(linear, Int8Linear) for linear in linears):
        return None
    if not all(norm.plain and norm.module.bias is not None for norm in norms):
        return None
    tensors = tuple(t for norm in norms for t in (norm.module.weight, norm.module.bias))
    heads = linears[0].out_features // layer.head_dim
    return one_call.Int8Layer(*(linear.packed for linear in linears), tensors, heads)


def _shared(layer: Layer) -> tuple[str, float, float]:
    """The fields of `LayerOptions` after the number of heads."""
    return layer.activation_name, layer.out_norm.module.eps, layer.down_norm.module.eps

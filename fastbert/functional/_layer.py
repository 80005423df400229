"""A whole layer as one operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..kernels._layer import LayerOptions, LayerWeights
from ..kernels.cpu import encoder_layer as cpu_encoder_layer
from ..kernels.cpu.encoder_layer import saved_bytes
from ._choice import Impl, choose_impl, triton_module
from ._expect import expect_cu_seqlens, expect_dropout, expect_integers

__all__ = ["encoder_layer", "encoder_layers", "saved_bytes"]


def encoder_layer(
    x: Tensor,
    weights: LayerWeights,
    cu_seqlens: Tensor,
    max_seqlen: int,
    options: LayerOptions,
    *,
    schedule: Any,
    seed: Tensor | None = None,
    row_ids: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    qkv: Callable[[], tuple[Tensor, Tensor | None]] | None = None,
    first_only: bool = False,
    impl: Impl | None = None,
) -> Tensor | None:
    """A post-norm encoder layer of a packed batch as one operator; None if its operators have to be called one by one.

        x = LayerNorm(dropout(attention(x)) + x);  x = LayerNorm(dropout(feed_forward(x)) + x)

    The Triton kernels have this operator for plain tensors of one dtype, outside of autocast, torch.compile, tracing
    and modes that observe or change single operators; second derivatives raise an error. On a CPU the C++ operators
    have it for training: with gradients on, `options.fold` and all biases, also under autocast to bfloat16. The result
    has the bits of the operators one by one, and its gradient the same error. (On a CPU, if neither x nor query, key
    and value need a gradient, the operators one by one round their products differently.)

    Args:
        x: [T, C].
        weights, options: see `LayerWeights` and `LayerOptions`.
        cu_seqlens, max_seqlen, schedule, seed, sequence_ids: as in `attention`; row_ids: as in `add_layer_norm`.
        qkv: returns the joint weight [3A, C] and bias [3A] of query, key and value; called without gradients, so that
            the caller may keep both from pass to pass. By default they are joined in every call.
        first_only: the result is [B, C], the rows of each sequence's first token, zero for a sequence without tokens.
            Only the C++ operators have it.
    """
    chosen = choose_impl(impl, x.device)
    if chosen == "native":
        return encoder_layers(
            x, [weights], cu_seqlens, [options],
            seed=seed, row_ids=row_ids, sequence_ids=sequence_ids, first_only=first_only, impl=impl,
        )  # fmt: skip
    if chosen != "triton" or first_only:
        return None
    module = triton_module("encoder_layer")
    taken = module.takes(x, weights, options)
    if not taken:
        return None
    _expect(x, cu_seqlens, [options], seed, row_ids, sequence_ids)
    return module.encoder_layer(
        x, weights, cu_seqlens.contiguous(), max_seqlen, options,
        schedule=schedule, seed=seed, row_ids=row_ids, sequence_ids=sequence_ids, taken=taken, qkv=qkv,
    )  # fmt: skip


def encoder_layers(
    x: Tensor,
    layers: Sequence[LayerWeights],
    cu_seqlens: Tensor,
    options: Sequence[LayerOptions],
    *,
    seed: Tensor | None = None,
    row_ids: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    first_only: bool = False,
    impl: Impl | None = None,
) -> Tensor | None:
    """`encoder_layer` for layers one after another; `first_only` is about the last. Only the C++ operators for training
    have it. All layers are one node of autograd: their gradients come at the same time, and what they saved for the
    backward pass is freed at its end."""
    if choose_impl(impl, x.device) != "native" or not cpu_encoder_layer.takes(x, layers, options):
        return None
    _expect(x, cu_seqlens, options, seed, row_ids, sequence_ids)
    return cpu_encoder_layer.encoder_layers(
        x, layers, cu_seqlens.contiguous(), options,
        seed=seed, row_ids=row_ids, sequence_ids=sequence_ids, first_only=first_only,
    )  # fmt: skip


def _expect(
    x: Tensor, cu_seqlens: Tensor, options: Sequence[LayerOptions], seed: Tensor | None, row_ids: Tensor | None,
    sequence_ids: Tensor | None,
) -> None:  # fmt: skip
    for of in options:
        expect_dropout("encoder_layer", max(of.probs_p, of.out_p, of.down_p), seed)
    expect_cu_seqlens("encoder_layer", cu_seqlens)
    if row_ids is not None:
        expect_integers("encoder_layer", "row_ids", row_ids, x.shape[0])
    expect_integers("encoder_layer", "sequence_ids", sequence_ids, cu_seqlens.shape[0] - 1)

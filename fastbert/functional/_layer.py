"""A whole layer as one operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels._layer import LayerOptions, LayerWeights
from ..kernels.cpu import encoder_layer as cpu_encoder_layer
from ._choice import Impl, choose_impl, triton_module
from ._expect import expect_dropout, expect_integers

__all__ = ["encoder_layer"]


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
    impl: Impl | None = None,
) -> Tensor | None:
    """A post-norm encoder layer of a packed batch as one operator, or None: its operators have to be called one by one.

        x = LayerNorm(dropout(attention(x)) + x);  x = LayerNorm(dropout(feed_forward(x)) + x)

    The Triton kernels have it, for plain tensors of one dtype, outside of autocast, torch.compile, tracing and whatever
    else follows or changes single operators, and refuse second derivatives. On a CPU the C++ operators have it for
    training: where gradients are on, `options.fold` is and every bias is there, under autocast to bfloat16 too. The
    bits of x are those of the operators one by one, its gradient is as close. (Where on a CPU neither x nor query, key
    and value want a gradient, the operators one by one round their products otherwise.)

    Args:
        x: [T, C].
        weights, options: see there.
        cu_seqlens, max_seqlen, schedule, seed, sequence_ids: as in `attention`; row_ids: as in `add_layer_norm`.
        qkv: gives query, key and value joined, weight [3A, C] and bias [3A]; called where no gradient is recorded, so
            that the caller may keep them from pass to pass. By default they are joined anew.
    """
    chosen = choose_impl(impl, x.device)
    if chosen not in ("triton", "native"):
        return None
    module = triton_module("encoder_layer") if chosen == "triton" else cpu_encoder_layer
    taken = module.takes(x, weights, options)
    if not taken:
        return None
    expect_dropout("encoder_layer", max(options.probs_p, options.out_p, options.down_p), seed)
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"encoder_layer: cu_seqlens must be [B + 1] int32, got {cu_seqlens.dtype} of {tuple(cu_seqlens.shape)}"
        )
    if row_ids is not None:
        expect_integers("encoder_layer", "row_ids", row_ids, x.shape[0])
    expect_integers("encoder_layer", "sequence_ids", sequence_ids, cu_seqlens.shape[0] - 1)
    if chosen == "native":
        return module.encoder_layer(
            x, weights, cu_seqlens.contiguous(), options, seed=seed, row_ids=row_ids, sequence_ids=sequence_ids
        )
    return module.encoder_layer(
        x, weights, cu_seqlens.contiguous(), max_seqlen, options,
        schedule=schedule, seed=seed, row_ids=row_ids, sequence_ids=sequence_ids, taken=taken, qkv=qkv,
    )  # fmt: skip

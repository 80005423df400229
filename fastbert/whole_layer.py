"""An encoder layer as tests and `fastbert verify` call it: by any implementation, with one gradient a tensor.

`functional.encoder_layer` may refuse. Here the Triton kernels' refusal is an error, and the other implementations then
take a layer's operators one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import functional as F


def encoder_layer(
    x: Tensor, qkv: Tensor, qkv_bias: Tensor | None, cu_seqlens: Tensor, max_seqlen: int, heads: int, *, impl: str,
    activation: str = "gelu", dropout_p: float = 0.0, seed: Tensor | None = None, stream: int = 0,
    row_ids: Tensor | None = None, fold: bool = False, whole: bool = True, first_only: bool = False,
    **rest: Tensor | None,
) -> Tensor:  # fmt: skip
    """LayerNorm(dropout(attention(x)) + x), then the same of the feed-forward, of x [T, C].

    Args:
        qkv, qkv_bias: [3C, C] and [3C]; one tensor: the gradient of the keys' bias alone is zero but for rounding.
        stream: of attention's dropout; the two of the hidden states have the next ones.
        fold, row_ids: as in `functional.encoder_layer`.
        first_only: the result is [B, C], the rows of each sequence's first token, zero for a sequence without tokens.
        whole: False: by its operators one by one in any case, as under a mode of torch's dispatcher.
        rest: the other tensors of `functional.LayerWeights`.

    Raises: RuntimeError where the Triton kernels refuse the layer.
    """
    schedule = F.attention_schedule(cu_seqlens, x.shape[0], impl)
    if whole and impl != "reference":
        query, key, value = qkv.chunk(3)
        biases = (None,) * 3 if qkv_bias is None else qkv_bias.chunk(3)
        projections = {"query": query, "key": key, "value": value}
        projections |= dict(zip(("query_bias", "key_bias", "value_bias"), biases, strict=True))
        weights = F.LayerWeights(**projections, **rest)
        options = F.LayerOptions(
            heads, activation, probs_p=dropout_p, out_p=dropout_p, down_p=dropout_p, probs_stream=stream,
            out_stream=stream + 1, down_stream=stream + 2, fold=fold,
        )  # fmt: skip
        y = F.encoder_layer(
            x, weights, cu_seqlens, max_seqlen, options,
            schedule=schedule, seed=seed, row_ids=row_ids, impl=impl, first_only=first_only and impl == "native",
        )  # fmt: skip
        if y is not None:
            return y if not first_only or impl == "native" else _first_rows(y, cu_seqlens)
        if impl == "triton":
            raise RuntimeError("the kernels do not take this layer as one operator")
    products = F.products_beside(impl)
    dropout = {"dropout_p": dropout_p, "seed": seed} if dropout_p else {}
    drop_probs, drop_out, drop_down = (
        dropout | {"stream": stream + n} | ({"row_ids": row_ids} if n else {}) if dropout else {} for n in range(3)
    )
    of_heads = 3, heads, qkv.shape[0] // 3 // heads
    q, k, v = F.linear(x, qkv, qkv_bias, impl=products).unflatten(1, of_heads).unbind(1)
    o = F.attention(q, k, v, cu_seqlens, max_seqlen, schedule=schedule, impl=impl, **drop_probs).flatten(1)
    z = F.linear(o, rest["out"], rest["out_bias"], impl=products)
    x = F.add_layer_norm(z, x, rest["out_norm"], rest["out_norm_bias"], impl=impl, **drop_out)
    feed = rest["up"], rest["up_bias"], rest["down"], rest["down_bias"]
    z = F.feed_forward(x, *feed, activation, impl=impl)
    y = F.add_layer_norm(z, x, rest["down_norm"], rest["down_norm_bias"], impl=impl, **drop_down)
    return _first_rows(y, cu_seqlens) if first_only else y


def _first_rows(y: Tensor, cu_seqlens: Tensor) -> Tensor:
    if len(y) == 0:
        return y.new_zeros(len(cu_seqlens) - 1, y.shape[1])
    rows = cu_seqlens[:-1].long().clamp(max=len(y) - 1)
    return torch.where((cu_seqlens.diff() > 0)[:, None], y[rows], 0.0)

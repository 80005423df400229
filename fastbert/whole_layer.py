"""An encoder layer as tests and `fastbert verify` call it: by any implementation, with one gradient a tensor.

`functional.encoder_layer` is there for the Triton kernels alone, and may refuse. Here the other implementations take a
layer's operators one by one, and a refusal is an error.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import functional as F


def encoder_layer(
    x: Tensor, qkv: Tensor, qkv_bias: Tensor | None, cu_seqlens: Tensor, max_seqlen: int, heads: int, *, impl: str,
    activation: str = "gelu", dropout_p: float = 0.0, seed: Tensor | None = None, stream: int = 0,
    row_ids: Tensor | None = None, fold: bool = False, **rest: Tensor | None,
) -> Tensor:  # fmt: skip
    """LayerNorm(dropout(attention(x)) + x), then the same of the feed-forward, of x [T, C].

    Args:
        qkv, qkv_bias: [3C, C] and [3C]; one tensor: the gradient of the keys' bias alone is zero but for rounding.
        stream: of attention's dropout; the two of the hidden states have the next ones.
        fold, row_ids: as in `functional.encoder_layer`.
        rest: the other tensors of `functional.LayerWeights`.

    Raises: RuntimeError where the Triton kernels refuse the layer.
    """
    (query, key, value), schedule = qkv.chunk(3), F.attention_schedule(cu_seqlens, x.shape[0], impl)
    biases = (None,) * 3 if qkv_bias is None else qkv_bias.chunk(3)
    projections = {"query": query, "key": key, "value": value}
    projections |= dict(zip(("query_bias", "key_bias", "value_bias"), biases, strict=True))
    weights = F.LayerWeights(**projections, **rest)
    if impl != "triton":
        dropout = {"dropout_p": dropout_p, "seed": seed} if dropout_p else {}
        return _one_by_one(
            x, weights, cu_seqlens, max_seqlen, heads, schedule, impl, activation, dropout, stream, row_ids
        )
    options = F.LayerOptions(
        heads, activation, probs_p=dropout_p, out_p=dropout_p, down_p=dropout_p, probs_stream=stream,
        out_stream=stream + 1, down_stream=stream + 2, fold=fold,
    )  # fmt: skip
    y = F.encoder_layer(
        x, weights, cu_seqlens, max_seqlen, options, schedule=schedule, seed=seed, row_ids=row_ids, impl=impl
    )
    if y is None:
        raise RuntimeError("the kernels do not take this layer as one operator")
    return y


def _one_by_one(
    x: Tensor, weights: F.LayerWeights, cu_seqlens: Tensor, max_seqlen: int, heads: int, schedule: Any, impl: str,
    activation: str, dropout: dict[str, Any], stream: int, row_ids: Tensor | None,
) -> Tensor:  # fmt: skip
    of = weights
    q, k, v = (
        F.linear(x, w, b, impl=impl).view(x.shape[0], heads, w.shape[0] // heads)
        for w, b in ((of.query, of.query_bias), (of.key, of.key_bias), (of.value, of.value_bias))
    )
    drop_probs, drop_out, drop_down = (
        dropout | {"stream": stream + n} | ({"row_ids": row_ids} if n else {}) if dropout else {} for n in range(3)
    )
    o = F.attention(q, k, v, cu_seqlens, max_seqlen, schedule=schedule, impl=impl, **drop_probs).flatten(1)
    z = F.linear(o, of.out, of.out_bias, impl=impl)
    x = F.add_layer_norm(z, x, of.out_norm, of.out_norm_bias, impl=impl, **drop_out)
    z = F.feed_forward(x, of.up, of.up_bias, of.down, of.down_bias, activation, impl=impl)
    return F.add_layer_norm(z, x, of.down_norm, of.down_norm_bias, impl=impl, **drop_down)

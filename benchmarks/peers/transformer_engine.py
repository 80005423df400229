"""NVIDIA's Transformer Engine: attention on packed tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..harness.peer import GPU_ONLY, AttentionPeer, Missing, Prepared, need

if TYPE_CHECKING:
    from torch import Tensor


def _attention(inputs: dict[str, Any]) -> Prepared:
    te = need("transformer-engine", "transformer_engine.pytorch")
    if inputs["q"].device.type != "cuda":
        raise Missing("transformer-engine needs a CUDA device")
    heads, dim = inputs["q"].shape[1:]
    cu, longest = inputs["cu_seqlens"], inputs["max_seqlen"]
    attend = te.DotProductAttention(
        heads, dim, attention_dropout=inputs.get("dropout_p", 0.0), qkv_format="thd", attn_mask_type="padding"
    )

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(
            q, k, v, cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=longest, max_seqlen_kv=longest,
            attn_mask_type="padding",
        )  # fmt: skip
        return out.unflatten(-1, (heads, dim))

    return Prepared(call)


ATTENTION = (AttentionPeer("transformer engine", "transformer-engine", _attention, devices=GPU_ONLY),)

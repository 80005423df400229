"""xFormers' memory-efficient attention with a block-diagonal mask."""

from __future__ import annotations

from typing import Any

from ..harness.peer import GPU_ONLY, AttentionPeer, Missing, Prepared, need


def _attention(inputs: dict[str, Any]) -> Prepared:
    ops = need("xformers", "xformers.ops")
    if inputs["q"].device.type != "cuda":
        raise Missing("xformers needs a CUDA device")
    bias = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(inputs["cu_seqlens"].diff().tolist())
    p = inputs.get("dropout_p", 0.0)
    attend = ops.memory_efficient_attention
    return Prepared(lambda q, k, v: attend(q[None], k[None], v[None], attn_bias=bias, p=p)[0])


ATTENTION = (AttentionPeer("xformers", "xformers", _attention, devices=GPU_ONLY),)

"""Everybody's attention on one packed batch: torch's backends, its varlen kernel, flash-attention, xFormers, TE.

A peer that wants padded input gets it ready-made: what padding and unpadding would cost is not in its time. FLOPs
count real tokens only, so padding still shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastbert import functional as F

from ..harness.case import Missing, need


@dataclass(frozen=True)
class Prepared:
    """A function of q, k, v as the peer wants them laid out, and the way there and back from packed [T, H, D]."""

    call: Callable[[Tensor, Tensor, Tensor], Tensor]
    there: Callable[[Tensor], Tensor] = lambda t: t
    back: Callable[[Tensor], Tensor] = lambda t: t


def _ours(impl: str | None):
    def prepare(inputs: dict[str, Any]) -> Prepared:
        rest = {name: value for name, value in inputs.items() if name not in ("q", "k", "v")}
        rest["schedule"] = F.attention_schedule(rest["cu_seqlens"], inputs["q"].shape[0], impl)
        return Prepared(lambda q, k, v: F.attention(q, k, v, impl=impl, **rest))

    return prepare


def _lengths(inputs: dict[str, Any]) -> Tensor:
    return inputs["cu_seqlens"].diff().long()


def _sdpa(backend: str | None):
    def prepare(inputs: dict[str, Any]) -> Prepared:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        lengths, width = _lengths(inputs), inputs["max_seqlen"]
        device = inputs["q"].device
        real = torch.arange(width, device=device) < lengths[:, None]  # [B, S]
        index = real.reshape(-1).nonzero().squeeze(1)
        even = bool(real.all())
        if backend == "FLASH_ATTENTION" and device.type == "cuda" and not even:
            raise Missing("the flash backend takes no mask: uneven lengths need torch's varlen kernel")
        mask = None if even else real[:, None, None, :]
        dropout_p = inputs.get("dropout_p", 0.0)

        def there(t: Tensor) -> Tensor:
            flat = t.new_zeros(real.numel(), *t.shape[1:])
            return flat.index_copy(0, index, t).unflatten(0, real.shape).transpose(1, 2).contiguous()

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            attend = torch.nn.functional.scaled_dot_product_attention
            if backend is None:
                return attend(q, k, v, attn_mask=mask, dropout_p=dropout_p)
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return attend(q, k, v, attn_mask=mask, dropout_p=dropout_p)

        return Prepared(call, there, lambda t: t.transpose(1, 2).flatten(0, 1)[index])

    return prepare


def _only_cuda(inputs: dict[str, Any], what: str) -> None:
    if inputs["q"].device.type != "cuda":
        raise Missing(f"{what} needs a CUDA device")


def _varlen(inputs: dict[str, Any]) -> Prepared:
    _only_cuda(inputs, "torch.nn.attention.varlen")
    varlen_attn = need("torch", "torch.nn.attention.varlen").varlen_attn
    if inputs.get("dropout_p"):
        raise Missing("torch.nn.attention.varlen has no dropout")
    cu, longest = inputs["cu_seqlens"], inputs["max_seqlen"]
    return Prepared(lambda q, k, v: varlen_attn(q, k, v, cu, cu, longest, longest))


def _flash_attn(inputs: dict[str, Any]) -> Prepared:
    attend = need("flash-attn", "flash_attn").flash_attn_varlen_func
    _only_cuda(inputs, "flash-attn")
    cu, longest, p = inputs["cu_seqlens"], inputs["max_seqlen"], inputs.get("dropout_p", 0.0)
    return Prepared(lambda q, k, v: attend(q, k, v, cu, cu, longest, longest, dropout_p=p))


def _xformers(inputs: dict[str, Any]) -> Prepared:
    ops = need("xformers", "xformers.ops")
    _only_cuda(inputs, "xformers")
    bias = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(_lengths(inputs).tolist())
    p = inputs.get("dropout_p", 0.0)
    attend = ops.memory_efficient_attention
    return Prepared(lambda q, k, v: attend(q[None], k[None], v[None], attn_bias=bias, p=p)[0])


def _transformer_engine(inputs: dict[str, Any]) -> Prepared:
    te = need("transformer-engine", "transformer_engine.pytorch")
    _only_cuda(inputs, "transformer-engine")
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


def _flex(inputs: dict[str, Any]) -> Prepared:
    """torch's flex_attention on the packed batch, told by a block mask which tokens share a sequence; compiled."""
    flex = need("torch", "torch.nn.attention.flex_attention")
    if inputs.get("dropout_p"):
        raise Missing("flex_attention has no dropout")
    lengths, q = _lengths(inputs), inputs["q"]
    of = torch.repeat_interleave(torch.arange(len(lengths), device=q.device), lengths)
    tokens = q.shape[0]
    mask = flex.create_block_mask(
        lambda b, h, i, j: of[i] == of[j], None, None, tokens, tokens, device=q.device, _compile=q.device.type == "cuda"
    )
    attend = torch.compile(flex.flex_attention, dynamic=False) if q.device.type == "cuda" else flex.flex_attention
    return Prepared(
        lambda q, k, v: attend(q, k, v, block_mask=mask),
        lambda t: t.transpose(0, 1)[None].contiguous(),  # [1, H, T, D]
        lambda t: t[0].transpose(0, 1),
    )


@dataclass(frozen=True)
class AttentionPeer:
    row: str
    peer: str
    prepare: Callable[[dict[str, Any]], Prepared]
    package: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    slow: bool = False


PEERS = (
    AttentionPeer("fastbert", "fastbert", _ours(None)),
    AttentionPeer("torch sdpa", "torch", _sdpa(None)),
    AttentionPeer("torch sdpa flash", "torch", _sdpa("FLASH_ATTENTION")),
    AttentionPeer("torch sdpa cudnn", "torch", _sdpa("CUDNN_ATTENTION"), devices=("cuda",)),
    AttentionPeer("torch sdpa efficient", "torch", _sdpa("EFFICIENT_ATTENTION"), devices=("cuda",)),
    AttentionPeer("torch sdpa math", "torch", _sdpa("MATH"), slow=True),
    AttentionPeer("torch varlen", "torch", _varlen, devices=("cuda",)),
    AttentionPeer("torch flex, packed", "torch.compile", _flex, "torch", ("cuda",), slow=True),
    AttentionPeer("flash-attn varlen", "flash-attn", _flash_attn, devices=("cuda",)),
    AttentionPeer("xformers", "xformers", _xformers, devices=("cuda",)),
    AttentionPeer("transformer engine", "transformer-engine", _transformer_engine, devices=("cuda",)),
    AttentionPeer("plain torch", "torch", _ours("reference"), slow=True),
)

"""The swap for torch's own modules: nn.TransformerEncoder, nn.TransformerEncoderLayer and nn.MultiheadAttention."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .. import functional as F
from ..graphs import CONTAINERS
from ..layers import attention_masks, multi_head_attention, same_where_same
from ..packing import PackedBatch
from .forward import TRACED, Forward
from .pieces import (
    Shared,
    add_norm,
    feed_forward,
    listeners,
    norm_and_sum,
    norm_only,
    plain,
    probability,
)


def is_torch(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Is `module` of torch's own `kind`, or of a subclass that computes the same?"""
    return isinstance(module, kind) and type(module).forward is kind.forward


def why_not_attention(module: nn.MultiheadAttention) -> str | None:
    if not is_torch(module, nn.MultiheadAttention):
        return f"attention is a {type(module).__name__}"
    if module.bias_k is not None or module.add_zero_attn:
        return "add_bias_kv and add_zero_attn are not among the fused operators' options"
    return None


def why_not_layer(layer: nn.Module) -> str | None:
    if not is_torch(layer, nn.TransformerEncoderLayer):
        return f"a layer is a {type(layer).__name__}"
    attention = layer.self_attn
    if attention.in_proj_weight is None:
        return "q, k and v are projected from different widths"
    return why_not_attention(attention)


class TorchForward(Forward):
    """What these three share: fallback with a warning, and torch's shapes."""

    def __init__(self, module: nn.Module, impl: F.Impl | None):
        super().__init__(module)
        self.impl = impl
        self.passed = [m for path, m in module.named_modules() if path and not isinstance(m, CONTAINERS)]

    def fall_back(self, reason: str, given: dict):
        self.warn(reason)
        return self.original(**given)

    @property
    def drops(self) -> bool:
        """May anything be dropped? A dropout module may be on in a model that evaluates."""
        return any(m.training for m in (self.module, *self.passed))

    def who_listens(self) -> str | None:
        for module in self.passed:
            if isinstance(module, nn.Linear) and type(module) is nn.Linear:
                continue  # it is called if anybody listens
            if listeners(module):
                return f"a {type(module).__name__} has a hook"
            if "forward" in module.__dict__ and not isinstance(module.__dict__["forward"], Forward):
                return f"the forward of a {type(module).__name__} was replaced"
        return None


class LayerForward(TorchForward):
    """nn.TransformerEncoderLayer: packed where an encoder gives what its layers share, else on its own."""

    def __call__(self, *args, **kwargs):
        if len(args) == 3 and isinstance(args[1], Shared):
            return self.run(*args)
        given = self.named(args, kwargs)
        src = given["src"]
        reason = why_not_layer(self.module) or why_not_masks(given) or self.who_listens()
        if reason is not None:
            return self.fall_back(reason, given)
        batch_first = self.module.self_attn.batch_first
        shared, x = pack(given, batch_first, self.module.self_attn.num_heads, self.impl, self.drops)
        if shared is None:
            return self.fall_back("a sequence has no token", given)
        return unpack(self.run(x, shared, 0), shared, src, batch_first)

    def attention(self, x: Tensor, shared: Shared, index: int) -> tuple[Tensor, Tensor | None]:
        module = self.module.self_attn
        qkv = nn.functional.linear(x, module.in_proj_weight, module.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, module.num_heads, -1)).unbind(1)
        o = shared.attend(q, k, v, module.dropout if module.training else 0.0, stream=index + 1)
        out = module.out_proj
        if out.bias is not None and self.module.training and plain(out, NonDynamicallyQuantizableLinear):
            return nn.functional.linear(o, out.weight), out.bias
        return out(o), None

    def feed_forward(self, x: Tensor, shared: Shared, fold: bool) -> tuple[Tensor, Tensor | None]:
        layer = self.module
        return feed_forward(
            x, layer.linear1, layer.activation, layer.linear2, shared,
            inner_dropout=probability(layer.dropout), fold=fold,
        )  # fmt: skip

    def run(self, x: Tensor, shared: Shared, index: int) -> Tensor:
        layer = self.module
        p1, p2, first = probability(layer.dropout1), probability(layer.dropout2), 2 * index + 1
        if layer.norm_first:
            y, bias = self.attention(norm_only(x, layer.norm1, shared), shared, index)
            h, x = norm_and_sum(y, bias, x, layer.norm2, p1, shared, stream=first)
            return x + nn.functional.dropout(self.feed_forward(h, shared, fold=False)[0], p2)
        y, bias = self.attention(x, shared, index)
        x = add_norm(y, bias, x, layer.norm1, p1, shared, stream=first)
        y, bias = self.feed_forward(x, shared, fold=layer.training)
        return add_norm(y, bias, x, layer.norm2, p2, shared, stream=first + 1)


class StackForward(TorchForward):
    """nn.TransformerEncoder: unpads once, pads once. Padding comes out as zeros, through the last norm if there is
    one: what torch's own inference path gives there."""

    def __call__(self, *args, **kwargs):
        given, module = self.named(args, kwargs), self.module
        given["src_mask"] = given.get("mask")
        reason = next((r for layer in module.layers if (r := why_not_layer(layer))), None)
        reason = reason or why_not_masks(given) or self.who_listens()
        first = None if reason else module.layers[0].self_attn
        if reason is None and any(layer.self_attn.num_heads != first.num_heads for layer in module.layers):
            reason = "layers differ in their number of heads"
        if reason is None:
            shared, x = pack(given, first.batch_first, first.num_heads, self.impl, self.drops)
            if shared is None:
                reason = "a sequence has no token"
        del given["src_mask"]
        if reason is not None:
            return self.fall_back(reason, given)
        for index, layer in enumerate(module.layers):
            x = layer(x, shared, index)
        y = unpack(x, shared, given["src"], first.batch_first)
        return y if module.norm is None else module.norm(y)


class AttentionForward(TorchForward):
    """nn.MultiheadAttention(need_weights=False), for itself."""

    def __call__(self, *args, **kwargs):
        given, module = self.named(args, kwargs), self.module
        query, key, value = given["query"], given["key"], given["value"]
        key_padding_mask, attn_mask = given.get("key_padding_mask"), given.get("attn_mask")
        reason = TRACED if torch.jit.is_tracing() else why_not_attention(module)
        if given.get("need_weights", True):
            reason = "need_weights=True asks for the attention weights"
        elif given.get("is_causal") and attn_mask is None:
            reason = "is_causal without attn_mask"
        elif query.is_nested or query.dim() not in (2, 3):
            reason = "query is nested, or neither [S, C] nor [B, S, C]"
        if reason is not None:
            return self.fall_back(reason, given)
        if query.dim() == 2:
            query, key, value = same_where_same([query, key, value], 0)
            padding = None if key_padding_mask is None else key_padding_mask[None]
            return multi_head_attention(module, query, key, value, padding, attn_mask, self.impl)[0], None
        query, key, value = same_where_same([query, key, value], None if module.batch_first else 1)
        o = multi_head_attention(module, query, key, value, key_padding_mask, attn_mask, self.impl)
        return (o if module.batch_first else o.transpose(0, 1).contiguous()), None


def why_not_masks(given: dict) -> str | None:
    if torch.jit.is_tracing():
        return TRACED
    if given.get("is_causal"):
        return "is_causal=True"
    src = given["src"]
    if src.is_nested or src.dim() not in (2, 3):
        return "src is nested, or neither [S, C] nor [B, S, C]"
    return None


def pack(
    given: dict, batch_first: bool, heads: int, impl: F.Impl | None, training: bool
) -> tuple[Shared | None, Tensor | None]:
    """(what the layers share, src [T, C]) of torch's arguments; (None, None) where a sequence has no token."""
    src, padding, attn_mask = given["src"], given.get("src_key_padding_mask"), given.get("src_mask")
    if src.dim() == 2:
        src, padding = src[None], None if padding is None else padding[None]
    elif not batch_first:
        src = src.transpose(0, 1)
    rows, width = src.shape[:2]
    columns = torch.arange(width, device=src.device)[None]
    real = None
    if padding is not None and not torch.compiler.is_compiling():
        real = ~padding if padding.dtype == torch.bool else None
        empty = real.logical_not() if real is not None else padding == float("-inf")
        if empty.all(1).any():
            return None, None
        if real is not None and not (real[:, 1:] <= real[:, :-1]).all():
            real = None  # only what is padded on the right is packed, as in torch's own inference path
    batch = PackedBatch.from_padded(None, real, None, columns, shape=(rows, width))
    # where padding is gone, a token still stands in the row and column that it had
    mask, bias = attention_masks(None if real is not None else padding, attn_mask, rows, heads)
    shape = (-1, -1, width, width)
    padded = real is None and (padding is not None or torch.compiler.is_compiling())
    shared = Shared(
        batch,
        None if padded else F.attention_schedule(batch.cu_seqlens, batch.total_tokens, impl),
        impl,
        mask=None if mask is None else mask.expand(shape),
        bias=None if bias is None else bias.expand(shape),
        padded=padded,
    )
    if training:
        seed = torch.randint(2**62, (1,), device=src.device)
        shared = replace(shared, seed=seed, row_ids=batch.row_ids())
    return shared, batch.unpad(src)


def unpack(x: Tensor, shared: Shared, src: Tensor, batch_first: bool) -> Tensor:
    y = shared.batch.pad(x)
    if src.dim() == 2:
        return y[0]
    return y if batch_first else y.transpose(0, 1).contiguous()

"""Building blocks with torch's constructors: attention, LayerNorm with a residual, feed-forward, a whole layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from . import functional as F
from ._moved import renamed
from .inference.eight_bits import Int8Linear as Int8Linear
from .inference.eight_bits import quantise as quantise
from .inference.weights import FusedLinears as FusedLinears
from .inference.weights import JoinedLinears as JoinedLinears
from .inference.weights import prepack as prepack
from .packing import PackedBatch
from .stack.description import Drops, Joined, Layer, Part, part_of
from .stack.layer import run
from .stack.shared import Pass
from .stack.steps import probability

# class name of an activation module, of torch or transformers -> the operators' name for it
ACTIVATION_CLASSES = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
}
__getattr__ = renamed(__name__)


def activation_name(activation: Callable) -> str | None:
    """The operators' name of an activation module or function, or None: they do not have it."""
    if activation in (nn.functional.gelu, nn.functional.relu, nn.functional.silu):
        return activation.__name__
    if isinstance(activation, nn.GELU):
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    return ACTIVATION_CLASSES.get(type(activation).__name__) if isinstance(activation, nn.Module) else None


def attention_masks(
    key_padding_mask: Tensor | None, attn_mask: Tensor | None, batch: int, heads: int
) -> tuple[Tensor | None, Tensor | None]:
    """torch's masks -> (mask bool, True where allowed; bias to add), each of [1 | B, 1 | H, Sq, Sk] or None.

    key_padding_mask [B, Sk] and attn_mask [Sq, Sk] or [B * H, Sq, Sk]: bool, True where forbidden, or float to add.
    """
    mask, bias = None, None
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask[:, None, None, :]
    if attn_mask is not None:
        attn_mask = attn_mask.unflatten(0, (batch, heads)) if attn_mask.dim() == 3 else attn_mask[None, None]
    for given in (key_padding_mask, attn_mask):
        if given is None:
            continue
        if given.dtype == torch.bool:
            mask = ~given if mask is None else mask & ~given
        else:
            bias = given if bias is None else bias + given
    return mask, bias


def multi_head_attention(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    impl: F.Impl | None = None,
) -> Tensor:
    """What `module` computes without its weights: query [B, Sq, C], key, value [B, Sk, .] -> [B, Sq, C].

    Masks as `attention_masks` takes them. A query that may see no key gives the output layer's bias.
    """
    heads, batch, width = module.num_heads, query.shape[0], module.embed_dim
    if query is key and key is value and module.in_proj_weight is not None:
        joined = nn.functional.linear(query, module.in_proj_weight, module.in_proj_bias)
        q, k, v = joined.unflatten(-1, (3, heads, -1)).unbind(2)
    else:
        separate = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        weights = separate if module.in_proj_weight is None else module.in_proj_weight.split(width)
        biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.split(width)
        q, k, v = (
            nn.functional.linear(x, weight, bias).unflatten(-1, (heads, -1))
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
    mask, bias = attention_masks(key_padding_mask, attn_mask, batch, heads)
    shape = (-1, -1, q.shape[1], k.shape[1])
    o = F.attention_padded(
        q, k, v,
        mask=None if mask is None else mask.expand(shape),
        bias=None if bias is None else bias.to(q.dtype).expand(shape),
        impl=impl, **dropout_options(module.dropout if module.training else 0.0, q.device),
    )  # fmt: skip
    # torch takes this layer's weight and never calls it
    return nn.functional.linear(o.flatten(2), module.out_proj.weight, module.out_proj.bias)


def dropout_options(p: float, device: torch.device) -> dict[str, Any]:
    """Dropout arguments of one operator, with a seed of its own."""
    return {"dropout_p": p, "seed": torch.randint(2**62, (1,), dtype=torch.int64, device=device)} if p > 0.0 else {}


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention on the fused operator: same arguments, parameters and shapes.

    Raises: ValueError on what the operator does not have: need_weights=True, add_bias_kv, add_zero_attn.
    """

    impl: F.Impl | None = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        if need_weights or self.bias_k is not None or self.add_zero_attn:
            raise ValueError("MultiheadAttention: need_weights, add_bias_kv and add_zero_attn are not supported")
        if is_causal and attn_mask is None:
            raise ValueError("MultiheadAttention: is_causal is a hint about attn_mask, which must be given with it")
        batched = query.dim() == 3
        given = [query, key, value]
        if not batched:
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        axis = 0 if not batched else None if self.batch_first else 1
        query, key, value = same_where_same(given, axis)
        o = multi_head_attention(self, query, key, value, key_padding_mask, attn_mask, self.impl)
        if not batched:
            return o[0], None
        return (o if self.batch_first else o.transpose(0, 1).contiguous()), None


def same_where_same(tensors: list[Tensor], axis: int | None) -> list[Tensor]:
    """[B, S, C] forms of query, key, value: axis None, as they are; 0, a batch of one is made; 1, the batch comes
    second. One tensor given twice stays one."""

    def turn(t: Tensor) -> Tensor:
        return t if axis is None else t[None] if axis == 0 else t.transpose(0, 1)

    turned = {id(t): turn(t) for t in tensors}
    return [turned[id(t)] for t in tensors]


class AddLayerNorm(nn.LayerNorm):
    """LayerNorm(dropout(x) + residual) as one operator. Arguments of torch.nn.LayerNorm, and the dropout.

    normalized_shape: one number, the last dimension.
    """

    impl: F.Impl | None = None

    def __init__(self, normalized_shape: int, eps: float = 1e-5, *, dropout: float = 0.0, **options):
        super().__init__(normalized_shape, eps, **options)
        if len(self.normalized_shape) != 1:
            raise ValueError(f"AddLayerNorm: normalized_shape must be one number, got {tuple(self.normalized_shape)}")
        self.dropout = dropout

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        dropout = dropout_options(self.dropout if self.training else 0.0, x.device)
        return F.add_layer_norm(x, residual, self.weight, self.bias, self.eps, impl=self.impl, **dropout)


class FeedForward(nn.Module):
    """linear2(act(linear1(x))) as one operator: [..., d_model] -> [..., d_model].

    activation: one of the operator's: gelu, gelu_tanh, relu, silu, or geglu (then linear1 is twice as wide).
    """

    impl: F.Impl | None = None

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int = 2048,
        activation: str = "relu",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if activation not in F.ACTIVATIONS:
            raise ValueError(f"FeedForward: activation must be one of {F.ACTIVATIONS}, got {activation!r}")
        rows = 2 * dim_feedforward if activation == "geglu" else dim_feedforward
        self.linear1 = nn.Linear(d_model, rows, bias=bias, device=device, dtype=dtype)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias=bias, device=device, dtype=dtype)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.linear1, self.linear2
        return F.feed_forward(x, up.weight, up.bias, down.weight, down.bias, self.activation, impl=self.impl)


class EncoderLayer(nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer on the fused operators: same arguments, parameters and shapes.

    Raises: ValueError on an activation that the operators do not have.
    """

    impl: F.Impl | None = None

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.activation_name = activation_name(self.activation)
        if self.activation_name is None:
            raise ValueError(f"EncoderLayer: activation must be one of {F.ACTIVATIONS}, got {self.activation!r}")

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if is_causal and src_mask is None:
            raise ValueError("EncoderLayer: is_causal is a hint about src_mask, which must be given with it")
        batched, batch_first = src.dim() == 3, self.self_attn.batch_first
        x = src[None] if not batched else src if batch_first else src.transpose(0, 1)
        if not batched and src_key_padding_mask is not None:
            src_key_padding_mask = src_key_padding_mask[None]

        mask, bias = attention_masks(src_key_padding_mask, src_mask, len(x), self.self_attn.num_heads)
        shared = whole_rows(x, mask, bias, self.impl)
        layer, drops = torch_layer(self, part_of), torch_drops(self)
        y = run(shared.batch.unpad(x), layer, drops, shared.dropping() if any(drops) else shared, 0, self.training)
        x = shared.batch.pad(y)
        return x[0] if not batched else x if batch_first else x.transpose(0, 1).contiguous()


def whole_rows(x: Tensor, mask: Tensor | None, bias: Tensor | None, impl: F.Impl | None) -> Pass:
    """What layers share that compute all of x [B, S, C], behind the masks that `attention_masks` gives."""
    rows, width = x.shape[:2]
    columns = torch.arange(width, dtype=torch.int64, device=x.device)[None]
    batch = PackedBatch.from_padded(None, None, None, columns, shape=(rows, width))
    shape = (-1, -1, width, width)
    return Pass(
        batch, None, impl, padded=True,
        mask=None if mask is None else mask.expand(shape), bias=None if bias is None else bias.expand(shape),
    )  # fmt: skip


def torch_layer(layer: nn.TransformerEncoderLayer, part: Callable[[nn.Module, type[nn.Module]], Part]) -> Layer:
    """torch's layer, described. part: says how a module of a kind is used."""
    attention, name = layer.self_attn, activation_name(layer.activation)
    return Layer(
        (Part(Joined(attention.in_proj_weight, attention.in_proj_bias), plain=True),),
        out=Part(attention.out_proj, plain=True),  # torch takes its weight and never calls it
        out_norm=part(layer.norm1, nn.LayerNorm),
        up=part(layer.linear1, nn.Linear),
        activation=Part(layer.activation, plain=False),
        down=part(layer.linear2, nn.Linear),
        down_norm=part(layer.norm2, nn.LayerNorm),
        activation_name=name,
        head_dim=attention.head_dim,
        joined=JoinedLinears(),
        pre_norm=layer.norm_first,
    )


def torch_drops(layer: nn.TransformerEncoderLayer) -> Drops:
    """What torch's layer drops at the moment. The mode of its attention turns on the dropout there."""
    attention = layer.self_attn
    return Drops(
        attention.dropout if attention.training else 0.0,
        *(probability(dropout) for dropout in (layer.dropout1, layer.dropout, layer.dropout2)),
    )

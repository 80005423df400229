"""`attn_implementation="fastbert"`: our attention in transformers' own attention interface, for models of any kind."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional as F
from ..layers import dropout_options

NAME = "fastbert"
# what some models ask of attention and the operator does not have; sdpa does it, or says why not
UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cache", "output_attentions")


def register_attention() -> None:
    """Makes `attn_implementation="fastbert"` known to transformers, for every model that uses its interface.

        fastbert.register_attention()
        model = AutoModel.from_pretrained(..., attn_implementation="fastbert")

    For models that `accelerate` does not know: only attention is replaced, and padding stays. Calls that the operator
    cannot do go to transformers' "sdpa".
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options,
) -> tuple[Tensor, None]:
    """query [B, H, Sq, D], key, value [B, Hk, Sk, D], mask [B, 1 | H, Sq, Sk] bool or float -> [B, Sq, H, D]."""
    width_q, width_k = query.shape[2], key.shape[2]
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(is_causal) and attention_mask is None and width_q > 1
    other_values = value.shape != key.shape
    if other_values or (causal and width_q != width_k) or any(options.get(name) is not None for name in UNSUPPORTED):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask,
            dropout=dropout, scaling=scaling, is_causal=is_causal, **options,
        )  # fmt: skip

    variant = dropout_options(dropout, query.device)
    if attention_mask is not None:
        attention_mask = attention_mask[..., :width_k].expand(query.shape[0], -1, width_q, width_k)
        variant["mask" if attention_mask.dtype == torch.bool else "bias"] = attention_mask
    if causal:
        variant["window"] = (width_k, 0)  # every key up to its own
    o = F.attention_padded(*(t.transpose(1, 2) for t in (query, key, value)), scale=scaling, **variant)
    return o.contiguous(), None

"""`attn_implementation="fastbert"`: our attention in transformers' own attention interface, for models of any kind.

The models of transformers pass an attention function many arguments besides queries, keys and values. Every keyword
argument of transformers 5.24 is in one of the tables below: it is honoured, it repeats what the mask says, or it is
refused with its name. An argument in no table is refused too, since its effect is not known.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from ..layers import dropout_options

NAME = "fastbert"
# arguments that our operator does not have, and that transformers' sdpa honours as the models' own code does
BY_SDPA = frozenset({"position_bias", "cache"})
# arguments without effect on the output: the mask repeats them, other code reads them, or they choose a flash kernel
HARMLESS = frozenset(
    {
        "sliding_window", "position_ids", "cache_position", "past_key_values", "past_key_value", "use_cache",
        "deterministic", "max_length_q", "max_length_k", "num_items_in_batch", "output_hidden_states",
        "output_router_logits", "return_dict", "layer_idx", "token_type_ids",
    }
)  # fmt: skip
# lengths of packed sequences, which the mask repeats if transformers made it from position_ids
PACKED = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"})
# arguments that would change the output and are not supported -> what they are
REFUSED = {
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "softcap": "a cap on the scores",
    "indices": "a choice of keys that is in no mask",
    "block_indices": "a choice of keys that is in no mask",
    "output_attentions": "attention probabilities, which are never stored",
}


def register_attention() -> None:
    """Makes `attn_implementation="fastbert"` known to transformers, for every model that uses its interface.

        fastbert.register_attention()
        model = AutoModel.from_pretrained(..., attn_implementation="fastbert")

    For models that `accelerate` does not know: only attention is replaced, and padding is computed. Calls with position
    biases or paged caches go to transformers' "sdpa". If a model's attention passes an argument that neither supports
    (sinks, a soft cap, sparse indices), or does not say whether it is causal, its first layer raises a ValueError that
    names the argument.
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
    """query [B, H, Sq, D], key, value [B, Hk, Sk, D], mask [B, 1 | H, Sq, Sk] bool or float -> [B, Sq, H, D].

    Raises: ValueError if an argument in `options` is not supported, or if it is not known whether the module is causal.
    """
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    if (why := _why_refused(given, attention_mask)) is not None:
        raise ValueError(f'attn_implementation="{NAME}": {type(module).__name__} {why}; load the model with "eager"')
    is_causal = _causal(module) if is_causal is None else is_causal
    width_q, width_k = query.shape[2], key.shape[2]
    causal = bool(is_causal) and attention_mask is None and width_q > 1
    if value.shape != key.shape or (causal and width_q != width_k) or not BY_SDPA.isdisjoint(given):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask,
            dropout=dropout, scaling=scaling, is_causal=is_causal, **given,
        )  # fmt: skip

    variant = dropout_options(dropout, query.device)
    if attention_mask is not None:
        attention_mask = attention_mask[..., :width_k].expand(query.shape[0], -1, width_q, width_k)
        variant["mask" if attention_mask.dtype == torch.bool else "bias"] = attention_mask
    if causal:
        variant["window"] = (width_k, 0)  # a query sees all keys up to its own
    o = F.attention_padded(*(t.transpose(1, 2) for t in (query, key, value)), scale=scaling, **variant)
    return o.contiguous(), None


def _why_refused(given: dict[str, Any], attention_mask: Tensor | None) -> str | None:
    """Which keyword argument of a call is not supported, and why; or None."""
    for name in given:
        if name in REFUSED:
            return f"passes {name} ({REFUSED[name]}), which is not supported"
        if name in PACKED:
            if attention_mask is None:
                return f"passes {name} (packed sequences) without a mask that keeps them apart"
        elif name not in HARMLESS and name not in BY_SDPA:
            return f"passes {name}, which is not known"
    return None


def _causal(module: torch.nn.Module) -> bool:
    """Whether a module that passes no `is_causal` is causal in calls without a mask.

    Transformers' sdpa takes a module without the attribute `is_causal` for causal. If its model does not support sdpa
    (ALIGN, CLAP, MarkupLM, Splinter), its eager attention is not causal, so a ValueError is raised.
    """
    if hasattr(module, "is_causal"):
        return module.is_causal
    from transformers import PreTrainedModel

    file = type(module).__module__
    models = [c for c in vars(sys.modules[file]).values() if isinstance(c, type) and issubclass(c, PreTrainedModel)]
    if any(c._supports_sdpa for c in models if c.__module__ == file):
        return True
    raise ValueError(
        f'attn_implementation="{NAME}": {type(module).__name__} does not say whether it is causal (it has no '
        'is_causal); load the model with "eager"'
    )

"""Rows of `families.py`: the encoders of BART's kind, whose models classify pairs of texts and translate."""

from __future__ import annotations

from typing import Any

from .facts import Family, Layer


def _encoder(name: str, *, pre_norm: bool = False, **different: Any) -> Family:
    layer = Layer(
        modules={"": (f"{name}EncoderLayer",), "self_attn": (f"{name}Attention",)},
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        head_dim="self_attn.head_dim",
        probs_dropout="self_attn.dropout",
        probs_switch="self_attn",
        scale="self_attn.scaling",
        causal="self_attn.is_causal",
        out="self_attn.out_proj",
        out_dropout="dropout",
        out_norm="self_attn_layer_norm",
        up="fc1",
        activation="activation_fn",
        inner_dropout="activation_dropout",
        down="fc2",
        down_dropout="dropout",
        down_norm="final_layer_norm",
        pre_norm=pre_norm,
    )
    return Family(
        layer,
        output="BaseModelOutput",
        modules={},
        buffers={},
        layers="layers",
        word="embed_tokens",
        word_class=f"{name}ScaledWordEmbedding",
        position="embed_positions",
        position_class=f"{name}LearnedPositionalEmbedding",
        token_type=None,
        norm="layernorm_embedding",
        dropout="dropout",
        layerdrop="layerdrop",
        half_clamped=True,
        heads=False,
        **different,
    )


BART_FAMILIES = {
    "BartEncoder": _encoder("Bart"),
    "MBartEncoder": _encoder("MBart", pre_norm=True, final_norm="layer_norm"),
    "PLBartEncoder": _encoder("PLBart"),
}

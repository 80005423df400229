"""Rows of `families.py`: pre-norm encoders and decoders with the structure of Llama, and T5's encoders.

The decoders embed or rerank texts: their tokens see no later ones. Generating runs the model's own code.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..stack.description import NormKind
from .facts import Family, Layer


def _rms(name: str) -> NormKind:
    return NormKind((f"{name}RMSNorm",), eps="variance_epsilon")


_QK_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
# config.layer_types says which layers have a window; the attention module holds its width
_TYPES = {"number": "self_attn.layer_idx", "reach": "self_attn.sliding_window"}


def _layer(name: str, suffix: str = "DecoderLayer", **different: Any) -> Layer:
    layer = Layer(
        modules={"": (f"{name}{suffix}",), "self_attn": (f"{name}Attention",), "mlp": (f"{name}MLP",)},
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        head_dim="self_attn.head_dim",
        probs_dropout="self_attn.attention_dropout",
        probs_switch="self_attn",
        scale="self_attn.scaling",
        causal="self_attn.is_causal",
        out="self_attn.o_proj",
        out_norm="input_layernorm",
        up="mlp.up_proj",
        gate="mlp.gate_proj",
        activation="mlp.act_fn",
        down="mlp.down_proj",
        down_norm="post_attention_layernorm",
        pre_norm=True,
        gated=True,
        rotates=True,
        norm=_rms(name),
    )
    return replace(layer, **different)


def _family(layer: Layer, output: str = "BaseModelOutput", **different: Any) -> Family:
    family = Family(
        layer,
        output=output,
        modules={},
        buffers={},
        layers="layers",
        word="embed_tokens",
        position=None,
        token_type=None,
        norm=None,
        dropout=None,
        positions="rotary",
        final_norm="norm",
    )
    return replace(family, **different)


def _decoder(layer: Layer, **different: Any) -> Family:
    return _family(
        layer,
        "BaseModelOutputWithPast",
        **{"decoder": True, "sees_less": 1, "first_column": False, "ignores_rest": True} | different,
    )


def _t5(name: str, layer: dict[str, Any], **different: Any) -> Family:
    """An encoder with the structure of T5. Its feed-forward blocks are gated if config.is_gated_act."""

    def of(suffix: str, feed_forward: dict[str, Any]) -> Family:
        own = Layer(
            modules={
                "": (f"{name}Block",),
                "layer.0": (f"{name}LayerSelfAttention",),
                "layer.0.SelfAttention": (f"{name}Attention",),
                "layer.1": (f"{name}LayerFF",),
                "layer.1.DenseReluDense": (f"{name}Dense{suffix}",),
            },
            qkv=tuple(f"layer.0.SelfAttention.{part}" for part in "qkv"),
            head_dim="layer.0.SelfAttention.key_value_proj_dim",
            probs_dropout="layer.0.SelfAttention.dropout",
            probs_switch="layer.0.SelfAttention",
            scale="layer.0.SelfAttention.scaling",
            any_scale=True,
            causal="layer.0.SelfAttention.is_causal",
            out="layer.0.SelfAttention.o",
            out_dropout="layer.0.dropout",
            out_norm="layer.0.layer_norm",
            activation="layer.1.DenseReluDense.act",
            inner_dropout="layer.1.DenseReluDense.dropout",
            down="layer.1.DenseReluDense.wo",
            down_dropout="layer.1.dropout",
            down_norm="layer.1.layer_norm",
            pre_norm=True,
            norm=NormKind((f"{name}LayerNorm",), eps="variance_epsilon"),
            **feed_forward,
            **layer,
        )
        return Family(
            own,
            output="BaseModelOutputWithPastAndCrossAttentions",
            modules={},
            buffers={},
            layers="block",
            word="embed_tokens",
            position=None,
            token_type=None,
            norm=None,
            dropout="dropout",
            final_norm="final_layer_norm",
            final_dropout="dropout",
            half_clamped=True,
            refuses_cache=True,
            passes=(f"{name}EncoderModel",),
            heads=False,
            **different,
        )

    path = "layer.1.DenseReluDense."
    gated = of("GatedActDense", {"gate": f"{path}wi_0", "up": f"{path}wi_1", "gated": True})
    return replace(of("ActDense", {"up": f"{path}wi"}), variant=("is_gated_act", True, gated))


_ESMC_LAYER = _layer(
    "Esmc",
    "Layer",
    **_QK_NORMS,
    norms_heads=False,
    divisor="scaling_factor",
    norm=NormKind(("EsmcLayerNorm",), rms=False),
)
_GEMMA3_LAYER = _layer(
    "Gemma3",
    **_QK_NORMS,
    **_TYPES,
    rotates=False,
    any_scale=True,
    after_out="post_attention_layernorm",
    down_norm="pre_feedforward_layernorm",
    after_down="post_feedforward_layernorm",
    norm=NormKind(("Gemma3RMSNorm",), offset=1.0),
)
_GEMMA_LAYER = _layer("Gemma", norm=NormKind(("GemmaRMSNorm",), offset=1.0))
_SHARED_BIAS = {"bias": "block.0.layer.0.SelfAttention"}

RMS_FAMILIES = {
    "EuroBertModel": _family(_layer("EuroBert"), ignores_rest=True),
    "UltrabertModel": _family(_layer("Ultrabert", rotates=False, **_TYPES)),
    "EsmcModel": _family(_ESMC_LAYER),
    "Gemma3TextModel": _decoder(
        _GEMMA3_LAYER, word_class="Gemma3TextScaledWordEmbedding", bidirectional="use_bidirectional_attention"
    ),
    "GemmaModel": _decoder(_GEMMA_LAYER, word_class="GemmaTextScaledWordEmbedding"),
    "Qwen3Model": _decoder(_layer("Qwen3", **_QK_NORMS, **_TYPES)),
    "Qwen2Model": _decoder(_layer("Qwen2", **_TYPES)),
    "MistralModel": _decoder(_layer("Mistral"), slides=True),
    "LlamaModel": _decoder(_layer("Llama")),
    "T5Stack": _t5("T5", {}, **_SHARED_BIAS),
    "MT5Stack": _t5("MT5", {}, **_SHARED_BIAS),
    "UMT5Stack": _t5("UMT5", {"bias": "layer.0.SelfAttention"}),
}

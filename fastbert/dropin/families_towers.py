"""Rows of `families.py`: the text towers of CLIP's kind, beside images or video, which are pre-norm encoders."""

from __future__ import annotations

from typing import Any

from .facts import Family, Layer


def _tower(name: str, passes: tuple[str, ...], **different: Any) -> Family:
    """A tower whose tokens see no later ones. passes: the parts of the names of classes around it."""
    bidirectional = different.get("pooled") == "last"
    layer = Layer(
        modules={"": (f"{name}EncoderLayer",), "self_attn": (f"{name}Attention",), "mlp": (f"{name}MLP",)},
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        head_dim="self_attn.head_dim",
        probs_dropout="self_attn.dropout",
        probs_switch="self_attn",
        scale="self_attn.scale",
        causal="self_attn.is_causal" if bidirectional else None,
        looks_back=not bidirectional,
        out="self_attn.out_proj",
        out_norm="layer_norm1",
        up="mlp.fc1",
        activation="mlp.activation_fn",
        down="mlp.fc2",
        down_norm="layer_norm2",
        pre_norm=True,
    )
    return Family(
        layer,
        output="BaseModelOutputWithPooling",
        modules={"embeddings": (f"{name}TextEmbeddings",), "encoder": (f"{name}Encoder",)},
        buffers={"embeddings.position_ids": "columns"},
        layers="encoder.layers",
        word="embeddings.token_embedding",
        position="embeddings.position_embedding",
        token_type=None,
        norm=None,
        dropout=None,
        final_norm="final_layer_norm",
        last_state_normed=False,
        decoder=not bidirectional,
        first_column=False,
        passes=tuple(f"{name}{suffix}" for suffix in passes),
        heads=False,
        **different,
    )


_SIGLIP: dict[str, Any] = {"pooled": "last", "pooled_by": "head"}
_PROJECTED = ("Model", "TextModelWithProjection")
_OWL = ("Model", "TextModel", "ForObjectDetection")

TOWERS = {
    "CLIPTextModel": _tower("CLIP", _PROJECTED, pooled="eos_or_largest"),
    "CLIPSegTextModel": _tower("CLIPSeg", ("Model", "ForImageSegmentation"), pooled="eos_or_largest"),
    "XCLIPTextModel": _tower("XCLIP", ("Model",), pooled="eos_or_largest"),
    "MetaClip2TextModel": _tower("MetaClip2", _PROJECTED, pooled="eos"),
    "OwlViTTextTransformer": _tower("OwlViT", _OWL, pooled="largest"),
    "Owlv2TextTransformer": _tower("Owlv2", _OWL, pooled="largest"),
    "SiglipTextModel": _tower("Siglip", ("Model",), **_SIGLIP),
    "Siglip2TextModel": _tower("Siglip2", ("Model",), **_SIGLIP),
}

"""The table of known encoders of transformers: a row holds all that is known of a family. Rows with the structure of
Llama and T5 are in `families_rms.py`, those of CLIP's in `families_towers.py`, of BART's in `families_bart.py`.

A row applies only if it accounts for every parameter and buffer of the encoder. A model whose config adds a table or a
layer is left alone, and `explain` names it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .facts import Distances, Family, Layer
from .families_bart import BART_FAMILIES
from .families_rms import RMS_FAMILIES
from .families_towers import TOWERS


def _attention(path: str) -> dict[str, str]:
    """The common paths of transformers' attention modules that use its attention interface."""
    return {
        "head_dim": f"{path}.attention_head_size",
        "probs_switch": path,
        "scale": f"{path}.scaling",
        "causal": f"{path}.is_causal",
    }


def _bert_layer(name: str, **different: Any) -> Layer:
    layer = Layer(
        modules={
            "": (f"{name}Layer",),
            "attention": (f"{name}Attention",),
            "attention.self": (f"{name}SelfAttention", f"{name}SdpaSelfAttention"),
            "attention.output": (f"{name}SelfOutput",),
            "intermediate": (f"{name}Intermediate",),
            "output": (f"{name}Output",),
        },
        qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
        probs_dropout="attention.self.dropout",
        **_attention("attention.self"),
        out="attention.output.dense",
        out_dropout="attention.output.dropout",
        out_norm="attention.output.LayerNorm",
        up="intermediate.dense",
        activation="intermediate.intermediate_act_fn",
        down="output.dense",
        down_dropout="output.dropout",
        down_norm="output.LayerNorm",
    )
    return replace(layer, **different)


# attention without that interface: the layer's own code multiplies, and calls the dropout module
_EAGER = {"probs_switch": None, "scale": None, "causal": None}
# attention that reads the dropout probability from a number rather than the dropout module
_NUMBER = {"probs_dropout": "attention.self.attention_dropout"}


_MPNET_LAYER = Layer(
    modules={
        "": ("MPNetLayer",),
        "attention": ("MPNetAttention",),
        "attention.attn": ("MPNetSelfAttention",),
        "intermediate": ("MPNetIntermediate",),
        "output": ("MPNetOutput",),
    },
    qkv=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    head_dim="attention.attn.attention_head_size",
    probs_dropout="attention.attn.dropout",
    out="attention.attn.o",
    out_dropout="attention.dropout",
    out_norm="attention.LayerNorm",
    up="intermediate.dense",
    activation="intermediate.intermediate_act_fn",
    down="output.dense",
    down_dropout="output.dropout",
    down_norm="output.LayerNorm",
)

_DISTILBERT_LAYER = Layer(
    modules={
        "": ("TransformerBlock",),
        "attention": ("DistilBertSelfAttention", "DistilBertSdpaAttention", "MultiHeadSelfAttention"),
        "ffn": ("FFN",),
    },
    qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    **_attention("attention"),
    probs_dropout="attention.dropout",
    out="attention.out_lin",
    out_norm="sa_layer_norm",
    up="ffn.lin1",
    activation="ffn.activation",
    down="ffn.lin2",
    down_dropout="ffn.dropout",
    down_norm="output_layer_norm",
)

_ALBERT_LAYER = Layer(
    modules={"": ("AlbertLayer",), "attention": ("AlbertAttention", "AlbertSdpaAttention")},
    qkv=("attention.query", "attention.key", "attention.value"),
    **_attention("attention"),
    probs_dropout="attention.attention_dropout",
    out="attention.dense",
    out_dropout="attention.output_dropout",
    out_norm="attention.LayerNorm",
    up="ffn",
    activation="activation",
    down="ffn_output",
    down_norm="full_layer_layer_norm",
)

_MODERNBERT_LAYER = Layer(
    modules={"": ("ModernBertEncoderLayer",), "attn": ("ModernBertAttention",), "mlp": ("ModernBertMLP",)},
    qkv=("attn.Wqkv",),
    head_dim="attn.head_dim",
    probs_dropout="attn.attention_dropout",
    probs_switch="attn",
    causal="attn.is_causal",
    reach="attn.sliding_window",
    out="attn.Wo",
    out_dropout="attn.out_drop",
    out_norm="attn_norm",
    up="mlp.Wi",
    activation="mlp.act",
    inner_dropout="mlp.drop",
    down="mlp.Wo",
    down_norm="mlp_norm",
    pre_norm=True,
    gated=True,
    attention_type="attention_type",
)

_MODERNBERT_DECODER_LAYER = replace(
    _MODERNBERT_LAYER,
    modules={
        "": ("ModernBertDecoderLayer",),
        "attn": ("ModernBertDecoderAttention",),
        "mlp": ("ModernBertDecoderMLP",),
    },
    qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    scale="attn.scaling",
    attention_type=None,
    number="attn.layer_idx",
)

_DEBERTA_V2_LAYER = _bert_layer(
    "DebertaV2",
    modules={
        "": ("DebertaV2Layer",),
        "attention": ("DebertaV2Attention",),
        "attention.self": ("DisentangledSelfAttention",),
        "attention.output": ("DebertaV2SelfOutput",),
        "intermediate": ("DebertaV2Intermediate",),
        "output": ("DebertaV2Output",),
    },
    qkv=("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
    **_EAGER,
    distances=Distances(
        key="attention.self.pos_key_proj",
        query="attention.self.pos_query_proj",
        dropout="attention.self.pos_dropout",
        terms="attention.self.pos_att_type",
        shares="attention.self.share_att_key",
    ),
)


def _rotary_layer(name: str, up: str, down: str, **different: Any) -> Layer:
    """A post-norm layer with rotary positions: Nomic BERT, GTE, Jina embeddings v3."""
    layer = Layer(
        modules={"": (f"{name}Layer",), "self_attn": (f"{name}Attention",), "mlp": (f"{name}MLP",)},
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        head_dim="self_attn.head_dim",
        probs_dropout="self_attn.attention_dropout",
        probs_switch="self_attn",
        scale="self_attn.scaling",
        causal="self_attn.is_causal",
        out="self_attn.o_proj",
        out_dropout="post_attention_dropout",
        out_norm="post_attention_layernorm",
        up=up,
        activation="mlp.act_fn",
        down=down,
        down_dropout="post_mlp_dropout",
        down_norm="post_mlp_layernorm",
        rotates=True,
    )
    return replace(layer, **different)


_POOLED = "BaseModelOutputWithPoolingAndCrossAttentions"
_PLAIN_POOLED = "BaseModelOutputWithPooling"


def _around(name: str) -> dict[str, Any]:
    """The modules around the layers, in most families."""
    return {
        "modules": {"embeddings": (f"{name}Embeddings",), "encoder": (f"{name}Encoder",)},
        "pooler": (f"{name}Pooler",),
    }


def _bert(name: str, output: str = _POOLED, layer: dict[str, Any] | None = None, **different: Any) -> Family:
    return Family(_bert_layer(name, **(layer or {})), output=output, **(_around(name) | different))


def _roberta(name: str, output: str = _POOLED, layer: dict[str, Any] | None = None, **different: Any) -> Family:
    return _bert(name, output, layer, positions="after_padding_idx", **different)


def _pre_norm(out_norm: str, down_norm: str) -> dict[str, Any]:
    return {"out_norm": out_norm, "down_norm": down_norm, "pre_norm": True}


def _rotary(name: str, layer: Layer, **different: Any) -> Family:
    return Family(
        layer,
        output=_PLAIN_POOLED,
        modules={"embeddings": (f"{name}Embeddings",)},
        pooler=(f"{name}Pooler",),
        layers="layers",
        position=None,
        positions="rotary",
        ignores_rest=True,
        heads=False,
        **different,
    )


_AROUND_MODERNBERT = {
    "layers": "layers",
    "word": "embeddings.tok_embeddings",
    "position": None,
    "token_type": None,
    "norm": "embeddings.norm",
    "dropout": "embeddings.drop",
    "positions": "rotary",
    "final_norm": "final_norm",
}
_TYPES = {"token_type_ids": None}  # for `Family.called`


def _called(
    name: str, output: str, called: dict[str, tuple[int | str, ...] | None], layer: dict[str, Any], **different: Any
) -> Family:
    """A family whose embeddings are called as they are."""
    return Family(
        _bert_layer(name, **layer),
        output=output,
        modules={"encoder": (f"{name}Encoder",)},
        buffers={},
        pooler=(f"{name}Pooler",),
        word=None,
        position=None,
        token_type=None,
        norm=None,
        dropout=None,
        called={"position_ids": None, "inputs_embeds": None} | called,
        heads=False,
        **different,
    )


_BRIDGE_TOWER = {
    "": ("BridgeTowerTextLayer",),
    "attention": ("BridgeTowerAttention",),
    "attention.self": ("BridgeTowerSelfAttention",),
    "attention.output": ("BridgeTowerSelfOutput",),
    "intermediate": ("BridgeTowerIntermediate",),
    "output": ("BridgeTowerOutput",),
}

_ESM = replace(
    _called(
        "Esm",
        _POOLED,
        {},
        _EAGER
        | _pre_norm("attention.LayerNorm", "LayerNorm")
        | {"probs_switch": "attention.self", "activation": None, "activation_name": "gelu"},
    ),
    called={"position_ids": None, "attention_mask": None},  # inputs_embeds bypass its embeddings
    unused=("contact_head",),
    final_norm="encoder.emb_layer_norm_after",
)

# class name of the encoder -> its facts
FAMILIES = {
    "BertModel": _bert("Bert"),
    "RobertaModel": _roberta("Roberta"),
    "XLMRobertaModel": _roberta("XLMRoberta"),
    "CamembertModel": _roberta("Camembert"),
    "ElectraModel": Family(
        _bert_layer("Electra"),
        output="BaseModelOutputWithPastAndCrossAttentions",
        **_around("Electra"),
        project="embeddings_project",
    ),
    "DistilBertModel": Family(
        _DISTILBERT_LAYER,
        output="BaseModelOutput",
        modules={"embeddings": ("Embeddings",), "transformer": ("Transformer",)},
        layers="transformer.layer",
        token_type=None,
    ),
    "AlbertModel": Family(
        _ALBERT_LAYER,
        output="BaseModelOutputWithPooling",
        modules={"embeddings": ("AlbertEmbeddings",), "encoder": ("AlbertTransformer",)},
        layers="encoder.albert_layer_groups",
        groups=True,
        project="encoder.embedding_hidden_mapping_in",
        pooler_activation="pooler_activation",
    ),
    "MPNetModel": Family(
        _MPNET_LAYER,
        output="BaseModelOutputWithPooling",
        **_around("MPNet"),
        token_type=None,
        positions="after_padding_idx",
        bias="encoder",
        tuple_keeps_pooler=True,
    ),
    "ModernBertModel": Family(
        _MODERNBERT_LAYER,
        output="BaseModelOutput",
        modules={"embeddings": ("ModernBertEmbeddings",)},
        **_AROUND_MODERNBERT,
    ),
    "ModernBertDecoderModel": Family(
        _MODERNBERT_DECODER_LAYER,
        output="BaseModelOutputWithPast",
        modules={"embeddings": ("ModernBertDecoderEmbeddings",)},
        **_AROUND_MODERNBERT,
        decoder=True,
        sees_less=1,
        first_column=False,
    ),
    "DebertaV2Model": Family(
        _DEBERTA_V2_LAYER,
        output="BaseModelOutput",
        modules={"embeddings": ("DebertaV2Embeddings",), "encoder": ("DebertaV2Encoder",)},
        distances="encoder",
        masks_embeddings=True,
        zero_or_one=True,
    ),
    "ErnieModel": _bert("Ernie"),  # with task ids it has a table that this row does not name, and is left alone
    "Data2VecTextModel": _roberta("Data2VecText"),
    "RemBertModel": _bert("RemBert", layer=_EAGER, project="encoder.embedding_hidden_mapping_in"),
    "SplinterModel": _bert("Splinter", "BaseModelOutput", _NUMBER, pooler=(), heads=False),
    "BertGenerationEncoder": _bert(
        "BertGeneration",
        "BaseModelOutputWithPastAndCrossAttentions",
        modules={"embeddings": ("BertGenerationEmbeddings",), "encoder": ("BertEncoder",)},
        pooler=(),
        token_type=None,
        heads=False,
    ),
    "ChineseCLIPTextModel": _bert("ChineseCLIPText", _PLAIN_POOLED, _NUMBER, heads=False),
    "BridgeTowerTextModel": _roberta(
        "BridgeTowerText",
        layer={"modules": _BRIDGE_TOWER},
        pooler=("BridgeTowerPooler",),
        heads=False,
    ),
    "AlignTextModel": _bert("AlignText", _PLAIN_POOLED, _NUMBER, heads=False),
    "ClapTextModel": _roberta("ClapText", _PLAIN_POOLED, _NUMBER, heads=False),
    "AltRobertaModel": _roberta("AltRoberta", _PLAIN_POOLED, _NUMBER, layers="encoder.layers", heads=False),
    "MegatronBertModel": _bert(
        "MegatronBert", layer=_EAGER | _pre_norm("attention.ln", "ln"), norm=None, final_norm="encoder.ln"
    ),
    "XLMRobertaXLModel": _roberta(
        "XLMRobertaXL",
        layer={"down_dropout": None} | _pre_norm("attention.self_attn_layer_norm", "LayerNorm"),
        norm=None,
        final_norm="encoder.LayerNorm",
    ),
    "RobertaPreLayerNormModel": _roberta(
        "RobertaPreLayerNorm", layer=_pre_norm("attention.LayerNorm", "intermediate.LayerNorm"), final_norm="LayerNorm"
    ),
    "NomicBertModel": _rotary(
        "NomicBert", _rotary_layer("NomicBert", "mlp.up_proj", "mlp.down_proj", gated=True, gate="mlp.gate_proj")
    ),
    "GteModel": _rotary(
        "Gte",
        _rotary_layer(
            "Gte", "mlp.up_proj", "mlp.down_proj", gated=True, gate="mlp.gate_proj", inner_dropout="mlp.dropout"
        ),
    ),
    "JinaEmbeddingsV3Model": _rotary(
        "JinaEmbeddingsV3", _rotary_layer("JinaEmbeddingsV3", "mlp.fc1", "mlp.fc2", activation="mlp.activation_fn")
    ),
    "EsmModel": replace(
        _ESM,
        layer=replace(_ESM.layer, rotates=True),
        positions="rotary",
        position_type="rotary",
        tables_of_rotation="rotary_embeddings",
        variant=("position_embedding_type", "absolute", _ESM),  # ESM-1b and ESM-1v
    ),
    "LayoutLMModel": _called("LayoutLM", _PLAIN_POOLED, _TYPES | {"bbox": (4,)}, _NUMBER, zero_or_one=True),
    "RoCBertModel": _called(
        "RoCBert", _POOLED, _TYPES | {"input_shape_ids": None, "input_pronunciation_ids": None}, {}
    ),
    "MarkupLMModel": _called(
        "MarkupLM",
        _PLAIN_POOLED,
        _TYPES | {"xpath_tags_seq": None, "xpath_subs_seq": None},
        _NUMBER,
        zero_or_one=True,
    ),
    "TapasModel": _called("Tapas", _PLAIN_POOLED, {"token_type_ids": ("type_vocab_sizes",)}, _EAGER),
    "VisualBertModel": _called("VisualBert", _PLAIN_POOLED, _TYPES, _EAGER),
    **RMS_FAMILIES,
    **BART_FAMILIES,
    **TOWERS,
}

# the families that were compared with transformers 4, and what is different there
_OF_4 = (
    "BertModel", "RobertaModel", "XLMRobertaModel", "CamembertModel", "ElectraModel", "DistilBertModel", "AlbertModel",
    "MPNetModel",
)  # fmt: skip
_MODERNBERT = FAMILIES["ModernBertModel"]
FAMILIES_OF_4 = {name: replace(FAMILIES[name], zero_or_one=True) for name in _OF_4} | {
    "ModernBertModel": replace(
        _MODERNBERT,
        layer=replace(_MODERNBERT.layer, attention_type="attn.local_attention", rotary="attn.rotary_emb"),
        last_state_normed=False,
        zero_or_one=True,
    )
}

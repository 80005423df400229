"""What has to be known of a model to run it packed: one row a family, and nothing else about that family anywhere.

Paths are attributes from the encoder (`Family`) or from one of its layers (`Layer`), as transformers names them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Layer:
    """Where the parts of a layer are. A path of None: the family has no such part.

    Attributes:
        modules: the modules that are walked past, and never called: path -> names of transformers' class for it. The
            layer itself is "". Any other class, or one with a method of its own, is somebody's own.
        qkv: the projections of attention: three linear layers, or one that makes q, k, v together.
        head_dim: where the width of a head is written.
        probs_dropout: nn.Dropout, or its probability, on the attention probabilities.
        probs_switch: the module whose training mode turns that on; None: the dropout module's own.
        scale: where the factor of the scores is written, which must be the inverse root of the head's width.
        causal: where it is written that a token sees no later one, which must be off.
        reach: where a layer with a window has its own, one more than config.sliding_window.
        out, out_dropout, out_norm: the linear layer after attention, the dropout on it, the LayerNorm of that block.
        up, activation, inner_dropout, down, down_dropout, down_norm: the same of the feed-forward block.
        pre_norm: the LayerNorms come first in their blocks (x = x + f(norm(x))) rather than last.
        gated: `up` makes two halves, act(first) * second.
        attention_type: with rotary positions, where it is written which rotation and window the layer has.
        rotary: the module that makes the rotation's tables, where every layer has one of its own.
    """

    modules: dict[str, tuple[str, ...]]
    qkv: tuple[str, ...]
    head_dim: str
    probs_dropout: str
    out: str
    out_norm: str
    up: str
    activation: str
    down: str
    down_norm: str
    probs_switch: str | None = None
    scale: str | None = None
    causal: str | None = None
    reach: str | None = None
    out_dropout: str | None = None
    inner_dropout: str | None = None
    down_dropout: str | None = None
    pre_norm: bool = False
    gated: bool = False
    attention_type: str | None = None
    rotary: str | None = None

    @property
    def kind(self) -> str:
        return self.modules[""][0]

    @property
    def linears(self) -> tuple[str, ...]:
        return (*self.qkv, self.out, self.up, self.down)

    @property
    def norms(self) -> tuple[str, ...]:
        return (self.out_norm, self.down_norm)

    @property
    def dropouts(self) -> tuple[str, ...]:
        """Those on hidden states, and the one on probabilities where it is a module."""
        paths = (self.probs_dropout, self.out_dropout, self.inner_dropout, self.down_dropout)
        return tuple(path for path in paths if path is not None)


@dataclass(frozen=True)
class Family:
    """Where the parts of an encoder are, and what its token positions mean.

    Attributes:
        layer: the parts of a layer.
        modules: as in `Layer`; those of the encoder around its layers.
        buffers: of the embeddings, and what they hold: "columns" (0, 1, 2, ...) or "zeros".
        pooler: names of the class of a pooler that reads each sequence's first column and no other.
        layers: the list of layers; with `groups` a list of groups that hold them, shared by many (ALBERT).
        word, position, token_type: the embedding tables.
        norm, dropout: of the sum of the tables.
        project: a linear layer from the embeddings' width to the layers'; absent where the two are equal.
        positions: "column": a token's column in the padded batch; "after_padding_idx": it counts the ids that are
            not padding, from padding_idx + 1 on; "rotary": no table, q and k are rotated.
        bias: the encoder whose `relative_attention_bias` table gives every layer's attention bias (MPNet).
        final_norm: a LayerNorm after the last layer.
        last_state_normed: the last of the hidden states is the output, rather than what goes into `final_norm`.
        output: transformers' class of what the encoder returns.
        pooler_activation: the pooler is a linear layer of the first token, and this its activation.
        tuple_keeps_pooler: in a returned tuple the pooler's place is there even where there is no pooler.
    """

    layer: Layer
    output: str
    modules: dict[str, tuple[str, ...]]
    buffers: dict[str, str] = field(default_factory=lambda: dict(_BUFFERS))
    pooler: tuple[str, ...] = ()
    layers: str = "encoder.layer"
    groups: bool = False
    word: str = "embeddings.word_embeddings"
    position: str | None = "embeddings.position_embeddings"
    token_type: str | None = "embeddings.token_type_embeddings"
    norm: str = "embeddings.LayerNorm"
    dropout: str = "embeddings.dropout"
    project: str | None = None
    positions: Literal["column", "after_padding_idx", "rotary"] = "column"
    bias: str | None = None
    final_norm: str | None = None
    last_state_normed: bool = True
    pooler_activation: str | None = None
    tuple_keeps_pooler: bool = False

    @property
    def relative(self) -> bool:
        """Does attention look at distances between tokens?"""
        return self.bias is not None or self.positions == "rotary"


_BUFFERS = {"embeddings.position_ids": "columns", "embeddings.token_type_ids": "zeros"}


def _attention(path: str) -> dict[str, str]:
    """What transformers' attention modules have in common, where they take their function from its interface."""
    return {
        "head_dim": f"{path}.attention_head_size",
        "probs_switch": path,
        "scale": f"{path}.scaling",
        "causal": f"{path}.is_causal",
    }


def _bert_layer(name: str) -> Layer:
    return Layer(
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

_POOLED = "BaseModelOutputWithPoolingAndCrossAttentions"


def _around(name: str) -> dict[str, Any]:
    """What is around the layers, in most families."""
    return {
        "modules": {"embeddings": (f"{name}Embeddings",), "encoder": (f"{name}Encoder",)},
        "pooler": (f"{name}Pooler",),
    }


def _roberta(name: str) -> Family:
    return Family(_bert_layer(name), output=_POOLED, positions="after_padding_idx", **_around(name))


# class name of the encoder -> its facts
FAMILIES = {
    "BertModel": Family(_bert_layer("Bert"), output=_POOLED, **_around("Bert")),
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
        layers="layers",
        word="embeddings.tok_embeddings",
        position=None,
        token_type=None,
        norm="embeddings.norm",
        dropout="embeddings.drop",
        positions="rotary",
        final_norm="final_norm",
    ),
}

# what is different under transformers 4
_MODERNBERT = FAMILIES["ModernBertModel"]
FAMILIES_OF_4 = FAMILIES | {
    "ModernBertModel": replace(
        _MODERNBERT,
        layer=replace(_MODERNBERT.layer, attention_type="attn.local_attention", rotary="attn.rotary_emb"),
        last_state_normed=False,
    )
}

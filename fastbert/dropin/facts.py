"""What has to be known of a model to run it packed. The models themselves are rows of `families.py`.

Paths are attributes from the encoder (`Family`) or from one of its layers (`Layer`), as transformers names them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def at(module: Any, path: str) -> Any:
    """The attribute of an attribute: at(layer, "attention.self.query"); of "" the module itself."""
    for name in path.split(".") if path else ():
        module = getattr(module, name)
    return module


def has(module: Any, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(module, name):
            return False
        module = getattr(module, name)
    return True


@dataclass(frozen=True)
class Distances:
    """Where a layer has what makes its scores look at distances between tokens (DeBERTa): paths from the layer.

    Attributes:
        key, query: the projections of the table of distances to keys and to queries; each may be missing in a layer.
        dropout: on the table, anew in every layer.
        terms: which of the two terms there are: "c2p", content to position, and "p2c", position to content.
        shares: whether the layer's own projections of key and query stand in for `key` and `query`.
    """

    key: str
    query: str
    dropout: str
    terms: str
    shares: str


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
        activation_name: where `activation` is None, a function in the layer's own code: the operators' name for it.
        pre_norm: the LayerNorms come first in their blocks (x = x + f(norm(x))) rather than last.
        gated: `up` makes two halves, act(first) * second.
        gate: of a gated block whose halves are two linear layers, the first: act(gate(x)) * up(x).
        rotates: q and k are rotated by their positions, all layers in the same way.
        attention_type: with rotary positions, where it is written which rotation and window the layer has.
        rotary: the module that makes the rotation's tables, where every layer has one of its own.
        distances: what makes the scores look at distances between tokens, by a table of the encoder.
    """

    modules: dict[str, tuple[str, ...]]
    qkv: tuple[str, ...]
    head_dim: str
    probs_dropout: str
    out: str
    out_norm: str
    up: str
    activation: str | None
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
    gate: str | None = None
    activation_name: str | None = None
    rotates: bool = False
    attention_type: str | None = None
    rotary: str | None = None
    distances: Distances | None = None

    @property
    def kind(self) -> str:
        return self.modules[""][0]

    @property
    def linears(self) -> tuple[str, ...]:
        """`gate` comes last, where there is one."""
        return (*self.qkv, self.out, self.up, self.down, *filter(None, [self.gate]))

    @property
    def norms(self) -> tuple[str, ...]:
        return (self.out_norm, self.down_norm)

    @property
    def dropouts(self) -> tuple[str, ...]:
        """Those on hidden states, and the one on probabilities where it is a module."""
        paths = (self.probs_dropout, self.out_dropout, self.inner_dropout, self.down_dropout)
        return tuple(path for path in paths if path is not None)


BUFFERS = {"embeddings.position_ids": "columns", "embeddings.token_type_ids": "zeros"}


@dataclass(frozen=True)
class Family:
    """Where the parts of an encoder are, and what its token positions mean.

    Attributes:
        layer: the parts of a layer.
        modules: as in `Layer`; those of the encoder around its layers.
        buffers: of the embeddings, and what they hold: "columns" (0, 1, 2, ...) or "zeros".
        pooler: names of the class of a pooler that reads each sequence's first column and no other.
        layers: the list of layers; with `groups` a list of groups that hold them, shared by many (ALBERT).
        word, position, token_type: the embedding tables. An encoder may have None in place of one.
        norm, dropout: of the sum of the tables.
        called: the embeddings are called as they are, on [batch, tokens], and no table of theirs is named here: what
            their forward is given of the encoder's arguments -> the shape, after [batch, tokens], of the zeros that
            stand for an argument that is not given, where a name is how many entries the config has under it; None
            where nothing stands for it. Without "inputs_embeds" these go into the layers past the embeddings. None:
            they are taken apart.
        project: a linear layer from the embeddings' width to the layers'; absent where the two are equal.
        positions: "column": a token's column in the padded batch; "after_padding_idx": it counts the ids that are
            not padding, from padding_idx + 1 on; "rotary": no table, q and k are rotated.
        position_type: what `config.position_embedding_type` says of it, or would say where it is not written.
        distances: the encoder that has the table of distances, which the layers' `distances` project (DeBERTa).
        masks_embeddings: the embeddings of padding are zeros.
        bias: the encoder whose `relative_attention_bias` table gives every layer's attention bias (MPNet).
        final_norm: a LayerNorm after the last layer.
        last_state_normed: the last of the hidden states is the output, rather than what goes into `final_norm`.
        ignores_rest: layers after the first `config.num_hidden_layers` of the list do not run.
        tables_of_rotation: with rotary positions, the module that makes the tables of all layers.
        unused: modules that the encoder's own forward does not call.
        heads: transformers' heads over this encoder read it as BERT's of the same name do.
        output: transformers' class of what the encoder returns.
        pooler_activation: the pooler is a linear layer of the first token, and this its activation.
        tuple_keeps_pooler: in a returned tuple the pooler's place is there even where there is no pooler.
    """

    layer: Layer
    output: str
    modules: dict[str, tuple[str, ...]]
    buffers: dict[str, str] = field(default_factory=lambda: dict(BUFFERS))
    pooler: tuple[str, ...] = ()
    layers: str = "encoder.layer"
    groups: bool = False
    word: str | None = "embeddings.word_embeddings"
    position: str | None = "embeddings.position_embeddings"
    token_type: str | None = "embeddings.token_type_embeddings"
    norm: str | None = "embeddings.LayerNorm"
    dropout: str | None = "embeddings.dropout"
    called: dict[str, tuple[int | str, ...] | None] | None = None
    project: str | None = None
    positions: Literal["column", "after_padding_idx", "rotary"] = "column"
    position_type: str = "absolute"
    bias: str | None = None
    distances: str | None = None
    masks_embeddings: bool = False
    final_norm: str | None = None
    last_state_normed: bool = True
    pooler_activation: str | None = None
    tuple_keeps_pooler: bool = False
    tables_of_rotation: str = "rotary_emb"
    unused: tuple[str, ...] = ()
    ignores_rest: bool = False
    heads: bool = True

    @property
    def tables(self) -> tuple[str, ...]:
        """The embedding tables that are looked up in."""
        return tuple(filter(None, (self.word, self.position, self.token_type)))

    @property
    def relative(self) -> bool:
        """Does attention look at distances between tokens?"""
        return self.bias is not None or self.distances is not None or self.positions == "rotary"

"""What has to be known of a model to run it packed. The models themselves are rows of `families.py`.

Paths are attributes from the encoder (`Family`) or from one of its layers (`Layer`), as transformers names them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch.nn as nn

from ..stack.description import NormKind


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
        scale: where the factor of the scores is written, which must be the inverse root of the head's width unless
            `any_scale` says otherwise.
        causal: where it is written that a token sees no later one, which must be off but in a `Family.decoder`.
        reach: where a layer with a window has its own, one more than the tokens that it sees on a side.
        out, out_dropout, out_norm: the linear layer after attention, the dropout on it, the LayerNorm of that block.
        up, activation, inner_dropout, down, down_dropout, down_norm: the same of the feed-forward block.
        activation_name: where `activation` is None, a function in the layer's own code: the operators' name for it.
        pre_norm: the LayerNorms come first in their blocks (x = x + f(norm(x))) rather than last.
        gated: `up` makes two halves, act(first) * second.
        gate: of a gated block whose halves are two linear layers, the first: act(gate(x)) * up(x).
        rotates: q and k are rotated by their positions, all layers in the same way.
        attention_type: with rotary positions, where it is written which rotation and window the layer has.
        number: where the layer's number is written, by which its attention's config.layer_types says the same.
        rotary: the module that makes the rotation's tables, where every layer has one of its own.
        distances: what makes the scores look at distances between tokens, by a table of the encoder.
        norm: what the norms are; None: torch's LayerNorm.
        q_norm, k_norm: norms of q and k; norms_heads: of each head by itself, rather than of all heads of a token.
        after_out, after_down: norms of what each block adds to the hidden states, of pre-norm layers.
        divisor: where it is written what each block of a pre-norm layer divides that by.
        bias: the module whose `compute_bias` gives the layer's own bias of the scores.
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
    number: str | None = None
    rotary: str | None = None
    distances: Distances | None = None
    any_scale: bool = False
    norm: NormKind | None = None
    q_norm: str | None = None
    k_norm: str | None = None
    norms_heads: bool = True
    after_out: str | None = None
    after_down: str | None = None
    divisor: str | None = None
    bias: str | None = None

    @property
    def kind(self) -> str:
        return self.modules[""][0]

    @property
    def linears(self) -> tuple[str, ...]:
        """`gate` comes last, where there is one."""
        return (*self.qkv, self.out, self.up, self.down, *filter(None, [self.gate]))

    @property
    def norms(self) -> tuple[str, ...]:
        paths = (self.out_norm, self.down_norm, self.q_norm, self.k_norm, self.after_out, self.after_down)
        return tuple(path for path in paths if path is not None)

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
        word_class: transformers' class of the word table, where it is no nn.Embedding and called with tokens [T].
        bias: the module whose `relative_attention_bias` table gives every layer's attention bias (MPNet, T5).
        final_norm: a norm after the last layer, of the kind of the layers' norms.
        final_dropout: a dropout after that.
        last_state_normed: the last of the hidden states is the output, rather than what goes into `final_norm`.
        ignores_rest: layers after the first `config.num_hidden_layers` of the list do not run.
        tables_of_rotation: with rotary positions, the module that makes the tables of all layers.
        unused: modules that the encoder's own forward does not call.
        decoder: its tokens may see no later ones, as the layers' `causal` and config.is_causal say, and it may return a
            cache, which only its own code makes.
        sees_less: how many tokens less than config.sliding_window a layer with a window sees on a side.
        slides: all layers have that window, unless config.sliding_window is None.
        passes: transformers' classes that call the encoder and return what it returns.
        first_column: what is above the encoder may read the first column even where it is padding.
        half_clamped: its layers clamp what overflows in float16, which they leave to their own code.
        refuses_cache: its own code raises where use_cache=True is given.
        variant: (a setting of the config, the facts where that is on).
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
    word_class: str | None = None
    final_norm: str | None = None
    final_dropout: str | None = None
    decoder: bool = False
    sees_less: int = 0
    slides: bool = False
    passes: tuple[str, ...] = ()
    first_column: bool = True
    half_clamped: bool = False
    refuses_cache: bool = False
    variant: tuple[str, Family] | None = None
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
    def around(self) -> tuple[tuple[str | None, type[nn.Module], NormKind | None], ...]:
        """(path, torch's class, kind of norm) of what is around the layers: `norm`, `final_norm` and `project`."""
        return (
            (self.norm, nn.LayerNorm, self.layer.norm),
            (self.final_norm, nn.LayerNorm, self.layer.norm),
            (self.project, nn.Linear, None),
        )

    @property
    def anywhere(self) -> bool:
        """Has a text the same values in whichever column of a batch it begins?"""
        return self.called is None and (self.position is None or self.positions != "column")

    @property
    def relative(self) -> bool:
        """Does attention look at distances between tokens?"""
        own = self.bias is not None or self.layer.bias is not None
        return own or self.distances is not None or self.positions == "rotary"

"""The facts about a model that are needed to run it packed. The models themselves are rows of `families.py`.

A path is a chain of attributes, as transformers names them, from the encoder (in `Family`) or from a layer (in
`Layer`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch.nn as nn

from ..stack.description import NormKind


def at(module: Any, path: str) -> Any:
    """The attribute at a path, such as at(layer, "attention.self.query"); the module itself for ""."""
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
    """Paths of DeBERTa's relative positions, from the layer.

    Attributes:
        key, query: the projections of the table of distances to keys and to queries; a layer may lack either.
        dropout: the dropout on the table, drawn in every layer.
        terms: the setting that lists the terms of the scores: "c2p" (content to position), "p2c" (position to content).
        shares: the setting by which the layer's own key and query projections are used in place of `key` and `query`.
    """

    key: str
    query: str
    dropout: str
    terms: str
    shares: str


@dataclass(frozen=True)
class Layer:
    """Paths of the parts and settings of a layer. None: the family has no such part.

    Attributes:
        modules: the bypassed modules: path -> names of transformers' class for it; "" is the layer itself. A module of
            another class, or with another method, runs the original's code.
        qkv: the projections of attention: three linear layers, or a single one that makes q, k and v.
        head_dim: the width of a head.
        probs_dropout: the nn.Dropout on the attention probabilities, or its probability.
        probs_switch: the module whose training mode turns that dropout on; None for the dropout module itself.
        scale: the factor of the scores, which must be 1 / sqrt(head_dim) unless `any_scale`.
        causal: the setting by which a token sees no later ones; it must be off except in a `Family.decoder`.
        looks_back: whether the encoder's code says so of all layers, and no setting of the layer.
        reach: the window of a layer, which is one more than the tokens that it sees on a side.
        out, out_dropout, out_norm: the linear layer after attention, the dropout on its output, the block's LayerNorm.
            A dropout may also be a number, which the training mode of the module that holds it turns on.
        up, activation, inner_dropout, down, down_dropout, down_norm: the same for the feed-forward block.
        activation_name: if `activation` is None, the layer's code calls a function: the operators' name for it.
        pre_norm: whether the LayerNorms come first in their blocks, x = x + f(norm(x)), rather than last.
        gated: whether `up` makes two halves, act(first) * second.
        gate: in a gated block with two linear layers, the one of the activation: act(gate(x)) * up(x).
        rotates: whether q and k are rotated by their positions, in the same way in all layers.
        attention_type: with rotary positions, the setting that tells which rotation and window the layer has.
        number: the layer's number, at which config.layer_types tells the same.
        rotary: the module that computes the rotary tables, if every layer has one.
        distances: the relative positions, which need a table of the encoder.
        norm: the kind of the norms; None for torch's LayerNorm.
        q_norm, k_norm: norms of q and k. norms_heads: whether they normalise each head by itself, or all of a token.
        after_out, after_down: in pre-norm layers, norms of a block's result before it is added to the hidden states.
        divisor: in pre-norm layers, a number by which a block's result is divided.
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
    looks_back: bool = False
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
        """The paths of the linear layers; `gate` comes last if there is one."""
        return (*self.qkv, self.out, self.up, self.down, *filter(None, [self.gate]))

    @property
    def norms(self) -> tuple[str, ...]:
        paths = (self.out_norm, self.down_norm, self.q_norm, self.k_norm, self.after_out, self.after_down)
        return tuple(path for path in paths if path is not None)

    @property
    def dropouts(self) -> tuple[str, ...]:
        """The dropouts on probabilities and on hidden states; the first one may be a number."""
        paths = (self.probs_dropout, self.out_dropout, self.inner_dropout, self.down_dropout)
        return tuple(path for path in paths if path is not None)


BUFFERS = {"embeddings.position_ids": "columns", "embeddings.token_type_ids": "zeros"}


@dataclass(frozen=True)
class Family:
    """Paths of the parts of an encoder, and how it computes positions, masks and outputs.

    Attributes:
        layer: the parts of a layer.
        output: transformers' class of the encoder's output.
        modules: as in `Layer`, for the encoder around its layers.
        buffers: path -> content of the embeddings' buffers: "columns" (0, 1, 2, ...) or "zeros".
        pooler: class names of a pooler that reads only the first column of each sequence.
        layers: the list of layers; with `groups` a list of groups of layers that are shared (ALBERT).
        word, position, token_type: the embedding tables. An encoder may have None in place of one.
        norm, dropout: of the sum of the tables.
        called: for encoders whose embeddings are called as they are, on [batch, tokens], in place of the tables above:
            name of an argument of their forward -> the shape after [batch, tokens] of the zeros that replace a missing
            argument (a name in it stands for the length of that config entry), or None if nothing replaces it.
            inputs_embeds bypass the embeddings unless they are named here.
        project: a linear layer from the embeddings' width to the layers'; absent if both are equal.
        positions: "column": a token's column in the padded batch; "after_padding_idx": ids other than padding are
            counted from padding_idx + 1; "rotary": no table, q and k are rotated.
        position_type: what `config.position_embedding_type` must be, with "absolute" as its default.
        bias: the module with the table `relative_attention_bias` for the attention bias of all layers (MPNet, T5).
        distances: the module with the table of distances that the layers' `distances` project (DeBERTa).
        masks_embeddings: whether the embeddings of padding are zeros.
        zero_or_one: whether the code computes with the values of a mask, and does not only ask which of them are 0.
        word_class: transformers' class of the word table if that is no nn.Embedding; it is called with tokens [T].
        position_class: the same of the table of positions; it has `offset` rows before that of the first position.
        layerdrop: the probability with which training leaves out a layer; the original's code runs such calls.
        final_norm: a norm after the last layer, of the kind of the layers' norms.
        final_dropout: a dropout after that norm.
        decoder: whether tokens see no later ones, as the layers' `causal` and config.is_causal say. Only the model's
            own code can return a cache.
        bidirectional: the setting of a decoder's config by which its layers and masks let tokens see later ones.
        sees_less: the tokens that a layer with a window sees on a side are config.sliding_window less this number.
        slides: whether all layers have that window unless config.sliding_window is None.
        passes: transformers' classes that call the encoder and return its output.
        first_column: whether the first column may be read even if it is padding.
        half_clamped: whether the layers clamp overflowing values in float16; the original's code runs such calls.
        refuses_cache: whether the original raises an error for use_cache=True.
        variant: (name of a setting of the config, its value, the facts for this value).
        last_state_normed: whether the last hidden state is the output, rather than the input of `final_norm`.
        pooled: without a pooler, the token that `pooler_output` is made of: the first eos_token_id of the encoder, the
            first largest id, the last column; or the largest id if eos_token_id is 2, and else the first eos_token_id.
        pooled_by: the linear layer that makes `pooler_output` of it.
        pooler_activation: the activation of a pooler that is a linear layer of the first token.
        tuple_keeps_pooler: whether a returned tuple has a place for the pooler's output even without a pooler.
        tables_of_rotation: with rotary positions, the module that computes the rotary tables of all layers.
        unused: modules that the encoder's own forward does not call.
        ignores_rest: whether layers after the first `config.num_hidden_layers` of the list do not run.
        heads: whether transformers' heads of this family read the encoder's output as BERT's do.
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
    zero_or_one: bool = False
    word_class: str | None = None
    position_class: str | None = None
    layerdrop: str | None = None
    final_norm: str | None = None
    final_dropout: str | None = None
    decoder: bool = False
    bidirectional: str | None = None
    sees_less: int = 0
    slides: bool = False
    passes: tuple[str, ...] = ()
    first_column: bool = True
    half_clamped: bool = False
    refuses_cache: bool = False
    variant: tuple[str, Any, Family] | None = None
    last_state_normed: bool = True
    pooled: Literal["eos", "largest", "eos_or_largest", "last"] | None = None
    pooled_by: str | None = None
    pooler_activation: str | None = None
    tuple_keeps_pooler: bool = False
    tables_of_rotation: str = "rotary_emb"
    unused: tuple[str, ...] = ()
    ignores_rest: bool = False
    heads: bool = True

    @property
    def tables(self) -> tuple[str, ...]:
        """The paths of the embedding tables."""
        return tuple(filter(None, (self.word, self.position, self.token_type)))

    @property
    def fuses_tables(self) -> bool:
        """Whether the embeddings can be one operator, if all tables are plain."""
        return self.position is not None and self.norm is not None

    @property
    def around(self) -> tuple[tuple[str | None, type[nn.Module], NormKind | None], ...]:
        """(path, torch's class, kind of norm) of `norm`, `final_norm` and `project`."""
        return (
            (self.norm, nn.LayerNorm, self.layer.norm),
            (self.final_norm, nn.LayerNorm, self.layer.norm),
            (self.project, nn.Linear, None),
        )

    @property
    def anywhere(self) -> bool:
        """Whether the values of a text do not depend on the column in which it begins."""
        return self.called is None and (self.position is None or self.positions != "column")

    @property
    def relative(self) -> bool:
        """Whether attention depends on distances between tokens."""
        own = self.bias is not None or self.layer.bias is not None
        return own or self.distances is not None or self.positions == "rotary" or self.layer.looks_back

"""The variable names of each framework, one `Family` each, and which family a TensorFlow checkpoint belongs to.

Our names are those of transformers' pre-training models, with the prefix "bert.", "albert." or "electra.".
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from ..storage import CheckpointError
from .names import (
    ARRAY,
    EMBEDDING,
    KERAS_LINEAR,
    KERAS_LINEAR_FROM_HEADS,
    KERAS_LINEAR_TO_HEADS,
    KERAS_NORM,
    KERAS_TABLE,
    LINEAR,
    LINEAR_FROM_HEADS,
    LINEAR_TO_HEADS,
    NORM,
    PADDLE_LINEAR,
    SAME,
    TABLE,
    Family,
    Kind,
    Module,
)


def _bert_layers(
    theirs: str, ours: str, names: Iterable[str], to_heads: Kind, from_heads: Kind, linear: Kind, norm: Kind
) -> tuple[Module, ...]:
    """The rows of the table for a layer. names: their names of query, key, value, the output product, its norm, up,
    down, and the norm after these."""
    query, key, value, output, output_norm, up, down, last_norm = names
    return (
        (theirs + query, ours + "attention.self.query", to_heads),
        (theirs + key, ours + "attention.self.key", to_heads),
        (theirs + value, ours + "attention.self.value", to_heads),
        (theirs + output, ours + "attention.output.dense", from_heads),
        (theirs + output_norm, ours + "attention.output.LayerNorm", norm),
        (theirs + up, ours + "intermediate.dense", linear),
        (theirs + down, ours + "output.dense", linear),
        (theirs + last_norm, ours + "output.LayerNorm", norm),
    )


_BERT_LAYER = "bert.encoder.layer.{n}."
_GOOGLE_LAYER_NAMES = (
    "attention/self/query", "attention/self/key", "attention/self/value", "attention/output/dense",
    "attention/output/LayerNorm", "intermediate/dense", "output/dense", "output/LayerNorm",
)  # fmt: skip


def _google_embeddings(theirs: str, ours: str) -> tuple[Module, ...]:
    return (
        (theirs + "word_embeddings", ours + "word_embeddings", TABLE),
        (theirs + "position_embeddings", ours + "position_embeddings", TABLE),
        (theirs + "token_type_embeddings", ours + "token_type_embeddings", TABLE),
        (theirs + "LayerNorm", ours + "LayerNorm", NORM),
    )


def _google_layers(theirs: str, ours: str) -> tuple[Module, ...]:
    return _bert_layers(theirs, ours, _GOOGLE_LAYER_NAMES, LINEAR, LINEAR, LINEAR, NORM)


# google-research/bert: modeling.py, run_pretraining.py, run_classifier.py, run_squad.py
GOOGLE = Family(
    "Google's TensorFlow checkpoint",
    "bert",
    "bert/embeddings/word_embeddings",
    (
        *_google_embeddings("bert/embeddings/", "bert.embeddings."),
        *_google_layers("bert/encoder/layer_{n}/", _BERT_LAYER),
        ("bert/pooler/dense", "bert.pooler.dense", LINEAR),
        ("cls/predictions/transform/dense", "cls.predictions.transform.dense", LINEAR),
        ("cls/predictions/transform/LayerNorm", "cls.predictions.transform.LayerNorm", NORM),
        ("cls/predictions/output_bias", "cls.predictions.bias", ARRAY),
        ("cls/seq_relationship/output_weights", "cls.seq_relationship.weight", ARRAY),
        ("cls/seq_relationship/output_bias", "cls.seq_relationship.bias", ARRAY),
        ("cls/squad/output_weights", "qa_outputs.weight", ARRAY),
        ("cls/squad/output_bias", "qa_outputs.bias", ARRAY),
        ("output_weights", "classifier.weight", ARRAY),
        ("output_bias", "classifier.bias", ARRAY),
    ),
    "gelu_new",
)

_TF2_ENDING = "/.ATTRIBUTES/VARIABLE_VALUE"
_TF2_LAYER_NAMES = (
    "_attention_layer/_query_dense", "_attention_layer/_key_dense", "_attention_layer/_value_dense",
    "_attention_layer/_output_dense", "_attention_layer_norm", "_intermediate_dense", "_output_dense",
    "_output_layer_norm",
)  # fmt: skip


def _garden_heads(theirs: str) -> tuple[Module, ...]:
    """The head of masked words. It shares the encoder's table of words, which is named by the shorter path, that of the
    head. In a path a dot is written twice, and a slash within a name as ".S"."""
    return (
        (theirs + "masked_lm/dense", "cls.predictions.transform.dense", LINEAR),
        (theirs + "masked_lm/layer_norm", "cls.predictions.transform.LayerNorm", NORM),
        (theirs + "masked_lm/output_bias.Sbias", "cls.predictions.bias", ARRAY),
        (theirs + "masked_lm/embedding_table", "bert.embeddings.word_embeddings", TABLE),
    )


# In a checkpoint the head is beside the encoder; in TF-Hub's modules it is in a second model of the same object.
_GARDEN_HEADS = _garden_heads("") + _garden_heads("mlm/layer_with_weights-0/")

# tf-models-official since 2.4: BertEncoderV2
MODEL_GARDEN = Family(
    "TF Model Garden's checkpoint",
    "bert",
    "_position_embedding_layer/embeddings",
    (
        ("_embedding_layer", "bert.embeddings.word_embeddings", EMBEDDING),
        ("_position_embedding_layer", "bert.embeddings.position_embeddings", EMBEDDING),
        ("_type_embedding_layer", "bert.embeddings.token_type_embeddings", EMBEDDING),
        ("_embedding_norm_layer", "bert.embeddings.LayerNorm", NORM),
        *_bert_layers("_transformer_layers/{n}/", _BERT_LAYER, _TF2_LAYER_NAMES,
                      LINEAR_TO_HEADS, LINEAR_FROM_HEADS, LINEAR, NORM),
        ("_pooler_layer", "bert.pooler.dense", LINEAR),
        *_GARDEN_HEADS,
    ),
    "gelu_new",
    _TF2_ENDING,
)  # fmt: skip


def _of_pretraining(family: Family) -> Family:
    """The family for a pre-training run. Such a run pools with a layer of the next-sentence head and never trains the
    encoder's own pooler; the Model Garden's export to TF-Hub replaces that pooler by the head's layer, and so does
    this.
    """
    (pooler,) = (theirs for theirs, ours, _ in family.modules if ours == "bert.pooler.dense")
    return replace(
        family,
        modules=(
            *(module for module in family.modules if module[0] != pooler),
            ("next_sentence..pooler_dense", "bert.pooler.dense", LINEAR),
            ("model/classification_heads/0/out_proj", "cls.seq_relationship", LINEAR),
        ),
        not_weights=((rf"(^|/){pooler}/", "a pooler that was not trained; the next sentence's pooler replaces it"),),
    )


# BertEncoder, the only one until 2.3, numbers its parts: four for the embeddings, then the layers, then the pooler. The
# pooler's number gives the number of layers. Until 2.3 the attention's output product belonged to the layer.
_NUMBERED_LAYER_NAMES = (*_TF2_LAYER_NAMES[:3], "_attention_output_dense", *_TF2_LAYER_NAMES[4:])


def numbered_family(parts: int) -> Family:
    """BertEncoder of tf-models-official, with `parts` numbered parts, and TF-Hub's modules made with it."""
    embeddings = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    modules = [(f"layer_with_weights-{i}", f"bert.embeddings.{name}", EMBEDDING) for i, name in enumerate(embeddings)]
    modules.append(("layer_with_weights-3", "bert.embeddings.LayerNorm", NORM))
    for i in range(4, parts - 1):
        theirs, ours = f"layer_with_weights-{i}/", _BERT_LAYER.format(n=i - 4)
        # Under both names the attention's output product has an axis of heads.
        for names in (_TF2_LAYER_NAMES, _NUMBERED_LAYER_NAMES):
            modules += _bert_layers(theirs, ours, names, LINEAR_TO_HEADS, LINEAR_FROM_HEADS, LINEAR, NORM)
    modules.append((f"layer_with_weights-{parts - 1}", "bert.pooler.dense", LINEAR))
    return Family(
        "TF Model Garden's checkpoint (with numbered parts)",
        "bert",
        "layer_with_weights-1/embeddings",
        (*modules, *_GARDEN_HEADS),
        "gelu_new",
        _TF2_ENDING,
    )


_LAYER_NAMES_OF_2019 = (
    "attention_layer/query_dense", "attention_layer/key_dense", "attention_layer/value_dense",
    "attention_output_dense", "attention_layer_norm", "intermediate_dense", "output_dense", "output_layer_norm",
)  # fmt: skip

# tf-models-official of 2019, before 2.1: one layer of Keras around all of BERT
MODEL_GARDEN_2019 = Family(
    "TF Model Garden's checkpoint (2019)",
    "bert",
    "embedding_lookup/embeddings",
    (
        ("embedding_lookup", "bert.embeddings.word_embeddings", EMBEDDING),
        ("embedding_postprocessor/position_embeddings", "bert.embeddings.position_embeddings", TABLE),
        ("embedding_postprocessor/type_embeddings", "bert.embeddings.token_type_embeddings", TABLE),
        ("embedding_postprocessor/output_layer_norm", "bert.embeddings.LayerNorm", NORM),
        *_bert_layers("encoder/layers/{n}/", _BERT_LAYER, _LAYER_NAMES_OF_2019,
                      LINEAR_TO_HEADS, LINEAR_FROM_HEADS, LINEAR, NORM),
        ("pooler_transform", "bert.pooler.dense", LINEAR),
    ),
    "gelu_new",
    _TF2_ENDING,
)  # fmt: skip

_ALBERT_THEIRS = "bert/encoder/transformer/group_{g}/inner_group_{i}/"
_ALBERT_OURS = "albert.encoder.albert_layer_groups.{g}.albert_layers.{i}."

# google-research/albert: modeling.py
ALBERT = Family(
    "Google's ALBERT checkpoint",
    "albert",
    "bert/embeddings/word_embeddings",
    (
        *_google_embeddings("bert/embeddings/", "albert.embeddings."),
        ("bert/encoder/embedding_hidden_mapping_in", "albert.encoder.embedding_hidden_mapping_in", LINEAR),
        *(
            (f"{_ALBERT_THEIRS}attention_1/self/{name}", f"{_ALBERT_OURS}attention.{name}", LINEAR)
            for name in ("query", "key", "value")
        ),
        (_ALBERT_THEIRS + "attention_1/output/dense", _ALBERT_OURS + "attention.dense", LINEAR),
        (_ALBERT_THEIRS + "LayerNorm", _ALBERT_OURS + "attention.LayerNorm", NORM),
        (_ALBERT_THEIRS + "ffn_1/intermediate/dense", _ALBERT_OURS + "ffn", LINEAR),
        (_ALBERT_THEIRS + "ffn_1/intermediate/output/dense", _ALBERT_OURS + "ffn_output", LINEAR),
        (_ALBERT_THEIRS + "LayerNorm_1", _ALBERT_OURS + "full_layer_layer_norm", NORM),
        ("bert/pooler/dense", "albert.pooler", LINEAR),
        ("cls/predictions/transform/dense", "predictions.dense", LINEAR),
        ("cls/predictions/transform/LayerNorm", "predictions.LayerNorm", NORM),
        ("cls/predictions/output_bias", "predictions.bias", ARRAY),
        ("cls/seq_relationship/output_weights", "sop_classifier.classifier.weight", ARRAY),
        ("cls/seq_relationship/output_bias", "sop_classifier.classifier.bias", ARRAY),
        ("output_weights", "classifier.weight", ARRAY),
        ("output_bias", "classifier.bias", ARRAY),
    ),
    "gelu_new",
)

# Prefix of the generator's names, so that both of ELECTRA's models fit into one dict.
GENERATOR = "generator:"

# google-research/electra: model/modeling.py, pretrain/pretrain_helpers.py. Its gelu is computed by erf.
ELECTRA = Family(
    "Google's ELECTRA checkpoint",
    "electra",
    "electra/embeddings/word_embeddings",
    (
        *_google_embeddings("electra/embeddings/", "electra.embeddings."),
        ("electra/embeddings_project", "electra.embeddings_project", LINEAR),
        *_google_layers("electra/encoder/layer_{n}/", "electra.encoder.layer.{n}."),
        ("discriminator_predictions/dense", "discriminator_predictions.dense", LINEAR),
        ("discriminator_predictions/dense_1", "discriminator_predictions.dense_prediction", LINEAR),
        *_google_embeddings("generator/embeddings/", GENERATOR + "electra.embeddings."),
        ("generator/embeddings_project", GENERATOR + "electra.embeddings_project", LINEAR),
        *_google_layers("generator/encoder/layer_{n}/", GENERATOR + "electra.encoder.layer.{n}."),
        ("generator_predictions/dense", GENERATOR + "generator_predictions.dense", LINEAR),
        ("generator_predictions/LayerNorm", GENERATOR + "generator_predictions.LayerNorm", NORM),
        ("generator_predictions/output_bias", GENERATOR + "generator_lm_head.bias", ARRAY),
    ),
    "gelu",
)

_KERAS_ATTENTION = "_self_attention_layer/"
_KERAS_LAYER_NAMES = (
    _KERAS_ATTENTION + "query_dense", _KERAS_ATTENTION + "key_dense", _KERAS_ATTENTION + "value_dense",
    _KERAS_ATTENTION + "output_dense", "_self_attention_layer_norm", "_feedforward_intermediate_dense",
    "_feedforward_output_dense", "_feedforward_layer_norm",
)  # fmt: skip

KERAS_HUB = Family(
    "keras-hub's weights",
    "bert",
    "token_embedding/0",
    (
        ("token_embedding", "bert.embeddings.word_embeddings", KERAS_TABLE),
        ("position_embedding", "bert.embeddings.position_embeddings", KERAS_TABLE),
        ("segment_embedding", "bert.embeddings.token_type_embeddings", KERAS_TABLE),
        ("embeddings_layer_norm", "bert.embeddings.LayerNorm", KERAS_NORM),
        *_bert_layers("transformer_layer_{n}/", _BERT_LAYER, _KERAS_LAYER_NAMES,
                      KERAS_LINEAR_TO_HEADS, KERAS_LINEAR_FROM_HEADS, KERAS_LINEAR, KERAS_NORM),
        ("pooled_dense", "bert.pooler.dense", KERAS_LINEAR),
        ("mlm_head/_intermediate_dense", "cls.predictions.transform.dense", KERAS_LINEAR),
        ("mlm_head/_intermediate_layer_norm", "cls.predictions.transform.LayerNorm", KERAS_NORM),
        ("mlm_head/0", "cls.predictions.bias", ARRAY),
        ("logits", "classifier", KERAS_LINEAR),
    ),
    "gelu_new",
    differs=((
        "cls.predictions.",
        "Its head of masked words computes gelu by erf, and a LayerNorm with the epsilon 1e-5; transformers' computes "
        "both as the encoder does, so the scores of words will differ slightly.",
    ),),
)  # fmt: skip

_PADDLE_LAYER_NAMES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "norm1", "linear1", "linear2",
    "norm2",
)  # fmt: skip

# These have the prefix "bert."; the reader adds it to a file whose names have none.
PADDLE = Family(
    "PaddleNLP's parameters",
    "bert",
    "bert.embeddings.word_embeddings.weight",
    (
        ("bert.embeddings.word_embeddings", "bert.embeddings.word_embeddings", SAME),
        ("bert.embeddings.position_embeddings", "bert.embeddings.position_embeddings", SAME),
        ("bert.embeddings.token_type_embeddings", "bert.embeddings.token_type_embeddings", SAME),
        ("bert.embeddings.layer_norm", "bert.embeddings.LayerNorm", SAME),
        *_bert_layers("bert.encoder.layers.{n}.", _BERT_LAYER, _PADDLE_LAYER_NAMES,
                      PADDLE_LINEAR, PADDLE_LINEAR, PADDLE_LINEAR, SAME),
        ("bert.pooler.dense", "bert.pooler.dense", PADDLE_LINEAR),
        ("cls.predictions.transform", "cls.predictions.transform.dense", PADDLE_LINEAR),
        ("cls.predictions.layer_norm", "cls.predictions.transform.LayerNorm", SAME),
        ("cls.predictions.decoder_bias", "cls.predictions.bias", ARRAY),
        ("cls.predictions.decoder_weight", "cls.predictions.decoder.weight", ARRAY),
        ("cls.seq_relationship", "cls.seq_relationship", PADDLE_LINEAR),
        ("classifier", "classifier", PADDLE_LINEAR),
    ),
    "gelu",
)  # fmt: skip

_GGUF_LAYER_NAMES = (
    "attn_q", "attn_k", "attn_v", "attn_output", "attn_output_norm", "ffn_up", "ffn_down", "layer_output_norm",
)  # fmt: skip

GGUF = Family(
    "GGUF",
    "bert",
    "token_embd.weight",
    (
        ("token_embd", "bert.embeddings.word_embeddings", SAME),
        ("position_embd", "bert.embeddings.position_embeddings", SAME),
        ("token_types", "bert.embeddings.token_type_embeddings", SAME),
        ("token_embd_norm", "bert.embeddings.LayerNorm", SAME),
        *_bert_layers("blk.{n}.", _BERT_LAYER, _GGUF_LAYER_NAMES, SAME, SAME, SAME, SAME),
    ),
    "gelu_new",
)


def tensorflow_family(names: Iterable[str]) -> Family:
    """The family of a TensorFlow checkpoint with these names. Raises CheckpointError if it is no BERT of a known
    kind."""
    names = list(names)

    def has(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in names)

    if has(r"(^|/)electra/embeddings/"):
        return ELECTRA
    if has(r"(^|/)bert/encoder/transformer/group_\d+/"):
        return ALBERT
    if has(r"(^|/)bert/embeddings/word_embeddings$"):
        return GOOGLE
    if has(r"(^|/)embedding_lookup/embeddings/"):
        return MODEL_GARDEN_2019
    family = None
    numbers = [
        int(m[1]) for name in names if (m := re.search(r"layer_with_weights-(\d+)/(?!layer_with_weights-)", name))
    ]
    if has(r"(^|/)_transformer_layers/\d+/"):
        family = MODEL_GARDEN
    elif numbers:
        family = numbered_family(max(numbers) + 1)
    if family is not None:
        return _of_pretraining(family) if has(r"^next_sentence\.\.pooler_dense/") else family
    some = ", ".join(names[:3])
    raise CheckpointError(f"it holds no BERT, ALBERT or ELECTRA that is known here: its variables are {some}, ...")

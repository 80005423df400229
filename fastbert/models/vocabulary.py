"""The heads that predict words: masked words, and both objectives of pre-training.

The docstring of `heads.py` lists the differences from transformers.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
import torch.nn as nn
from torch import Tensor

from .. import functional as F
from ..config import BertConfig
from ..packing import PackedBatch
from .head import IGNORED, BertHead, Encoded, cross_entropy, product, scores, start
from .outputs import HeadOutput, PreTrainingOutput

TIED_DECODER = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}


class PredictionHead(nn.Module):
    """logits = decoder(LayerNorm(act(dense(x)))): x [N, C] -> [N, V]. The decoder's weight is the word embedding's."""

    def __init__(self, config: BertConfig, impl: F.Impl | None):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        decoder = nn.Linear(width, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros_like(decoder.bias))
        self.transform = nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, eps=eps)})
        self.decoder = decoder
        self.activation, self.impl = config.activation, impl

    def transformed(self, x: Tensor) -> Tensor:
        norm: Any = self.transform["LayerNorm"]
        h = F.activate(product(self.transform["dense"], x, self.impl), self.activation)
        return F.add_layer_norm(h, None, norm.weight, norm.bias, norm.eps, impl=self.impl)

    def forward(self, x: Tensor) -> Tensor:
        return product(self.decoder, self.transformed(x), self.impl)

    def loss(
        self, x: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None, wants_logits: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(cross-entropy of the rows of x [T, C] whose label is not -100, their logits [N, V] or None)."""
        rows = (labels != IGNORED).nonzero().squeeze(1)
        h, labels = self.transformed(x[rows]), labels[rows]
        if wants_logits:
            logits = product(self.decoder, h, self.impl)
            return cross_entropy(logits, labels, num_items_in_batch), logits
        decoder = self.decoder
        reduction: Literal["mean", "sum"] = "mean" if num_items_in_batch is None else "sum"
        loss = F.linear_cross_entropy(h, decoder.weight, decoder.bias, labels, reduction=reduction, impl=self.impl)
        return loss if num_items_in_batch is None else loss / num_items_in_batch, None


class _Vocabulary(BertHead):
    """A head that predicts words."""

    _tied_weights_keys = TIED_DECODER

    def __init__(self, config: BertConfig, impl: F.Impl | None = None):
        super().__init__(config, impl)
        self.cls = nn.ModuleDict({"predictions": start(PredictionHead(config, impl), config)})
        self.tie_weights()

    def get_output_embeddings(self) -> nn.Module:
        return cast(PredictionHead, self.cls["predictions"]).decoder

    def words(
        self, encoded: Encoded, labels: Tensor | None, num_items_in_batch: Tensor | int | None,
        output_logits: bool | None,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """(loss, logits); the loss is None without labels, logits are None unless requested."""
        predictions = cast(PredictionHead, self.cls["predictions"])
        if labels is None:
            return None, None if output_logits is False else encoded.shaped(predictions(encoded.hidden))
        return predictions.loss(
            encoded.hidden, encoded.by_token("labels", labels), num_items_in_batch, bool(output_logits)
        )


class BertForMaskedLM(_Vocabulary):
    """Predicts masked words. The decoder's weight is the word embedding's."""

    POOLED = False

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        output_logits: bool | None = None,
    ) -> HeadOutput | tuple:
        """loss, and logits [B, S, V], 0 at padding; [T, V] for a PackedBatch.

        labels: [B, S], or [T] for a PackedBatch; -100 for tokens that are not predicted. With labels only the labelled
            rows go through the head, and their logits are never in memory as a whole. On a GPU this waits once for
            the number of these rows.
        output_logits: with labels, True also returns the logits of the labelled rows, [N, V] in reading order;
            without labels, False skips the head.
        """
        encoded = self.encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            output_attentions, output_hidden_states,
        )  # fmt: skip
        loss, logits = self.words(encoded, labels, num_items_in_batch, output_logits)
        return self.returned(HeadOutput(loss=loss, logits=logits, **encoded.extras), return_dict)


class BertForPreTraining(_Vocabulary):
    """Both objectives of BERT's pre-training: masked words, and whether the second segment follows the first."""

    POOLED = True

    def __init__(self, config: BertConfig, impl: F.Impl | None = None):
        super().__init__(config, impl)
        self.cls["seq_relationship"] = start(nn.Linear(config.hidden_size, 2), config)

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        output_logits: bool | None = None,
        num_pairs_in_batch: Tensor | int | None = None,
    ) -> PreTrainingOutput | tuple:
        """loss, prediction_logits [B, S, V] ([T, V] for a PackedBatch) and seq_relationship_logits [B, 2].

        labels, output_logits: as in `BertForMaskedLM`. With labels but without next_sentence_label there are logits and
            no loss, as in transformers.
        next_sentence_label: [B], -100 for a pair that does not count. The loss is the sum of both objectives' losses.
        num_items_in_batch: masked words of the whole optimiser step. num_pairs_in_batch: its next_sentence_labels that
            count. With num_items_in_batch only, as transformers' Trainer passes it, the second objective is the mean
            over this batch, weighted by the batch's share of the step's masked words.
        """
        encoded = self.encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            output_attentions, output_hidden_states,
        )  # fmt: skip
        assert encoded.pooled is not None  # POOLED
        relation = scores(self.cls["seq_relationship"], encoded.pooled, self.impl)
        if labels is None or next_sentence_label is None:
            loss, logits = None, self.words(encoded, None, None, output_logits)[1]
        else:
            loss, logits = self.words(encoded, labels, num_items_in_batch, output_logits)
            pairs = cross_entropy(relation, next_sentence_label.view(-1), num_pairs_in_batch)
            if num_pairs_in_batch is None and num_items_in_batch is not None:
                pairs = pairs * ((encoded.by_token("labels", labels) != IGNORED).sum() / num_items_in_batch)
            loss = pairs if loss is None else loss + pairs
        output = PreTrainingOutput(
            loss=loss, prediction_logits=logits, seq_relationship_logits=relation, **encoded.extras
        )
        return self.returned(output, return_dict)

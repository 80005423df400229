"""BERT for tasks: transformers' classes, names, outputs and losses, on packed batches. Heads that predict words are in
`vocabulary.py`.

Differences from transformers 5.24, and their reasons:

- Padding is never computed. Logits at padding are 0; those of answer spans are the smallest number of their dtype, so
  that a span's softmax covers only the tokens of its text, and a text's loss does not depend on the rest of its batch.
  transformers includes padding, so its loss of padded batches differs; for one text at a time both agree.
- Labels at padding do not count, nor answer positions outside their text. transformers counts a negative position as
  the first token.
- The config decides a classifier's kind of loss at construction. In transformers the first labels decide.
- Heads that read only the first token compute the last layer for that token only, unless hidden states or attentions
  are requested.
- With labels, heads that predict words compute only what the loss needs, and no logits unless these are requested.
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from .. import functional as F
from ..config import BertConfig
from ..packing import PackedBatch
from .head import (
    IGNORED,
    BertHead,
    at_least_float32,
    cross_entropy,
    scores,
    start,
)
from .outputs import HeadOutput, SpanOutput
from .vocabulary import BertForMaskedLM as BertForMaskedLM
from .vocabulary import BertForPreTraining as BertForPreTraining

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


# ---- a sequence ------------------------------------------------------------------------------------------


class BertForSequenceClassification(BertHead):
    """A linear layer on the pooled first token.

    `problem_type` is the config's; if the config has none, "regression" for one label, otherwise
    "single_label_classification".

    `class_weights` is None or [num_labels]: the weight of each class in the loss of single_label_classification, see
    `BertForTokenClassification`.
    """

    POOLED = FIRST_ONLY = True
    class_weights: Tensor | None

    def __init__(self, config: BertConfig, impl: F.Impl | None = None):
        super().__init__(config, impl)
        self.num_labels = config.num_labels
        by_number = "regression" if config.num_labels == 1 else "single_label_classification"
        self.problem_type = config.problem_type or by_number
        if self.problem_type not in PROBLEM_TYPES:
            raise ValueError(f"problem_type must be one of {PROBLEM_TYPES}, got {self.problem_type!r}")
        self.classifier = start(nn.Linear(config.hidden_size, config.num_labels), config)
        self.register_buffer("class_weights", None, persistent=False)

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
    ) -> HeadOutput | tuple:
        """loss and logits [B, num_labels], for padded and packed input.

        labels: [B] classes, -100 for a text that does not count; for several labels per text [B, num_labels] of 0 and
            1; for regression [B] or [B, num_labels] numbers. For the latter two, each element is an item of the loss.
        """
        encoded = self.encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            output_attentions, output_hidden_states,
        )  # fmt: skip
        logits = scores(self.classifier, self.pooled_dropped(encoded), self.impl)
        loss = None if labels is None else self._loss(logits, labels, num_items_in_batch)
        return self.returned(HeadOutput(loss=loss, logits=logits, **encoded.extras), return_dict)

    def _loss(self, logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        if self.problem_type == "single_label_classification":
            if labels.is_floating_point():
                raise ValueError(
                    "labels of single_label_classification are integers, got "
                    f'{labels.dtype}; for several labels a text set problem_type="multi_label_classification"'
                )
            return cross_entropy(logits, labels.view(-1), num_items_in_batch, self.class_weights)
        logits = at_least_float32(logits)
        if labels.numel() != logits.numel() or labels.shape[0] != logits.shape[0]:
            raise ValueError(f"{self.problem_type}: labels are {list(labels.shape)}, logits {list(logits.shape)}")
        labels = labels.view_as(logits).to(logits.dtype)
        regresses = self.problem_type == "regression"
        by_element = nn.functional.mse_loss if regresses else nn.functional.binary_cross_entropy_with_logits
        if num_items_in_batch is None:
            return by_element(logits, labels)
        return by_element(logits, labels, reduction="sum") / num_items_in_batch


class BertForMultipleChoice(BertHead):
    """One score for each choice, from the pooled first token of its text."""

    POOLED = FIRST_ONLY = True

    def __init__(self, config: BertConfig, impl: F.Impl | None = None):
        super().__init__(config, impl)
        self.classifier = start(nn.Linear(config.hidden_size, 1), config)

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
        num_choices: int | None = None,
    ) -> HeadOutput | tuple:
        """loss and logits [B, num_choices].

        input_ids and the other inputs: [B, num_choices, S]; or a PackedBatch of B * num_choices texts, in which the
            choices of an example follow each other.
        labels: [B], the number of the right choice, -100 for an example that does not count.
        num_choices: for a PackedBatch.
        """
        if isinstance(input_ids, PackedBatch):
            if not num_choices or input_ids.batch_size % num_choices:
                raise ValueError(
                    f"a PackedBatch of {input_ids.batch_size} texts needs num_choices that divides it, "
                    f"got {num_choices}"
                )
        else:
            num_choices = (inputs_embeds if input_ids is None else input_ids).shape[1]
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds = (
                None if t is None else t.flatten(0, 1)
                for t in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
            )
        encoded = self.encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            output_attentions, output_hidden_states,
        )  # fmt: skip
        logits = scores(self.classifier, self.pooled_dropped(encoded), self.impl).view(-1, num_choices)
        loss = None if labels is None else cross_entropy(logits, labels.view(-1), num_items_in_batch)
        return self.returned(HeadOutput(loss=loss, logits=logits, **encoded.extras), return_dict)


class BertForNextSentencePrediction(BertHead):
    """Whether the second segment follows the first (0) or not (1), from the pooled first token."""

    POOLED = FIRST_ONLY = True

    def __init__(self, config: BertConfig, impl: F.Impl | None = None):
        super().__init__(config, impl)
        self.cls = nn.ModuleDict({"seq_relationship": start(nn.Linear(config.hidden_size, 2), config)})

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
    ) -> HeadOutput | tuple:
        """loss and logits [B, 2], for padded and packed input. labels: [B], -100 for a pair that does not count."""
        encoded = self.encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            output_attentions, output_hidden_states,
        )  # fmt: skip
        assert encoded.pooled is not None  # POOLED
        logits = scores(self.cls["seq_relationship"], encoded.pooled, self.impl)
        loss = None if labels is None else cross_entropy(logits, labels.view(-1), num_items_in_batch)
        return self.returned(HeadOutput(loss=loss, logits=logits, **encoded.extras), return_dict)


# ---- every token -----------------------------------------------------------------------------------------


class BertForTokenClassification(BertHead):
    """A linear layer on every token.

    `class_weights` is None or [num_labels]: each token's loss is multiplied by the weight of its label, and the mean is
    divided by the sum of these weights, as in torch's cross_entropy. `num_items_in_batch` then is that sum over the
    whole step. The weights are set by assignment and are not part of the `state_dict`.
    """

    POOLED = False
    class_weights: Tensor | None

    def __init__(self, config: BertConfig, impl: F.Impl | None = None):
        super().__init__(config, impl)
        self.num_labels = config.num_labels
        self.classifier = start(nn.Linear(config.hidden_size, config.num_labels), config)
        self.register_buffer("class_weights", None, persistent=False)

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
    ) -> HeadOutput | tuple:
        """loss and logits [B, S, num_labels], 0 at padding; of a PackedBatch [T, num_labels].

        labels: [B, S], or [T] for a PackedBatch; -100 for a token that does not count.
        """
        encoded = self.encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            output_attentions, output_hidden_states,
        )  # fmt: skip
        logits = scores(self.classifier, self.drop(encoded.hidden, encoded.batch.row_ids()), self.impl)
        loss = None
        if labels is not None:
            labels = encoded.by_token("labels", labels)
            loss = cross_entropy(logits, labels, num_items_in_batch, self.class_weights)
        return self.returned(HeadOutput(loss=loss, logits=encoded.shaped(logits), **encoded.extras), return_dict)


class BertForQuestionAnswering(BertHead):
    """Two scores for every token: that an answer begins there, and that it ends there."""

    POOLED = False

    def __init__(self, config: BertConfig, impl: F.Impl | None = None):
        super().__init__(config, impl)
        if config.num_labels != 2:
            raise ValueError(f"question answering has two labels, start and end; the config has {config.num_labels}")
        self.qa_outputs = start(nn.Linear(config.hidden_size, 2), config)

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SpanOutput | tuple:
        """loss, start_logits and end_logits [B, S], at padding the smallest number of the dtype; [T] for a PackedBatch.

        start_positions, end_positions: [B], the column in a padded batch, or the position within the text in a
            PackedBatch. A position outside its text does not count. The items of the loss are texts: the loss is half
            of the starts' sum plus half of the ends' sum, divided by num_items_in_batch; by default the mean of the two
            means.
        """
        encoded = self.encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            output_attentions, output_hidden_states,
        )  # fmt: skip
        logits = at_least_float32(scores(self.qa_outputs, encoded.hidden, self.impl))  # [T, 2]
        nothing = torch.finfo(logits.dtype).min
        padded = encoded.batch.pad(logits, nothing)  # [B, S, 2]
        loss = None
        if start_positions is not None and end_positions is not None:
            real = encoded.batch.pad(torch.ones_like(logits[:, 0], dtype=torch.bool), False)
            losses = [
                cross_entropy(padded[..., side], _counting(positions.view(-1), real), num_items_in_batch)
                for side, positions in enumerate((start_positions, end_positions))
            ]
            loss = (losses[0] + losses[1]) / 2
        start_logits, end_logits = (logits if encoded.packed else padded).unbind(-1)
        output = SpanOutput(loss=loss, start_logits=start_logits, end_logits=end_logits, **encoded.extras)
        return self.returned(output, return_dict)


def _counting(positions: Tensor, real: Tensor) -> Tensor:
    """Positions [B], replaced by -100 if there is no real token. real: [B, S] bool."""
    width = real.shape[1]
    inside = (positions >= 0) & (positions < width)
    columns = torch.where(inside, positions, 0).long()
    return torch.where(inside & real.gather(1, columns[:, None])[:, 0], columns, IGNORED)

"""ELECTRA (Clark et al., arXiv:2003.10555): a small generator guesses masked words, and a discriminator predicts for
every token whether it is the original.

    x_masked -> generator -> logits of the masked tokens -> sampled in their place -> discriminator -> one logit a token
    loss = cross-entropy of the generator's guesses + 50 * binary cross-entropy of the discriminator's

A sampled token that equals the original counts as original. No gradient flows through the sampling. Both models share
their embeddings. The discriminator is a BERT, which is kept for fine-tuning.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import checkpoint
from .. import functional as F
from ..config import BertConfig
from ..models.bert import BertEmbeddings, BertModel
from ..models.head import IGNORED, at_least_float32, product, scores, start
from ..packing import PackedBatch
from ..storage import make_folder, write_json
from .sizes import HEAD_WIDTH

DISCRIMINATOR_WEIGHT = 50.0


class ElectraOutput(NamedTuple):
    """The loss and its two parts; the discriminator's logits [T], detached; whether each token was replaced, [T]
    bool."""

    loss: Tensor
    generator_loss: Tensor
    discriminator_loss: Tensor
    logits: Tensor
    replaced: Tensor


def generator_config(config: BertConfig) -> BertConfig:
    """The generator's sizes (table 6 of the paper): a third of BERT-base's width, a fourth of other widths, in heads of
    64, and as many layers as the discriminator."""
    share = 3 if config.hidden_size == BertConfig().hidden_size else 4
    width = max(HEAD_WIDTH, config.hidden_size // share // HEAD_WIDTH * HEAD_WIDTH)
    return replace(
        config, hidden_size=width, num_attention_heads=width // HEAD_WIDTH, intermediate_size=4 * width,
        pruned_heads=None, num_labels=None,
    )  # fmt: skip


class _ProjectedEmbeddings(nn.Module):
    """The discriminator's embeddings [T, C], projected to the generator's width: [T, G]."""

    def __init__(self, embeddings: BertEmbeddings, width: int) -> None:
        super().__init__()
        # In a tuple, so that the discriminator's embeddings are not registered as a submodule of the generator.
        self._of_discriminator = (embeddings,)
        self.project = nn.Linear(embeddings.word_embeddings.embedding_dim, width)

    @property
    def word_embeddings(self) -> nn.Embedding:
        return self._of_discriminator[0].word_embeddings

    def forward(self, shared: Any, inputs_embeds: Tensor | None = None) -> Tensor:
        return self.project(self._of_discriminator[0](shared, inputs_embeds))


class Electra(nn.Module):
    """Both models of pre-training.

    Args:
        bert: the discriminator's encoder, without a pooler; the generator uses its embeddings too.
    """

    def __init__(self, bert: BertModel) -> None:
        super().__init__()
        config = self.config = bert.config
        self.bert, self.impl = bert, bert.impl
        smaller = generator_config(config)
        width, inner, eps = config.hidden_size, smaller.hidden_size, config.layer_norm_eps
        self.generator = BertModel(smaller, add_pooling_layer=False, impl=bert.impl)
        self.generator.embeddings = start(_ProjectedEmbeddings(bert.embeddings, inner), config)
        self.generator_predictions = start(
            nn.ModuleDict({"dense": nn.Linear(inner, width), "LayerNorm": nn.LayerNorm(width, eps=eps)}), config
        )
        self.generator_bias = nn.Parameter(torch.zeros(config.vocab_size, dtype=torch.float32, device="cpu"))
        self.discriminator_predictions = start(
            nn.ModuleDict({"dense": nn.Linear(width, width), "dense_prediction": nn.Linear(width, 1)}), config
        )

    def gradient_checkpointing_enable(self) -> None:
        self.bert.gradient_checkpointing_enable()
        self.generator.gradient_checkpointing_enable()

    def forward(
        self, batch: PackedBatch, labels: Tensor, uniform: Tensor, num_items_in_batch: float, num_tokens_in_batch: float
    ) -> ElectraOutput:
        """Args:
        batch: with [MASK] for every token to guess. labels: [T] int64, the original of these tokens, else IGNORED.
        uniform: [T], a random number in [0, 1) for each token, with which the generator samples.
        num_items_in_batch, num_tokens_in_batch: divisors of the generator's and the discriminator's summed loss.
        """
        rows = (labels != IGNORED).nonzero().squeeze(1)
        guesses = self._guesses(self.generator(batch).last_hidden_state[rows])  # [N, V] float32
        wanted = labels[rows]
        generated = nn.functional.cross_entropy(guesses, wanted, reduction="sum") / num_items_in_batch
        with torch.no_grad():
            sampled = sample(guesses, uniform[rows])
        originals = batch.input_ids.index_copy(0, rows, wanted)
        seen = batch.input_ids.index_copy(0, rows, sampled)
        replaced = seen != originals
        hidden = self.bert(replace(batch, input_ids=seen)).last_hidden_state
        layers = self.discriminator_predictions
        h = F.activate(product(layers["dense"], hidden, self.impl), "gelu")
        # In float32: in bfloat16 thousands of logits would tie, and the area under the curve counts ties half.
        logits = at_least_float32(scores(layers["dense_prediction"], h, self.impl)).squeeze(1)  # [T]
        told = nn.functional.binary_cross_entropy_with_logits(logits, replaced.to(logits.dtype), reduction="sum")
        told = told / num_tokens_in_batch
        loss = generated + DISCRIMINATOR_WEIGHT * told
        return ElectraOutput(loss, generated, told, logits.detach().clone(), replaced)

    def _guesses(self, x: Tensor) -> Tensor:
        """Logits [N, V] of rows x [N, G] of the generator. The decoder's weight is the word embedding's."""
        layers = self.generator_predictions
        norm = layers["LayerNorm"]
        h = F.activate(product(layers["dense"], x, self.impl), "gelu")
        h = F.add_layer_norm(h, None, norm.weight, norm.bias, norm.eps, impl=self.impl)
        table = self.bert.embeddings.word_embeddings.weight
        return at_least_float32(nn.functional.linear(h, table, self.generator_bias))

    def save_pretrained(self, folder: str | Path, state: dict[str, Tensor]) -> None:
        """Writes the discriminator's encoder as a BERT to `folder`, for `fastbert finetune` and transformers'
        AutoModel, and to `folder`/discriminator and `folder`/generator the models for transformers'
        ElectraForPreTraining and ElectraForMaskedLM.

        state: all parameters of this module, unsharded.
        """
        folder = make_folder(folder)
        encoder = {name.removeprefix("bert."): t for name, t in state.items() if name.startswith("bert.")}
        config = replace(self.config, architectures=["BertModel"], dtype="float32", num_labels=None)
        config.save_pretrained(folder)
        checkpoint.save_state_dict(folder, encoder)
        _save_electra(folder / "discriminator", self.config, self.config.hidden_size, "ElectraForPreTraining", {
            **{f"electra.{name}": t for name, t in encoder.items()},
            **_under(state, "discriminator_predictions.", "discriminator_predictions."),
        })  # fmt: skip
        _save_electra(folder / "generator", self.generator.config, self.config.hidden_size, "ElectraForMaskedLM", {
            **{f"electra.{name}": t for name, t in encoder.items() if name.startswith("embeddings.")},
            **_under(state, "generator.embeddings.project.", "electra.embeddings_project."),
            **_under(state, "generator.encoder.", "electra.encoder."),
            **_under(state, "generator_predictions.", "generator_predictions."),
            "generator_lm_head.bias": state["generator_bias"],
        })  # fmt: skip


def sample(logits: Tensor, uniform: Tensor) -> Tensor:
    """A token for each row, drawn from the row's softmax: logits [N, V], uniform [N] in [0, 1) -> [N] int64."""
    sums = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    place = uniform.double()[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, place, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)


def _under(state: dict[str, Tensor], prefix: str, other: str) -> dict[str, Tensor]:
    return {other + name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def _save_electra(
    folder: Path, config: BertConfig, embedding_size: int, architecture: str, state: dict[str, Tensor]
) -> None:
    described = {
        **config.to_dict(), "model_type": "electra", "architectures": [architecture], "embedding_size": embedding_size,
    }  # fmt: skip
    make_folder(folder)
    checkpoint.save_state_dict(folder, state)
    write_json(folder / "config.json", described)

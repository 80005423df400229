"""Predicts words for the [MASK]s of texts, with a model that has the head for masked words."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .. import functional as F
from ..models.vocabulary import BertForMaskedLM
from ..packing import PackedBatch
from ..storage import CheckpointError
from ..text.batching import batches_within, tokens_per_batch
from ..text.tokenizer import Tokenizer
from .devices import resolve_device, resolve_dtype


class Word(NamedTuple):
    """A candidate for a mask: the token of the vocabulary, its id, and its probability."""

    token: str
    id: int
    score: float


class MaskError(ValueError):
    """A text has no mask, or a mask past the longest length. `row` is the number of the text."""

    def __init__(self, row: int, reason: str):
        super().__init__(reason)
        self.row = row


class MaskFiller:
    """A model and its tokenizer.

    MaskFiller.from_pretrained("bert-base-uncased").fill(["Paris is the [MASK] of France."], top_k=3)
    """

    def __init__(self, model: BertForMaskedLM, tokenizer: Tokenizer):
        if tokenizer.mask_token_id is None:
            raise ValueError(f"the vocabulary has no {tokenizer.mask_token}")
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size:,} words, and the model {model.config.vocab_size:,}"
            )
        self.model, self.tokenizer = model, tokenizer
        limits = (tokenizer.model_max_length, model.config.max_position_embeddings)
        self.max_length = min(limit for limit in limits if limit is not None)

    @classmethod
    def from_pretrained(
        cls,
        id_or_path: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        impl: F.Impl | None = None,
    ) -> MaskFiller:
        """From whatever `BertModel.from_pretrained` takes. Raises: CheckpointError, also where the head is missing."""
        device = resolve_device(device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the warning of a missing head, which is an error here
            model = BertForMaskedLM.from_pretrained(
                id_or_path, dtype=resolve_dtype(dtype, device), device=device, impl=impl
            )
        if model.initialised:
            raise CheckpointError(
                f"{id_or_path} has no head for masked words: it lacks {model.initialised[0]} and "
                f"{len(model.initialised) - 1} more"
            )
        return cls(model, Tokenizer.from_pretrained(id_or_path))

    @torch.no_grad()
    def fill(self, texts: Sequence[str], top_k: int = 5) -> list[list[list[Word]]]:
        """For each text, for each of its masks, the `top_k` most probable words, the best first.

        Raises: MaskError, before anything is computed; ValueError if top_k is not in 1 to the vocabulary's size, or if
            scores are not finite.
        """
        if not 1 <= top_k <= self.tokenizer.vocab_size:
            raise ValueError(f"top_k must be from 1 to {self.tokenizer.vocab_size:,}, the vocabulary, got {top_k}")
        ids = self.tokenizer.input_ids(texts, self.max_length)
        for row, (text, of_text) in enumerate(zip(texts, ids, strict=True)):
            self._expect_masks(row, text, of_text)
        lengths = list(map(len, ids))
        order = sorted(range(len(texts)), key=lengths.__getitem__)
        filled: dict[int, list[list[Word]]] = {}
        for rows in batches_within(order, lengths, tokens_per_batch(self.model.device)):
            filled.update(zip(rows, self._fill([ids[row] for row in rows], top_k), strict=True))
        return [filled[row] for row in range(len(texts))]

    def _expect_masks(self, row: int, text: str, ids: list[int]) -> None:
        mask = self.tokenizer.mask_token
        given, kept = text.count(mask), ids.count(self.tokenizer.mask_token_id)
        if not given:
            raise MaskError(row, f"there is no {mask} in the text")
        if kept < given:
            raise MaskError(row, f"{given - kept} of {given} {mask} are past the model's {self.max_length} tokens")

    @torch.no_grad()
    def probabilities(self, ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """[masks of all texts in order, words of the vocabulary] float32, of tokenised texts in one batch."""
        batch = PackedBatch.from_lists(ids, device=self.model.device)
        hidden = self.model.bert(batch).last_hidden_state
        at_masks = hidden[(batch.input_ids == self.tokenizer.mask_token_id).nonzero().squeeze(1)]
        return self.model.cls["predictions"](at_masks).float()[:, : self.tokenizer.vocab_size].softmax(-1)

    def _fill(self, ids: list[list[int]], top_k: int) -> Iterator[list[list[Word]]]:
        scores, found = (t.tolist() for t in self.probabilities(ids).topk(top_k))
        if not all(score == score for of_mask in scores for score in of_mask):
            raise ValueError("the model's scores are not finite")
        words = iter(
            [
                [Word(self.tokenizer.id_to_token(i), i, score) for i, score in zip(numbers, of_mask, strict=True)]
                for numbers, of_mask in zip(found, scores, strict=True)
            ]
        )
        for of_text in ids:
            yield [next(words) for _ in range(of_text.count(self.tokenizer.mask_token_id))]

"""Words for the [MASK]s of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ...encoding.masks import MaskFiller
from ..engine import Piece, Prepared
from ..errors import ServiceError
from .texts import Texts

# Words in one answer: each comes with the whole text in which it is filled in.
MOST_WORDS = 50_000
MANY_WORDS = 100  # take 10 ms or more


class _Asked(NamedTuple):
    ids: list[int]
    top_k: int
    targets: list[int] | None  # ids of the words to choose from


class Masks:
    """A model with the head for masked words."""

    def __init__(self, filler: MaskFiller, limit: int | None = None):
        self.filler = filler
        self.texts = Texts(filler.tokenizer, min(filler.max_length, limit or filler.max_length))

    def prepare(self, texts: Sequence[str], *, top_k: int = 5, targets: Sequence[str] | None = None) -> Prepared:
        """Tokenises. The answer is, for each text, for each of its masks, a list of at most `top_k` dicts with score,
        token, token_str and sequence, the best first.

        Args:
            targets: words of the vocabulary; the best of these alone.

        Raises: ServiceError for a text without a mask or with one where the text is cut, an unknown target, and where
            the answer would have more than MOST_WORDS.
        """
        tokenizer = self.filler.tokenizer
        if not 1 <= top_k <= tokenizer.vocab_size:
            raise ServiceError("invalid", f"top_k must be from 1 to {tokenizer.vocab_size}", param="top_k")
        chosen = None
        if targets is not None:
            chosen = [tokenizer.token_to_id(word) for word in targets]
            if unknown := [word for word, i in zip(targets, chosen, strict=True) if i is None]:
                raise ServiceError(
                    "invalid", f"{len(unknown)} of the targets are not in the vocabulary", param="targets"
                )
        ids, cut = self.texts.ids(texts, True)
        mask, number = tokenizer.mask_token, tokenizer.mask_token_id
        for place, (text, of_text) in enumerate(zip(texts, ids, strict=True)):
            given, kept = text.count(mask), of_text.count(number)
            if not given:
                raise ServiceError("invalid", f"there is no {mask} in text {place}", param="inputs")
            if kept < given:
                raise ServiceError(
                    "too_large",
                    f"text {place}: {given - kept} of {given} {mask} are past the {self.texts.limit} tokens",
                )
        words = sum(of_text.count(number) for of_text in ids) * min(top_k, top_k if chosen is None else len(chosen))
        if words > MOST_WORDS:
            raise ServiceError(
                "too_large",
                f"the answer would have {words:,} words, and at most {MOST_WORDS:,} go into one: send fewer texts at "
                "once, or a smaller top_k",
            )
        pieces = [Piece(self, _Asked(of_text, top_k, chosen), len(of_text)) for of_text in ids]

        def finish(found: list[list[list[tuple[float, int]]]]) -> list[list[list[dict[str, Any]]]]:
            return [
                [[self._word(of_text, at, score, i) for score, i in words] for at, words in enumerate(masks)]
                for of_text, masks in zip(ids, found, strict=True)
            ]

        return Prepared(pieces, list(map(len, ids)), cut, finish, words > MANY_WORDS)

    def _word(self, ids: list[int], at: int, score: float, word: int) -> dict[str, Any]:
        """at: which of the text's masks the word stands for."""
        tokenizer, places = self.filler.tokenizer, [i for i, token in enumerate(ids) if token == self._mask]
        filled = [*ids[: places[at]], word, *ids[places[at] + 1 :]]
        special = tokenizer.special_ids - {self._mask}
        sequence = tokenizer.decode([i for i in filled if i not in special], skip_special_tokens=False)
        return {"score": score, "token": word, "token_str": tokenizer.id_to_token(word), "sequence": sequence}

    @property
    def _mask(self) -> int:
        return self.filler.tokenizer.mask_token_id

    def compute(self, data: Sequence[_Asked]) -> list[list[list[tuple[float, int]]]]:
        """(probability, id) of the best words of each mask of each text."""
        rows = iter(self.filler.probabilities([asked.ids for asked in data]))
        return [[self._best(next(rows), asked) for _ in range(asked.ids.count(self._mask))] for asked in data]

    @staticmethod
    def _best(probabilities: torch.Tensor, asked: _Asked) -> list[tuple[float, int]]:
        if not bool(torch.isfinite(probabilities).all()):
            raise ServiceError("failed", "the model's scores are not finite")
        if asked.targets is None:
            scores, words = probabilities.topk(asked.top_k)
            return list(zip(scores.tolist(), words.tolist(), strict=True))
        of_targets = zip(probabilities[asked.targets].tolist(), asked.targets, strict=True)
        return sorted(of_targets, reverse=True)[: asked.top_k]

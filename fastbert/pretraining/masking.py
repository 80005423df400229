"""Chooses the tokens to guess and their replacements, as a function of (seed, epoch, example, position).

The random numbers of a token depend on nothing else, so the masks of a run are the same for any number of processes,
workers and micro-batches, and differ between epochs.

    clean     each word is guessed with the same probability, whatever its length and its neighbours. Special tokens and
              unused words are neither guessed nor drawn as replacements.
    google    as in create_pretraining_data.py of Google's BERT: a rounded share of an example's tokens ([CLS] and [SEP]
              count) in whole words, taken while they fit. Unknown words are guessed too, and every word of the
              vocabulary may be a replacement.

Of ten tokens to guess, eight are shown as [MASK], one as a random word and one unchanged. With whole words, the tokens
of a word are guessed together; a word is a run of WordPieces, or of Chinese characters that a segmenter joined.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..text.files import InputError
from ..text.tokenizer import Tokenizer
from .counters import Words, below, philox, threshold

IGNORED = -100
CLEAN, GOOGLE = "clean", "google"
_UNUSED = re.compile(r"\[unused\d+\]")
MASKS = 2  # number of the random stream for masks


@dataclass(frozen=True)
class Masking:
    """The rule.

    Args:
        tokenizer: must have a [MASK]. vocab_size: the tokenizer's, without rows that only pad the embedding table.
        rule: CLEAN or GOOGLE.
        share: share of the tokens to guess.
        shown_as_mask, shown_as_random: shares of these that are shown as [MASK] or as a random word; the others are
            shown unchanged.

    Raises: InputError if the tokenizer has no [MASK].
    """

    tokenizer: Tokenizer
    rule: str = CLEAN
    share: float = 0.15
    whole_words: bool = True
    shown_as_mask: float = 0.8
    shown_as_random: float = 0.1
    may_be_guessed: NDArray[np.bool_] = field(init=False, repr=False)  # [vocabulary]
    replacements: NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        tokenizer = self.tokenizer
        if tokenizer.mask_token_id is None:
            raise InputError(f"the tokenizer has no {tokenizer.mask_token}, so no word can be masked")
        guessed = np.ones(tokenizer.vocab_size, np.bool_)
        drawn = np.arange(tokenizer.vocab_size)
        if self.rule == CLEAN:
            special = tokenizer.special_ids
            unused = {index for word, index in tokenizer.get_vocab().items() if _UNUSED.fullmatch(word)}
            guessed[list(special)] = False
            drawn = np.array(sorted(set(drawn.tolist()) - special - unused), np.int64)
        else:
            guessed[[tokenizer.cls_token_id, tokenizer.sep_token_id]] = False
        object.__setattr__(self, "may_be_guessed", guessed)
        object.__setattr__(self, "replacements", drawn)

    def apply(
        self, ids: Sequence[Any], joins: Sequence[Any], names: Sequence[int], seed: int, epoch: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], Words]:
        """(ids with replacements, labels, further random words), each [tokens of all examples].

        Args:
            ids, joins: one array [tokens] for each example; see `documents.tokens_of`.
            names: the number of each example in its epoch.

        Returns: labels are ids, IGNORED for tokens that are not guessed; the random words have 32 bits each.
        """
        lengths = np.array([len(row) for row in ids], np.int64)
        flat = np.concatenate(ids)
        example = np.repeat(np.array(names, np.uint64), lengths)
        starts = np.cumsum(lengths) - lengths
        place = np.arange(len(flat)) - np.repeat(starts, lengths)
        counter = (place.astype(np.uint64), example, np.uint64(epoch), np.uint64(MASKS))
        chosen_by, shown_by, replaced_by, further = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
        may_be = self.may_be_guessed[flat]
        if self.whole_words:
            word = np.cumsum(np.concatenate(joins) == 0) - 1  # the number of each token's word in the batch
        else:
            word = np.arange(len(flat))
        row = np.repeat(np.arange(len(lengths)), lengths)
        choose = self._budgeted if self.rule == GOOGLE else self._independent
        guessed = choose(word, may_be, chosen_by, row, lengths)
        labels = np.where(guessed, flat, IGNORED)
        mask, random = threshold(self.shown_as_mask), threshold(self.shown_as_mask + self.shown_as_random)
        shown = np.where(guessed & (shown_by < mask), self.tokenizer.mask_token_id, flat)
        drawn = self.replacements[below(replaced_by, len(self.replacements)).astype(np.int64)]
        shown = np.where(guessed & (shown_by >= mask) & (shown_by < random), drawn, shown)
        return shown, labels, further

    def _independent(
        self, word: NDArray, may_be: NDArray, chosen_by: Words, row: NDArray, lengths: NDArray
    ) -> NDArray[np.bool_]:
        """Decides for each word separately, by the random number of its first token."""
        first = np.flatnonzero(np.diff(word, prepend=-1))
        chosen = np.logical_and.reduceat(may_be, first) & (chosen_by[first] < threshold(self.share))
        return chosen[word]

    def _budgeted(
        self, word: NDArray, may_be: NDArray, chosen_by: Words, row: NDArray, lengths: NDArray
    ) -> NDArray[np.bool_]:
        """Takes the words of a row in random order, each if it fits into the rest of the row's budget."""
        first = np.flatnonzero(np.diff(word, prepend=-1))
        sizes = np.diff(first, append=len(word))
        candidate = np.logical_and.reduceat(may_be, first)
        row_of_word = row[first]
        order = np.lexsort((chosen_by[first], row_of_word))
        budget = [max(1, round(length * self.share)) for length in lengths.tolist()]
        chosen = np.zeros(len(first), np.bool_)
        for number in order[candidate[order]].tolist():
            size, of_row = int(sizes[number]), int(row_of_word[number])
            if size <= budget[of_row]:
                budget[of_row] -= size
                chosen[number] = True
        return chosen[word]

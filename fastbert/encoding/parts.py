"""Vectors of the tokens of a text, or of its words, out of the same pass that makes the text's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tokenizers import Encoding

WORD_VECTORS = ("first", "mean")


class Parts(NamedTuple):
    """The n tokens of a text, or its words, in order.

    Attributes:
        parts: tokens as the vocabulary has them ("##ing"), or words as the text has them.
        offsets: (start, end) of each in the text, in characters; None for [CLS] and [SEP].
        vectors: [n, C] float32 on the CPU.
    """

    parts: list[str]
    offsets: list[tuple[int, int] | None]
    vectors: Tensor


@dataclass(frozen=True)
class Wanted:
    """Which parts of a text have vectors.

    Attributes:
        words: None for every token; "first": every word by its first token; "mean": by the mean of its tokens. A word
            of which only a beginning is within the limit has no vector.
        special_tokens: [CLS] and [SEP] too, of tokens.

    Raises: ValueError for another value, or special tokens of words.
    """

    words: str | None = None
    special_tokens: bool = False

    def __post_init__(self) -> None:
        if self.words not in (None, *WORD_VECTORS):
            raise ValueError(f"words must be None, {' or '.join(map(repr, WORD_VECTORS))}, got {self.words!r}")
        if self.words is not None and self.special_tokens:
            raise ValueError("special tokens are of no word: they come with tokens")

    def of(self, text: str, encoding: Encoding, prompt: int, states: Tensor) -> Parts:
        """The parts of a text.

        Args:
            encoding: of the prompt and the text.
            prompt: characters of the prompt; tokens that begin there are left out.
            states: [tokens, C] float32.
        """
        special, places = encoding.special_tokens_mask, encoding.offsets
        own = [i for i, (start, _) in enumerate(places) if not special[i] and start >= prompt]
        if self.words is None:
            kept = [i for i in range(len(places)) if special[i]] + own if self.special_tokens else own
            kept.sort()
            offsets = [None if special[i] else (places[i][0] - prompt, places[i][1] - prompt) for i in kept]
            return Parts([encoding.tokens[i] for i in kept], offsets, states[kept])
        words = [list(group) for _, group in groupby(own, key=encoding.word_ids.__getitem__)]
        if words and encoding.word_ids[words[-1][0]] == _first_word_cut_off(encoding):
            words.pop()
        offsets = [(places[word[0]][0] - prompt, places[word[-1]][1] - prompt) for word in words]
        return Parts([text[start:end] for start, end in offsets], offsets, self._of_words(words, states))

    def _of_words(self, words: Sequence[Sequence[int]], states: Tensor) -> Tensor:
        """[words, C] of the rows of each word in states [tokens, C]."""
        if self.words == "first":
            return states[[word[0] for word in words]]
        counts = torch.tensor([len(word) for word in words], dtype=torch.int64, device="cpu")
        of_row = torch.arange(len(words), dtype=torch.int64, device="cpu").repeat_interleave(counts)
        sums = torch.zeros(len(words), states.shape[1], dtype=states.dtype, device="cpu")
        return sums.index_add(0, of_row, states[[row for word in words for row in word]]) / counts[:, None]


def _first_word_cut_off(encoding: Encoding) -> int | None:
    """The number of the word that the first token beyond the limit is of; None where nothing was cut off."""
    if not encoding.overflowing:
        return None
    return next(number for number in encoding.overflowing[0].word_ids if number is not None)

"""Vectors of the tokens of a text, or of its words."""

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
        parts: tokens as in the vocabulary ("##ing"), or words as in the text.
        offsets: (start, end) of each in the text, in characters; None for [CLS] and [SEP].
        vectors: [n, C] float32 on the CPU.
    """

    parts: list[str]
    offsets: list[tuple[int, int] | None]
    vectors: Tensor


@dataclass(frozen=True)
class Wanted:
    """The parts of a text that get vectors.

    Attributes:
        words: None: every token. "first": every word, by the vector of its first token. "mean": every word, by the mean
            of its tokens. A word that is partly cut off gets no vector.
        special_tokens: also [CLS] and [SEP]; only with words=None.

    Raises: ValueError for another value, or for special tokens with words.
    """

    words: str | None = None
    special_tokens: bool = False

    def __post_init__(self) -> None:
        if self.words not in (None, *WORD_VECTORS):
            raise ValueError(f"words must be None, {' or '.join(map(repr, WORD_VECTORS))}, got {self.words!r}")
        if self.words is not None and self.special_tokens:
            raise ValueError("special tokens belong to no word: leave out words or special_tokens")

    def of(self, text: str, encoding: Encoding, prompt: int, states: Tensor) -> Parts:
        """The parts of a text.

        Args:
            encoding: the tokens of the prompt and the text.
            prompt: length of the prompt in characters; tokens that begin in the prompt are left out.
            states: [tokens, C] float32.
        """
        special, places = encoding.special_tokens_mask, encoding.offsets
        own = [i for i, (start, _) in enumerate(places) if not special[i] and start >= prompt]
        if self.words is None:
            kept = [i for i in range(len(places)) if special[i]] + own if self.special_tokens else own
            kept.sort()
            offsets = [None if special[i] else (places[i][0] - prompt, places[i][1] - prompt) for i in kept]
            return Parts([encoding.tokens[i] for i in kept], offsets, states[kept])
        # Words that continue in the tokens that were cut off are incomplete.
        cut = set(encoding.overflowing[0].word_ids) if encoding.overflowing else set()
        by_word = groupby(own, key=encoding.word_ids.__getitem__)
        words = [list(group) for number, group in by_word if number not in cut]
        offsets = [(places[word[0]][0] - prompt, places[word[-1]][1] - prompt) for word in words]
        return Parts([text[start:end] for start, end in offsets], offsets, self._of_words(words, states))

    def _of_words(self, words: Sequence[Sequence[int]], states: Tensor) -> Tensor:
        """[words, C] from states [tokens, C]; words: the rows of each word."""
        if self.words == "first":
            return states[[word[0] for word in words]]
        counts = torch.tensor([len(word) for word in words], dtype=torch.int64, device="cpu")
        of_row = torch.arange(len(words), dtype=torch.int64, device="cpu").repeat_interleave(counts)
        sums = torch.zeros(len(words), states.shape[1], dtype=states.dtype, device="cpu")
        return sums.index_add(0, of_row, states[[row for word in words for row in word]]) / counts[:, None]

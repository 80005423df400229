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
            of which a part is cut off has no vector.
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
        # The tokens next to those that are kept: a word that goes on there is not whole.
        cut = set(encoding.overflowing[0].word_ids) if encoding.overflowing else set()
        by_word = groupby(own, key=encoding.word_ids.__getitem__)
        words = [list(group) for number, group in by_word if number not in cut]
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

"""Leaves out the middle of long runs of characters that no token of a Unigram or BPE model covers.

All that stand side by side in a word are one token, so their number decides nothing. In Unigram it changes the scores
of the paths to what is behind, and with them how sums are rounded, so there the word must end with the run. Normalizers
treat such characters one by one.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from functools import cached_property

import numpy as np
import tokenizers
from tokenizers import models

from .characters import is_space, joins

_CODES = 0x110000
_NEW, _KNOWN, _UNKNOWN = range(3)
# Characters looked at together, few enough for the processor's cache, and parts of them that are left out or stay.
_CHUNK, _PART = 65_536, 64


class Unknown:
    """Shortens runs of unknown characters for one tokenizer, whose pre-tokenizer splits at spaces only.

    Args:
        becomes: what a character becomes; "" if that depends on those beside it.
        added: the added tokens, in a text and in a normalised one.
        avoided: characters that a normalizer replaces if they stand side by side.
        ends_words: whether a space always ends a word.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        becomes: Callable[[str], str],
        added: set[str],
        avoided: set[str],
        ends_words: bool,
    ) -> None:
        self._model, self._becomes, self._avoided = backend.model, becomes, avoided
        self._ends_words = ends_words
        pieces = backend.get_vocab(with_added_tokens=False)
        self._alphabet = {piece for piece in pieces if len(piece) == 1}
        self._longest = max(map(len, (*pieces, *added)), default=0)
        # Such tokens cover characters that are none by themselves.
        self._rare = [set(piece) for piece in pieces if self._alphabet.isdisjoint(piece)]
        self._rare += map(set, added)
        self._kinds = np.zeros(_CODES, np.uint8)
        self._kinds[0xD800:0xE000] = _KNOWN

    def shortened(self, text: str) -> str:
        """A text with the same ids."""
        if not self._are_fused or self._longest > _PART:
            return text
        whole = len(text) - len(text) % _PART
        chunks = [slice(at, min(at + _CHUNK, whole)) for at in range(0, whole, _CHUNK)]
        present = np.zeros(_CODES, bool)
        for chunk in chunks:
            present[self._codes(text[chunk])] = True
        kinds = self._kinds_of(present)
        parts = [(kinds[self._codes(text[chunk])] == _UNKNOWN).reshape(-1, _PART).all(1) for chunk in chunks]
        unknown = np.concatenate([[False], *parts, [False]])
        edges = np.flatnonzero(unknown[1:] != unknown[:-1]) * _PART
        kept, at = [], 0
        for start, end in edges.reshape(-1, 2).tolist():  # the first part and the last one stay
            if end - start > 2 * _PART and self._are_one_token(text, end, kinds):
                kept.append(text[at : start + _PART])
                at = end - _PART
        return "".join([*kept, text[at:]])

    def _are_one_token(self, text: str, end: int, kinds: np.ndarray) -> bool:
        """Whether that is certain of unknown characters before this place, with those that follow."""
        if isinstance(self._model, models.BPE):
            return True
        while end < len(text) and kinds[ord(text[end])] == _UNKNOWN:
            end += 1
        return end == len(text) or (self._ends_words and self._becomes(text[end]) == " ")

    @cached_property
    def _are_fused(self) -> bool:
        if isinstance(self._model, models.BPE):
            return self._model.fuse_unk and not self._model.byte_fallback
        return not json.loads(self._model.__getstate__())["byte_fallback"]

    def _codes(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)

    def _kinds_of(self, present: np.ndarray) -> np.ndarray:
        """The kind of each character in a text that has these characters."""
        codes = np.flatnonzero(present)
        for code in codes[self._kinds[codes] == _NEW].tolist():
            self._kinds[code] = self._kind(chr(code))
        unknown = [chr(code) for code in codes[self._kinds[codes] == _UNKNOWN].tolist()]
        present = set("".join([*unknown, *map(self._becomes, unknown)]))
        covered = set().union(*(piece for piece in self._rare if piece <= present))
        if not covered:
            return self._kinds
        kinds = self._kinds.copy()
        kinds[[ord(char) for char in unknown if not covered.isdisjoint((char, *self._becomes(char)))]] = _KNOWN
        return kinds

    def _kind(self, char: str) -> int:
        category = unicodedata.category(char)
        if category == "Sk" or not (category[0] in "LNSP" or category in ("Cc", "Co")):
            return _KNOWN
        made = set(self._becomes(char))
        is_known = not made or made & self._alphabet or any(map(is_space, made)) or any(map(joins, {char, *made}))
        return _KNOWN if is_known or self._avoided & {char, *made} else _UNKNOWN

"""Cuts texts in a long run: few characters over and over, within one word ("....", "-=-=").

Which first tokens such a word has can depend on the length of the whole run, so it is cut in other ways than at a seam:

    Unigram  At a place on the best path of the whole word. `Paths` finds it: up to there, the text has the same tokens.
    BPE      Far behind the wanted tokens. It merges the same pairs all along the run. What stands at its end changes
             how that ends, and each merge that makes the repeated piece longer, or doubles it, moves this change by at
             most a longest token towards the beginning. There are few such merges, as a token has so many letters at
             most.
    both     Characters that disappear, or that no token covers and that are one token together, are left out.

What a repetition becomes is seen from a text with many more, since no normalizer looks further.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import tokenizers
from tokenizers import models

from .characters import SURROGATE
from .paths import Paths

Tokenised = tuple[list[int], list[str], list[int | None]]

# Characters per wanted token of the beginnings at whose end a run is searched.
_SIZES = (8, 32)
# Characters that are looked at there, and how many are repeated at most.
_LOOKED_AT, _MOST_REPEATED = 128, 8
_MANY = 64
# A shorter rest of a run is not worth it.
_LEAST = 4_096
# Characters behind a run in which a seam is searched.
_TAIL = 512
# Merges of BPE, counted in longest tokens, by which the end of a run reaches into it. Up to `_MOST_REPEATED` characters
# of four bytes become one token, and that is doubled while there are such tokens.
_REACH = 48
# Most characters per wanted token of the beginning that is kept.
_MOST_CHARACTERS = 512
# Neighbouring places that are tried if the best path goes through the middle of a character.
_TRIES = 4


class _Run(NamedTuple):
    """A run in a text.

    Attributes:
        start: a place in it, behind `_LOOKED_AT` of its characters.
        end: where it ends.
        period: characters of one repetition.
        head: the word up to `start`, as the model gets it.
        unit: what a repetition adds to that; "" if it disappears.
        is_one_token: whether more repetitions make no more tokens.
        number: which word of the text it is.
        before: tokens before the word.
    """

    start: int
    end: int
    period: int
    head: str
    unit: str
    is_one_token: bool
    number: int | None
    before: int

    @property
    def repetitions(self) -> int:
        return (self.end - self.start) // self.period


class Runs:
    """Cuts texts for one tokenizer, whose parts are those of `Seams`.

    Args:
        tokenised: ids, pieces and numbers of words of a text.
        seam_in: a seam in a part of a text, and whether a word certainly ends there; None if there is none.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        tokenised: Callable[[str], Tokenised],
        seam_in: Callable[[str, int, int], tuple[int, bool] | None],
    ) -> None:
        self._model, self._tokenised, self._seam_in = backend.model, tokenised, seam_in
        self._is_bpe = isinstance(backend.model, models.BPE)
        self._longest = max(map(len, backend.get_vocab(with_added_tokens=False)), default=0)

    def beginning(self, text: str, wanted: int, shorten: bool) -> str | None:
        """A beginning of a text with the same first `wanted` tokens; None if it is not known.

        shorten: whether characters within may be left out as well.
        """
        for size in _SIZES:
            end = size * wanted
            if end + _LEAST > len(text) or SURROGATE.search(text, 0, end + _LEAST):
                return None
            run = self._run_at(text, end)
            if run is None:
                continue
            if run.is_one_token:
                return self._shortened(text, run) if shorten else None
            return self._of_bpe(text, run, wanted) if self._is_bpe else self._of_unigram(text, run, wanted, shorten)
        return None

    def _run_at(self, text: str, at: int) -> _Run | None:
        """The run that a text has before and behind this place."""
        looked_at = text[max(at - _LOOKED_AT, 0) : at]
        if any(map(str.isspace, looked_at)):
            return None
        for period in range(1, _MOST_REPEATED + 1):
            if looked_at[period:] != looked_at[:-period]:
                continue
            end = _end_of_run(text, at, period)
            if end - at < _LEAST:
                return None
            for start in range(at, at + period):
                few, many = (self._last_word(text[: start + more * period]) for more in (0, _MANY))
                if few is None or many is None or few[1:3] != many[1:3]:
                    return None
                head, before, number, ids = few
                unit = many[0][len(head) :][: (len(many[0]) - len(head)) // _MANY]
                if many[0] == head + unit * _MANY:
                    return _Run(start, end, period, head, unit, ids == many[3], number, before)
        return None

    def _last_word(self, text: str) -> tuple[str, int, int | None, list[int]] | None:
        """(a text's last word, tokens before it, its number, all ids); None if the model gets another one."""
        ids, pieces, words = self._tokenised(text)
        if not ids:
            return "", 0, None, ids
        before = words.index(words[-1])
        word = "".join(pieces[before:])
        if [token.id for token in self._model.tokenize(word)] != ids[before:]:
            return None  # an added token, or tokens that are not the characters they stand for
        return word, before, words[-1], ids

    # ---- characters that can be left out ------------------------------------------------------------------

    def _shortened(self, text: str, run: _Run) -> str | None:
        # In Unigram, other sums, rounded in another way, would decide on the tokens behind the run.
        # A token may also be longer than the runs that were compared.
        if run.unit and not self._is_bpe and (self.paths.covers(run.unit) or self._tail(text, run) != ("", True)):
            return None
        return text[: run.start] + text[run.start + run.repetitions * run.period :]

    # ---- BPE ----------------------------------------------------------------------------------------------

    def _of_bpe(self, text: str, run: _Run, wanted: int) -> str | None:
        size = run.start
        while size < min(run.end - _REACH * self._longest, _MOST_CHARACTERS * wanted):
            ids, pieces, _ = self._tokenised(text[:size])
            if len(ids) > wanted and sum(map(len, pieces[wanted:])) >= _REACH * self._longest:
                other, _, _ = self._tokenised(text[: size - run.period])
                return text[:size] if ids[:wanted] == other[:wanted] else None
            missing = size * wanted // len(ids) - size + 2 * _REACH * self._longest
            size += max(missing // run.period, 1) * run.period
        return None

    # ---- Unigram ------------------------------------------------------------------------------------------

    @cached_property
    def paths(self) -> Paths:
        """Of a Unigram model."""
        return Paths(self._model)

    def _of_unigram(self, text: str, run: _Run, wanted: int, shorten: bool) -> str | None:
        ids, _, _ = self._tokenised(text[: run.start])
        more = max(run.start * (wanted + 4) // len(ids) - run.start, 0) // run.period + 2 * self._longest
        if more + self._longest > run.repetitions or not self.paths.are_as_expected:
            return None
        tail, is_whole = self._tail(text, run)
        for units in range(more, more - _TRIES, -1):
            back = self.paths.through(run.head, run.unit, units, run.repetitions - units, tail, is_whole)
            if back is None:
                return None
            word = run.head + run.unit * units
            found = self._text_of(text, run, word[: len(word) - back], units - back // len(run.unit), shorten)
            if found is not None and len(self._tokenised(found)[0]) > wanted:
                return found
        return None

    def _text_of(self, text: str, run: _Run, word: str, units: int, shorten: bool) -> str | None:
        """A beginning of a text that ends with this word, which ends with about so many units of the run."""
        last = run.start + units * run.period
        ends = [text[:end] for end in range(last, last - run.period, -1)]
        if shorten:  # the path may go through the middle of a character: that is written in its parts
            ends += [text[: last - run.period] + run.unit[:length] for length in range(1, len(run.unit))]
        return next((end for end in ends if (self._last_word(end) or ("",))[:2] == (word, run.before)), None)

    def _tail(self, text: str, run: _Run) -> tuple[str, bool]:
        """(what follows the last unit in the word, as far as it is looked at; whether the word ends there)."""
        at = run.start + run.repetitions * run.period
        end, is_whole = len(text), True
        if SURROGATE.search(text, at, at + _TAIL):
            return "", False
        if end - at > _TAIL:
            seam = self._seam_in(text, run.end + 1, at + _TAIL)
            if seam is None:
                return "", False
            end, is_whole = seam
        _, pieces, words = self._tokenised(text[: run.start + _MANY * run.period] + text[at:end])
        word = "".join(p for p, number in zip(pieces, words, strict=True) if number == run.number)
        known = run.head + run.unit * _MANY
        if not word.startswith(known):
            return "", False
        return word[len(known) :], is_whole or words[-1] != run.number


def _end_of_run(text: str, at: int, period: int) -> int:
    """Where the repetition of the characters before this place ends."""
    block = text[at - period : at] * 65_536
    while text.startswith(block, at):
        at += len(block)
    low, high = 0, min(len(block), len(text) - at)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text.startswith(block[:middle], at) else (low, middle - 1)
    return at + low

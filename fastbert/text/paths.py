"""Where the best path of a Unigram model goes through a word with a long run, without going through all of the run.

Unigram gives a word the tokens with the largest sum of scores. It goes from left to right: the best path to a place is
the best of those to earlier places with one more token. So the places within reach of a token are all that decides what
follows. In a word that repeats a unit ("xxxx", "-=-=") they soon repeat, too, with all sums less by the same number.
That goes on until a sum gets another exponent, where sums are rounded in another way, which may decide between paths
that are equally good. So all units up to there are passed at once. The sums are those of the `tokenizers` library, to
the last bit: while the exponent stays, all sums are multiples of one number, and adding a score is rounded alike.
"""

from __future__ import annotations

import json
import math
import re
from functools import cached_property
from typing import NamedTuple

from tokenizers import models

# A character that no token covers costs so much more than the worst token.
_UNKNOWN_PENALTY = 10.0
# Units gone through one by one before a word is given up. Usually it is some longest tokens for each exponent.
_MOST_UNITS = 4_096
_KEPT = 65_536
# Characters, counted in longest tokens, in which the paths from different places have to meet.
_MEETING = 8
# Tokens of the word whose paths are compared with the library's.
_COMPARED = 100
# A token that is one byte of a character without a token.
BYTE = re.compile("<0x[0-9A-F]{2}>")
_ALWAYS = 1 << 62


class Place(NamedTuple):
    """The best path to a place.

    Attributes:
        score: sum of the scores of its tokens.
        length: characters of its last token.
        mark: what the path has been marked with.
    """

    score: float
    length: int
    mark: int | None


# A place, the one behind it and so on, each with its best path whose last token begins before the first of them.
Front = list[Place | None]


class Paths:
    """The best paths of a Unigram model.

    Attributes:
        longest: characters of the longest token.
        unknown_id: id of the unknown token. Without one, the library refuses characters that no token covers.
    """

    def __init__(self, model: models.Unigram) -> None:
        self._model = model
        state = json.loads(model.__getstate__())
        vocabulary, self.unknown_id = state["vocab"], state["unk_id"]
        self._unknown_piece = None if self.unknown_id is None else vocabulary[self.unknown_id][0]
        self._gives_bytes = bool(state.get("byte_fallback"))
        self._scores: dict[str, float] = {piece: score for piece, score in vocabulary if piece}
        self._unknown = min(score for _, score in vocabulary) - _UNKNOWN_PENALTY
        self._largest = max(map(abs, (self._unknown, *self._scores.values())))
        self.longest = max(map(len, self._scores))
        self._found: dict[str, list[tuple[int, float]]] = {}

    @cached_property
    def are_as_expected(self) -> bool:
        """Whether the library's best path is the one of this class, for a word made of many tokens."""
        if self.unknown_id is None:
            return False
        pieces = [piece for piece in self._scores if piece != self._unknown_piece and not BYTE.fullmatch(piece)]
        word = "".join(pieces[:: len(pieces) // _COMPARED + 1]) + ("" if self._gives_bytes else "\ue000")
        covered, at = [], 0
        for token in self._model.tokenize(word):
            ends = range(at + 1, at + len(token.value) + 1)
            covered.extend(ends if token.id == self.unknown_id else ends[-1:])
            at += len(token.value)
        return covered == self.ends(word)

    def ends(self, word: str) -> list[int]:
        """Where the tokens of a word end. Each unknown character is a token."""
        front: Front = [Place(0.0, 0, None)]
        lengths = [0]
        for at in range(len(word)):
            self._pass(front, word, at)
            lengths.append(_of(front).length)
        found, at = [], len(word)
        while at:
            found.append(at)
            at -= lengths[at]
        return found[::-1]

    def through(self, head: str, unit: str, before: int, after: int, tail: str, is_whole: bool) -> int | None:
        """The last place on the best path of `head + unit * (before + after) + tail` before the end of `before` units.

        It is given as the number of characters from there to that end; None if it is not certain.
        is_whole: whether the word ends with the tail; else it goes on in an unknown way.
        """
        if not is_whole and len(tail) <= self.longest:
            after, tail = after - self._reach(unit), unit * self._reach(unit) + tail
        front: Front = [Place(0.0, 0, None)]
        self._pass_all(front, head, unit * self._reach(unit))
        if after < self._reach(unit) or not self._pass_units(front, unit, before, unit * self._reach(unit)):
            return None
        front[:] = [place and place._replace(mark=place.length - n if n else 0) for n, place in enumerate(front)]
        if not self._pass_units(front, unit, after, tail):
            return None
        if is_whole and _only_mark(front) is None:
            self._pass_all(front, tail, "")
            return _of(front).mark
        if _only_mark(front) is None:  # a token behind these characters could reach into what is unknown
            self._pass_all(front, tail[: -self.longest], tail[-self.longest :])
        return _only_mark(front)

    def is_settled(self, word: str, at: int, before: int) -> bool:
        """Whether the best path of each word that ends with this one goes through this place of it and, from there on,
        as in this one.

        before: most characters of what stands before it in such a word. The first character of this one may be missing
        there, if it is the mark of a beginning.
        """
        margin = 2 * len(word) * math.ulp((before + len(word)) * self._largest)
        last = min(_MEETING * self.longest, len(word))
        # What is before decides at which place the path comes in. Soon all paths from there go through the same places.
        fronts = range(last if last == len(word) else last - self.longest + 1, last + 1)
        met = set(range(last + 1))
        for start in range(1, min(self.longest, len(word)) + 1):
            lengths = self._lengths(word, start, last, margin)
            for front in fronts:
                places = _places(lengths, start, front, start)
                if places is None:
                    return False
                met &= places
        if not met:
            return False
        start = min(met)
        places = _places(self._lengths(word, start, len(word), margin), start, len(word), at)
        return places is not None and at in places

    def _lengths(self, word: str, start: int, end: int, margin: float) -> list[int]:
        """Of each place from `start` to `end`, the characters of the last token of the best path from there; 0 if
        another one is as good, but for `margin`."""
        scores, lengths = [-math.inf] * (end - start + self.longest + 1), [0] * (end - start + self.longest + 1)
        scores[0] = 0.0
        for at in range(start, end):
            here = scores[at - start]
            for length, score in self._tokens(word[at : at + self.longest]):
                place, score = at - start + length, here + score
                if score > scores[place]:
                    lengths[place] = length if score - scores[place] > margin else 0
                    scores[place] = score
                elif scores[place] - score <= margin:
                    lengths[place] = 0
        return lengths

    def covers(self, unit: str) -> bool:
        """Whether a token covers anything in a run of this unit."""
        text = unit * (self._reach(unit) + 1)
        ends = range(1, self.longest + 1)
        return any(text[at : at + length] in self._scores for at in range(len(unit)) for length in ends)

    def _reach(self, unit: str) -> int:
        """Units into which a token can reach from the place before them."""
        return self.longest // len(unit) + 1

    def _tokens(self, text: str) -> list[tuple[int, float]]:
        """(length, score) of each token at the beginning of a text, which has at most `longest` characters."""
        found = self._found.get(text)
        if found is None:
            if len(self._found) >= _KEPT:
                self._found.clear()
            lengths = range(1, len(text) + 1)
            found = [(n, self._scores[text[:n]]) for n in lengths if text[:n] in self._scores]
            if not found or found[0][0] > 1:
                found.append((1, self._unknown))
            self._found[text] = found
        return found

    def _pass(self, front: Front, text: str, at: int) -> float:
        """Goes on by the character at this place of a text; returns the least of its sums."""
        here, least = _of(front), 0.0
        for length, score in self._tokens(text[at : at + self.longest]):
            while len(front) <= length:
                front.append(None)
            score = score + here.score
            least = min(least, score)
            other = front[length]
            if other is None or score > other.score:
                front[length] = Place(score, length, here.mark)
        del front[0]
        return least

    def _pass_all(self, front: Front, text: str, following: str) -> float:
        """Goes on by all characters of a text; returns the least of all sums."""
        whole, least = text + following, 0.0
        for at in range(len(text)):
            least = min(least, self._pass(front, whole, at))
        return least

    def _pass_units(self, front: Front, unit: str, number: int, following: str) -> bool:
        """Goes on by so many units, or until all paths have the same mark; False if that takes too long."""
        reach, past = self._reach(unit), []
        for _ in range(_MOST_UNITS):
            if number <= reach or _only_mark(front) is not None:
                break
            passed = self._pass_repeated(front, past, unit, number - reach)
            past = [] if passed else [*past[-2 * self.longest :], list(front)]
            if not passed:
                self._pass_all(front, unit, unit * reach)
            number -= passed or 1
        else:
            return False
        if _only_mark(front) is None:
            self._pass_all(front, unit * number, following)
        return True

    def _pass_repeated(self, front: Front, past: list[Front], unit: str, most: int) -> int:
        """Goes on by at most so many units at once if the front repeats an earlier one; returns their number or 0."""
        for units, before in enumerate(reversed(past), 1):
            change = _change(before, front)
            if change is None:
                continue
            marked: Front = [place and place._replace(mark=n) for n, place in enumerate(front)]
            worst = self._pass_all(marked, unit * units, unit * self._reach(unit))
            if _change(front, marked) != change:
                return 0
            times = min(most // units, self._times(front, change, worst, unit))
            if times < 2:
                return 0
            sources = _power([place and place.mark for place in marked], times)
            marks = [place and place.mark for place in front]
            for n, (place, source) in enumerate(zip(list(front), sources, strict=True)):
                if place is not None:
                    mark = None if source is None else marks[source]
                    front[n] = Place(place.score + times * change, place.length, mark)
            return times * units
        return 0

    def _times(self, front: Front, change: float, worst: float, unit: str) -> int:
        """How often such a change can repeat while no sum gets another exponent; worst: the least sum of the first."""
        if change == 0:
            return _ALWAYS
        text = unit * (self._reach(unit) + 1)
        scores = {score for at in range(len(unit)) for _, score in self._tokens(text[at : at + self.longest])}
        largest = max(place.score for place in front if place)
        if max(scores) > 0 or largest >= 0:
            return 0
        smallest = math.ulp(largest)
        # Rounding half to even depends on the sum, unless it changes by an even number of the smallest parts.
        if change / smallest % 2 == 1 and any(score % smallest == smallest / 2 for score in scores):
            return 0
        return max(math.ceil((2.0 ** math.frexp(largest)[1] + worst) / -change) - 1, 0)


def _places(lengths: list[int], start: int, end: int, least: int) -> set[int] | None:
    """The places on the best path from `start` to `end`, from `least` on; None if that is not certain."""
    places = {end}
    while end > least:
        if not lengths[end - start]:
            return None
        end -= lengths[end - start]
        places.add(end)
    return places


def _of(front: Front) -> Place:
    assert front[0] is not None  # a path comes through each place, as each character can be a token
    return front[0]


def _only_mark(front: Front) -> int | None:
    """The mark of all paths; None if they differ or have none."""
    marks = {place.mark for place in front if place}
    return marks.pop() if len(marks) == 1 else None


def _change(before: Front, after: Front) -> float | None:
    """The number by which all sums have changed; None if they differ in anything else, or in exponents."""
    if len(before) != len(after):
        return None
    changes, exponents = set(), set()
    for old, new in zip(before, after, strict=True):
        if old is None or new is None or old.length != new.length:
            if old is not new:
                return None
            continue
        changes.add(new.score - old.score)
        exponents |= {math.frexp(old.score)[1], math.frexp(new.score)[1]}
        if len(changes) > 1 or len(exponents) > 1:
            return None
    return changes.pop()


def _power(sources: list[int | None], times: int) -> list[int | None]:
    """From which place each came `times` times ago, if that is from which it came the last time."""
    found: list[int | None] = list(range(len(sources)))
    while times:
        if times & 1:
            found = [None if place is None else sources[place] for place in found]
        sources = [None if place is None else sources[place] for place in sources]
        times >>= 1
    return found

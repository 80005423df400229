"""Cuts documents into examples: segments of one document up to the limit, or pairs of such parts.

    words only      [CLS] segments [SEP]
    next sentence   [CLS] A [SEP] B [SEP]; B follows A (0), or is from another document (1), with equal probability
    order           [CLS] A [SEP] B [SEP]; two neighbours in their order (0), or exchanged (1)

The examples are a function of (corpus, seed, epoch), so each epoch has different ones. One example in ten is cut to a
shorter length, drawn between two tokens and the limit, as in Google's BERT, so that a model also sees short texts.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..text.files import InputError
from .corpus import Corpus
from .counters import Stream

NEXT_SENTENCE, SENTENCE_ORDER = "next sentence", "sentence order"
SHORT_ONE_IN = 10
CUTS = 1  # number of the random stream for cutting examples


@dataclass(frozen=True)
class Examples:
    """The examples of an epoch.

    Attributes:
        first, second: [examples, 2] int64, begin and end of both parts in the corpus' tokens; begin and end of `second`
            are equal if the example has no second part.
        labels: [examples] int8, 0 or 1 for pairs, else -1.
        lengths: [examples] int32 number of tokens, special ones included.
        left_out: number of segments in no example: the only segment of a document, or the rest after a pair.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    labels: NDArray[np.int8]
    lengths: NDArray[np.int32]
    left_out: int

    def __len__(self) -> int:
        return len(self.labels)


def longest_segment(max_length: int) -> int:
    """Most tokens of a segment, so that two segments fit into a pair."""
    return max(1, (max_length - 3) // 2)


def check_pairs(corpus: Corpus, pairs: str | None, what: str) -> None:
    """Raises InputError if a corpus is too small for pairs; `what` names the corpus."""
    if pairs == NEXT_SENTENCE and corpus.n_documents < 2:
        raise InputError(
            f"{what} is one document, and the next-sentence objective takes its wrong pairs from other documents: put "
            "blank lines between documents, or choose --objective mlm or mlm+sop"
        )
    if pairs is not None and int(np.diff(corpus.documents).max()) < 2:
        raise InputError(
            f"{what}: no document has two sentences, of which a pair is made: blank lines part documents, not "
            "sentences; or choose --objective mlm"
        )


def examples_of(corpus: Corpus, pairs: str | None, max_length: int, seed: int, epoch: int) -> Examples:
    """The examples of an epoch.

    pairs: None, NEXT_SENTENCE or SENTENCE_ORDER. max_length: tokens of an example, with the special ones.
    """
    return _Cutter(corpus, pairs, max_length, Stream(seed, epoch, CUTS)).cut()


class _Cutter:
    def __init__(self, corpus: Corpus, pairs: str | None, max_length: int, draw: Stream) -> None:
        self.segments, self.documents, self.pairs, self.draw = corpus.segments, corpus.documents, pairs, draw
        self.n_documents = corpus.n_documents
        self.special = 2 if pairs is None else 3
        self.room = max_length - self.special
        self.firsts, self.seconds, self.labels = array("q"), array("q"), array("b")
        self.left_out = 0

    def cut(self) -> Examples:
        for document in range(self.n_documents):
            begin, end = int(self.documents[document]), int(self.documents[document + 1])
            while begin < end:
                begin = self._next(document, begin, end)
        # A large corpus has millions of examples. Without pairs, the bounds of second parts take no memory.
        firsts = np.frombuffer(self.firsts, np.int64).reshape(-1, 2)
        seconds = np.frombuffer(self.seconds, np.int64).reshape(-1, 2)
        if self.pairs is None:
            seconds = np.broadcast_to(np.zeros(2, np.int64), firsts.shape)
        lengths = np.full(len(firsts), self.special, np.int32)
        for part in (firsts, seconds):
            np.add(lengths, part[:, 1] - part[:, 0], out=lengths, casting="unsafe")
        return Examples(firsts, seconds, np.frombuffer(self.labels, np.int8), lengths, self.left_out)

    def _next(self, document: int, begin: int, end: int) -> int:
        """Makes the example that begins with segment `begin`; returns the segment after the example."""
        target, draw = self.room, self.draw
        if draw.below(SHORT_ONE_IN) == 0:
            target = 2 + draw.below(self.room - 1)
        stop = min(end, max(begin + 1, self._last_within(begin, target)))
        if self.pairs is None:
            self._add(begin, stop, 0, 0, -1)
            return stop
        # As in Google's BERT, examples for next sentences take one segment more than fits, and `_add` cuts them.
        # If right pairs ended with a sentence and wrong ones at the limit, their lengths would tell them apart.
        more = self.pairs == NEXT_SENTENCE
        stop = min(end, max(stop + more, begin + 2))
        if end - stop == 1:  # a single remaining segment could not make a pair
            stop = end
        if stop - begin < 2:
            self.left_out += 1
            return stop
        split = begin + 1 + draw.below(stop - begin - 1)
        other = draw.below(2)
        if self.pairs == SENTENCE_ORDER:
            parts = (split, stop, begin, split) if other else (begin, split, split, stop)
            self._add(*parts, other)
            return stop
        if not other:
            self._add(begin, split, split, stop, 0)
            return stop
        start, last = self._elsewhere(document, target)
        missing = target - int(self.segments[split] - self.segments[begin])
        self._add(begin, split, start, min(last, max(start, self._last_within(start, missing)) + 1), 1)
        return split

    def _elsewhere(self, document: int, target: int) -> tuple[int, int]:
        """A segment of another document where a second part begins, and the end of that document.

        It is where the second part of a right pair would begin, if a right pair began after any token of the others. So
        second parts of right and wrong pairs are alike, and do not tell the answer alone. Google's script draws a
        document, then a sentence of it: then short documents, short sentences and beginnings of documents are more
        frequent in wrong pairs.
        """
        begin, end = (int(self.segments[self.documents[d]]) for d in (document, document + 1))
        token = self.draw.below(int(self.segments[-1]) - (end - begin))
        if token >= begin:
            token += end - begin
        segment = int(np.searchsorted(self.segments, token, side="right"))
        last = int(self.documents[np.searchsorted(self.documents, segment - 1, side="right")])
        segment = min(segment, last - 1)
        stop = min(last, max(segment, self._last_within(segment, target)) + 1)
        split = segment + 1 + self.draw.below(max(1, stop - segment - 1))
        return min(split, last - 1), last

    def _last_within(self, begin: int, tokens: int) -> int:
        """The last segment that begins at most `tokens` tokens after the beginning of `begin`."""
        limit = self.segments[begin] + tokens
        # A segment has at least one token, which bounds the search.
        near = self.segments[begin : begin + max(tokens, 0) + 2]
        return begin + int(np.searchsorted(near, limit, side="right")) - 1

    def _add(self, begin: int, end: int, second_begin: int, second_end: int, label: int) -> None:
        """Tokens of the segments from `begin` to before `end`, and those of the second part."""
        a, b = int(self.segments[begin]), int(self.segments[end])
        c, d = int(self.segments[second_begin]), int(self.segments[second_end])
        excess = b - a + d - c - self.room
        if excess > 0:
            # The longer part loses tokens until both have the same length, then both do, at random ends.
            more = min(excess, abs((b - a) - (d - c)))
            both = excess - more
            from_first = both // 2 + (more if b - a > d - c else 0)
            in_front = self.draw.heads(from_first)
            a, b = a + in_front, b - (from_first - in_front)
            from_second = excess - from_first
            in_front = self.draw.heads(from_second)
            c, d = c + in_front, d - (from_second - in_front)
        self.firsts.extend((a, b))
        if self.pairs is not None:
            self.seconds.extend((c, d))
        self.labels.append(label)


def tokens_of(corpus: Corpus, examples: Examples, rows: Any, cls: int, sep: int) -> tuple[list[Any], ...]:
    """(ids, joins, segments), each a list with one array [tokens] per row, including [CLS] and [SEP]."""
    all_ids, all_joins, all_types = [], [], []
    for row in rows:
        (a, b), (c, d) = examples.first[row].tolist(), examples.second[row].tolist()
        length = int(examples.lengths[row])
        ids, joins, types = np.full(length, sep, np.int64), np.zeros(length, np.uint8), np.zeros(length, np.int64)
        middle = 1 + b - a
        ids[0], ids[1:middle], joins[1:middle] = cls, corpus.ids[a:b], corpus.joins[a:b]
        joins[1] = 0  # the beginning of the first word may have been cut off
        if examples.labels[row] >= 0:
            ids[middle + 1 : -1], joins[middle + 1 : -1] = corpus.ids[c:d], corpus.joins[c:d]
            joins[middle + 1] = 0
            types[middle + 1 :] = 1
        all_ids.append(ids)
        all_joins.append(joins)
        all_types.append(types)
    return all_ids, all_joins, all_types

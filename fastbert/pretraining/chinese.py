"""Chinese words: the tokenizer makes a token of each character, and a segmenter joins characters into words.

A word list is a plain file, one word a line. A text is cut into as few words of the list as possible; a character that
is in no word counts as a word. Of several such cuts the one with the longer last words is taken.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..text.files import InputError, read_lines

# Runs of ideographs: the ranges that BERT's tokenizer splits into characters.
_CHINESE = re.compile(
    "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]+"
)


class Segmenter:
    """Cuts runs of ideographs into words.

    cut: returns the words of a run; joined, they give the run. name: names segmenter and words, for messages and
    digests.
    """

    def __init__(self, name: str, cut: Callable[[str], Iterable[str]]) -> None:
        self.name, self.cut = name, cut


def segmenter_of(name: str) -> Segmenter:
    """`jieba`, or a file with a word list.

    Raises: ImportError if jieba is not installed; InputError if the list has no words.
    """
    if name == "jieba":
        try:
            import jieba
        except ImportError as error:
            raise ImportError("the segmenter jieba is not there: pip install jieba, or give a word list") from error
        jieba.setLogLevel("WARNING")  # otherwise jieba prints to standard error that it loads its dictionary
        return Segmenter(f"jieba {jieba.__version__}", jieba.Tokenizer().cut)
    path = Path(name)
    with open(path, "rb") as stream:
        words = {line.text.strip() for line in read_lines(stream, str(path))} - {""}
    if not words:
        raise InputError(f"{path} has no words")
    digest = sha256("\n".join(sorted(words)).encode()).hexdigest()[:16]
    return Segmenter(f"{len(words):,} words, {digest}", _FewestWords(words))


class _FewestWords:
    def __init__(self, words: set[str]) -> None:
        self.words, self.longest = words, max(map(len, words))

    def __call__(self, run: str) -> list[str]:
        # fewest[i]: for run[:i], (number of words, length of the last word) of the best cut
        fewest = [(0, 0)]
        for end in range(1, len(run) + 1):
            best = (fewest[end - 1][0] + 1, 1)
            for size in range(2, min(self.longest, end) + 1):
                count = fewest[end - size][0] + 1
                if count <= best[0] and run[end - size : end] in self.words:
                    best = (count, size)
            fewest.append(best)
        found, end = [], len(run)
        while end:
            size = fewest[end][1]
            found.append(run[end - size : end])
            end -= size
        return found[::-1]


def joins_of_words(text: str, offsets: Sequence[tuple[int, int]], segmenter: Segmenter) -> NDArray[np.uint8]:
    """1 for each token that belongs to the same Chinese word as the token before it, [tokens] uint8.

    A token that crosses the edge of a word is not joined with its neighbours.

    offsets: (start, end) of each token in `text`, in characters.
    """
    word_of = np.full(len(text), -1, np.int64)  # the number of each character's word; -1 outside of Chinese
    number = 0
    for run in _CHINESE.finditer(text):
        place = run.start()
        for word in segmenter.cut(run.group()):
            word_of[place : place + len(word)] = number
            number += 1
            place += len(word)
    joins = np.zeros(len(offsets), np.uint8)
    if number == 0 or not len(offsets):
        return joins
    starts, ends = np.array(offsets, np.int64).T
    first, last = word_of[np.minimum(starts, len(text) - 1)], word_of[ends - 1]
    whole = (first == last) & (first >= 0) & (ends > starts)
    joins[1:] = whole[1:] & (first[1:] == first[:-1])
    return joins

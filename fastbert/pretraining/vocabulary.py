"""Trains a WordPiece vocabulary. The same text and options give the same bytes, with any number of threads.

Words are counted as BERT's tokenizer splits them. A word starts as its characters, "word" as w ##o ##r ##d. Then the
most frequent pair of neighbours becomes one piece, again and again (Sennrich et al., arXiv:1508.07909), until the
vocabulary is full. Of equally frequent pairs, the one whose pieces are first in the order of strings is taken.

The vocabulary holds, in this order: special tokens, single characters by frequency, and pieces in the order in which
they were made.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from tokenizers import normalizers, pre_tokenizers

from ..text.files import LINE_BYTES, InputError
from ..text.tokenizer import Tokenizer
from .texts import lines_of

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONTINUING = "##"
# Longest word, in characters. WordPiece treats longer words as unknown, so they are not counted.
LONGEST_WORD = 100
# Number of different runs between spaces that are collected before they are split into words.
CHUNKS_HELD = 1_000_000


def train_tokenizer(
    files: Sequence[Path], size: int, *, lowercase: bool = True, alphabet: int | None = None, min_frequency: int = 2,
    field: str = "text", line_bytes: int = LINE_BYTES,
) -> tuple[Tokenizer, dict[str, int]]:  # fmt: skip
    """The tokenizer of files of text, and facts about it. Arguments and errors: `train_vocabulary`, `lines_of`."""
    words = count_words(lines_of(files, field, line_bytes), lowercase)
    if not words:
        raise InputError(f"there is no text in {', '.join(map(str, files))}")
    pieces = train_vocabulary(words, size, alphabet=alphabet, min_frequency=min_frequency)
    known = {piece for piece in pieces if len(piece.removeprefix(CONTINUING)) == 1}
    long = sum(count for word, count in words.items() if len(word) > LONGEST_WORD)
    lost = sum(
        count for word, count in words.items()
        if len(word) <= LONGEST_WORD and not known.issuperset(_characters(word))
    )  # fmt: skip
    facts = {
        "words": words.total(), "different words": len(words), "characters": len(known),
        "words with a character that is no piece": lost, f"words of over {LONGEST_WORD} characters": long,
    }  # fmt: skip
    return Tokenizer.from_words(pieces, lowercase), facts


def count_words(lines: Iterable[str | None], lowercase: bool) -> Counter[str]:
    """Frequencies of the words in `lines`, as BERT's tokenizer splits them. None among the lines is ignored."""
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    cutter = pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    chunks: Counter[str] = Counter()

    def fold() -> None:
        for chunk, count in chunks.items():
            for word, _ in cutter.pre_tokenize_str(normalizer.normalize_str(chunk)):
                words[word] += count
        chunks.clear()

    for line in lines:
        if line is None:
            continue
        # BERT's rules never look across a space, so each run between spaces is split once, however often it occurs.
        chunks.update(line.split(" "))
        if len(chunks) > CHUNKS_HELD:
            fold()
    fold()
    return words


def train_vocabulary(
    words: Mapping[str, int], size: int, *, alphabet: int | None = None, min_frequency: int = 2
) -> list[str]:
    """The pieces of a vocabulary, at most `size`, in the order of their ids.

    Args:
        words: word -> frequency.
        alphabet: most pieces of one character ("a" and "##a" are two); None for three quarters of the vocabulary. The
            rarest characters are left out, and every word that has one is then unknown.
        min_frequency: least frequency of a character or a pair that becomes a piece.

    Raises: InputError if no character is that frequent; ValueError if `size` has no room for pieces.
    """
    room = size - len(SPECIAL)
    if room < 1:
        raise ValueError(f"a vocabulary of {size} has no room beside the {len(SPECIAL)} special tokens")
    occurring: Counter[str] = Counter()
    for word, count in words.items():
        if len(word) <= LONGEST_WORD:
            for piece in _characters(word):
                occurring[piece] += count
    ranked = sorted((-count, piece) for piece, count in occurring.items() if count >= min_frequency)
    if not ranked:
        raise InputError(f"no vocabulary can be made: no character occurs {min_frequency} times or more")
    limit = min(room, max(1, room * 3 // 4) if alphabet is None else alphabet)
    characters = [piece for _, piece in ranked[:limit]]
    merged = _merge(words, set(characters), room - len(characters), min_frequency)
    return [*SPECIAL, *characters, *merged]


def _characters(word: str) -> list[str]:
    return [word[0], *(CONTINUING + character for character in word[1:])]


def _joined(left: str, right: str) -> str:
    return left + right.removeprefix(CONTINUING)


def _merge(words: Mapping[str, int], characters: set[str], wanted: int, min_frequency: int) -> list[str]:
    """Up to `wanted` pieces of more than one character, in the order of merging."""
    cut: list[list[str]] = []
    counts: list[int] = []
    for word, count in words.items():
        pieces = _characters(word) if len(word) <= LONGEST_WORD else []
        if len(pieces) > 1 and characters.issuperset(pieces):
            cut.append(pieces)
            counts.append(count)
    pairs: Counter[tuple[str, str]] = Counter()
    places: defaultdict[tuple[str, str], set[int]] = defaultdict(set)  # pair -> words in which it has occurred
    for number, pieces in enumerate(cut):
        for pair in pairwise(pieces):
            pairs[pair] += counts[number]
            places[pair].add(number)
    queue = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(queue)
    made: dict[str, None] = {}
    while queue and len(made) < wanted:
        negative, pair = heapq.heappop(queue)
        count = pairs[pair]
        if -negative != count:  # an outdated entry: the pair has become rarer since
            if count:
                heapq.heappush(queue, (-count, pair))
            continue
        if count < min_frequency:
            break
        piece = _joined(*pair)
        made[piece] = None
        grown: set[tuple[str, str]] = set()
        for number in places.pop(pair):
            before, times = cut[number], counts[number]
            after = _with(before, pair, piece)
            if len(after) == len(before):
                continue
            for old in pairwise(before):
                pairs[old] -= times
            for new in pairwise(after):
                pairs[new] += times
                if piece in new:
                    places[new].add(number)
                    grown.add(new)
            cut[number] = after
        for new in grown:
            heapq.heappush(queue, (-pairs[new], new))
    return list(made)


def _with(pieces: list[str], pair: tuple[str, str], piece: str) -> list[str]:
    """`pieces` with `piece` in place of each `pair` of neighbours, from the left."""
    result, place = [], 0
    while place < len(pieces):
        if place + 1 < len(pieces) and (pieces[place], pieces[place + 1]) == pair:
            result.append(piece)
            place += 2
        else:
            result.append(pieces[place])
            place += 1
    return result

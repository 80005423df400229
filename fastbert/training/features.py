"""Examples as sequences of tokens: one for a sentence or a pair, one or several windows for tagged words and questions.

    text or pair   [CLS] text [SEP]  or  [CLS] text [SEP] pair [SEP], cut at the limit; the cuts are counted
    tagged words   [CLS] words [SEP]; the label of a word is at its first piece
    question       [CLS] question [SEP] part of the context [SEP]

Overlapping windows cover tagged words and contexts that are longer than the limit. A word in several windows belongs to
the window that has the most context on the shorter of its two sides, and of equals to the earlier one. That window
counts the word's loss and gives its prediction. Likewise, an answer may start at a token of a context only in the
window that the token belongs to.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..text.tokenizer import Tokenizer
from .files import Question, Sentence

IGNORED = -100  # a label that does not count
NO_ANSWER = (0, 0)  # the span of [CLS]
QUESTION_TOKENS = 64  # most tokens of a question, as in Google's run_squad.py


@dataclass(frozen=True)
class Window:
    """A sequence of tokens for the model, which is an example or a part of one.

    Attributes:
        input_ids, token_type_ids: of its tokens; token_type_ids is None if all are 0.
        example: the number of its example.
        target: the label: a class (int), a number (float), 1 or 0 for each of several labels, a class or IGNORED for
            each token, or the tokens (start, end) of an answer; None if there is no label.
        words: for tagged words: (word, position of its first piece) of the words that belong to the window.
        offsets: for a context: (start, end) of each token in characters of the context; None for other tokens.
        owned: for a context: the positions of the tokens that belong to the window.
    """

    input_ids: list[int]
    token_type_ids: list[int] | None
    example: int
    target: Any = None
    words: list[tuple[int, int]] | None = None
    offsets: list[tuple[int, int] | None] | None = None
    owned: frozenset[int] | None = None


@dataclass(frozen=True)
class Features:
    """The windows of all examples in order, and counts of what was cut, such as {"examples cut at 128 tokens": 3}."""

    windows: list[Window]
    notes: dict[str, int]


# ---- texts ---------------------------------------------------------------------------------------------------


def text_features(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    targets: Sequence[Any] | None,
    max_length: int,
) -> Features:
    """One window for each example."""
    encoded = tokenizer(texts, pairs, max_length=max_length)
    windows = [
        Window(e.ids, None if pairs is None else e.type_ids, i, None if targets is None else targets[i])
        for i, e in enumerate(encoded.encodings)
    ]
    cut = sum(bool(e.overflowing) for e in encoded.encodings)
    return Features(windows, {f"examples cut at {max_length} tokens": cut})


# ---- tagged words --------------------------------------------------------------------------------------------


def word_features(
    tokenizer: Tokenizer, sentences: Sequence[Sentence], label2id: dict[str, int] | None, max_length: int, stride: int
) -> Features:
    """Windows of whole words. label2id: None for words without tags.

    A word for which the tokenizer gives no piece becomes [UNK]. A word longer than a window is cut, and counted.

    Raises: ValueError if stride leaves no room for new words in a window.
    """
    room = _room(max_length - 2, stride)
    pieces = _pieces_of_words(tokenizer, sentences, room)
    cut = windowed = 0
    windows = []
    for example, sentence in enumerate(sentences):
        words = [pieces[word] for word in sentence.words]
        cut += sum(len(word) > room for word in words)
        words = [word[:room] for word in words]
        spans = _spans([len(word) for word in words], room, stride)
        windowed += len(spans) > 1
        owner = _owners(len(words), spans)
        for number, (first, last) in enumerate(spans):
            ids, target, owned = [tokenizer.cls_token_id], [IGNORED], []
            for word in range(first, last):
                label = IGNORED
                if owner[word] == number:
                    owned.append((word, len(ids)))
                    if label2id is not None:
                        label = label2id[sentence.tags[word]]
                ids += words[word]
                target += [label] + [IGNORED] * (len(words[word]) - 1)
            ids.append(tokenizer.sep_token_id)
            target.append(IGNORED)
            windows.append(Window(ids, None, example, None if label2id is None else target, words=owned))
    notes = {f"sentences in several windows of {max_length} tokens": windowed, "words cut": cut}
    return Features(windows, notes)


def _pieces_of_words(tokenizer: Tokenizer, sentences: Sequence[Sentence], most: int) -> dict[str, list[int]]:
    """The pieces of each word; of a longer word at least `most + 1`."""
    words = list(dict.fromkeys(word for sentence in sentences for word in sentence.words))
    beginnings = [tokenizer.beginning(word, most) for word in words]
    ids = tokenizer(beginnings, truncation=None, add_special_tokens=False).input_ids
    return {word: of_word or [tokenizer.unk_token_id] for word, of_word in zip(words, ids, strict=True)}


# ---- questions -----------------------------------------------------------------------------------------------


def question_features(
    tokenizer: Tokenizer, questions: Sequence[Question], max_length: int, stride: int, training: bool, longest: int
) -> Features:
    """Windows of each context, after its question.

    In training a window's target is the first gold answer that it contains completely, else its [CLS]. A question whose
    gold answers are not in its context has no windows, and is counted.

    Otherwise the questions are counted that cannot be answered rightly, because no window contains a complete gold
    answer of at most `longest` tokens.

    Raises: ValueError if max_length leaves no room for the context, or stride none for new tokens in a window.
    """
    contexts = list(dict.fromkeys(q.context for q in questions))
    tokens = dict(zip(contexts, tokenizer(contexts, truncation=None, add_special_tokens=False).encodings, strict=True))
    gold = [gold_tokens(q, tokens[q.context].offsets) for q in questions]
    asked = [i for i, q in enumerate(questions) if not training or gold[i] or not q.answers]
    limit = min(QUESTION_TOKENS, max_length // 2)
    beginnings = [tokenizer.beginning(questions[i].question, limit) for i in asked]
    ids = tokenizer(beginnings, truncation=None, add_special_tokens=False).input_ids
    windows, windowed, split, beyond = [], 0, 0, 0
    for example, of_question in zip(asked, ids, strict=True):
        context = tokens[questions[example].context]
        context_ids, context_offsets = context.ids, context.offsets  # each makes a list of all tokens
        head = [tokenizer.cls_token_id, *of_question[:limit], tokenizer.sep_token_id]
        spans = _spans([1] * len(context_ids), _room(max_length - len(head) - 1, stride), stride)
        owner = _owners(len(context_ids), spans)
        targets = [_target(gold[example], first, end, len(head)) if training else None for first, end in spans]
        for number, (first, end) in enumerate(spans):
            window_ids = [*head, *context_ids[first:end], tokenizer.sep_token_id]
            offsets = [*[None] * len(head), *context_offsets[first:end], None]
            owned = frozenset(len(head) + t - first for t in range(first, end) if owner[t] == number)
            types = [0] * len(head) + [1] * (end - first + 1)
            windows.append(Window(window_ids, types, example, targets[number], offsets=offsets, owned=owned))
        windowed += len(spans) > 1
        split += training and bool(gold[example]) and set(targets) == {NO_ANSWER}
        beyond += bool(gold[example]) and not any(
            first <= start and last < min(end, start + longest) for start, last in gold[example] for first, end in spans
        )
    notes = {
        f"contexts in several windows of {max_length} tokens": windowed,
        f"questions cut at {limit} tokens": sum(len(of_question) > limit for of_question in ids),
    }
    if training:
        notes["questions left out, whose answers are not in their context"] = len(questions) - len(asked)
        notes["answers that no window holds whole"] = split
    else:
        notes[f"questions without a gold answer of up to {longest} tokens within a window"] = beyond
    return Features(windows, notes)


def gold_tokens(question: Question, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(first, last) token of each gold answer in the context: the tokens that share a character with it."""
    spans = []
    for answer in question.answers:
        if answer.start is not None:
            first = bisect_right(offsets, answer.start, key=lambda o: o[1])
            last = bisect_left(offsets, answer.start + len(answer.text), key=lambda o: o[0]) - 1
            if first <= last:
                spans.append((first, last))
    return spans


def _target(gold: Sequence[tuple[int, int]], first: int, end: int, head: int) -> tuple[int, int]:
    """The tokens (start, end) of the first gold answer that a window contains completely, else NO_ANSWER. The window
    has `head` tokens, then the tokens [first, end) of the context."""
    for start, last in gold:
        if first <= start and last < end:
            return head + start - first, head + last - first
    return NO_ANSWER


# ---- windows -------------------------------------------------------------------------------------------------


def _room(tokens: int, stride: int) -> int:
    if not 0 <= stride < tokens:
        raise ValueError(
            f"windows with room for {tokens} tokens cannot overlap by {stride}: see --max-length and --stride"
        )
    return tokens


def _spans(lengths: Sequence[int], room: int, stride: int) -> list[tuple[int, int]]:
    """(first, end) of windows of whole items, with at most `room` tokens. A window begins with the last items of the
    window before it, at most `stride` tokens of them. Without items there is one empty window."""
    spans, first = [], 0
    while True:
        end, tokens = first, 0
        while end < len(lengths) and tokens + lengths[end] <= room:
            tokens += lengths[end]
            end += 1
        spans.append((first, end))
        if end == len(lengths):
            return spans
        # The next window goes back by at most `stride` tokens, and only so far that it still holds the item at `end`.
        back, start = 0, end
        while start - 1 > first and back + lengths[start - 1] <= min(stride, room - lengths[end]):
            start -= 1
            back += lengths[start]
        first = start


def _owners(count: int, spans: Sequence[tuple[int, int]]) -> list[int]:
    """The number of the window that each item belongs to: the one with the most items on the shorter side of it."""
    owner, best = [0] * count, [-1] * count
    for number, (first, end) in enumerate(spans):
        for item in range(first, end):
            context = min(item - first, end - 1 - item)
            if context > best[item]:
                owner[item], best[item] = number, context
    return owner

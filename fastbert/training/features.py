"""Examples as sequences of tokens: one for a sentence or a pair, one or several windows for tagged words and questions.

    text or pair   [CLS] text [SEP]  or  [CLS] text [SEP] pair [SEP], cut at the limit; the cuts are counted
    tagged words   [CLS] words [SEP]; the label of a word is at its first piece
    question       [CLS] question [SEP] part of the context [SEP]

What is longer than the limit is covered by windows that overlap. A word of several windows belongs to one of them,
where the shorter of its two sides of context is longest (of equals, to the earlier window): its loss counts there and
its prediction is taken from there. So does every token of a context, as the start of an answer.
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
QUESTION_TOKENS = 64  # of a question, at most, as in Google's run_squad.py


@dataclass(frozen=True)
class Window:
    """A sequence of tokens for the model, of one example.

    Attributes:
        input_ids, token_type_ids: of its tokens; token_type_ids is None where all are 0.
        example: the number of its example.
        target: what is to be learnt: a class (int), a number (float), or 1 or 0 for each of several labels; a class or
            IGNORED for each token; the tokens (start, end) of an answer; None where nothing is known.
        words: of a window of tagged words, (word, place of its first piece) for the words that belong to it.
        offsets: of a window of a context, (start, end) of each token in the context, in characters; None for tokens
            that are not of the context.
        owned: of a window of a context, the places of the tokens that belong to it.
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
    """Windows of all examples in order, and what was lost: notes such as "examples cut at 128 tokens": 3."""

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
    """One window an example."""
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
    """Windows of whole words; label2id: None for words without tags.

    A word of which the tokenizer leaves nothing stands as [UNK]. One longer than a window is cut to it, and counted.

    Raises: ValueError where stride leaves no room for anything new.
    """
    room = _room(max_length - 2, stride)
    pieces = _pieces_of_words(tokenizer, sentences)
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


def _pieces_of_words(tokenizer: Tokenizer, sentences: Sequence[Sentence]) -> dict[str, list[int]]:
    words = list(dict.fromkeys(word for sentence in sentences for word in sentence.words))
    ids = tokenizer(words, truncation=None, add_special_tokens=False).input_ids
    return {word: of_word or [tokenizer.unk_token_id] for word, of_word in zip(words, ids, strict=True)}


# ---- questions -----------------------------------------------------------------------------------------------


def question_features(
    tokenizer: Tokenizer, questions: Sequence[Question], max_length: int, stride: int, training: bool, longest: int
) -> Features:
    """Windows of each context behind its question.

    In training a window's target is the first gold answer that lies in it whole, else its [CLS]; a question that has
    gold answers, but none in its context, has no windows, and is counted.

    Otherwise those questions are counted of which no gold answer is whole in a window and of at most `longest` tokens,
    so that none can be predicted.

    Raises: ValueError where max_length leaves no room for the context, or stride none for anything new.
    """
    contexts = list(dict.fromkeys(q.context for q in questions))
    tokens = dict(zip(contexts, tokenizer(contexts, truncation=None, add_special_tokens=False).encodings, strict=True))
    gold = [gold_tokens(q, tokens[q.context].offsets) for q in questions]
    asked = [i for i, q in enumerate(questions) if not training or gold[i] or not q.answers]
    ids = tokenizer([questions[i].question for i in asked], truncation=None, add_special_tokens=False).input_ids
    limit = min(QUESTION_TOKENS, max_length // 2)
    windows, windowed, split, beyond = [], 0, 0, 0
    for example, of_question in zip(asked, ids, strict=True):
        context = tokens[questions[example].context]
        head = [tokenizer.cls_token_id, *of_question[:limit], tokenizer.sep_token_id]
        spans = _spans([1] * len(context.ids), _room(max_length - len(head) - 1, stride), stride)
        owner = _owners(len(context.ids), spans)
        targets = [_target(gold[example], first, end, len(head)) if training else None for first, end in spans]
        for number, (first, end) in enumerate(spans):
            window_ids = [*head, *context.ids[first:end], tokenizer.sep_token_id]
            offsets = [*[None] * len(head), *context.offsets[first:end], None]
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
    """(first, last) token of each gold answer that lies in the context: all tokens that share a character with it."""
    spans = []
    for answer in question.answers:
        if answer.start is not None:
            first = bisect_right(offsets, answer.start, key=lambda o: o[1])
            last = bisect_left(offsets, answer.start + len(answer.text), key=lambda o: o[0]) - 1
            if first <= last:
                spans.append((first, last))
    return spans


def _target(gold: Sequence[tuple[int, int]], first: int, end: int, head: int) -> tuple[int, int]:
    """Where in a window the first gold answer lies that is whole in it. The window has the tokens of the context from
    `first` to before `end`, behind `head` others."""
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
    """(first, end) of windows of whole items, each of at most `room` tokens; neighbours share the last items of the
    first one, of at most `stride` tokens together. Without items a single window is empty."""
    spans, first = [], 0
    while True:
        end, tokens = first, 0
        while end < len(lengths) and tokens + lengths[end] <= room:
            tokens += lengths[end]
            end += 1
        spans.append((first, end))
        if end == len(lengths):
            return spans
        # Going back by `stride` tokens must leave the next window something new: the item at `end` has to fit in it.
        back, start = 0, end
        while start - 1 > first and back + lengths[start - 1] <= min(stride, room - lengths[end]):
            start -= 1
            back += lengths[start]
        first = start


def _owners(count: int, spans: Sequence[tuple[int, int]]) -> list[int]:
    """Of each item, the number of the window that it belongs to: the one whose shorter side around it is longest."""
    owner, best = [0] * count, [-1] * count
    for number, (first, end) in enumerate(spans):
        for item in range(first, end):
            context = min(item - first, end - 1 - item)
            if context > best[item]:
                owner[item], best[item] = number, context
    return owner

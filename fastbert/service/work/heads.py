"""Labels of texts and of pairs, entities, answers: models with a head, each by the task of its `Pipeline`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...training.features import Window
from ...training.files import Question
from ...training.pipeline import WORDS, Pipeline
from ...training.predicting import outputs_of
from ...training.spans import best_spans, probabilities
from ..engine import Piece, Prepared
from ..errors import ServiceError
from .texts import Texts

_COUNTED = 65_536  # characters tokenised at once to count tokens
_MANY = 8  # windows of which the answer takes milliseconds


class _Head:
    """The lane of a head: what the task's `by_window` gives of each window."""

    def __init__(self, pipeline: Pipeline):
        self.pipeline = pipeline

    def compute(self, data: Sequence[Window]) -> list[np.ndarray]:
        p = self.pipeline
        return outputs_of(p.model, p.task, data, sum(len(w.input_ids) for w in data), p.dtype, p.processes)

    def pieces(self, windows: Sequence[Window]) -> list[Piece]:
        return [Piece(self, window, len(window.input_ids)) for window in windows]


class Labels:
    """A classifier, or a reranker, of texts or pairs of texts.

    Attributes:
        labels: names in the order of their numbers.
        is_reranker: whether there is one number alone.
        several: whether a text may have any number of labels.
    """

    def __init__(self, pipeline: Pipeline, limit: int | None = None):
        config, own = pipeline.model.config, pipeline.task.spec.max_length
        self.labels = [config.id2label[i] for i in range(config.num_labels)]
        self.is_reranker = len(self.labels) == 1
        self.lane = _Head(pipeline)
        self.texts = Texts(pipeline.task.tokenizer, min(own, limit or own), of_pairs=self.is_reranker)
        self.several = config.problem_type == "multi_label_classification"
        self.regresses = config.problem_type == "regression" and not self.is_reranker

    def prepare(
        self,
        given: Sequence[str | tuple[str, str]],
        *,
        truncate: bool = True,
        side: str | None = None,
        limit: int | None = None,
        most: int | None = None,
    ) -> Prepared:
        """Tokenises. The answer is [N, labels] float32, logits of each text or pair.

        limit: tokens of a text or a pair at most; None for the model's own limit.
        most: tokens of the second text of a pair at most.
        """
        windows: list[Window] = [None] * len(given)
        alone = [i for i, text in enumerate(given) if isinstance(text, str)]
        paired = [i for i, text in enumerate(given) if not isinstance(text, str)]
        cut = 0
        if alone:
            ids, cut = self.texts.ids([given[i] for i in alone], truncate, side, limit)
            for i, row in zip(alone, ids, strict=True):
                windows[i] = Window(row, [0] * len(row), i)
        if paired:
            firsts, seconds = zip(*(given[i] for i in paired), strict=True)
            encodings, cut_pairs = self.texts.pairs(firsts, seconds, truncate, side, most, limit)
            cut += cut_pairs
            for i, encoding in zip(paired, encodings, strict=True):
                windows[i] = Window(encoding.ids, encoding.type_ids, i)
        return Prepared(self.lane.pieces(windows), [len(w.input_ids) for w in windows], cut, _finite)

    def scores(self, logits: np.ndarray, raw: bool = False, function: str | None = None) -> np.ndarray:
        """[N, labels] out of logits: probabilities, or the logits themselves.

        function: "softmax", "sigmoid" or "none"; None for what the model was trained for, of a number alone sigmoid.
        """
        if function is None:
            function = "sigmoid" if self.several or self.is_reranker else "none" if self.regresses else "softmax"
        if raw or function == "none":
            return logits
        logits = logits.astype(np.float64)
        if function == "sigmoid":
            return 0.5 * (1.0 + np.tanh(0.5 * logits))
        return np.stack([probabilities(row) for row in logits])


def _finite(rows: list[np.ndarray]) -> np.ndarray:
    found = np.stack(rows).astype(np.float32)
    if not np.isfinite(found).all():
        raise ServiceError("failed", "the model's numbers are not finite")
    return found


class Entities:
    """A tagger of words."""

    def __init__(self, pipeline: Pipeline):
        self.pipeline, self.lane = pipeline, _Head(pipeline)

    def prepare(
        self, texts: Sequence[str], most: int | None = None, form: Callable[[dict[str, Any]], Any] | None = None
    ) -> Prepared:
        """Tokenises. The answer is a list of dicts as `Pipeline` gives them, each also with the tag of every word. A
        long text is several pieces, so nothing is cut.

        Args:
            most: tokens of all texts at most.
            form: makes something else of each dict.

        Raises: ServiceError.
        """
        task = self.pipeline.task
        _expect_at_most(most, texts, lambda part: len(WORDS.findall(part)))  # at least a token for each
        examples = [self.pipeline.example(i, text) for i, text in enumerate(texts)]
        windows = _features(task, examples)

        def finish(found: list[np.ndarray]) -> list[Any]:
            predictions = task.predictions(examples, windows, found)
            records = [task.record(e, p, True) for e, p in zip(examples, predictions, strict=True)]
            for example, record in zip(examples, records, strict=True):
                for start, tag in zip(example.starts, record["tags"], strict=True):
                    tag["start"], tag["end"] = start, start + len(tag["word"])
            return records if form is None else list(map(form, records))

        tokens, is_slow = _tokens_of(windows, len(texts)), len(windows) > _MANY
        return Prepared(self.lane.pieces(windows), tokens, 0, finish, is_slow)


class Answers:
    """A finder of answers in contexts."""

    def __init__(self, pipeline: Pipeline):
        self.pipeline, self.lane = pipeline, _Head(pipeline)

    def prepare(
        self,
        pairs: Sequence[tuple[str, str]],
        most: int | None = None,
        *,
        top_k: int = 1,
        longest: int | None = None,
        may_be_silent: bool | None = None,
    ) -> Prepared:
        """Tokenises (question, context). The answer is, for each, a list of at most `top_k` dicts with answer, score,
        start and end in characters, the best first; answer "" stands for no answer.

        Args:
            most: tokens of all contexts at most.
            longest: tokens of an answer at most; None for the model's own.
            may_be_silent: whether no answer is one of them; None for what the model was trained for.

        Raises: ServiceError.
        """
        task = self.pipeline.task
        _expect_at_most(most, [context for _, context in pairs], lambda part: len(task.tokenizer.tokenize(part)))
        longest = task.spec.longest if longest is None else longest
        silent = task.allows_no_answer if may_be_silent is None else may_be_silent
        examples = [Question(str(i), question, context) for i, (question, context) in enumerate(pairs)]
        windows = _features(task, examples)

        def finish(found: list[np.ndarray]) -> list[list[dict[str, Any]]]:
            of_question: list[list] = [[] for _ in examples]
            for window, logits in zip(windows, found, strict=True):
                of_question[window.example].append((window, logits))
            return [answers_of(e, pairs) for e, pairs in zip(examples, of_question, strict=True)]

        def answers_of(example: Question, of_windows: list) -> list[dict[str, Any]]:
            nothing = {"answer": "", "start": 0, "end": 0}
            spans, null = best_spans(*zip(*of_windows, strict=True), longest)
            ranked = [
                (s.score, {"answer": example.context[s.start : s.end], "start": s.start, "end": s.end}) for s in spans
            ]
            if silent or not spans:
                ranked.append((null, nothing))
            if not all(math.isfinite(score) for score, _ in ranked):
                raise ServiceError("failed", "the model's numbers are not finite")
            every = probabilities([score for score, _ in ranked])
            best = sorted(zip(every.tolist(), ranked, strict=True), key=lambda pair: -pair[0])[:top_k]
            return [{"score": p, **answer} for p, (_, answer) in best]

        tokens, is_slow = _tokens_of(windows, len(pairs)), len(windows) > _MANY
        return Prepared(self.lane.pieces(windows), tokens, 0, finish, is_slow)


def _expect_at_most(most: int | None, texts: Sequence[str], count: Callable[[str], int]) -> None:
    """Refuses texts that have more than `most` tokens before they are tokenised whole, which takes gigabytes.

    count: tokens of a part of a text.
    """
    tokens = 0
    if most is None or sum(map(len, texts)) <= most:
        return
    for text in texts:
        for at in range(0, len(text), _COUNTED):
            try:
                tokens += count(text[at : at + _COUNTED])
            except ValueError as error:
                raise ServiceError("tokenizer", str(error)) from error
            if tokens > most:
                raise ServiceError(
                    "too_large", f"the texts have more than {most:,} tokens, and no more may wait: send fewer texts at "
                    "once, or start the server with a larger --max-queue-tokens",
                )  # fmt: skip


def _features(task: Any, examples: list[Any]) -> list[Window]:
    try:
        return task.features(examples, training=False).windows
    except ValueError as error:
        raise ServiceError("tokenizer", str(error)) from error


def _tokens_of(windows: Sequence[Window], count: int) -> list[int]:
    """Tokens of all windows of each example."""
    tokens = [0] * count
    for window in windows:
        tokens[window.example] += len(window.input_ids)
    return tokens

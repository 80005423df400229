"""The tasks by name. Those with tags and answers are here, those with labels of texts in `text_tasks`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..text.tokenizer import Tokenizer
from .answers import ANSWER_METRICS, answer_scores, best_threshold, score
from .entities import TOKEN_METRICS, lenient, token_scores
from .features import IGNORED, Features, Window, question_features, word_features
from .files import DataError, Question, Sentence, read_conll, read_questions
from .labels import expect_known, numbers_of, tags_of
from .metrics import Scores
from .spans import best_spans, probabilities
from .task import Spec, Task
from .text_tasks import NUMBERS, MultiLabelTask, NextSentenceTask, TextTask

__all__ = [
    "DEFAULT_METRICS", "DEFAULT_STRIDES", "NUMBERS", "TASKS", "QuestionTask", "Spec", "Task", "TokenTask", "make_task",
]  # fmt: skip


class TokenTask(Task):
    """token: a tag for each word."""

    head = "BertForTokenClassification"
    metrics = TOKEN_METRICS

    def read(self, path: str | Path, gold: bool = True) -> list[Sentence]:
        return read_conll(path, tagged=gold)

    def settle(
        self, examples: Sequence[Sentence], given: Sequence[str] | None, model_labels: Sequence[str] | None
    ) -> None:
        if given:
            raise DataError("--labels is not for --task token: the tags of the training file are the labels")
        self.labels = tags_of(examples, model_labels)

    def check(self, examples: Sequence[Sentence]) -> None:
        expect_known(((tag, example.place) for example in examples for tag in example.tags), self.labels)

    def features(self, examples: Sequence[Sentence], training: bool) -> Features:
        numbers = None
        if training:
            folded = numbers_of(self.labels)
            numbers = {tag: folded[tag.casefold()] for example in examples for tag in example.tags}
        return word_features(self.tokenizer, examples, numbers, self.spec.max_length, self.spec.stride)

    def classes(self, window: Window) -> list[int]:
        return [label for label in window.target if label != IGNORED]

    def items(self, window: Window) -> int:
        return len(self.classes(window))

    def arguments(self, windows: Sequence[Window], device: torch.device) -> dict[str, Tensor]:
        labels = [label for window in windows for label in window.target]
        return {"labels": torch.tensor(labels, dtype=torch.int64, device=device)}

    def by_window(self, output: Any, windows: Sequence[Window]) -> list[np.ndarray]:
        ends = np.cumsum([len(w.input_ids) for w in windows])[:-1]
        by_token = np.split(output.logits.float().cpu().numpy(), ends)
        return [logits[[place for _, place in w.words]] for w, logits in zip(windows, by_token, strict=True)]

    def predictions(
        self, examples: Sequence[Sentence], windows: Sequence[Window], found: Sequence[np.ndarray]
    ) -> list[list[tuple[str, float]]]:
        """(tag, its probability) of each word of each example."""
        predictions = [[("O", 0.0)] * len(e.words) for e in examples]
        for window, logits in zip(windows, found, strict=True):
            for (word, _), row in zip(window.words, logits, strict=True):
                p = probabilities(row)
                best = int(np.argmax(p))
                predictions[window.example][word] = self.labels[best], float(p[best])
        return predictions

    def scores(self, examples: Sequence[Sentence], predictions: Sequence[list[tuple[str, float]]]) -> Scores:
        names = {label.casefold(): label for label in self.labels}
        gold = [[names[tag.casefold()] for tag in e.tags] for e in examples]
        return token_scores([e.words for e in examples], gold, [[tag for tag, _ in p] for p in predictions])

    def record(self, example: Sentence, prediction: list[tuple[str, float]], all_scores: bool) -> dict[str, Any]:
        """The entities of a sentence, with start and end in characters of the text, and with the mean probability of
        their words' tags as score."""
        text, starts = example.text, example.starts
        if text is None:
            text = " ".join(example.words)
            starts = np.cumsum([0, *(len(word) + 1 for word in example.words)]).tolist()
        entities = []
        for kind, first, end in lenient([tag for tag, _ in prediction]):
            start, stop = starts[first], starts[end - 1] + len(example.words[end - 1])
            mean = math.fsum(p for _, p in prediction[first:end]) / (end - first)
            entities.append({"type": kind, "text": text[start:stop], "start": start, "end": stop, "score": mean})
        record: dict[str, Any] = {"text": text, "entities": entities}
        if all_scores:
            record["tags"] = [
                {"word": w, "tag": t, "score": p} for w, (t, p) in zip(example.words, prediction, strict=True)
            ]
        return record


class QuestionTask(Task):
    """qa: a part of a context that answers a question."""

    head = "BertForQuestionAnswering"
    metrics = tuple(ANSWER_METRICS)

    @property
    def changes(self) -> dict[str, Any]:
        return {"num_labels": 2}

    @property
    def allows_no_answer(self) -> bool:
        """Whether a question may have no answer."""
        return self.spec.metric == "squad_v2"

    def read(self, path: str | Path, gold: bool = True) -> list[Question]:
        questions, repaired, lost = read_questions(path)
        self.notes[f"{path}: gold answers not at their offset, found nearby"] = repaired
        self.notes[f"{path}: gold answers not in their context"] = lost
        if gold and not self.allows_no_answer:
            silent = [q.id for q in questions if not q.answers]
            if silent:
                raise DataError(f"{path}: question {silent[0]!r} has no answer; --metric squad_v2 is for such")
        return questions

    def settle(
        self, examples: Sequence[Question], given: Sequence[str] | None, model_labels: Sequence[str] | None
    ) -> None:
        if given:
            raise DataError("--labels is not for --task qa")

    def check(self, examples: Sequence[Question]) -> None:
        """Any question can be scored."""

    def features(self, examples: Sequence[Question], training: bool) -> Features:
        spec = self.spec
        return question_features(self.tokenizer, examples, spec.max_length, spec.stride, training, spec.longest)

    def arguments(self, windows: Sequence[Window], device: torch.device) -> dict[str, Tensor]:
        names = ("start_positions", "end_positions")
        return {
            name: torch.tensor([w.target[side] for w in windows], dtype=torch.int64, device=device)
            for side, name in enumerate(names)
        }

    def by_window(self, output: Any, windows: Sequence[Window]) -> list[np.ndarray]:
        logits = torch.stack((output.start_logits, output.end_logits), 1).float().cpu().numpy()
        return np.split(logits, np.cumsum([len(w.input_ids) for w in windows])[:-1])

    def predictions(
        self, examples: Sequence[Question], windows: Sequence[Window], found: Sequence[np.ndarray]
    ) -> list[dict[str, Any]]:
        """answer, score, start, end; if questions may have no answer also null_difference, the score of no answer less
        that of the best one."""
        predictions: list[dict[str, Any]] = [{"answer": "", "score": 1.0, "start": None, "end": None}] * len(examples)
        together = groupby(zip(windows, found, strict=True), key=lambda pair: pair[0].example)
        for example, pairs in together:
            of_example, logits = zip(*pairs, strict=True)
            spans, null = best_spans(of_example, logits, self.spec.longest)
            if spans:
                every = probabilities([span.score for span in spans] + ([null] if self.allows_no_answer else []))
                best = spans[0]
                text = examples[example].context[best.start : best.end]
                predictions[example] = {"answer": text, "score": float(every[0]), "start": best.start, "end": best.end}
                if self.allows_no_answer:
                    predictions[example] |= {"null_score": float(every[-1]), "null_difference": null - best.score}
        return predictions

    def scores(self, examples: Sequence[Question], predictions: Sequence[dict[str, Any]]) -> Scores:
        """The scores; for squad_v2 with the threshold of `tuned`."""
        gold = {e.id: [a.text for a in e.answers] for e in examples}
        threshold = self.tuned(examples, predictions)
        answers = {e.id: self.answer(p, threshold)["answer"] for e, p in zip(examples, predictions, strict=True)}
        scores = answer_scores(self.spec.metric, gold, answers)
        if self.allows_no_answer:
            scores.values["threshold"] = threshold
            scores.definitions["threshold"] = "no answer where its score is more than this above the best answer's"
            scores.definitions["f1"] += ", with the threshold that is best on these questions"
        return scores

    def tuned(self, examples: Sequence[Question], predictions: Sequence[dict[str, Any]]) -> float:
        """The threshold with the best mean F1 over these questions."""
        pairs = [(e, p) for e, p in zip(examples, predictions, strict=True) if "null_difference" in p]
        if not pairs:
            return self.spec.threshold
        gold = {e.id: [a.text for a in e.answers] for e, _ in pairs}
        return best_threshold(
            {e.id: p["null_difference"] for e, p in pairs},
            {e.id: score(self.spec.metric, gold[e.id], p["answer"])[1] for e, p in pairs},
            {key: score(self.spec.metric, texts, "")[1] for key, texts in gold.items()},
        )[0]

    def answer(self, prediction: dict[str, Any], threshold: float) -> dict[str, Any]:
        """A prediction after the threshold, which may turn it into no answer."""
        if prediction.get("null_difference", -math.inf) <= threshold:
            return {name: prediction[name] for name in ("answer", "score", "start", "end")}
        return {"answer": "", "score": prediction["null_score"], "start": None, "end": None}

    def record(self, example: Question, prediction: dict[str, Any], all_scores: bool) -> dict[str, Any]:
        record = {"id": example.id, **self.answer(prediction, self.spec.threshold)}
        if all_scores and "null_difference" in prediction:
            record["null_difference"] = prediction["null_difference"]
        return record


TASKS: dict[str, type[Task]] = {
    "sentence": TextTask, "pair": TextTask, "token": TokenTask, "qa": QuestionTask, "next-sentence": NextSentenceTask,
}  # fmt: skip
# The default metric. For numbers it is pearson, for several labels per text f1_micro.
DEFAULT_METRICS = {"sentence": "accuracy", "pair": "accuracy", "token": "entity_f1", "qa": "squad"}
DEFAULT_STRIDES = {"token": 32, "qa": 128}


def make_task(spec: Spec, tokenizer: Tokenizer, labels: Sequence[str] = ()) -> Any:
    """The task of a spec. Raises: DataError if the task does not have the spec's metric."""
    kind = MultiLabelTask if spec.multi_label else TASKS[spec.task]
    task = kind(spec, tokenizer, list(labels))
    if spec.metric not in task.metrics:
        raise DataError(f"--metric of --task {spec.task} is one of {', '.join(task.metrics)}, got {spec.metric!r}")
    return task

"""The four tasks: how each reads its files, what its head learns from and answers, and how the answers are scored.

A task is used in this order: `read` examples, `settle` the labels (in training) or take them from the model, make
`features`, hand `arguments` of windows to the head, take what it returns apart with `by_window`, and turn that into
`predictions` and `scores`. `record` is what `fastbert predict` writes for a prediction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..text.tokenizer import Tokenizer
from .answers import ANSWER_METRICS, answer_scores, best_threshold, score
from .entities import TOKEN_METRICS, lenient, token_scores
from .features import IGNORED, Features, Window, question_features, text_features, word_features
from .files import DataError, Question, Sentence, columns_of, expect_text, read_conll, read_questions, read_table
from .labels import Text, class_name, classes_of, expect_known, number, numbers_of, tags_of
from .metrics import CLASS_METRICS, NUMBER_METRICS, Scores, class_scores, number_scores
from .spans import best_spans, probabilities

NUMBERS = ("number",)  # what --labels says where labels are numbers
# names of columns that are looked for where none are given
TEXT_COLUMNS = (("text",), ("sentence",))
PAIR_COLUMNS = (("sentence1", "sentence2"), ("text1", "text2"), ("premise", "hypothesis"), ("question", "sentence"))


@dataclass(frozen=True)
class Spec:
    """What a model was fine-tuned for; it lies beside the model as fastbert_task.json.

    Attributes:
        task: sentence, pair, token or qa.
        metric: which of the task's scores decides.
        columns: of tables, the text or the two texts, then the label.
        max_length, stride: tokens of a window, and what neighbouring windows share.
        longest: tokens of an answer at most.
        threshold: of questions that may have no answer: there is none where its score is more than this above the best
            answer's.
    """

    task: str
    metric: str
    columns: tuple[str, ...] = ()
    max_length: int = 128
    stride: int = 0
    longest: int = 30
    threshold: float = 0.0


@dataclass
class Task:
    """One of the four.

    labels: names in the order of their numbers, or NUMBERS; [] for questions.
    notes: what was noticed in the files that were read.
    """

    spec: Spec
    tokenizer: Tokenizer
    labels: list[str] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)

    head: ClassVar[str]  # the class in fastbert.models.heads
    metrics: ClassVar[tuple[str, ...]]

    @property
    def changes(self) -> dict[str, Any]:
        """Fields of the model's config."""
        return {
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: i for i, label in enumerate(self.labels)},
        }

    def weight(self, window: Window) -> int:
        """How many items of the loss a window has."""
        return 1


class TextTask(Task):
    """sentence and pair: a class or a number for a text or for two."""

    head = "BertForSequenceClassification"
    metrics = (*CLASS_METRICS, "f1_macro", *NUMBER_METRICS)

    @property
    def regresses(self) -> bool:
        return tuple(self.labels) == NUMBERS

    @property
    def changes(self) -> dict[str, Any]:
        kind = "regression" if self.regresses else "single_label_classification"
        return {**super().changes, "problem_type": kind}

    def columns(self, path: str | Path, gold: bool) -> list[str]:
        """The columns to read: those named, else of the known ones those that the table has."""
        n_texts = 2 if self.spec.task == "pair" else 1
        if self.spec.columns:
            if len(self.spec.columns) != n_texts + 1:
                raise DataError(f"--columns must name {n_texts + 1} columns for --task {self.spec.task}")
            return list(self.spec.columns[: n_texts + gold])
        has, known = columns_of(path), PAIR_COLUMNS if n_texts == 2 else TEXT_COLUMNS
        found = next((names for names in known if set(names) <= set(has)), None)
        if found is None or (gold and "label" not in has):
            expected = " or ".join(", ".join((*names, "label")) for names in known)
            raise DataError(f"{path} has the columns {', '.join(has)}; expected {expected}, or --columns")
        return [*found, "label"][: n_texts + gold]

    def read(self, path: str | Path, gold: bool = True) -> list[Text]:
        columns = self.columns(path, gold)
        texts = columns[:-1] if gold else columns
        examples = []
        for row in read_table(path, columns):
            label = None
            if gold:
                make = number if self.regresses else class_name
                label = make(row.cells[columns[-1]], row.place)
            values = [expect_text(row, name) for name in texts]
            examples.append(Text(row.place, values[0], values[1] if len(values) == 2 else None, label))
        return examples

    def settle(self, examples: Sequence[Text], given: Sequence[str] | None, model_labels: Sequence[str] | None) -> None:
        self.labels = list(NUMBERS) if self.regresses else classes_of(examples, given, model_labels)
        if (self.spec.metric in NUMBER_METRICS) != self.regresses:
            kind = "numbers" if self.regresses else "classes; --labels number is for numbers"
            raise DataError(f"--metric {self.spec.metric} does not fit labels that are {kind}")
        if self.spec.metric == "f1" and len(self.labels) != 2:
            raise DataError(f"--metric f1 is of one of two labels, and there are {len(self.labels)}: see f1_macro")

    def check(self, examples: Sequence[Text]) -> None:
        """Raises DataError where an example to be scored has a label that was never seen in training."""
        if not self.regresses:
            expect_known(((example.label, example.place) for example in examples), self.labels)

    def features(self, examples: Sequence[Text], training: bool) -> Features:
        targets = None
        if training:
            numbers = None if self.regresses else numbers_of(self.labels)
            targets = [e.label if numbers is None else numbers[e.label.casefold()] for e in examples]
        pairs = [e.pair for e in examples] if self.spec.task == "pair" else None
        return text_features(self.tokenizer, [e.text for e in examples], pairs, targets, self.spec.max_length)

    def arguments(self, windows: Sequence[Window], device: torch.device) -> dict[str, Tensor]:
        dtype = torch.float32 if self.regresses else torch.int64
        return {"labels": torch.tensor([w.target for w in windows], dtype=dtype, device=device)}

    def by_window(self, output: Any, windows: Sequence[Window]) -> list[np.ndarray]:
        return list(output.logits.float().cpu().numpy())

    def predictions(
        self, examples: Sequence[Text], windows: Sequence[Window], found: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """A number for each example, or the probabilities of the classes."""
        return [of_example[0] if self.regresses else probabilities(of_example) for of_example in found]

    def scores(self, examples: Sequence[Text], predictions: Sequence[Any]) -> Scores:
        if self.regresses:
            return number_scores([e.label for e in examples], predictions)
        numbers = numbers_of(self.labels)
        gold = [numbers[e.label.casefold()] for e in examples]
        return class_scores(gold, [int(np.argmax(p)) for p in predictions], self.labels)

    def record(self, example: Text, prediction: Any, all_scores: bool) -> dict[str, Any]:
        if self.regresses:
            return {"score": float(prediction)}
        best = int(np.argmax(prediction))
        record = {"label": self.labels[best], "score": float(prediction[best])}
        if all_scores:
            record["scores"] = {label: float(p) for label, p in zip(self.labels, prediction, strict=True)}
        return record


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

    def weight(self, window: Window) -> int:
        return sum(label != IGNORED for label in window.target)

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
        """start and end are characters of the text; a score is the mean probability of the words' tags."""
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
    def may_be_silent(self) -> bool:
        """Whether a question may have no answer."""
        return self.spec.metric == "squad_v2"

    def read(self, path: str | Path, gold: bool = True) -> list[Question]:
        questions, repaired, lost = read_questions(path)
        self.notes[f"{path}: gold answers not at their offset, found nearby"] = repaired
        self.notes[f"{path}: gold answers not in their context"] = lost
        if gold and not self.may_be_silent:
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
        return question_features(self.tokenizer, examples, self.spec.max_length, self.spec.stride, training)

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
        """answer, score, start, end, and where silence is allowed null_difference, its score less the best answer's."""
        predictions: list[dict[str, Any]] = [{"answer": "", "score": 1.0, "start": None, "end": None}] * len(examples)
        together = groupby(zip(windows, found, strict=True), key=lambda pair: pair[0].example)
        for example, pairs in together:
            of_example, logits = zip(*pairs, strict=True)
            spans, null = best_spans(of_example, logits, self.spec.longest)
            if spans:
                every = probabilities([span.score for span in spans] + ([null] if self.may_be_silent else []))
                best = spans[0]
                text = examples[example].context[best.start : best.end]
                predictions[example] = {"answer": text, "score": float(every[0]), "start": best.start, "end": best.end}
                if self.may_be_silent:
                    predictions[example] |= {"null_score": float(every[-1]), "null_difference": null - best.score}
        return predictions

    def scores(self, examples: Sequence[Question], predictions: Sequence[dict[str, Any]]) -> Scores:
        """Of squad_v2 with the threshold that is best on these questions; `tuned` gives it."""
        gold = {e.id: [a.text for a in e.answers] for e in examples}
        threshold = self.tuned(examples, predictions)
        answers = {e.id: self.answer(p, threshold)["answer"] for e, p in zip(examples, predictions, strict=True)}
        scores = answer_scores(self.spec.metric, gold, answers)
        if self.may_be_silent:
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
        """A prediction as it is shown: with no answer where that scores enough."""
        if prediction.get("null_difference", -math.inf) <= threshold:
            return {name: prediction[name] for name in ("answer", "score", "start", "end")}
        return {"answer": "", "score": prediction["null_score"], "start": None, "end": None}

    def record(self, example: Question, prediction: dict[str, Any], all_scores: bool) -> dict[str, Any]:
        record = {"id": example.id, **self.answer(prediction, self.spec.threshold)}
        if all_scores and "null_difference" in prediction:
            record["null_difference"] = prediction["null_difference"]
        return record


TASKS: dict[str, type[Task]] = {"sentence": TextTask, "pair": TextTask, "token": TokenTask, "qa": QuestionTask}
# the metric that decides where none is given; of numbers it is pearson
DEFAULT_METRICS = {"sentence": "accuracy", "pair": "accuracy", "token": "entity_f1", "qa": "squad"}


def make_task(spec: Spec, tokenizer: Tokenizer, labels: Sequence[str] = ()) -> Any:
    """The task of a spec. Raises DataError where its metric is none of the task's."""
    task = TASKS[spec.task](spec, tokenizer, list(labels))
    if spec.metric not in task.metrics:
        raise DataError(f"--metric of --task {spec.task} is one of {', '.join(task.metrics)}, got {spec.metric!r}")
    return task

"""The tasks sentence and pair, with a class, several classes or a number for one or two texts; and next sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .features import Features, Window, text_features
from .files import DataError, columns_of, expect_text, read_table
from .labels import Text, class_name, class_names, classes_of, expect_known, number, numbers_of, one_label_each
from .metrics import (
    CLASS_METRICS,
    MULTI_LABEL_METRICS,
    NUMBER_METRICS,
    Scores,
    class_scores,
    multi_label_scores,
    number_scores,
)
from .spans import probabilities
from .task import Task

NUMBERS = ("number",)  # `--labels number`: labels are numbers
# the names of columns that are tried if none are given
TEXT_COLUMNS = (("text",), ("sentence",))
PAIR_COLUMNS = (("sentence1", "sentence2"), ("text1", "text2"), ("premise", "hypothesis"), ("question", "sentence"))


class TextTask(Task):
    """sentence and pair with a class or a number for one or two texts."""

    head = "BertForSequenceClassification"
    metrics = (*CLASS_METRICS, "f1_macro", *NUMBER_METRICS)

    @property
    def regresses(self) -> bool:
        return tuple(self.labels) == NUMBERS

    @property
    def problem_type(self) -> str:
        return "regression" if self.regresses else "single_label_classification"

    @property
    def changes(self) -> dict[str, Any]:
        return {**super().changes, "problem_type": self.problem_type}

    @property
    def n_texts(self) -> int:
        """The number of texts of an example."""
        return 1 if self.spec.task == "sentence" else 2

    def columns(self, path: str | Path, gold: bool) -> list[str]:
        """The columns to read: those that the spec names, else the known ones that the table has."""
        n_texts = self.n_texts
        if self.spec.columns:
            if len(self.spec.columns) != n_texts + 1:
                raise DataError(f"--columns must name {n_texts + 1} columns for --task {self.spec.task}")
            if twice := [name for name in self.spec.columns if self.spec.columns.count(name) > 1]:
                raise DataError(f"--columns names {twice[0]!r} twice")
            return list(self.spec.columns[: n_texts + gold])
        has, known = columns_of(path), PAIR_COLUMNS if n_texts == 2 else TEXT_COLUMNS
        found = next((names for names in known if set(names) <= set(has)), None)
        if found is None or (gold and "label" not in has):
            expected = [", ".join((*names, "label")[: n_texts + gold]) for names in known]
            if gold:  # `fastbert predict`, which reads no labels, has no such option
                expected.append("others by --columns")
            raise DataError(f"{path} has the columns {', '.join(has)}; expected {' or '.join(expected)}")
        return [*found, "label"][: n_texts + gold]

    def read(self, path: str | Path, gold: bool = True) -> list[Text]:
        columns = self.columns(path, gold)
        texts = columns[:-1] if gold else columns
        examples = []
        for row in read_table(path, columns):
            label = self.label(row.cells[columns[-1]], row.place) if gold else None
            values = [expect_text(row, name) for name in texts]
            examples.append(Text(row.place, values[0], values[1] if len(values) == 2 else None, label))
        return examples

    def label(self, value: Any, place: str) -> Any:
        """An example's label from its cell."""
        return number(value, place) if self.regresses else class_name(value, place)

    def settle(self, examples: Sequence[Text], given: Sequence[str] | None, model_labels: Sequence[str] | None) -> None:
        self.labels = list(NUMBERS) if self.regresses else classes_of(examples, given, model_labels)
        self.expect_metric()

    def expect_metric(self) -> None:
        """Raises DataError if the metric does not fit the labels."""
        if (self.spec.metric in NUMBER_METRICS) != self.regresses:
            kind = "numbers" if self.regresses else "classes; --labels number is for numbers"
            raise DataError(f"--metric {self.spec.metric} does not fit labels that are {kind}")
        if self.spec.metric == "f1" and len(self.labels) != 2:
            raise DataError(f"--metric f1 is of one of two labels, and there are {len(self.labels)}: see f1_macro")

    def check(self, examples: Sequence[Text]) -> None:
        """Raises DataError if an example to be scored has a label that was never seen in training."""
        if not self.regresses:
            expect_known(((example.label, example.place) for example in examples), self.labels)

    def classes(self, window: Window) -> list[int]:
        if self.regresses:
            raise DataError("--class-weights is for classes, and the labels are numbers")
        return [window.target]

    def features(self, examples: Sequence[Text], training: bool) -> Features:
        targets = self.targets(examples) if training else None
        pairs = [e.pair for e in examples] if self.n_texts == 2 else None
        return text_features(self.tokenizer, [e.text for e in examples], pairs, targets, self.spec.max_length)

    def targets(self, examples: Sequence[Text]) -> list[Any]:
        """The target of each example."""
        if self.regresses:
            return [example.label for example in examples]
        numbers = numbers_of(self.labels)
        return [numbers[example.label.casefold()] for example in examples]

    def begin(self, model: nn.Module, windows: Sequence[Window]) -> None:
        """For numbers the bias begins at their mean, which would otherwise take many steps to learn."""
        if self.regresses:
            with torch.no_grad():
                model.classifier.bias.fill_(math.fsum(window.target for window in windows) / len(windows))

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


class MultiLabelTask(TextTask):
    """sentence and pair with any number of labels for each text. Labels with a probability above 0.5 are predicted."""

    metrics = MULTI_LABEL_METRICS
    problem_type = "multi_label_classification"
    regresses = False

    def label(self, value: Any, place: str) -> tuple[str, ...]:
        return class_names(value, place)

    def settle(self, examples: Sequence[Text], given: Sequence[str] | None, model_labels: Sequence[str] | None) -> None:
        if tuple(given or ()) == NUMBERS:
            raise DataError("--labels number is for one number a text, and --multi-label for names")
        labelled = one_label_each(examples)
        if not labelled:
            raise DataError("no example has a label")
        self.labels = classes_of(labelled, given, model_labels)

    def check(self, examples: Sequence[Text]) -> None:
        expect_known(((e.label, e.place) for e in one_label_each(examples)), self.labels)

    def classes(self, window: Window) -> list[int]:
        raise DataError("--class-weights is for one label a text, and --multi-label allows several")

    def items(self, window: Window) -> int:
        return len(self.labels)

    def targets(self, examples: Sequence[Text]) -> list[list[float]]:
        """1 and 0 for each label."""
        numbers = numbers_of(self.labels)
        targets = [[0.0] * len(self.labels) for _ in examples]
        for target, example in zip(targets, examples, strict=True):
            for name in example.label:
                target[numbers[name.casefold()]] = 1.0
        return targets

    def arguments(self, windows: Sequence[Window], device: torch.device) -> dict[str, Tensor]:
        return {"labels": torch.tensor([w.target for w in windows], dtype=torch.float32, device=device)}

    def predictions(
        self, examples: Sequence[Text], windows: Sequence[Window], found: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """The probability of each label, for each example."""
        return [0.5 * (1.0 + np.tanh(0.5 * logits.astype(np.float64))) for logits in found]

    def scores(self, examples: Sequence[Text], predictions: Sequence[np.ndarray]) -> Scores:
        gold = np.array(self.targets(examples)) > 0.5
        return multi_label_scores(gold, np.array(predictions) > 0.5, self.labels)

    def record(self, example: Text, prediction: np.ndarray, all_scores: bool) -> dict[str, Any]:
        """Labels with their probabilities, the likeliest first."""
        by_score = sorted(zip(self.labels, prediction.tolist(), strict=True), key=lambda pair: -pair[1])
        record: dict[str, Any] = {"labels": [{"label": name, "score": p} for name, p in by_score if p > 0.5]}
        if all_scores:
            record["scores"] = dict(zip(self.labels, prediction.tolist(), strict=True))
        return record


class NextSentenceTask(TextTask):
    """Whether the second text follows the first, as BERT's pre-training learns it. For predictions only."""

    head = "BertForNextSentencePrediction"
    LABELS = ("is_next", "not_next")

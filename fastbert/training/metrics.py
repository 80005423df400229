"""Metrics of classes and of numbers as functions of gold and predicted values, and their definitions in words.

Metrics of entities are in `entities`, those of answers in `answers`. Every value is a fraction: 0.5, not 50.0.

Values of undefined metrics:
    F1, precision, recall   0.0 if there is nothing to find or nothing was found, as in conlleval
    Matthews                0.0 if gold or predictions have one class only, as in scikit-learn
    Pearson, Spearman       nan if gold or predictions are constant or contain nan, as in scipy; see `is_better`
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Scores(NamedTuple):
    """The values of an evaluation by name, and their definitions in words."""

    values: dict[str, float]
    definitions: dict[str, str]


class Counts(NamedTuple):
    """The numbers of correct predictions, of predictions, and of gold items."""

    correct: int
    predicted: int
    gold: int

    @property
    def precision(self) -> float:
        return self.correct / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        return self.correct / self.gold if self.gold else 0.0

    @property
    def f1(self) -> float:
        found = self.predicted + self.gold
        return 2.0 * self.correct / found if found else 0.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


def is_better(value: float, best: float | None) -> bool:
    """Whether a later value is better than the best one so far. nan is never better; any number is better than nan and
    None."""
    if math.isnan(value):
        return False
    return best is None or math.isnan(best) or value > best


# ---- classes -------------------------------------------------------------------------------------------------


def accuracy(gold: Sequence[int], predicted: Sequence[int]) -> float:
    """The share of right predictions."""
    gold, predicted = _pair(gold, predicted)
    return float((gold == predicted).mean())


def class_counts(gold: Sequence[int], predicted: Sequence[int], label: int) -> Counts:
    """The counts of one label."""
    gold, predicted = _pair(gold, predicted)
    found, wanted = predicted == label, gold == label
    return Counts(int((found & wanted).sum()), int(found.sum()), int(wanted.sum()))


def f1_binary(gold: Sequence[int], predicted: Sequence[int], positive: int = 1) -> float:
    """F1 of one class."""
    return class_counts(gold, predicted, positive).f1


def f1_macro(gold: Sequence[int], predicted: Sequence[int]) -> float:
    """The mean F1 of the classes that occur in gold or in the predictions."""
    gold, predicted = _pair(gold, predicted)
    labels = np.union1d(gold, predicted)
    return float(np.mean([class_counts(gold, predicted, label).f1 for label in labels]))


def matthews(gold: Sequence[int], predicted: Sequence[int]) -> float:
    """Matthews' correlation of two or more classes (Gorodkin, Comput. Biol. Chem. 28, 2004, for more than two)."""
    gold, predicted = _pair(gold, predicted)
    n = len(gold)
    labels = np.union1d(gold, predicted)
    g = np.array([(gold == label).sum() for label in labels], dtype=np.float64)
    p = np.array([(predicted == label).sum() for label in labels], dtype=np.float64)
    spread_g, spread_p = n * n - g @ g, n * n - p @ p
    if spread_g == 0 or spread_p == 0:
        return 0.0
    return float((n * (gold == predicted).sum() - g @ p) / math.sqrt(spread_g * spread_p))


# ---- numbers -------------------------------------------------------------------------------------------------


def pearson(gold: Sequence[float], predicted: Sequence[float]) -> float:
    """Pearson's correlation."""
    x, y = _pair(gold, predicted, np.float64)
    if np.isnan(x).any() or np.isnan(y).any() or (x == x[0]).all() or (y == y[0]).all():
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    x, y = x / np.abs(x).max(), y / np.abs(y).max()  # so that squares neither underflow nor overflow
    return float(np.clip((x @ y) / math.sqrt((x @ x) * (y @ y)), -1.0, 1.0))


def spearman(gold: Sequence[float], predicted: Sequence[float]) -> float:
    """Pearson's correlation of the ranks; equal values share the mean of their ranks."""
    x, y = _pair(gold, predicted, np.float64)
    if np.isnan(x).any() or np.isnan(y).any():
        return math.nan
    return pearson(_ranks(x), _ranks(y))


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1."""
    _, place, count = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return ((last - count + 1 + last) / 2.0)[place]


def _pair(gold: Sequence, predicted: Sequence, dtype: type | None = None) -> tuple[np.ndarray, np.ndarray]:
    gold, predicted = np.asarray(gold, dtype), np.asarray(predicted, dtype)
    if gold.shape != predicted.shape or gold.ndim != 1 or not gold.size:
        raise ValueError(f"expected as many gold values as predictions, one at least, got {gold.shape} "
                         f"and {predicted.shape}")  # fmt: skip
    return gold, predicted


# ---- scores of tasks -----------------------------------------------------------------------------------------

CLASS_METRICS = ("accuracy", "f1", "matthews")
MULTI_LABEL_METRICS = ("f1_micro", "f1_macro", "subset_accuracy")
NUMBER_METRICS = ("pearson", "spearman")


def class_scores(gold: Sequence[int], predicted: Sequence[int], labels: Sequence[str]) -> Scores:
    """All metrics of classes; gold and predicted are numbers of `labels`."""
    shown = ", ".join(f"{i} = {label}" for i, label in enumerate(labels))
    definitions = {
        "accuracy": f"share of examples whose label is right; labels: {shown}",
        "matthews": "Matthews' correlation over all labels; 0 where gold or predictions are of one label",
        "f1_macro": "mean of the F1 of each label that occurs in gold or in predictions",
    }
    values = {
        "accuracy": accuracy(gold, predicted),
        "matthews": matthews(gold, predicted),
        "f1_macro": f1_macro(gold, predicted),
    }
    if len(labels) == 2:
        values["f1"] = f1_binary(gold, predicted, positive=1)
        definitions["f1"] = f"F1 of the label {labels[1]}"
    return Scores(values, definitions)


def multi_label_scores(gold: np.ndarray, predicted: np.ndarray, labels: Sequence[str]) -> Scores:
    """All metrics of texts with any number of labels; gold and predicted are [texts, labels] bool."""
    if gold.shape != predicted.shape or gold.ndim != 2 or not gold.size:
        raise ValueError(f"expected as many gold values as predictions, [texts, labels], got {gold.shape} "
                         f"and {predicted.shape}")  # fmt: skip
    right, found, wanted = ((a & b).sum(0) for a, b in ((gold, predicted), (predicted, predicted), (gold, gold)))
    counts = [Counts(int(a), int(b), int(c)) for a, b, c in zip(right, found, wanted, strict=True)]
    occurring = [c.f1 for c in counts if c.predicted or c.gold]
    above = "a label is predicted where its probability is above 0.5"
    return Scores(
        {
            "f1_micro": sum(counts, Counts(0, 0, 0)).f1,
            "f1_macro": sum(occurring) / len(occurring) if occurring else 0.0,
            "subset_accuracy": float((gold == predicted).all(1).mean()),
        },
        {
            "f1_micro": f"F1 over all pairs of a text and a label; {above}; labels: {', '.join(labels)}",
            "f1_macro": f"mean of the F1 of each label that occurs in gold or in predictions; {above}",
            "subset_accuracy": f"share of texts of which every label is right; {above}",
        },
    )


def number_scores(gold: Sequence[float], predicted: Sequence[float]) -> Scores:
    """All metrics of numbers."""
    undefined = "; undefined (null) where gold or predictions are constant"
    x, y = _pair(gold, predicted, np.float64)
    return Scores(
        {"pearson": pearson(x, y), "spearman": spearman(x, y), "mean_squared_error": float(((x - y) ** 2).mean())},
        {
            "pearson": f"Pearson's correlation{undefined}",
            "spearman": f"Pearson's correlation of ranks, ties sharing their mean rank{undefined}",
            "mean_squared_error": "mean of the squared differences, in the unit of the gold values",
        },
    )

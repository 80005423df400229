"""The base class of the tasks, and the description of what a model was fine-tuned for.

A task is used in this order: `read` the examples; in training, `settle` the labels; make `features`; pass `arguments`
of windows to the head; split its output with `by_window`; make `predictions` and `scores` from that. `record` is what
`fastbert predict` writes for a prediction.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from ..text.tokenizer import Tokenizer
from .features import Window
from .files import DataError
from .labels import class_weights


@dataclass(frozen=True)
class Spec:
    """What a model was fine-tuned for, stored beside the model as fastbert_task.json.

    Attributes:
        task: sentence, pair, token or qa; or next-sentence for a model that was only pre-trained.
        metric: the score that models are compared by.
        columns: names of the columns of a table: the text or the two texts, then the label.
        max_length: tokens of a window. stride: tokens that neighbouring windows share.
        longest: most tokens of an answer.
        threshold: if questions may have no answer: there is none if the score of no answer is more than this above that
            of the best answer.
        multi_label: for sentence and pair, whether a text has any number of labels.
    """

    task: str
    metric: str
    columns: tuple[str, ...] = ()
    max_length: int = 128
    stride: int = 0
    longest: int = 30
    threshold: float = 0.0
    multi_label: bool = False

    @property
    def score(self) -> str:
        """The name of the score that the metric compares models by; for questions this is F1."""
        return "f1" if self.task == "qa" else self.metric


@dataclass
class Task:
    """A task.

    labels: names in the order of their numbers, or NUMBERS; [] for questions.
    notes: counts of what was repaired or lost in the files that were read.
    class_weights: the weight of each class in the loss; None if all are equal.
    """

    spec: Spec
    tokenizer: Tokenizer
    labels: list[str] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)
    class_weights: list[float] | None = None

    head: ClassVar[str]  # name of the class in fastbert.models.heads
    metrics: ClassVar[tuple[str, ...]]
    problem_type: ClassVar[str | None] = None  # in the model's config

    @property
    def changes(self) -> dict[str, Any]:
        """The fields of the model's config that the task sets."""
        return {"id2label": dict(enumerate(self.labels)), "label2id": {label: i for i, label in enumerate(self.labels)}}

    def expect_metric(self) -> None:
        """Raises DataError if the metric does not fit the labels. In this class every metric does."""

    def classes(self, window: Window) -> list[int]:
        """The classes of a window's items. Raises: DataError if the task has no classes."""
        raise DataError(f"--class-weights is for classes, and --task {self.spec.task} has none")

    def weigh(self, given: str, windows: Sequence[Window]) -> None:
        """Sets `class_weights`. given: "none", or as in `labels.class_weights`; windows: the training data."""
        if given == "none":
            self.class_weights = None
            return
        counts = Counter(number for window in windows for number in self.classes(window))
        self.class_weights = class_weights(given, self.labels, counts)

    def weight(self, window: Window) -> float:
        """The part of a window in the loss's divisor: its number of items, or the sum of their classes' weights."""
        if self.class_weights is None:
            return self.items(window)
        return math.fsum(self.class_weights[number] for number in self.classes(window))

    def items(self, window: Window) -> int:
        """The number of items of the loss in a window."""
        return 1

    def begin(self, model: nn.Module, windows: Sequence[Window]) -> None:
        """Initialises a new head beyond its random weights, here not at all. windows: the training data."""

"""What the tasks have in common, and what a model was fine-tuned for.

A task is used in this order: `read` examples, `settle` the labels (in training) or take them from the model, make
`features`, hand `arguments` of windows to the head, take what it returns apart with `by_window`, and turn that into
`predictions` and `scores`. `record` is what `fastbert predict` writes for a prediction.
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
    """What a model was fine-tuned for; it lies beside the model as fastbert_task.json.

    Attributes:
        task: sentence, pair, token or qa; or next-sentence, of a model that was pre-trained only.
        metric: which of the task's scores decides.
        columns: of tables, the text or the two texts, then the label.
        max_length, stride: tokens of a window, and what neighbouring windows share.
        longest: tokens of an answer at most.
        threshold: of questions that may have no answer: there is none where its score is more than this above the best
            answer's.
        multi_label: of sentence and pair, whether a text has any number of labels.
    """

    task: str
    metric: str
    columns: tuple[str, ...] = ()
    max_length: int = 128
    stride: int = 0
    longest: int = 30
    threshold: float = 0.0
    multi_label: bool = False


@dataclass
class Task:
    """One of them.

    labels: names in the order of their numbers, or NUMBERS; [] for questions.
    notes: what was noticed in the files that were read.
    class_weights: how much an item of each class counts in the loss; None where all count the same.
    """

    spec: Spec
    tokenizer: Tokenizer
    labels: list[str] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)
    class_weights: list[float] | None = None

    head: ClassVar[str]  # the class in fastbert.models.heads
    metrics: ClassVar[tuple[str, ...]]
    problem_type: ClassVar[str | None] = None  # of the model's config

    @property
    def changes(self) -> dict[str, Any]:
        """Fields of the model's config."""
        return {
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: i for i, label in enumerate(self.labels)},
        }

    def expect_metric(self) -> None:
        """Raises DataError where the metric does not fit the labels: any does."""

    def classes(self, window: Window) -> list[int]:
        """The classes of a window's items. Raises: DataError where the task has no classes."""
        raise DataError(f"--class-weights is for classes, and --task {self.spec.task} has none")

    def weigh(self, given: str, windows: Sequence[Window]) -> None:
        """Sets `class_weights`: None for "none", else as `labels.class_weights` has them, of the windows that are
        trained on."""
        if given == "none":
            self.class_weights = None
            return
        counts = Counter(number for window in windows for number in self.classes(window))
        self.class_weights = class_weights(given, self.labels, counts)

    def weight(self, window: Window) -> float:
        """How much a window counts in the divisor of the loss: its items, or the sum of their classes' weights."""
        if self.class_weights is None:
            return self.items(window)
        return math.fsum(self.class_weights[number] for number in self.classes(window))

    def items(self, window: Window) -> int:
        """How many items of the loss a window has."""
        return 1

    def begin(self, model: nn.Module, windows: Sequence[Window]) -> None:
        """Sets what a new head begins with, beyond random weights, from the windows that are trained on: nothing."""

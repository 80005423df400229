"""The loss between a student's and a teacher's logits for each kind of task, and its number of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..packing import PackedBatch
from ..training.features import Window
from . import losses


class Classes:
    """The logits of classes of one or two texts."""

    def rows(self, window: Window) -> int:
        """The number of rows of the loss in a window."""
        return 1

    def places(self, windows: Sequence[Window], device: torch.device) -> Tensor | None:
        """The tokens [N] int64 in the batch of these windows whose logits are compared; None for all rows."""
        return None

    def loss(
        self, student: Any, teacher: Any, batch: PackedBatch, places: Tensor | None, temperature: float
    ) -> Tensor:  # fmt: skip
        """The sum over the rows. student, teacher: outputs of the heads."""
        return losses.classes(student.logits, teacher.logits, temperature)


class Several(Classes):
    """The logits of any number of labels of one or two texts."""

    def loss(self, student: Any, teacher: Any, batch: PackedBatch, places: Tensor | None, temperature: float) -> Tensor:
        return losses.several(student.logits, teacher.logits, temperature)


class Numbers(Classes):
    """A number for one or two texts."""

    def loss(self, student: Any, teacher: Any, batch: PackedBatch, places: Tensor | None, temperature: float) -> Tensor:
        return losses.numbers(student.logits, teacher.logits)


class Tags(Classes):
    """The logits of tags, at the first piece of each word."""

    def rows(self, window: Window) -> int:
        return len(window.words)

    def places(self, windows: Sequence[Window], device: torch.device) -> Tensor:
        found, start = [], 0
        for window in windows:
            found += [start + place for _, place in window.words]
            start += len(window.input_ids)
        return torch.tensor(found, dtype=torch.int64, device=device)

    def loss(self, student: Any, teacher: Any, batch: PackedBatch, places: Tensor | None, temperature: float) -> Tensor:
        return losses.classes(student.logits[places], teacher.logits[places], temperature)


class Answers(Classes):
    """The logits of an answer's start and end."""

    def loss(self, student: Any, teacher: Any, batch: PackedBatch, places: Tensor | None, temperature: float) -> Tensor:
        sides = [(output.start_logits, output.end_logits) for output in (student, teacher)]
        return losses.spans(*sides, batch.lengths, temperature)


_KINDS = {"sentence": Classes, "pair": Classes, "token": Tags, "qa": Answers}


def logits_of(task: Any) -> Classes:
    """The loss of a task's logits."""
    if task.spec.multi_label:
        return Several()
    return Numbers() if task.problem_type == "regression" else _KINDS[task.spec.task]()

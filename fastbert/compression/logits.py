"""A teacher's answer to what a task asks, beside its student's: which logits are compared, and how many rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..packing import PackedBatch
from ..training.features import Window
from . import losses


class Classes:
    """A class of a text or of two."""

    def rows(self, window: Window) -> int:
        """How many rows of the loss a window has."""
        return 1

    def places(self, windows: Sequence[Window], device: torch.device) -> Tensor | None:
        """Of the batch of these windows, the tokens whose logits are compared, [N] int64; None for all rows."""
        return None

    def loss(
        self, student: Any, teacher: Any, batch: PackedBatch, places: Tensor | None, temperature: float
    ) -> Tensor:  # fmt: skip
        """The sum over the rows; student, teacher: what the heads return."""
        return losses.classes(student.logits, teacher.logits, temperature)


class Several(Classes):
    """Any number of labels of a text or of two."""

    def loss(self, student: Any, teacher: Any, batch: PackedBatch, places: Tensor | None, temperature: float) -> Tensor:
        return losses.several(student.logits, teacher.logits, temperature)


class Numbers(Classes):
    """A number of a text or of two."""

    def loss(self, student: Any, teacher: Any, batch: PackedBatch, places: Tensor | None, temperature: float) -> Tensor:
        return losses.numbers(student.logits, teacher.logits)


class Tags(Classes):
    """A tag of each word, at its first piece."""

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
    """Where an answer begins and ends."""

    def loss(self, student: Any, teacher: Any, batch: PackedBatch, places: Tensor | None, temperature: float) -> Tensor:
        sides = [(output.start_logits, output.end_logits) for output in (student, teacher)]
        return losses.spans(*sides, batch.lengths, temperature)


_KINDS = {"sentence": Classes, "pair": Classes, "token": Tags, "qa": Answers}


def logits_of(task: Any) -> Classes:
    """What is compared of a task's logits."""
    if task.spec.multi_label:
        return Several()
    return Numbers() if task.problem_type == "regression" else _KINDS[task.spec.task]()

"""One fine-tuning: the windows of each step, their loss, and evaluations, of which the best model is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from .features import Window
from .loop import Loop, Settings
from .metrics import Scores, is_better
from .plan import Plan
from .predicting import pack
from .processes import Processes
from .shaping import Shaping


@dataclass
class Run(Loop):
    """One fine-tuning.

    Args:
        windows: the training data.
        metric: the name of the score that models are compared by; more is better.
        evaluate: returns the scores of the model, the same in every process; None without an evaluation.
        keep_best: saves the model. Called in every process after each evaluation with the best metric so far, or while
            no metric has been a number; without evaluations after each epoch.
        report: called in the first process with each record of metrics.jsonl.
        binding: further values that must be the same when the run is resumed, such as its data; JSON values.
    """

    model: nn.Module
    task: Any
    windows: Sequence[Window]
    settings: Settings
    out: Path
    processes: Processes
    metric: str = ""
    evaluate: Callable[[nn.Module], Scores] | None = None
    keep_best: Callable[[nn.Module, Scores | None], None] | None = None
    report: Callable[[dict[str, Any]], None] | None = None
    binding: dict[str, Any] = field(default_factory=dict)
    shaping: Shaping = field(default_factory=Shaping)

    DEFERS: ClassVar[bool] = True  # `losses` settles the rows of the word table that it reads, see `AdamW.defer`

    def __post_init__(self) -> None:
        s = self.settings
        plan = Plan(s.seed, [len(w.input_ids) for w in self.windows], s.step_tokens, s.batch_tokens)
        self.steps_of_epochs = plan.count_steps(s.epochs)
        self.begin(plan, sum(self.steps_of_epochs), {"windows": len(self.windows)} | self.binding)
        is_alone = self.processes.count == 1 and self.processes.device.type == "cpu"
        reads_each_step = self.average is not None or type(self.shaping) is not Shaping
        if self.DEFERS and is_alone and not reads_each_step:
            self.optimizer.defer(self.model.get_input_embeddings().weight)

    def train(self) -> None:
        if self.progress.step == 0 and self.evaluate is not None and self.shaping.keeps_first():
            self.evaluated(0)
        super().train()

    def epochs(self) -> Iterator[tuple[int, int]]:
        yield from enumerate(self.steps_of_epochs)

    def is_due(self, number: int, steps: int) -> bool:
        """Evaluations are spread evenly over the epoch. Without any, the model is saved at the epoch's end."""
        wanted = self.settings.evaluations if self.evaluate is not None else 1
        return (number + 1) * wanted // steps > number * wanted // steps

    def is_over(self) -> bool:
        return 0 < self.settings.patience <= self.progress.since_best

    def share(self, step: list[int], epoch: int) -> tuple[list[tuple[list[int], bool]], float]:
        return self.own_batches(step), sum(self.task.weight(self.windows[row]) for row in step)

    def own_batches(self, step: list[int]) -> list[tuple[list[int], bool]]:
        """The batches of this process, each with whether it counts. One that does not count replaces an empty batch."""
        batches = self.plan.batches(step, self.processes.rank, self.processes.count)
        return [(rows or step[:1], bool(rows)) for rows in batches]

    def losses(self, batch: list[int], epoch: int, divisor: float) -> tuple[Tensor]:
        chosen, device = [self.windows[row] for row in batch], self.processes.device
        packed = pack(chosen, batch, device)
        if self.optimizer.deferred is not None:
            self.optimizer.settle(packed.input_ids.long())
        return (self.shared(packed, num_items_in_batch=divisor, **self.task.arguments(chosen, device)).loss,)

    def evaluated(self, epoch: int) -> None:
        """Evaluates the model and keeps the best one, among the evaluations for which `shaping` is complete."""
        scores, whole = None, self.shaping.is_whole(self.progress.step, self.steps)
        if self.evaluate is not None:
            scores = self.evaluate(self.shared)
            value = scores.values[self.metric]
            better = whole and is_better(value, self.progress.best)
            if whole:
                self.progress.since_best = 0 if better else self.progress.since_best + 1
            self.progress.best = value if better else self.progress.best
            values = {name: None if math.isnan(v) else v for name, v in scores.values.items()}
            self._record({"step": self.progress.step, "epoch": epoch, "scores": values, "best": better})
            # Until an evaluation has a score that is a number, the model of the last one is kept.
            if not better and self.progress.best is not None:
                return
        if whole and self.keep_best is not None:
            self.keep_best(self.shared, scores)

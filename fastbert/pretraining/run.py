"""Pre-training with the training loop: steps of masked batches, and evaluations on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..training.loop import Loop, Settings
from ..training.metrics import Scores
from ..training.plan import Plan
from ..training.predicting import autocast
from ..training.processes import Processes
from .batches import Loader, MaskedBatch, masked_batch
from .corpus import Corpus
from .documents import examples_of
from .masking import Masking
from .objectives import Divisor, MaskedWords, merged
from .plan import PretrainingPlan, Step


@dataclass
class Pretraining(Loop):
    """One pre-training.

    Args:
        examples: the plan of the training examples.
        loader: makes this process's batches of a step.
        wanted_steps: steps of the run; 0 if its time is limited instead.
        evaluate_every: steps between evaluations; one more evaluation follows at the end.
        evaluate: returns the scores of the present model, the same in every process; None for no evaluation.
        keep: saves the model; called in every process after each evaluation.
    """

    SAVES_EPOCHS = False  # an epoch of a short text is only a few steps

    model: nn.Module
    objective: MaskedWords
    examples: PretrainingPlan
    loader: Loader
    settings: Settings
    wanted_steps: int
    evaluate_every: int
    out: Path
    processes: Processes
    evaluate: Callable[[nn.Module], Scores] | None = None
    keep: Callable[[nn.Module, Scores | None], None] | None = None
    report: Callable[[dict[str, Any]], None] | None = None
    binding: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.PARTS = self.objective.PARTS
        self.begin(self.examples, self.wanted_steps, self.binding)

    def epochs(self) -> Iterator[tuple[int, int]]:
        done = 0
        for epoch in count():
            steps = len(self.examples.steps(epoch))
            if self.steps:
                steps = min(steps, self.steps - done)
            yield epoch, steps
            done += steps
            if done == self.steps:
                return

    def share(self, step: Step, epoch: int) -> tuple[list[tuple[MaskedBatch, bool]], Divisor]:
        batches = self.loader(step)
        device = self.processes.device
        sizes = torch.tensor([batch.sizes() for batch in batches], dtype=torch.float64, device=device).sum(0)
        # A step of short examples may have no token to guess.
        divisor = Divisor(*(max(1.0, size) for size in self.processes.sum(sizes).tolist()))
        return [(batch, batch.counts) for batch in batches], divisor

    def losses(self, batch: MaskedBatch, epoch: int, divisor: Divisor) -> tuple[Tensor, ...]:
        return self.objective.losses(self.shared, batch.to(self.processes.device), divisor)

    def is_due(self, number: int, steps: int) -> bool:
        return self.progress.step % self.evaluate_every == 0 or self.has_ended()

    def evaluated(self, epoch: int) -> None:
        scores = None
        if self.evaluate is not None:
            scores = self.evaluate(self.shared)
            values = {name: None if math.isnan(value) else value for name, value in scores.values.items()}
            self._record({"step": self.progress.step, "epoch": epoch, "scores": values})
        if self.keep is not None:
            self.keep(self.shared, scores)


@dataclass(frozen=True)
class Evaluation:
    """Scores on held-out text, with the same masks each time.

    Args:
        batch_tokens: most tokens computed at once.
    """

    corpus: Corpus
    objective: MaskedWords
    masking: Masking
    max_length: int
    batch_tokens: int
    dtype: torch.dtype
    processes: Processes

    def __call__(self, model: nn.Module) -> Scores:
        examples = examples_of(self.corpus, self.objective.pairs, self.max_length, 0, 0)
        plan = Plan(0, examples.lengths.tolist(), self.batch_tokens, self.batch_tokens)
        batches, processes = plan.steps(0), self.processes
        mine = batches[processes.rank :: processes.count]
        # Sharded models need all processes for each batch: a process with fewer batches computes one that does not
        # count.
        rounds = -(-len(batches) // processes.count)
        model.eval()
        tallies = []
        with torch.no_grad(), autocast(processes.device, self.dtype):
            for place in range(rounds):
                rows = mine[place] if place < len(mine) else batches[0]
                batch = masked_batch(self.corpus, examples, rows, self.masking, 0, 0)
                tally = self.objective.tally(model, batch.to(processes.device))
                if place < len(mine):
                    tallies.append(tally)
        everything = [tally for part in processes.gather(tallies) for tally in part]
        return self.objective.scores(merged(everything))

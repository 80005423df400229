"""Which examples a step of pre-training is made of: those of `training.plan`, of examples that each epoch has anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..text.files import InputError
from ..training.plan import Plan
from .corpus import Corpus
from .documents import Examples, examples_of


class Step(NamedTuple):
    """An optimiser step: its epoch, its number there, and the numbers of its examples in their epoch."""

    epoch: int
    number: int
    rows: list[int]


@dataclass(frozen=True)
class Epoch:
    """One epoch: its number, its examples, their plan, its steps, and how many steps were before it."""

    number: int
    examples: Examples
    plan: Plan
    steps: list[Step]
    begun: int


class PretrainingPlan:
    """The steps of a run, a function of (corpus, seed).

    Args:
        pairs, max_length: of examples; see `documents`.
        step_tokens: tokens of an optimiser step. Over the first `growing` steps it grows to that from a tenth.
        batch_tokens: that are computed at once.

    Raises: InputError where the corpus has no example.
    """

    def __init__(
        self, corpus: Corpus, pairs: str | None, max_length: int, seed: int, step_tokens: int, batch_tokens: int,
        growing: int = 0,
    ) -> None:  # fmt: skip
        self.corpus, self.pairs, self.max_length, self.seed = corpus, pairs, max_length, seed
        self.step_tokens, self.batch_tokens, self.growing = step_tokens, batch_tokens, growing
        self._begun = [0]  # steps before each epoch that is known
        self._made: Epoch | None = None
        if not self.steps(0):
            raise InputError("the corpus is too small for one example")

    def epoch(self, number: int) -> Epoch:
        """The steps of an epoch; the last one that was asked for is kept."""
        while len(self._begun) <= number:  # the size of a step may depend on how many there were
            before = self.epoch(len(self._begun) - 1)
            self._begun.append(before.begun + len(before.steps))
        if self._made is None or self._made.number != number:
            examples = examples_of(self.corpus, self.pairs, self.max_length, self.seed, number)
            plan = Plan(self.seed, examples.lengths.tolist(), self.step_tokens, self.batch_tokens)
            begun = self._begun[number]
            rows = self._cut(plan.order(number), plan.lengths, begun)
            steps = [Step(number, place, of_step) for place, of_step in enumerate(rows)]
            self._made = Epoch(number, examples, plan, steps, begun)
        return self._made

    def steps(self, epoch: int) -> list[Step]:
        return self.epoch(epoch).steps

    def tokens(self, step: Step) -> int:
        return self.epoch(step.epoch).plan.tokens(step.rows)

    def tokens_of_step(self, number: int) -> int:
        """At most, of the `number`-th step of the run."""
        share = 1.0 if number >= self.growing else 0.1 + 0.9 * number / self.growing
        return max(1, round(self.step_tokens * share))

    def _cut(self, order: Sequence[int], lengths: Sequence[int], begun: int) -> list[list[int]]:
        steps: list[list[int]] = []
        tokens = budget = 0
        for row in order:
            if not steps or tokens + lengths[row] > budget:
                budget, tokens = self.tokens_of_step(begun + len(steps)), 0
                steps.append([])
            steps[-1].append(row)
            tokens += lengths[row]
        return steps

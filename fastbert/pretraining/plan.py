"""The examples of each step of pre-training: `training.plan`, with new examples in each epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..text.files import InputError
from ..training.plan import Plan
from .corpus import Corpus
from .documents import Examples, examples_of


class Step(NamedTuple):
    """An optimiser step: its epoch, its number in the epoch, and the numbers of its examples in the epoch."""

    epoch: int
    number: int
    rows: list[int]


@dataclass(frozen=True)
class Epoch:
    """One epoch: its number, examples, their plan, its steps, and the number of steps before it."""

    number: int
    examples: Examples
    plan: Plan
    steps: list[Step]
    begun: int


class PretrainingPlan:
    """The steps of a run, a function of (corpus, seed).

    Args:
        pairs, max_length: of the examples; see `documents`.
        step_tokens: tokens of an optimiser step. In the first `growing` steps it grows from a tenth to this number.
        batch_tokens: most tokens computed at once.

    Raises: InputError if the corpus has no example.
    """

    def __init__(
        self, corpus: Corpus, pairs: str | None, max_length: int, seed: int, step_tokens: int, batch_tokens: int,
        growing: int = 0,
    ) -> None:  # fmt: skip
        self.corpus, self.pairs, self.max_length, self.seed = corpus, pairs, max_length, seed
        self.step_tokens, self.batch_tokens, self.growing = step_tokens, batch_tokens, growing
        self._begun = [0]  # number of steps before each epoch so far
        self._made: Epoch | None = None
        if not self.steps(0):
            raise InputError("the corpus is too small for one example")

    def epoch(self, number: int) -> Epoch:
        """An epoch; the last requested one is cached."""
        while len(self._begun) <= number:  # epochs are made in order: a step's size depends on the steps before it
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
        """Most tokens of step `number` of the run."""
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

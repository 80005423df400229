"""The examples of each step of pre-training: `training.plan`, with new examples in each epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from ..text.files import InputError
from ..training.plan import Plan
from .corpus import Corpus
from .documents import Examples, examples_of


class Step(NamedTuple):
    """An optimiser step: its epoch, its number in the epoch, and the numbers of its examples in the epoch."""

    epoch: int
    number: int
    rows: list[int]


class Steps(Sequence[Step]):
    """The steps of an epoch. A large corpus has millions of examples, so only their order is kept, not lists.

    Args:
        order: [examples] the examples' numbers. edges: [steps + 1] where each step begins in it, and its end.
    """

    def __init__(self, epoch: int, order: NDArray[np.integer], edges: Sequence[int]) -> None:
        self.epoch, self.order, self.edges = epoch, order, edges

    def __len__(self) -> int:
        return len(self.edges) - 1

    @overload
    def __getitem__(self, place: int) -> Step: ...
    @overload
    def __getitem__(self, place: slice) -> list[Step]: ...
    def __getitem__(self, place: int | slice) -> Step | list[Step]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number = range(len(self))[place]  # raises IndexError
        return Step(self.epoch, number, self.order[self.edges[number] : self.edges[number + 1]].tolist())


@dataclass(frozen=True)
class Epoch:
    """One epoch: its number, examples, their plan, its steps, and the number of steps before it."""

    number: int
    examples: Examples
    plan: Plan
    steps: Steps
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
            lengths = examples.lengths
            plan = Plan(self.seed, memoryview(lengths), self.step_tokens, self.batch_tokens)
            begun = self._begun[number]
            order = plan.permutation(number)
            steps = Steps(number, order, self._edges(lengths[order], begun))
            self._made = Epoch(number, examples, plan, steps, begun)
        return self._made

    def steps(self, epoch: int) -> Steps:
        return self.epoch(epoch).steps

    def tokens(self, step: Step) -> int:
        return self.epoch(step.epoch).plan.tokens(step.rows)

    def tokens_of_step(self, number: int) -> int:
        """Most tokens of step `number` of the run."""
        share = 1.0 if number >= self.growing else 0.1 + 0.9 * number / self.growing
        return max(1, round(self.step_tokens * share))

    def _edges(self, lengths: NDArray[np.integer], begun: int) -> list[int]:
        """Where each step begins among examples of these lengths, and the end. A step takes examples while they fit,
        and at least one. begun: number of steps before."""
        ends = np.cumsum(lengths, dtype=np.int64)
        edges, before = [0], 0
        while edges[-1] < len(ends):
            budget = self.tokens_of_step(begun + len(edges) - 1)
            edges.append(max(edges[-1] + 1, int(np.searchsorted(ends, before + budget, side="right"))))
            before = int(ends[edges[-1] - 1])
        return edges

"""The windows of each optimiser step, and how processes share them.

The plan is a function of the seed, the epoch and the lengths of the windows. So every process knows the plan of all
others, and a resumed run follows the plan of the run that was interrupted:

    epoch     all windows, in an order drawn by (seed, epoch)
    step      the next windows in that order, up to a number of tokens
    share     the windows of a step that one of several ranks computes; shares have about the same number of tokens
    batch     a part of a share, up to the number of tokens that fit in memory; all ranks have as many batches

The loss is divided by the items of the whole step, so it does not depend on shares and batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..text.batching import batches_within


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    Args:
        lengths: the number of tokens of each window.
        step_tokens: the largest number of tokens in an optimiser step, except for a single longer window.
        batch_tokens: the largest number of tokens computed at once, with the same exception.
    """

    seed: int
    lengths: Sequence[int]
    step_tokens: int
    batch_tokens: int

    def order(self, epoch: int) -> list[int]:
        """The windows in the order of this epoch."""
        return self.permutation(epoch).tolist()

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """As `order`, in an array."""
        drawn = np.random.Philox(key=[self.seed, epoch]).random_raw(len(self.lengths))
        return np.argsort(drawn, kind="stable")

    def steps(self, epoch: int) -> list[list[int]]:
        """The windows of each optimiser step of this epoch."""
        return list(batches_within(self.order(epoch), self.lengths, self.step_tokens))

    def count_steps(self, epochs: int) -> list[int]:
        """The number of steps of each epoch."""
        return [len(self.steps(epoch)) for epoch in range(epochs)]

    def tokens(self, step: Sequence[int]) -> int:
        return sum(self.lengths[window] for window in step)

    def batches(self, step: Sequence[int], rank: int = 0, ranks: int = 1) -> list[list[int]]:
        """The batches of one rank's share of a step. Empty batches are added so that all ranks have as many."""
        shares = self._shares(step, ranks)
        cut = [list(batches_within(share, self.lengths, self.batch_tokens)) for share in shares]
        count = max(map(len, cut))
        return cut[rank] + [[]] * (count - len(cut[rank]))

    def _shares(self, step: Sequence[int], ranks: int) -> list[list[int]]:
        """Gives the windows, the longest first, each to the rank with the fewest tokens so far."""
        shares: list[list[int]] = [[] for _ in range(ranks)]
        if ranks == 1:
            return [list(step)]
        tokens = [0] * ranks
        for window in sorted(step, key=lambda w: -self.lengths[w]):
            least = tokens.index(min(tokens))
            shares[least].append(window)
            tokens[least] += self.lengths[window]
        return shares


def dropout_seed(seed: int, epoch: int) -> int:
    """The seed of an epoch's dropout. Masks also depend on the number of the window."""
    return int(np.random.Philox(key=[seed, epoch], counter=1).random_raw() >> np.uint64(2))


def rate(step: float, steps: float, warmup: float) -> float:
    """The learning rate as a share of its peak: it rises for `warmup` steps, then falls to 0 after the last step. All
    three arguments may be seconds instead."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (steps - step) / max(1, steps - warmup)


def warmup_steps(steps: int, share: float) -> int:
    return math.ceil(steps * share)

"""Which windows an optimiser step is made of, and who computes which of them.

All of it is a function of the seed, the epoch and the lengths of the windows, so that every process knows the plan of
all others, and a run that goes on follows the plan of the one it continues:

    epoch     all windows, in an order of (seed, epoch)
    step      the next windows of that order, up to a number of tokens
    share     of a step, for one of several ranks: about as many tokens for each
    batch     of a share, up to the number of tokens that fit in memory; every rank has as many batches

A loss is divided once, by the items of its whole step, whatever its shares and batches are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..text.batching import batches_within


@dataclass(frozen=True)
class Plan:
    """Args:
    lengths: tokens of each window.
    step_tokens: of an optimiser step, at most, but for a window that is longer.
    batch_tokens: that are computed at once.
    """

    seed: int
    lengths: Sequence[int]
    step_tokens: int
    batch_tokens: int

    def order(self, epoch: int) -> list[int]:
        """The windows in the order of this epoch."""
        drawn = np.random.Philox(key=[self.seed, epoch]).random_raw(len(self.lengths))
        return np.argsort(drawn, kind="stable").tolist()

    def steps(self, epoch: int) -> list[list[int]]:
        """The windows of each optimiser step of this epoch."""
        return list(batches_within(self.order(epoch), self.lengths, self.step_tokens))

    def count_steps(self, epochs: int) -> list[int]:
        """How many steps each epoch has."""
        return [len(self.steps(epoch)) for epoch in range(epochs)]

    def tokens(self, step: Sequence[int]) -> int:
        return sum(self.lengths[window] for window in step)

    def batches(self, step: Sequence[int], rank: int = 0, ranks: int = 1) -> list[list[int]]:
        """What one rank computes of a step, a batch after another. An empty batch fills up the number of them."""
        shares = self._shares(step, ranks)
        cut = [list(batches_within(share, self.lengths, self.batch_tokens)) for share in shares]
        count = max(map(len, cut))
        return cut[rank] + [[]] * (count - len(cut[rank]))

    def _shares(self, step: Sequence[int], ranks: int) -> list[list[int]]:
        """The longest window first, each to the rank with the fewest tokens so far."""
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
    """The seed of an epoch's dropout; a window's name does the rest."""
    return int(np.random.Philox(key=[seed, epoch], counter=1).random_raw() >> np.uint64(2))


def rate(step: float, steps: float, warmup: float) -> float:
    """The learning rate's share of its peak: up in `warmup` steps, and down to 0 behind the last one. (Or seconds.)"""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (steps - step) / max(1, steps - warmup)


def warmup_steps(steps: int, share: float) -> int:
    return math.ceil(steps * share)

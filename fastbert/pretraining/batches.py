"""Batches of masked examples, made from a plan, in the calling thread or ahead of it by other threads.

A batch is a function of its step and the seed, so the number of threads does not change what is learnt.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..packing import PackedBatch
from .corpus import Corpus
from .documents import Examples, tokens_of
from .masking import IGNORED, Masking
from .plan import Epoch, PretrainingPlan, Step


@dataclass(frozen=True)
class MaskedBatch:
    """B masked examples of T tokens.

    Attributes:
        shown: the packed batch with masked tokens replaced. labels: [T] int64, IGNORED for tokens that are not guessed.
        pairs: [B] int64, 0 or 1, or None. uniform: [T] float64, a random number in [0, 1) for each token.
        counts: False for a batch that a process only computes to take part, and whose result is ignored.
        guessed: number of tokens to guess.
    """

    shown: PackedBatch
    labels: Tensor
    pairs: Tensor | None
    uniform: Tensor
    counts: bool
    guessed: int

    def sizes(self) -> list[int]:
        """Numbers of guessed tokens, pairs, tokens and examples; 0 if the batch does not count."""
        if not self.counts:
            return [0, 0, 0, 0]
        pairs = 0 if self.pairs is None else len(self.pairs)
        return [self.guessed, pairs, self.shown.total_tokens, self.shown.batch_size]

    def to(self, device: torch.device) -> MaskedBatch:
        if device.type == "cpu":
            return self
        moved = (None if t is None else t.to(device, non_blocking=True) for t in (self.labels, self.pairs))
        labels, pairs = moved
        return MaskedBatch(self.shown.to(device), labels, pairs, self.uniform.to(device), self.counts, self.guessed)


def masked_batch(
    corpus: Corpus,
    examples: Examples,
    rows: Sequence[int],
    masking: Masking,
    seed: int,
    epoch: int,
    counts: bool = True,
) -> MaskedBatch:
    """A batch of the examples with the numbers `rows`, on the CPU."""
    tokenizer = masking.tokenizer
    ids, joins, types = tokens_of(corpus, examples, rows, tokenizer.cls_token_id, tokenizer.sep_token_id)
    shown, labels, further = masking.apply(ids, joins, rows, seed, epoch)
    has_pairs = bool(examples.labels[rows[0]] >= 0)
    lengths = [len(row) for row in ids]
    ends = np.cumsum(lengths)[:-1]
    packed = PackedBatch.from_lists(
        np.split(shown, ends), types if has_pairs else None, sequence_ids=rows, device=torch.device("cpu")
    )
    return MaskedBatch(
        packed,
        torch.from_numpy(labels),
        torch.from_numpy(examples.labels[rows].astype(np.int64)) if has_pairs else None,
        torch.from_numpy(further.astype(np.float64) / 2**32),
        counts,
        int((labels != IGNORED).sum()),
    )


class Loader:
    """The batches of this process for each step.

    Args:
        workers: threads that make the batches of the next steps; 0 makes each batch when it is needed.
    """

    def __init__(self, plan: PretrainingPlan, masking: Masking, rank: int, ranks: int, workers: int) -> None:
        self.plan, self.masking, self.rank, self.ranks, self.workers = plan, masking, rank, ranks, workers
        self.threads = ThreadPoolExecutor(workers, "loader") if workers else None
        self.coming: dict[tuple[int, int], Future[list[MaskedBatch]]] = {}

    def __call__(self, step: Step) -> list[MaskedBatch]:
        epoch = self.plan.epoch(step.epoch)
        if self.threads is None:
            return self._make(step, epoch)
        for ahead in epoch.steps[step.number : step.number + 1 + self.workers]:
            key = (ahead.epoch, ahead.number)
            if key not in self.coming:
                self.coming[key] = self.threads.submit(self._make, ahead, epoch)
        return self.coming.pop((step.epoch, step.number)).result()

    def close(self) -> None:
        if self.threads is not None:
            self.threads.shutdown(cancel_futures=True)

    def _make(self, step: Step, epoch: Epoch) -> list[MaskedBatch]:
        batches = epoch.plan.batches(step.rows, self.rank, self.ranks)
        return [
            masked_batch(
                self.plan.corpus, epoch.examples, rows or step.rows[:1], self.masking, self.plan.seed, step.epoch,
                counts=bool(rows),
            )
            for rows in batches
        ]  # fmt: skip

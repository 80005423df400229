"""Encodes one file with all processes that torchrun started, on one machine or several, into one ordered result.

    rank i % world encodes chunk i of FILE
    rank > 0  --gloo-->  rank 0, which writes OUT in the order of the lines

Each rank reads FILE, but only rank 0 opens OUT, so the machines must share FILE and need not share OUT. A rank that
fails prints the reason and ends; torchrun then ends the others, and OUT is not written.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .encoder import Encoder, EncodeStats

T = TypeVar("T")

# Chunks of vectors that a rank may have sent without rank 0 having received them; then the rank waits.
CHUNKS_AHEAD = 4


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started: `rank` of `world`, `local_rank` on its machine."""

    rank: int
    world: int
    local_rank: int

    @classmethod
    def from_environment(cls) -> Ranks:
        return cls(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))

    def device(self, asked: str) -> str:
        """The device for this process: CUDA device `local_rank`, or the CPU."""
        if asked == "cpu" or not torch.cuda.is_available():
            return asked
        if self.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"{self.local_rank + 1} or more processes on a machine with {torch.cuda.device_count()} CUDA devices: "
                "give torchrun --nproc-per-node that number, or fastbert --device cpu"
            )
        return f"cuda:{self.local_rank}"

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's share of the items. Every item is in the share of exactly one process."""
        return list(items[self.rank :: self.world])

    @contextlib.contextmanager
    def joined(self, facts: dict[str, int]) -> Iterator[None]:
        """A block in which the ranks are connected.

        Raises: ValueError if `facts` differ between ranks.
        """
        with self._told_apart():
            dist.init_process_group("gloo")
        try:
            with self._told_apart():
                everywhere: list = [None] * self.world
                dist.all_gather_object(everywhere, facts)
            for name, ours in facts.items():
                for rank, theirs in enumerate(everywhere):
                    if theirs[name] != ours:
                        raise ValueError(
                            f"{name} must be the same everywhere: {ours:,}, but {theirs[name]:,} on rank {rank}"
                        )
            yield
        finally:
            dist.destroy_process_group()

    def gather(
        self, encoder: Encoder, chunks: Iterable[Sequence[str]], *, max_tokens_per_batch: int | None = None
    ) -> Iterator[Tensor]:
        """On rank 0: the vectors of every chunk in order, computed here or received."""
        expected: deque[int] = deque()  # numbers of texts of the chunks that were read and not yielded yet

        def own() -> Iterator[Sequence[str]]:
            for number, texts in enumerate(chunks):
                expected.append(len(texts))
                if number % self.world == 0:
                    yield texts

        for vectors in encoder.encode_chunks(own(), max_tokens_per_batch=max_tokens_per_batch):
            expected.popleft()
            yield vectors
            # Between two chunks of rank 0 there is one chunk of each other rank.
            for rank in range(1, self.world):
                if expected:
                    vectors = torch.empty(expected.popleft(), encoder.dimension, dtype=torch.float32, device="cpu")
                    with self._told_apart():
                        dist.recv(vectors, rank)
                    yield vectors
        self._add_up(encoder.stats)

    def contribute(
        self, encoder: Encoder, chunks: Iterable[Sequence[str]], *, max_tokens_per_batch: int | None = None
    ) -> None:
        """On the other ranks: computes this rank's chunks, and sends them to rank 0."""
        own = (texts for number, texts in enumerate(chunks) if number % self.world == self.rank)
        under_way: deque = deque()
        for vectors in encoder.encode_chunks(own, max_tokens_per_batch=max_tokens_per_batch):
            with self._told_apart():
                under_way.append((dist.isend(vectors, 0), vectors))
                if len(under_way) > CHUNKS_AHEAD:
                    under_way.popleft()[0].wait()
        with self._told_apart():
            for sending, _ in under_way:
                sending.wait()
        self._add_up(encoder.stats)

    def _add_up(self, stats: EncodeStats) -> None:
        """Sums the counts of all ranks. This also waits for all ranks, so that none ends before rank 0 has every
        vector."""
        everywhere: list = [None] * self.world
        with self._told_apart():
            dist.all_gather_object(everywhere, (stats.texts, stats.tokens, stats.padded_tokens))
        stats.texts, stats.tokens, stats.padded_tokens = map(sum, zip(*everywhere, strict=True))

    @contextlib.contextmanager
    def _told_apart(self) -> Iterator[None]:
        """Replaces the transport's error for a lost peer (addresses and line numbers) by a readable one."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError("lost the connection to another rank, which has ended or cannot be reached") from error

"""The queue of one model, which decides which waiting pieces go into the next batch. It uses no threads and no clock.

A piece is a sequence of tokens for one pass: a text, a pair of texts, or a window of a long text. A request consists of
one or more pieces, and is answered when all of them are computed.

Batches are bounded in tokens, never in pieces. A request of few tokens, or of one piece, is short; all others are long:

    short requests come first, in order; long ones get the remaining room
    while long requests wait, every batch adds a quarter of its room to their credit; as soon as the credit covers their
    next piece, that piece goes before the short ones
    a short request that finds no room because of that goes before the long ones in the next batch

So a long request waits for at most `4 * tokens before it / budget` batches, rounded up, plus two, however many short
requests come. The first short request is delayed by long ones in at most every second batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

SHARE = 4  # long requests are guaranteed 1 / SHARE of each batch


class Full(Exception):
    """The queue has no room for the request. `never`: not even if the queue were empty."""

    def __init__(self, never: bool):
        super().__init__("the queue is full")
        self.never = never


class Waiting:
    """A request in the queue.

    Attributes:
        lengths: number of tokens of each piece.
        owner: the caller's object; the queue does not use it.
        taken: number of pieces that went into batches.
    """

    __slots__ = ("is_short", "lengths", "owner", "taken", "tokens")

    def __init__(self, lengths: Sequence[int], owner: Any = None):
        self.lengths, self.owner, self.taken = lengths, owner, 0
        self.tokens = sum(lengths)  # tokens of the pieces that still wait
        self.is_short = True


class TokenQueue:
    """Requests that wait for one model.

    Args:
        budget: most tokens of a batch; only a single longer piece may exceed it.
        bound: most tokens that may wait, including the announced tokens of requests that are being tokenised.
    """

    def __init__(self, budget: int, bound: int):
        self.budget, self.bound = budget, bound
        self.waiting = self.announced = 0  # tokens
        self._short: deque[Waiting] = deque()
        self._long: deque[Waiting] = deque()
        self._credit = 0
        self._passed = False  # the last batch left out the first short request because of long ones

    def __len__(self) -> int:
        """Number of waiting requests."""
        return len(self._short) + len(self._long)

    @property
    def tokens(self) -> int:
        """Waiting and announced tokens, never more than the bound."""
        return self.waiting + self.announced

    def announce(self, tokens: int) -> None:
        """Reserves room for a request that is not tokenised yet. Raises Full."""
        if self.tokens + tokens > self.bound:
            raise Full(tokens > self.bound)
        self.announced += tokens

    def withdraw(self, tokens: int) -> None:
        """Releases the room that `announce` reserved."""
        self.announced -= tokens

    def put(self, request: Waiting) -> None:
        """Adds a tokenised request. Raises Full."""
        if self.tokens + request.tokens > self.bound:
            raise Full(request.tokens > self.bound)
        request.is_short = request.tokens <= self.budget // SHARE or len(request.lengths) == 1
        (self._short if request.is_short else self._long).append(request)
        self.waiting += request.tokens

    def remove(self, request: Waiting) -> None:
        """Removes the pieces of a request that still wait."""
        if request.tokens:
            (self._short if request.is_short else self._long).remove(request)
            self.waiting -= request.tokens
            request.tokens = 0

    def next_batch(self) -> list[tuple[Waiting, int]]:
        """The next batch as (request, number of its piece); empty if nothing waits."""
        batch: list[tuple[Waiting, int]] = []
        room = self.budget
        if self._long:
            self._credit += max(self.budget // SHARE, 1)
            if not self._passed:
                room = self._take(self._long, min(room, self._credit), room, batch, must=False)
                self._credit -= self.budget - room
        of_long = len(batch)
        room = self._take(self._short, room, room, batch, must=not batch)
        self._passed = bool(self._short) and 0 < of_long == len(batch)
        self._take(self._long, room, room, batch, must=not batch)
        if not self._long:
            self._credit = 0
        return batch

    def _take(self, line: deque[Waiting], allowed: int, room: int, batch: list, must: bool) -> int:
        """Moves pieces of at most `allowed` tokens into the batch, in order; `must` takes one of any length. Returns
        the room that is left."""
        while line:
            request = line[0]
            length = request.lengths[request.taken]
            if length > allowed and not must:
                break
            must = False
            allowed, room = allowed - length, room - length
            batch.append((request, request.taken))
            request.taken += 1
            request.tokens -= length
            self.waiting -= length
            if request.taken == len(request.lengths):
                line.popleft()
        return room

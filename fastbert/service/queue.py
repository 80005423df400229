"""The queue of one model: which pieces wait, and which of them go into the next batch. No threads, no clock.

A piece is a sequence of tokens that the model takes at once: a text, a pair of texts, or a window of a long one. A
request is one or several pieces, and is answered when all of them are computed.

Batches are bounded in tokens, never in pieces. A request of few tokens, or of one piece, is short; all others are long:

    short requests come first, in their order; long ones have what room is left
    whenever long requests wait, every batch adds a quarter of its room to their credit, and as soon as the credit
    covers their next piece, that piece goes before the short ones
    a short request that then finds no room goes before the long ones in the next batch

So however many short requests come, a long one waits for at most `4 * tokens before it / budget` batches, rounded up,
and two more; and long ones keep a short one at the head of its line out of one batch in two at most.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

SHARE = 4  # long requests have one of so many parts of a batch for certain


class Full(Exception):
    """The queue has no room for so many tokens now; `never`: it would have none if it were empty."""

    def __init__(self, never: bool):
        super().__init__("the queue is full")
        self.never = never


class Waiting:
    """A request in the queue.

    Attributes:
        lengths: tokens of each piece.
        owner: whose it is; the queue does not look at it.
        taken: how many pieces are in batches.
    """

    __slots__ = ("is_short", "lengths", "owner", "taken", "tokens")

    def __init__(self, lengths: Sequence[int], owner: Any = None):
        self.lengths, self.owner, self.taken = lengths, owner, 0
        self.tokens = sum(lengths)  # of pieces that still wait
        self.is_short = True


class TokenQueue:
    """Requests that wait for one model.

    Args:
        budget: tokens of a batch at most, but for a piece that is longer by itself.
        bound: tokens that may wait; those of requests that are being tokenised are counted as announced.
    """

    def __init__(self, budget: int, bound: int):
        self.budget, self.bound = budget, bound
        self.waiting = self.announced = 0  # tokens
        self._short: deque[Waiting] = deque()
        self._long: deque[Waiting] = deque()
        self._credit = 0
        self._passed = False  # whether long requests took the room of the first short one in the last batch

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._short) + len(self._long)

    @property
    def tokens(self) -> int:
        """Tokens that wait or are announced: never more than the bound."""
        return self.waiting + self.announced

    def announce(self, tokens: int) -> None:
        """Keeps room for a request that is not tokenised yet. Raises Full."""
        if self.tokens + tokens > self.bound:
            raise Full(tokens > self.bound)
        self.announced += tokens

    def withdraw(self, tokens: int) -> None:
        """Gives back what `announce` kept."""
        self.announced -= tokens

    def put(self, request: Waiting) -> None:
        """Raises Full."""
        if self.tokens + request.tokens > self.bound:
            raise Full(request.tokens > self.bound)
        request.is_short = request.tokens <= self.budget // SHARE or len(request.lengths) == 1
        (self._short if request.is_short else self._long).append(request)
        self.waiting += request.tokens

    def remove(self, request: Waiting) -> None:
        """Takes a request's pieces out that still wait, if any do."""
        if request.tokens:
            (self._short if request.is_short else self._long).remove(request)
            self.waiting -= request.tokens
            request.tokens = 0

    def next_batch(self) -> list[tuple[Waiting, int]]:
        """(request, number of its piece) of the next batch; empty where nothing waits."""
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

"""Random numbers as a function of a counter: Philox4x32-10 (Salmon et al., SC 2011), for arrays.

numpy's Philox is a stream, one object for each key. Here every element has its own counter, so that a whole batch is
drawn at once, and a token's numbers do not depend on the other tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_ROUNDS = 10


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Four words of 32 random bits for each element, in uint64.

    counter: four arrays of one shape, or that broadcast to one, uint64 below 2^32. key: two numbers below 2^32.
    """
    a, b, c, d = counter
    low, high = key
    for _ in range(_ROUNDS):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            (second >> _HALF) ^ b ^ np.uint64(low), second & _LOW, (first >> _HALF) ^ d ^ np.uint64(high), first & _LOW
        )  # fmt: skip
        low, high = (low + _WEYL[0]) & 0xFFFFFFFF, (high + _WEYL[1]) & 0xFFFFFFFF
    return a, b, c, d


def below(word: Words, bound: int | Words) -> Words:
    """Numbers from 0 to `bound` - 1 from words of 32 random bits, equally likely up to 1 in 2^32; bound: below 2^32."""
    return (word * np.asarray(bound, dtype=np.uint64)) >> _HALF


def threshold(probability: float) -> np.uint64:
    """The number below which a word of 32 random bits is with this probability."""
    return np.uint64(round(probability * 2**32))


class Stream:
    """A sequence of random numbers, a function of (seed, epoch, stream)."""

    def __init__(self, seed: int, epoch: int, stream: int) -> None:
        # The stream's number is in the counter's third word, which counting never reaches.
        self._bits = np.random.Philox(key=[seed, epoch], counter=[0, 0, stream, 0])
        self._drawn: list[int] = []

    def raw(self) -> int:
        """64 random bits."""
        if not self._drawn:
            self._drawn = self._bits.random_raw(4096).tolist()
        return self._drawn.pop()

    def below(self, bound: int) -> int:
        """A number from 0 to `bound` - 1."""
        return (self.raw() * bound) >> 64

    def heads(self, coins: int) -> int:
        """Number of heads among `coins` thrown coins."""
        total = 0
        while coins > 0:
            total += (self.raw() >> (64 - min(coins, 64))).bit_count()
            coins -= 64
        return total

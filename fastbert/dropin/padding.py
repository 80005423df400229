"""Who reads what an encoder puts at padding, and which rows are therefore computed.

Rows of padding that nobody reads are left out and come back as zeros; rows that somebody reads are computed as the
original computes them, as queries over the keys of the real tokens. Who reads is known of the code above the encoder
that says so (`reading`): transformers' heads and sentence-transformers' poolings. Of all others it is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Policy = Literal["auto", "exact", "zero"]
POLICIES = ("auto", "exact", "zero")

ABOVE = "what lies above the encoder is not known to leave padding alone"
OTHERS = "a masked position holds something other than padding"
EXACT = 'padding="exact" asks for it'
ZEROS = (
    'rows at padding come back as zeros; fastbert.accelerate(model, padding="exact") computes them as the original '
    'does, padding="zero" leaves them out without this warning'
)


@dataclass(frozen=True)
class Reading:
    """Which rows of padding are read in a call, beyond the first column: all, none, or those of a [B, S].

    Attributes:
        needs: by the code above the encoder itself, for what it returns of each sequence.
        shows: by whoever has called that code, which returns something of each token.
        why: said by `explain` where they are computed.
        only: [n] int64, the rows of [B * S] that the code above the encoder goes on with, or None: all.
        first: of the last hidden state nothing is read but the first column, and no other state is shown.
    """

    needs: bool | Tensor = False
    shows: bool = False
    why: str = ABOVE
    only: Tensor | None = None
    first: bool = False

    @property
    def rows(self) -> bool | Tensor:
        return True if self.shows else self.needs


# What the known code does that runs at the moment, in this thread. None: nothing known has called.
_READING: ContextVar[Reading | None] = ContextVar("fastbert_reading", default=None)


def reading_now() -> Reading | None:
    return _READING.get()


def only_wanted(states: Tensor) -> Tensor:
    """Of an encoder's states [B, S, C] the rows that the code above it goes on with, as [1, n, C]; else all of them.

    A compiler cannot follow what the code above has said, and that code says nothing while it is compiled.
    """
    if torch.compiler.is_compiling():
        return states
    now = reading_now()
    if now is None or now.only is None:
        return states
    return states.flatten(0, 1).index_select(0, now.only.to(states.device))[None]


@contextmanager
def reading(what: Reading) -> Iterator[None]:
    """Within it, encoders are called by code that reads so much."""
    token = _READING.set(what)
    try:
        yield
    finally:
        _READING.reset(token)


@dataclass(frozen=True)
class Rows:
    """Which rows of a batch [B, S] are computed.

    Attributes:
        real: [B, S] bool, the tokens that are keys; None where all are.
        queries: [B, S] bool, the rows that are computed; None: all of them.
        reason: why the original runs instead.
        keys, lengths: of each sequence how many of `real` and of `queries` there are; None: not known on the host.
    """

    real: Tensor | None = None
    queries: Tensor | None = None
    reason: str | None = None
    keys: list[int] | None = None
    lengths: list[int] | None = None

    @property
    def padding(self) -> bool:
        """Is a row of padding computed?"""
        return self.real is not None and self.queries is not self.real


FULL = Rows()
EMPTY = "a sequence has no token"  # its rows are zeros here and a mean of all values there; the original knows which
WINDOW = "padding that is read, out of sight of every token under a sliding window"
BEFORE = 'padding that may be read, before the tokens of a causal model, sees no token (padding="zero" leaves it out)'


def rows_to_compute(
    mask: Tensor, reads: bool | Tensor, others: Tensor | None = None, relative: bool = False, reach: int | None = None,
    causal: bool = False, first_column: bool = True,
) -> tuple[Rows, bool]:  # fmt: skip
    """(the rows of a batch that are computed, whether `others` decided it). Waits once for the device.

    Args:
        mask: [B, S], 0 at padding.
        reads: which rows of padding somebody reads: all, none, or those of a bool [B, S].
        others: [B, S] bool, where a token other than padding stands: all rows are computed if it is masked anywhere.
        relative: attention looks at distances, so that nothing may be left out between two tokens.
        reach: with relative, how far a token sees in the layer where it sees least; None: everywhere.
        causal: a token sees no later ones.
        first_column: it is computed where it is padding too.
    """
    real = mask != 0
    left_out = ~real
    looks = [real.sum(1), left_out[:, 0], (real[:, 1:] & left_out[:, :-1]).sum(1)]
    if isinstance(reads, Tensor):
        looks += [(reads & left_out).sum(1), reads[:, 0] & left_out[:, 0]]
    if others is not None:
        looks.append((others & left_out).any(1))
    # of each sequence, in one copy: whatever depends on the mask is known on the host from here on
    keys, first, ends, *more = torch.stack([look.to(torch.int64) for look in looks]).tolist()
    shortest, width = min(keys, default=mask.shape[1]), mask.shape[1]
    if shortest == width:
        return FULL, False
    if shortest == 0:
        return Rows(reason=EMPTY), False
    by_others = others is not None and any(more.pop())
    some = isinstance(reads, Tensor) and any(more[0])
    before, holes = any(first), any(end > begins for end, begins in zip(ends, first, strict=True))
    first = first if first_column else [0] * len(first)
    if reads is True or by_others or (relative and (holes or any(first) or some)):
        blind = WINDOW if reach is not None and width - shortest > reach else BEFORE if causal and before else None
        return Rows(real, None, blind, keys), by_others
    if not (some or any(first)):
        return Rows(real, real, None, keys, keys), False
    queries = real | reads if some else real.clone()
    queries[:, 0] = True  # it is read by poolers, classifiers and people
    lengths = [count + one for count, one in zip(keys, first, strict=True)]
    if some:
        lengths = [count + asked - one for count, asked, one in zip(lengths, *more, strict=True)]
    return Rows(real, queries, None, keys, lengths), False

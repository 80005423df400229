"""Which rows of padding an encoder has to compute.

Rows of padding that no code reads are left out and come back as zeros. Rows that are read are computed as the original
computes them: as queries over the keys of the real tokens. Transformers' heads and sentence-transformers' poolings
declare by `reading` which rows of the encoder's output they read. Other callers of an encoder may read any row.
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

ABOVE = "the code that calls the encoder may read padding"
OTHERS = "a masked position holds a token other than padding"
EXACT = 'padding="exact" was given'
ZEROS = (
    'rows at padding come back as zeros; fastbert.accelerate(model, padding="exact") computes them as the original '
    'does, padding="zero" leaves them out without this warning'
)


@dataclass(frozen=True)
class Reading:
    """Which rows of padding are read in a call, besides the first column.

    Attributes:
        needs: the rows that the head or pooling itself reads: all, none, or those of a bool [B, S].
        shows: whether the head returns a value of each token, so that its caller may read any row.
        why: the reason that `explain` gives if rows of padding are computed.
        only: [n] int64, the rows of [B * S] that the head computes its output of; None for all.
        first: the head reads only the first column of the last hidden state, and returns no hidden states.
    """

    needs: bool | Tensor = False
    shows: bool = False
    why: str = ABOVE
    only: Tensor | None = None
    first: bool = False

    @property
    def rows(self) -> bool | Tensor:
        return True if self.shows else self.needs


# The declaration of the head or pooling that is running in this thread; None if there is none.
_READING: ContextVar[Reading | None] = ContextVar("fastbert_reading", default=None)


def reading_now() -> Reading | None:
    return _READING.get()


def only_wanted(states: Tensor) -> Tensor:
    """The rows `Reading.only` of an encoder's states [B, S, C], as [1, n, C]; all states if there is no such choice, or
    under torch.compile, where heads declare nothing."""
    if torch.compiler.is_compiling():
        return states
    now = reading_now()
    if now is None or now.only is None:
        return states
    return states.flatten(0, 1).index_select(0, now.only.to(states.device))[None]


@contextmanager
def reading(what: Reading) -> Iterator[None]:
    """A block in which the code that calls encoders reads these rows."""
    token = _READING.set(what)
    try:
        yield
    finally:
        _READING.reset(token)


@dataclass(frozen=True)
class Rows:
    """Which rows of a batch [B, S] are computed.

    Attributes:
        real: [B, S] bool, the tokens that are keys; None for all.
        queries: [B, S] bool, the rows that are computed; None for all.
        reason: why the original's code runs instead, or None.
        keys, lengths: the number of keys and of queries of each sequence; None if the host does not know them.
    """

    real: Tensor | None = None
    queries: Tensor | None = None
    reason: str | None = None
    keys: list[int] | None = None
    lengths: list[int] | None = None

    @property
    def padding(self) -> bool:
        """Whether a row of padding is computed."""
        return self.real is not None and self.queries is not self.real


FULL = Rows()
EMPTY = "a sequence has no token"  # the fused code gives zeros for it, other code the mean of all values
VALUES = "attention_mask has values other than 0 and 1, with which the original computes"
WINDOW = "padding that is read sees no token under a sliding window"
BEFORE = 'padding that may be read, before the tokens of a causal model, sees no token (padding="zero" leaves it out)'


def rows_to_compute(
    mask: Tensor, reads: bool | Tensor, others: Tensor | None = None, relative: bool = False, reach: int | None = None,
    causal: bool = False, first_column: bool = True, blind_is_zero: bool = False, zero_or_one: bool = False,
) -> tuple[Rows, bool]:  # fmt: skip
    """(the rows of a batch that are computed, whether `others` was the reason). Waits once for the device.

    Args:
        mask: [B, S], 0 at padding.
        reads: which rows of padding are read: all, none, or those of a bool [B, S].
        others: [B, S] bool, True at tokens other than the padding token. If one of them is masked, all rows are
            computed.
        relative: whether attention depends on distances between tokens, so that no row between two tokens may go.
        reach: with `relative`, the smallest number of tokens that a layer's window has on one side; None for no window.
        causal: whether tokens see no later ones.
        first_column: whether the first column is computed even if it is padding.
        blind_is_zero: whether the original's attention gives zeros where a row of padding sees no token, as ours does.
        zero_or_one: whether the original computes with the mask's values, so that others than 0 and 1 run its own code.
    """
    real = mask != 0
    left_out = ~real
    looks = [real.sum(1), left_out[:, 0], (real[:, 1:] & left_out[:, :-1]).sum(1)]
    if isinstance(reads, Tensor):
        looks += [(reads & left_out).sum(1), reads[:, 0] & left_out[:, 0]]
    if others is not None:
        looks.append((others & left_out).any(1))
    checks_values = zero_or_one and mask.dtype != torch.bool
    if checks_values:
        looks.append((real & (mask != 1)).any(1))
    # one copy to the host with all the numbers of each sequence that depend on the mask
    keys, first, ends, *more = torch.stack([look.to(torch.int64) for look in looks]).tolist()
    if checks_values and any(more.pop()):
        return Rows(reason=VALUES), False
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
        return Rows(real, None, None if blind_is_zero else blind, keys), by_others
    if not (some or any(first)):
        return Rows(real, real, None, keys, keys), False
    queries = real | reads if some else real.clone()
    lengths = [count + one for count, one in zip(keys, first, strict=True)]
    asked, both = more if some else ([0] * len(keys),) * 2
    if first_column:
        queries[:, 0] = True  # poolers and classifiers read it
    else:
        both = [0] * len(keys)
    lengths = [count + of_reads - one for count, of_reads, one in zip(lengths, asked, both, strict=True)]
    return Rows(real, queries, None, keys, lengths), False

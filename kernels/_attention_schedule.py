"""Attention's list of tiles: which sequence, and which rows of it, each program of a kernel works on.

An entry is (sequence, tile), [n, 2] int32 in all. The list has three parts, one for each kind of kernel, and within a
part the longest sequence comes first:

    long     sequences of more than TILE tokens, in q or in k: an entry for each TILE rows
    medium   other sequences of more than SHORT tokens: one entry. Padded tensors have no long part; their sequences
             have an entry here for each TILE rows of the width, because programs write zeros into padding
    short    sequences of at most SHORT tokens: one entry, also for an empty sequence

If the host knows the lengths, a part has exactly as many entries as needed. Otherwise it has the most that this number
of sequences and tokens can need, and surplus entries are (-1, 0).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_config import SHORT, TILE
from ._launch import Plan, cdiv
from ._library import register


class Schedule(NamedTuple):
    """The list of a batch.

    Attributes:
        entries: [n, 2] int32, contiguous, on the device of q.
        n_long, n_medium: the number of entries in the first two parts; all others are in the third.
        sequences, size, padded: the batch that it was made for: B and total tokens, or, padded, B and the width.
    """

    entries: Tensor
    n_long: int
    n_medium: int
    sequences: int
    size: int
    padded: bool

    def parts(self, longest: int) -> tuple[int, int, int]:
        """The `parts` argument of operators and launchers. longest: a bound for the length of every sequence."""
        return self.n_long, self.n_medium, longest


# ---- how long the parts are ----------------------------------------------------------------------------------


def parts_of(lengths: Sequence[int]) -> tuple[int, int, int]:
    """Entries in each part for packed sequences of these lengths."""
    n_long = n_medium = n_short = 0
    for length in lengths:
        if length <= SHORT:
            n_short += 1
        elif length <= TILE:
            n_medium += 1
        else:
            n_long += cdiv(length, TILE)
    return n_long, n_medium, n_short


def most_parts(sequences: int, size: int, padded: bool, cross: bool) -> tuple[int, int, int]:
    """The most entries that each part can have. size: total tokens; padded: the width. cross: k has other lengths."""
    if padded:
        return 0, sequences * ((size + TILE - 1) // TILE), sequences
    if cross:  # a sequence with few rows can still be long because of its keys
        n_long, n_medium = sequences, sequences
    else:
        n_long, n_medium = (torch.sym_min(sequences, size // (shorter + 1)) for shorter in (TILE, SHORT))
    # All tiles but the last of each sequence are full. The sum is never 1, because torch.compile would specialise on a
    # size of one.
    return size // TILE + n_long + 1, n_medium, sequences


# ---- on the host ---------------------------------------------------------------------------------------------


def attention_entries(lengths: Sequence[int]) -> Tensor:
    """The entries for packed sequences of these lengths, as exact parts, on the CPU."""
    entries = []
    for sequence in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        for tile in range(cdiv(lengths[sequence], TILE) or 1):
            entries += (sequence, tile)
    return torch.tensor(entries, dtype=torch.int32, device="cpu").view(-1, 2)


# ---- on the device -------------------------------------------------------------------------------------------


@triton.jit
def _entries_in_parts(
    spans_ptr, other_spans_ptr, sequences, n_sequences, width_tiles,
    PADDED: tl.constexpr, CROSS: tl.constexpr, TILE: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """(length, entries in the long part, in the medium part, in the short part) of each of `sequences`."""
    exists = sequences < n_sequences
    length = _lengths(spans_ptr, sequences, exists, PADDED)
    longest = length
    if CROSS:
        longest = tl.maximum(length, _lengths(other_spans_ptr, sequences, exists, PADDED))
    short = exists & (longest <= SHORT)
    if PADDED:
        n_long = tl.zeros_like(length)
        n_medium = tl.where(exists & (longest > SHORT), width_tiles, 0)
    else:
        n_long = tl.where(longest > TILE, tl.cdiv(length, TILE), 0)
        n_medium = ((longest > SHORT) & (longest <= TILE)).to(tl.int32)
    return length, n_long, n_medium, short.to(tl.int32)


@triton.jit
def _lengths(spans_ptr, sequences, exists, PADDED: tl.constexpr):
    length = tl.load(spans_ptr + sequences, mask=exists, other=0)
    if PADDED:
        return length
    else:
        return tl.load(spans_ptr + sequences + 1, mask=exists, other=0) - length


@triton.jit
def _fill_part(entries_ptr, first, end, BLOCK: tl.constexpr):
    """(-1, 0) into entries [first, end), shared among all programs."""
    for start in tl.range(first + tl.program_id(0) * BLOCK, end, tl.num_programs(0) * BLOCK):
        places = start + tl.arange(0, BLOCK)
        empty = tl.full((BLOCK,), -1, tl.int32)
        tl.store(entries_ptr + 2 * places, empty, mask=places < end)
        tl.store(entries_ptr + 2 * places + 1, empty + 1, mask=places < end)


@triton.jit(do_not_specialize=["n_sequences", "n_long", "n_medium", "n_short", "width_tiles"])
def _attention_schedule_kernel(
    spans_ptr, other_spans_ptr,                 # in:  cu_seqlens [B + 1], PADDED: lengths [B]; of k, for q's list
    entries_ptr,                                # out: [n_long + n_medium + n_short, 2]
    n_sequences, n_long, n_medium, n_short, width_tiles,
    PADDED: tl.constexpr, CROSS: tl.constexpr, TILE: tl.constexpr, SHORT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The entries of BLOCK_M sequences. Nothing is sorted: an entry's index is the number of entries before it."""
    mine = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    length, long, medium, short = _entries_in_parts(
        spans_ptr, other_spans_ptr, mine, n_sequences, width_tiles, PADDED, CROSS, TILE, SHORT
    )

    long_before, medium_before, short_before = tl.zeros_like(long), tl.zeros_like(long), tl.zeros_like(long)
    all_long, all_medium, all_short = n_long * 0, n_long * 0, n_long * 0
    for first in tl.range(0, n_sequences, BLOCK_N):
        others = first + tl.arange(0, BLOCK_N)
        length_other, long_other, medium_other, short_other = _entries_in_parts(
            spans_ptr, other_spans_ptr, others, n_sequences, width_tiles, PADDED, CROSS, TILE, SHORT
        )
        same = length_other[None, :] == length[:, None]
        before = (length_other[None, :] > length[:, None]) | (same & (others[None, :] < mine[:, None]))
        long_before += tl.sum(tl.where(before, long_other[None, :], 0), 1)
        medium_before += tl.sum(tl.where(before, medium_other[None, :], 0), 1)
        short_before += tl.sum(tl.where(before, short_other[None, :], 0), 1)
        all_long += tl.sum(long_other, 0)
        all_medium += tl.sum(medium_other, 0)
        all_short += tl.sum(short_other, 0)

    # a sequence has entries in one part only
    end_long, end_medium, end = n_long, n_long + n_medium, n_long + n_medium + n_short
    place = tl.where(short > 0, end_medium + short_before, tl.where(medium > 0, end_long + medium_before, long_before))
    limit = tl.where(short > 0, end, tl.where(medium > 0, end_medium, end_long))
    count = long + medium + short
    for tile in tl.range(0, tl.max(count, 0)):
        mask = (tile < count) & (place + tile < limit)
        tl.store(entries_ptr + 2 * (place + tile), mine, mask=mask)
        tl.store(entries_ptr + 2 * (place + tile) + 1, tl.zeros_like(mine) + tile, mask=mask)

    _fill_part(entries_ptr, all_long, end_long, BLOCK_N)
    _fill_part(entries_ptr, end_long + all_medium, end_medium, BLOCK_N)
    _fill_part(entries_ptr, end_medium + all_short, end, BLOCK_N)


# A program makes 4,096 comparisons in a step, 32 in each lane. A thousand sequences need 32 programs of 8 steps.
BLOCK_M, BLOCK_N = 32, 128


@functools.lru_cache(4)
def _plan(padded: bool, cross: bool) -> Plan:
    constants = {
        "PADDED": padded, "CROSS": cross, "TILE": TILE, "SHORT": SHORT, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N
    }  # fmt: skip
    return Plan(
        _attention_schedule_kernel, "spans_ptr other_spans_ptr entries_ptr",
        "n_sequences n_long n_medium n_short width_tiles", constants, num_warps=4,
    )  # fmt: skip


def _launch(
    spans: Tensor, other_spans: Tensor | None, n_long: int, n_medium: int, n_short: int, size: int, padded: bool
) -> Tensor:
    entries = spans.new_empty((n_long + n_medium + n_short, 2))
    if entries.shape[0] == 0:
        return entries
    spans, cross = spans.contiguous(), other_spans is not None
    other_spans = other_spans.contiguous() if cross else spans
    sequences = spans.shape[0] - (not padded)
    _plan(padded, cross)(
        (max(cdiv(sequences, BLOCK_M), 1),), (spans, other_spans, entries),
        (sequences, n_long, n_medium, n_short, cdiv(size, TILE)),
    )  # fmt: skip
    return entries


_schedule_op = register(
    "attention_schedule(Tensor spans, Tensor? other_spans, SymInt n_long, SymInt n_medium, SymInt n_short, "
    "SymInt size, bool padded) -> Tensor",
    launch=_launch,
    fake=lambda spans, other_spans, n_long, n_medium, n_short, size, padded: spans.new_empty(
        (n_long + n_medium + n_short, 2)
    ),
)


def attention_schedule(
    spans: Tensor,
    size: int,
    other_spans: Tensor | None = None,
    padded: bool = False,
    lengths: Sequence[int] | None = None,
    entries: Tensor | None = None,
) -> Schedule:
    """The list of tiles of a batch, made by one kernel, or from entries that the host made.

    Args:
        spans, size: cu_seqlens [B + 1] int32 and the total of tokens, or, padded, lengths [B] int32 and the width.
        other_spans: in cross-attention the spans of k for the list over q, and those of q for the list over k.
        lengths: the lengths of the packed sequences, if the host knows them and k has the same.
        entries: `attention_entries(lengths)` on the device of spans.

    Raises: ValueError unless there are B lengths and their sum is size.
    """
    sequences = spans.shape[0] - (not padded)
    if lengths is None:
        parts = most_parts(sequences, size, padded, other_spans is not None)
    elif len(lengths) != sequences or sum(lengths) != size:
        raise ValueError(
            f"expected {sequences} lengths with sum {size}, got {len(lengths)} lengths with sum {sum(lengths)}"
        )
    else:
        parts = parts_of(lengths)
    if entries is None:
        entries = _schedule_op(spans, other_spans, *parts, size, padded)
    return Schedule(entries, parts[0], parts[1], sequences, size, padded)

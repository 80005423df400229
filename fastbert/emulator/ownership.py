"""Tracks the programs and threads that wrote and read each piece of global memory in a launch.

Programs run in any order and concurrently. So two programs may not write the same address, and one may not read what
another writes; within a program there must be a barrier in between. Only tensors whose addresses reach a store are
tracked, and all tensors that share memory with them. Atomic operations are exempt.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .errors import GlobalRace, ProgramRace
from .formats import i32, i64
from .order import stamp
from .region import Region
from .state import State

_SHIFT = 42  # of the program in stamps; below it time and thread, as in shared memory
_STAMP = (1 << _SHIFT) - 1
_MANY = i32(-1)  # more than one program has read this piece


@dataclass(frozen=True)
class _Span:
    origin: int  # true address
    written: np.ndarray  # stamps of the writes, [pieces]; 0 for unwritten pieces
    read: np.ndarray  # number of the program that read the piece, from 1, [pieces]


@dataclass(frozen=True)
class _Access:
    """Pieces that the threads of an access use, one axis each."""

    region: Region
    span: _Span
    index: np.ndarray
    program: np.ndarray  # of the batch
    thread: np.ndarray
    number: np.ndarray  # of the program in the grid, from 1


class Ownership:
    """Tracks spans of memory. Tensors that share memory form one span, tracked if one of them is in `stored` (numbers
    of regions). piece: bytes of the smallest access.
    """

    def __init__(self, regions: list[Region], stored: set[int], piece: int):
        self._piece = piece
        self._spans: dict[int, _Span] = {}  # by region
        members: list[int] = []
        end = 0
        for number in sorted(range(len(regions)), key=lambda n: regions[n].start):
            if regions[number].start >= end:
                self._add(regions, members, stored)
                members, end = [], 0
            members.append(number)
            end = max(end, regions[number].end)
        self._add(regions, members, stored)

    def _add(self, regions: list[Region], members: list[int], stored: set[int]) -> None:
        if not stored.isdisjoint(members):
            origin = regions[members[0]].origin
            pieces = -(-(max(regions[n].end for n in members) - origin) // self._piece)
            span = _Span(origin, np.zeros(pieces, i64), np.zeros(pieces, i32))
            self._spans |= dict.fromkeys(members, span)

    def read(self, S: State, region: int, offset: np.ndarray, size: int, mask) -> None:
        """Records a read. offset: bytes from the region's origin, [programs, threads]."""
        if region not in self._spans:
            return
        access = self._access(S, region, offset, size, mask)
        self._expect_own(S, access, "reads")
        read = access.span.read
        before = read.take(access.index)
        read[access.index] = np.where((before == 0) | (before == access.number), access.number, _MANY)
        several = read.take(access.index) != access.number
        if several.any():
            read[access.index[several]] = _MANY

    def write(self, S: State, region: int, offset: np.ndarray, size: int, mask) -> bool:
        """Records a write; returns whether several threads of a program write the same piece at once."""
        if region not in self._spans:
            return False
        access = self._access(S, region, offset, size, mask)
        self._expect_own(S, access, "writes")
        read = access.span.read.take(access.index)
        self._expect_one_program(access, np.where(read == 0, access.number, read), "writes", "read")
        new = (access.number << _SHIFT) | stamp(S.order.now, access.thread)
        access.span.written[access.index] = new
        back = access.span.written.take(access.index)
        self._expect_one_program(access, back >> _SHIFT, "writes", "writes too")
        return bool((back != new).any())

    def _access(self, S: State, region: int, offset: np.ndarray, size: int, mask) -> _Access:
        span, each = self._spans[region], max(size // self._piece, 1)
        place = offset + (S.memory.regions[region].origin - span.origin)
        program = np.broadcast_to(np.arange(S.count)[:, None], S.shape)
        thread = np.broadcast_to(np.arange(S.threads), S.shape)
        if mask is not None:
            place, program, thread = place[mask], program[mask], thread[mask]
        index = (place.reshape(-1, 1) // self._piece + np.arange(each)).reshape(-1)
        program, thread = program.repeat(each), thread.repeat(each)
        return _Access(S.memory.regions[region], span, index, program, thread, program + (S.first + 1))

    def _expect_own(self, S: State, access: _Access, does: str) -> None:
        """Raises if another program wrote a piece of the access, or another thread did without a barrier in between."""
        stamps = access.span.written.take(access.index)
        self._expect_one_program(access, np.where(stamps == 0, access.number, stamps >> _SHIFT), does, "wrote")
        stamps &= _STAMP
        at = np.flatnonzero(stamps >= S.order.limit[access.program])
        if at.size:
            at = at[S.order.unknown(stamps[at], access.program[at], access.thread[at])]
        if at.size:
            raise GlobalRace(
                f"thread {access.thread[at[0]]} of program {access.number[at[0]] - 1} {does} "
                f"{self._place(access, at[0])}, which thread {stamps[at[0]] & 1023} wrote with no barrier between"
            )

    def _expect_one_program(self, access: _Access, numbers: np.ndarray, does: str, other_did: str) -> None:
        foreign = np.flatnonzero(numbers != access.number)
        if foreign.size:
            at = int(foreign[0])
            other = "another program" if numbers[at] < 1 else f"program {numbers[at] - 1}"
            raise ProgramRace(
                f"program {access.number[at] - 1} {does} {self._place(access, at)}, which {other} {other_did}"
            )

    def _place(self, access: _Access, at: int) -> str:
        byte = access.span.origin + int(access.index[at]) * self._piece - access.region.start
        return f"byte {max(byte, 0)} of {access.region.name}"

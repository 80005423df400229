"""Barriers: bar.sync of a CTA, and mbarriers in shared memory.

A thread stops at a `bar.sync` until all threads of its CTA (or as many as the instruction says) are at one of the same
number, and at an `mbarrier.try_wait` until the phase is over. The scheduler asks `arrived` and `phase_over`; the
instructions themselves run for the threads that may go on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .errors import BarrierMisuse, InvalidOperand
from .formats import i64
from .ptx import Address, Immediate, Instruction, Operand, Register, Sink
from .translate import Emitter, refuse, translates

if TYPE_CHECKING:
    from .machine import Machine


@dataclass
class MBarrier:
    """One address in the shared memory of every program; arrays are [programs]."""

    valid: np.ndarray  # bool
    expected: np.ndarray  # arrivals of a phase
    pending: np.ndarray  # arrivals that this phase still waits for
    bytes: np.ndarray  # that this phase still waits for
    phase: np.ndarray  # number of phases that are over


class Barriers:
    def __init__(self, machine: Machine):
        self.mbarriers: dict[int, MBarrier] = {}
        self.count = machine.count

    # ---- bar.sync

    def sync(self, S: Machine, mask) -> None:
        """All threads of the mask have met."""

    def warp_sync(self, S: Machine, mask) -> None:
        """The threads of the mask have met, warp by warp."""

    # ---- mbarriers

    def init(self, S: Machine, address, count, mask) -> None:
        count = S.full(count)
        for at, programs, lanes in self._groups(S, address, mask):
            if at % 8:
                raise InvalidOperand(f"an mbarrier at byte {at} of shared memory, no multiple of 8")
            S.shared.locate(S, np.int64(at), 8, None)
            barrier = self.mbarriers.setdefault(at, self._new())
            wanted = (count * lanes).max(1).astype(i64)
            if (wanted[programs] < 1).any():
                raise InvalidOperand("an mbarrier needs a count of at least 1")
            barrier.valid[programs] = True
            barrier.expected[programs] = barrier.pending[programs] = wanted[programs]
            barrier.bytes[programs] = barrier.phase[programs] = 0

    def invalidate(self, S: Machine, address, mask) -> None:
        for at, programs, _ in self._groups(S, address, mask):
            self._valid(at, programs).valid[programs] = False

    def arrive(self, S: Machine, address, count, expect_bytes, mask) -> None:
        count, expect_bytes = S.full(count).astype(i64), S.full(expect_bytes).astype(i64)
        for at, programs, lanes in self._groups(S, address, mask):
            barrier = self._valid(at, programs)
            barrier.bytes += (expect_bytes * lanes).sum(1)
            barrier.pending -= (count * lanes).sum(1)
            if (barrier.pending[programs] < 0).any():
                raise BarrierMisuse(f"more arrivals than the mbarrier at byte {at} expects in a phase")
            self._complete(barrier, programs)

    def transferred(self, at: int, programs: np.ndarray, size: int) -> None:
        """`size` bytes of a bulk copy have arrived for programs (a mask)."""
        barrier = self._valid(at, programs)
        barrier.bytes[programs] -= size
        self._complete(barrier, programs)

    def phase_over(self, S: Machine, address, parity, mask) -> np.ndarray:
        """For each thread of the mask: is the phase of this parity over?"""
        parity = S.full(parity).astype(i64)
        over = np.zeros(S.shape, bool)
        for at, programs, lanes in self._groups(S, address, mask):
            phase = self._valid(at, programs).phase
            over |= lanes & ((phase[:, None] & 1) != parity)
        return over

    def waited(self, S: Machine, address, mask) -> np.ndarray:
        """The threads of the mask have seen a phase end: what came with it is there for them."""
        for at, programs, _ in self._groups(S, address, mask):
            S.copies.deliver(S, at, programs, self.mbarriers[at].phase)
        return np.True_

    def _complete(self, barrier: MBarrier, programs: np.ndarray) -> None:
        over = programs & (barrier.pending == 0) & (barrier.bytes == 0)
        barrier.phase += over
        barrier.pending[over] = barrier.expected[over]

    def _new(self) -> MBarrier:
        return MBarrier(np.zeros(self.count, bool), *(np.zeros(self.count, i64) for _ in range(4)))

    def _valid(self, at: int, programs: np.ndarray) -> MBarrier:
        barrier = self.mbarriers.get(at)
        if barrier is None or not barrier.valid[programs].all():
            raise BarrierMisuse(f"no mbarrier was initialised at byte {at} of shared memory")
        return barrier

    @staticmethod
    def _groups(S: Machine, address, mask) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """(address, programs that use it, threads that do) for each address among the threads of the mask."""
        address = S.full(address)
        active = np.ones(S.shape, bool) if mask is None else S.full(mask)
        groups = []
        for at in np.unique(address[active]).tolist():
            lanes = active & (address == at)
            groups.append((at, lanes.any(1), lanes))
        return groups


def evaluate(S: Machine, R: list, operand: Operand):
    """The value of an operand at the start of a block."""
    match operand:
        case Register(index=index):
            return R[index]
        case Immediate(value=value):
            return np.uint32(value & 0xFFFFFFFF)
        case Address(base=base, offset=offset):
            return evaluate(S, R, base) + np.uint32(offset & 0xFFFFFFFF)
    raise InvalidOperand(f"cannot wait on {operand}")


@translates("bar", "barrier")
def _bar(emit: Emitter, i: Instruction) -> None:
    if "warp" in i.parts:
        emit.line(f"S.barriers.warp_sync(S, {emit.mask})")
    elif "sync" in i.parts:
        if i.guard is not None or len(i.operands) != 1 or i.operands[0] != Immediate(0):
            refuse(i)
        emit.line(f"S.barriers.sync(S, {emit.mask})")
    else:
        refuse(i)


@translates("mbarrier")
def _mbarrier(emit: Emitter, i: Instruction) -> None:
    operation, operands = i.parts[1], i.operands
    if operation == "init":
        emit.line(f"S.barriers.init(S, {emit.address(operands[0], 32)}, {emit.read(operands[1], 'u32')}, {emit.mask})")
    elif operation == "inval":
        emit.line(f"S.barriers.invalidate(S, {emit.address(operands[0], 32)}, {emit.mask})")
    elif operation == "arrive" and isinstance(operands[0], Sink):
        given = emit.read(operands[2], "u32") if len(operands) > 2 else "u32(1)"
        count, size = ("u32(1)", given) if "expect_tx" in i.parts else (given, "u32(0)")
        emit.line(f"S.barriers.arrive(S, {emit.address(operands[1], 32)}, {count}, {size}, {emit.mask})")
    elif operation in ("try_wait", "test_wait") and "parity" in i.parts and i.guard is None:
        emit.write(operands[0], f"S.barriers.waited(S, {emit.address(operands[1], 32)}, {emit.mask})")
    else:
        refuse(i)


@translates("fence", "membar", "griddepcontrol", "nanosleep")
def _fence(emit: Emitter, i: Instruction) -> None:
    """Memory is in order here; see `fence.proxy`."""


_fence.can_fail = False

"""Barriers: bar.sync of a CTA, and mbarriers in shared memory.

A thread stops at a `bar.sync` until all threads of its CTA (or the number in the instruction) have reached a barrier
with the same number, and at an `mbarrier.try_wait` until the phase is over. The scheduler calls `arrived` and
`phase_over`; the instructions then run for the threads that may proceed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .errors import BarrierMisuse, InvalidOperand, Misaligned, SharedRace
from .formats import i64
from .order import BULK
from .ptx import Address, Immediate, Instruction, Operand, Register, Sink
from .state import State
from .translate import Emitter, refuse, translates
from .warp import expect_named_lanes


@dataclass
class MBarrier:
    """One address in the shared memory of every program; arrays are [programs]."""

    valid: np.ndarray  # bool
    expected: np.ndarray  # arrivals per phase
    pending: np.ndarray  # arrivals that the current phase still waits for
    bytes: np.ndarray  # bytes that the current phase still waits for
    phase: np.ndarray  # number of completed phases
    code: int  # code in the stamps of bytes from bulk copies that report here
    maker: np.ndarray  # warp that initialised the mbarrier
    made: np.ndarray  # time of the initialisation
    last_use: np.ndarray  # time of each warp's last use, [programs, warps]
    arriving: np.ndarray  # what the threads that arrived in this phase know, [programs, columns of the order]
    arrived: np.ndarray  # the same for completed phases


class Barriers:
    def __init__(self, machine: State):
        self.mbarriers: dict[int, MBarrier] = {}  # by address

    # ---- bar.sync

    def sync(self, S: State, mask) -> None:
        """bar.sync: all threads of the mask's programs have arrived."""
        S.order.meet(np.ones(S.count, bool) if mask is None else S.full(mask).any(1))

    def warp_sync(self, S: State, mask) -> None:
        """bar.warp.sync: the threads of the mask have arrived, warp by warp."""
        S.order.meet_in_warp(S.warps_of(mask))

    # ---- mbarriers

    def init(self, S: State, address, count, mask) -> None:
        count = S.full(count)
        for at, programs, lanes in self._groups(S, address, mask):
            if at % 8:
                raise Misaligned(f"an mbarrier at byte {at} of shared memory, no multiple of 8")
            if (lanes.sum(1) > 1).any():
                raise BarrierMisuse(f"{lanes.sum(1).max()} threads initialise the mbarrier at byte {at} at once")
            place = S.shared.locate(S, np.uint32(at), 8, None)
            S.shared.shadow.write(place, 8, lanes)
            if at not in self.mbarriers:
                self.mbarriers[at] = self._new(S)
            barrier, wanted = self.mbarriers[at], (count * lanes).max(1).astype(i64)
            if (wanted[programs] < 1).any():
                raise InvalidOperand("an mbarrier needs a count of at least 1")
            S.shared.shadow.hold_mbarrier(place[:, 0], programs)
            barrier.valid[programs] = True
            barrier.expected[programs] = barrier.pending[programs] = wanted[programs]
            barrier.bytes[programs] = barrier.phase[programs] = 0
            barrier.maker[programs] = lanes.argmax(1)[programs] // 32
            barrier.made[programs] = S.order.now
            barrier.last_use[programs] = 0

    def invalidate(self, S: State, address, mask) -> None:
        for at, programs, lanes in self._groups(S, address, mask):
            barrier, thread = self.used(S, at, programs, lanes), lanes.argmax(1)
            known = S.order.known[np.arange(S.count), thread // 32, : S.warps]
            unknown = programs[:, None] & (barrier.last_use > known)
            unknown[np.arange(S.count), thread // 32] = False
            if unknown.any():
                warp = int(np.argwhere(unknown)[0, 1])
                raise SharedRace(f"the mbarrier at byte {at} is given up while warp {warp} may still wait on it")
            self._expect_finished(at, barrier, programs)
            barrier.valid[programs] = False
            place = S.shared.locate(S, np.uint32(at), 8, None)
            S.shared.shadow.free_mbarrier(place[:, 0], programs, thread)

    def arrive(self, S: State, address, count, expect_bytes, mask) -> None:
        count, expect_bytes = S.full(count).astype(i64), S.full(expect_bytes).astype(i64)
        for at, programs, lanes in self._groups(S, address, mask):
            barrier = self.used(S, at, programs, lanes)
            barrier.arriving = _later(barrier.arriving, S.order.release(S.warps_of(lanes)))
            barrier.bytes += (expect_bytes * lanes).sum(1)
            barrier.pending -= (count * lanes).sum(1)
            if (barrier.pending[programs] < 0).any():
                raise BarrierMisuse(f"more arrivals than the mbarrier at byte {at} expects in a phase")
            self._complete(barrier, programs)

    def transferred(self, at: int, programs: np.ndarray, size: int) -> None:
        """`size` bytes of a bulk copy have arrived for these programs (a mask)."""
        barrier = self.mbarriers[at]
        barrier.bytes[programs] -= size
        self._complete(barrier, programs)

    def phase_over(self, S: State, address, parity, mask) -> np.ndarray:
        """For each thread of the mask: whether the phase of this parity is over."""
        parity = S.full(parity).astype(i64)
        over = np.zeros(S.shape, bool)
        for at, programs, lanes in self._groups(S, address, mask):
            phase = self.used(S, at, programs, lanes).phase
            over |= lanes & ((phase[:, None] & 1) != parity)
        return over

    def waited(self, S: State, address, mask) -> np.ndarray:
        """The threads of the mask have seen a phase end, so they may use the data that it signals."""
        for at, programs, lanes in self._groups(S, address, mask):
            barrier = self.mbarriers[at]
            S.order.tick()
            came = S.copies.deliver(S, at, programs, barrier.phase)
            came |= S.tensor.deliver(S, at, programs, barrier.phase, barrier.code)
            barrier.arrived = _later(barrier.arrived, np.zeros((S.count, barrier.code - BULK + 1), i64))
            barrier.arrived[came, barrier.code - BULK] = S.order.now
            S.order.acquire(S.warps_of(lanes), barrier.arrived)
        return np.True_

    def used(self, S: State, at: int, programs: np.ndarray, lanes: np.ndarray) -> MBarrier:
        """The mbarrier of these programs at an address. Raises if its initialisation is not visible to the threads."""
        barrier = self.mbarriers.get(at)
        if barrier is None or not barrier.valid[programs].all():
            raise BarrierMisuse(f"no mbarrier was initialised at byte {at} of shared memory")
        warps = S.warps_of(lanes) & programs[:, None]
        known = S.order.known[np.arange(S.count), :, barrier.maker]
        unknown = warps & (known < barrier.made[:, None])
        unknown[np.arange(S.count), barrier.maker] = False
        if unknown.any():
            program, warp = np.argwhere(unknown)[0]
            raise SharedRace(
                f"warp {warp} uses the mbarrier at byte {at}, which warp {barrier.maker[program]} initialised with no "
                "barrier between"
            )
        barrier.last_use[warps] = S.order.now
        return barrier

    def expect_finished(self) -> None:
        """Raises at the end of the programs if an mbarrier still waits for bytes or arrivals."""
        for at, barrier in self.mbarriers.items():
            self._expect_finished(at, barrier, barrier.valid)

    @staticmethod
    def _expect_finished(at: int, barrier: MBarrier, programs: np.ndarray) -> None:
        if (barrier.bytes[programs] != 0).any():
            left = int(barrier.bytes[programs][barrier.bytes[programs] != 0][0])
            raise BarrierMisuse(f"the mbarrier at byte {at} is left while it waits for {left} bytes")
        if (barrier.pending[programs] != barrier.expected[programs]).any():
            raise BarrierMisuse(f"the mbarrier at byte {at} is left with a part of its arrivals")

    @staticmethod
    def _complete(barrier: MBarrier, programs: np.ndarray) -> None:
        over = programs & (barrier.pending == 0) & (barrier.bytes == 0)
        barrier.phase += over
        barrier.pending[over] = barrier.expected[over]
        barrier.arrived = _later(barrier.arrived, np.where(over[:, None], barrier.arriving, 0))
        barrier.arriving = np.where(over[:, None], 0, barrier.arriving)

    @staticmethod
    def _new(S: State) -> MBarrier:
        numbers = [np.zeros(S.count, i64) for _ in range(6)]
        nothing = np.zeros((S.count, S.warps), i64)
        code = BULK + S.order.add_column()
        return MBarrier(
            np.zeros(S.count, bool), *numbers[:4], code, *numbers[4:], nothing.copy(), nothing.copy(), nothing.copy()
        )

    @staticmethod
    def _groups(S: State, address, mask) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """(address, its programs, its threads) for each address that threads of the mask use."""
        address = S.full(address)
        active = np.ones(S.shape, bool) if mask is None else S.full(mask)
        groups = []
        for at in np.unique(address[active]).tolist():
            lanes = active & (address == at)
            groups.append((at, lanes.any(1), lanes))
        return groups


def _later(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The element-wise maximum of two arrays of times; missing columns of the narrower one count as 0."""
    columns = max(a.shape[1], b.shape[1])
    return np.maximum(*(np.pad(x, ((0, 0), (0, columns - x.shape[1]))) for x in (a, b)))


def evaluate(S: State, R: list, operand: Operand):
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
        expect_named_lanes(emit, i)
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
    """Only barriers order memory between threads in this model; a proxy fence orders it for asynchronous units."""
    if i.opcode.startswith("fence.proxy.async"):
        emit.line(f"S.order.fence(S.warps_of({emit.mask}))")

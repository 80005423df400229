"""Asynchronous copies: cp.async, and bulk copies of tensor boxes (TMA).

The data of a copy is written to shared memory only when a thread has waited for the copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .errors import InvalidOperand, Misaligned, MissingWait, OutOfBounds, UnknownInstruction
from .formats import i32, i64, u8, u32
from .ptx import Immediate, Instruction
from .state import State
from .translate import Emitter, refuse, translates

SWIZZLE_SPANS = {0: 0, 1: 32, 2: 64, 3: 128}  # bytes whose 16-byte pieces change places, by the descriptor's mode


@dataclass(frozen=True)
class TensorDescriptor:
    """A tensor map: sizes and strides in elements, outermost first; the innermost stride is 1."""

    region: int  # of global memory
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    element: int  # bytes
    box: tuple[int, ...]
    swizzle: int  # see SWIZZLE_SPANS
    fill: int = 0  # bits of an element outside the tensor


@dataclass
class _ThreadCopy:
    place: np.ndarray  # [programs, threads] in shared memory
    size: int  # bytes
    data: np.ndarray  # [programs, threads, size] uint8
    group: int | np.ndarray  # of each thread
    pending: np.ndarray  # [programs, threads]


@dataclass
class _BulkCopy:
    barrier: int
    code: int  # of the mbarrier in stamps
    phase: np.ndarray  # [programs] that it belongs to
    pending: np.ndarray  # [programs]
    place: np.ndarray  # [programs, pieces] of 16 bytes each
    data: np.ndarray  # [programs, pieces] complex128


class AsyncCopies:
    def __init__(self, machine: State):
        self._copies: list[_ThreadCopy] = []
        self._committed: int | np.ndarray = 0
        self._bulk: list[_BulkCopy] = []

    # ---- cp.async: groups of each thread

    def start(self, S: State, target, source, size: int, source_size, mask) -> None:
        """Starts a copy of `size` bytes to shared memory. If `source_size` is 0 it writes zeros and reads nothing."""
        if mask is not None and not np.any(mask):
            return
        place = S.shared.locate(S, target, size, mask)
        reads = mask
        if source_size is not None:
            source_size = S.full(source_size)
            active = source_size if mask is None else source_size[S.full(mask)]
            if not np.isin(active, (0, size)).all():
                raise UnknownInstruction("cp.async that reads a part of its bytes")
            reads = source_size != 0 if mask is None else mask & (source_size != 0)
        words = S.memory.load(S, source, 32, size // 4, reads)
        data = np.stack(words, -1)
        if reads is not None:
            data = np.where(S.full(reads)[..., None], data, u32(0))
        pending = np.ones(S.shape, bool) if mask is None else S.full(mask).copy()
        S.shared.shadow.fly(place, size, pending, None)
        self._copies.append(_ThreadCopy(place, size, np.ascontiguousarray(data).view(u8), self._committed, pending))

    def commit(self, S: State, mask) -> None:
        self._committed = self._committed + (1 if mask is None else S.full(mask).astype(i64))

    def wait(self, S: State, allowed: int | None, mask) -> None:
        """Completes all but the newest `allowed` groups of these threads; None completes all, committed or not."""
        for copy in self._copies:
            done = copy.pending if allowed is None else copy.pending & (copy.group < self._committed - allowed)
            done = done if mask is None else done & mask
            if done.any():
                S.shared.shadow.land(copy.place, copy.size, done)
                view = S.shared.view(copy.size * 8)
                view[copy.place[done] // copy.size] = copy.data[done].view(view.dtype)[..., 0]
                copy.pending = copy.pending & ~done
        self._copies = [copy for copy in self._copies if copy.pending.any()]

    # ---- bulk copies

    def load_box(self, S: State, target, descriptor, coordinates: list, barrier, mask) -> None:
        """Starts a copy of a tensor's box to shared memory for every thread of the mask. An mbarrier counts the
        bytes."""
        active = np.ones(S.shape, bool) if mask is None else S.full(mask)
        order = active.cumsum(1)
        for nth in range(1, int(order.max()) + 1):
            chosen = active & (order == nth)
            programs, lane = chosen.any(1), chosen.argmax(1)
            pick = lambda x: S.full(x)[np.arange(S.count), lane]  # noqa: B023, E731
            at = np.stack([pick(c).astype(u32).view(i32).astype(i64) for c in coordinates[::-1]], 1)
            self._load_boxes(
                S, pick(target).astype(i64), pick(descriptor), at, pick(barrier).astype(i64), programs, lane
            )

    def _load_boxes(self, S: State, target, descriptor, coordinates, barrier, programs, thread) -> None:
        """One box a program: all arguments are [programs]."""
        for address in np.unique(descriptor[programs]).tolist():
            box = S.descriptor(address)
            for at in np.unique(barrier[programs]).tolist():
                here = programs & (descriptor == address) & (barrier == at)
                if here.any():
                    self._start_box(S, box, target, coordinates, at, here, thread)

    def _start_box(self, S: State, box: TensorDescriptor, target, coordinates, at: int, programs, thread) -> None:
        barrier = S.barriers.used(S, at, programs, np.arange(S.threads) == thread[:, None])
        values, place = self._read_box(S, box, coordinates), self._box_places(S, box, target, programs)
        everywhere = np.broadcast_to(programs[:, None], place.shape)
        S.shared.shadow.fly(place, 16, everywhere, thread[:, None], np.int64(barrier.code))
        self._bulk.append(_BulkCopy(at, barrier.code, barrier.phase.copy(), programs.copy(), place, values))
        S.barriers.transferred(at, programs, int(np.prod(box.box)) * box.element)

    @staticmethod
    def _read_box(S: State, box: TensorDescriptor, coordinates: np.ndarray) -> np.ndarray:
        """[programs, pieces] of 16 bytes; what lies outside the tensor is filled."""
        rank, index, inside = len(box.box), np.int64(0), np.True_
        for axis in range(rank):
            along = (1,) + (1,) * axis + (-1,) + (1,) * (rank - axis - 1)
            at = coordinates[:, axis].reshape(-1, *(1,) * rank) + np.arange(box.box[axis]).reshape(along)
            ok = (at >= 0) & (at < box.shape[axis])
            inside = inside & ok
            index = index + np.where(ok, at, 0) * box.strides[axis]
        kind = np.dtype(f"u{box.element}")
        view = S.memory.view(box.region, kind)
        start = (box.address - S.memory.regions[box.region].origin) // box.element
        values = np.where(inside, view.take(np.where(inside, index, 0) + start), kind.type(box.fill))
        return np.ascontiguousarray(values).reshape(S.count, -1).view(np.complex128)

    @staticmethod
    def _box_places(S: State, box: TensorDescriptor, target: np.ndarray, programs) -> np.ndarray:
        """[programs, pieces] places in shared memory, swizzled."""
        row, span = box.box[-1] * box.element, SWIZZLE_SPANS[box.swizzle]
        if row % 16 or (span and row != span):
            raise InvalidOperand(f"a box of rows of {row} bytes swizzled over {span}")
        size = int(np.prod(box.box)) * box.element
        target = np.where(programs, target, 0)
        if (target % 128).any():
            raise Misaligned("a bulk copy to shared memory at an address that is no multiple of 128")
        if target.max() + size > S.shared.size:
            raise OutOfBounds(f"a bulk copy of {size} bytes to byte {target.max()} of {S.shared.size} of shared memory")
        return swizzle(target[:, None] + np.arange(0, size, 16), span) + S.shared.base

    def deliver(self, S: State, barrier: int, programs: np.ndarray, phase: np.ndarray) -> np.ndarray:
        """Writes the data of copies whose phase of an mbarrier is before `phase`, for programs (a mask) that have
        waited. Returns the programs that received data."""
        came = np.zeros(S.count, bool)
        for copy in self._bulk:
            if copy.barrier == barrier:
                done = copy.pending & programs & (copy.phase < phase)
                S.shared.shadow.land(
                    copy.place, 16, np.broadcast_to(done[:, None], copy.place.shape), np.int64(copy.code)
                )
                S.shared.view(128)[copy.place[done] // 16] = copy.data[done]
                copy.pending &= ~done
                came |= done
        self._bulk = [copy for copy in self._bulk if copy.pending.any()]
        return came

    def expect_none(self) -> None:
        """Raises if copies are in flight at the end of the programs, when their shared memory is gone."""
        if self._copies:
            raise MissingWait("a program ends before it has waited for its cp.async")
        if self._bulk:
            raise MissingWait("a program ends before it has waited for its bulk copies")


def swizzle(address: np.ndarray, span: int) -> np.ndarray:
    """Byte addresses with the 16-byte pieces of each `span` bytes exchanged by the number of the row of 128 bytes."""
    return address ^ (((address >> 7) & (span // 16 - 1)) << 4) if span else address


@translates("cp")
def _cp(emit: Emitter, i: Instruction) -> None:
    if i.opcode == "cp.async.commit_group":
        emit.line(f"S.copies.commit(S, {emit.mask})")
    elif i.opcode == "cp.async.wait_group" and isinstance(i.operands[0], Immediate):
        emit.line(f"S.copies.wait(S, {i.operands[0].value}, {emit.mask})")
    elif i.opcode == "cp.async.wait_all":
        emit.line(f"S.copies.wait(S, None, {emit.mask})")
    elif i.parts[2] in ("ca", "cg") and len(i.operands) in (3, 4):
        source_size = emit.read(i.operands[3], "u32") if len(i.operands) == 4 else "None"
        target, source = emit.address(i.operands[0], 32), emit.address(i.operands[1], 64)
        emit.line(f"S.copies.start(S, {target}, {source}, {i.operands[2].value}, {source_size}, {emit.mask})")
    elif "tensor" in i.parts and i.parts[5].startswith("shared") and "mbarrier::complete_tx::bytes" in i.opcode:
        if len(i.operands) != 3 or {"tile", "im2col", "multicast"} & set(i.parts) - {"tile"}:
            refuse(i)
        tensor = i.operands[1]
        coordinates = ", ".join(emit.read(c, "u32") for c in tensor.coordinates)
        target, barrier = emit.address(i.operands[0], 32), emit.address(i.operands[2], 32)
        descriptor = emit.read(tensor.descriptor, "u64")
        emit.line(f"S.copies.load_box(S, {target}, {descriptor}, [{coordinates}], {barrier}, {emit.mask})")
    else:
        refuse(i)

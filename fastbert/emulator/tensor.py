"""Tensor memory of Blackwell, and the matrix unit that works on it (tcgen05), for one program at a time.

Tensor memory has 128 lanes of 512 columns of 32 bits; an address is (lane << 16) + column. Warp w reaches the 32 lanes
from 32 (w % 4). A product D = A B + D is started by one thread: B lies in shared memory, laid out as for wgmma, A there
or in tensor memory, D in tensor memory. With m = 128 row r of D and of A is lane r; with m = 64 it is lane
32 (r / 16) + r % 16. Two 16-bit elements of A share a column.

Registers that a `tcgen05.ld` fills may be used at once; the memory that it reads may not be written before
`tcgen05.wait::ld`.
PTX ISA, 9.7.16.6.4.5: "an intra-thread ordering through true register dependency will be respected", which "does not
imply any other form of ordering".

Products run one after the other, asynchronously to the threads. A thread that has waited for the mbarrier of a
`tcgen05.commit` may read D, and may overwrite the operands of the products before the commit. Sums are taken as by
wgmma.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .errors import DivergentWarp, InvalidOperand, MissingWait, OutOfBounds, TensorMemoryMisuse
from .formats import f32, f64, i64, u16, u32, u64
from .matrix import halves_to_f32
from .ptx import Address, Immediate, Instruction, Vector
from .shadow import Shadow
from .state import State
from .translate import Emitter, refuse, translates
from .warp import expect_whole_warps
from .warpgroup import layout

LANES, COLUMNS = 128, 512
_STRIDE = LANES * COLUMNS * 4  # bytes of a program
_K = 16
_KINDS = {0: "f16", 1: "bf16"}  # of A and B, in the instruction descriptor


@dataclass
class _Product:
    """One instruction in flight. Arrays are [n], over the programs that run it."""

    programs: np.ndarray
    warp: np.ndarray  # that started it
    result: np.ndarray  # pieces of D, [n, pieces]
    shared: list[np.ndarray]  # pieces of operands in shared memory
    operand: np.ndarray | None  # pieces of A in tensor memory
    pending: np.ndarray
    barrier: np.ndarray  # address of the mbarrier that reports it; -1 before the commit
    phase: np.ndarray  # of that mbarrier


@dataclass
class _Move:
    """A tcgen05.ld or st that some threads have not waited for."""

    place: np.ndarray  # [programs, threads * columns], bytes
    pending: np.ndarray  # the same shape


class TensorMemory:
    def __init__(self, state: State):
        self._columns = np.zeros(state.count, i64)  # allocated, from column 0
        self._products: list[_Product] = []
        self._loads: list[_Move] = []
        self._stores: list[_Move] = []
        self._state = state

    @functools.cached_property
    def _values(self) -> np.ndarray:
        return np.full((self._state.count, LANES, COLUMNS), 0xFFFFFFFF, u32)

    @functools.cached_property
    def _shadow(self) -> Shadow:
        return Shadow(self._state, self._state.count * _STRIDE, _STRIDE, 4, "tensor memory")

    @functools.cached_property
    def _issuer(self) -> np.ndarray:
        """For each piece the warp whose product wrote it last; -1 after a store."""
        return np.full(self._state.count * _STRIDE // 4, -1, np.int8)

    # ---- allocation

    def allocate(self, S: State, target, columns: int, mask) -> None:
        programs, thread = self._one_warp(S, mask, "tcgen05.alloc")
        if columns < 32 or columns & (columns - 1):
            raise InvalidOperand(f"{columns} columns of tensor memory, no power of 2 from 32")
        base = self._columns.copy()
        self._columns[programs] += columns
        if self._columns.max() > COLUMNS:
            raise TensorMemoryMisuse(f"{self._columns.max()} columns of tensor memory are allocated, it has {COLUMNS}")
        first = programs[:, None] & (np.arange(S.threads) == thread[:, None])
        S.shared.store(S, target, 32, [np.broadcast_to(base[:, None], S.shape).astype(u32)], first)

    def free(self, S: State, address, columns: int, mask) -> None:
        programs, thread = self._one_warp(S, mask, "tcgen05.dealloc")
        if any(product.pending[programs[product.programs]].any() for product in self._products):
            raise MissingWait("tensor memory is freed while a product may still write it: a wait is missing")
        if any(load.pending[programs].any() for load in self._loads):
            raise MissingWait("tensor memory is freed while a tcgen05.ld may still read it: a wait is missing")
        base = S.full(address)[np.arange(S.count), thread].astype(i64)
        if (base + columns != self._columns)[programs].any():
            raise TensorMemoryMisuse(f"{columns} columns of tensor memory are freed, which are not the last allocated")
        self._columns[programs] -= columns

    def expect_none(self) -> None:
        """Raises at the end of the programs if tensor memory is still allocated, or products are in flight."""
        if self._stores or any(product.pending.any() for product in self._products):
            raise MissingWait("a program ends before it has waited for its tensor memory")
        if self._columns.any():
            raise TensorMemoryMisuse("a program ends before it has freed its tensor memory")

    @staticmethod
    def _one_warp(S: State, mask, what: str) -> tuple[np.ndarray, np.ndarray]:
        """(programs that run this, the first thread of each). Raises unless it is one whole warp in each program."""
        expect_whole_warps(S, mask, what)
        active = np.ones(S.shape, bool) if mask is None else S.full(mask)
        if (active.sum(1) > 32).any():
            raise DivergentWarp(f"{what} by more than one warp")
        return active.any(1), active.argmax(1)

    # ---- registers

    def load(self, S: State, address, count: int, halves: int | None, mask) -> list[np.ndarray]:
        """`count` columns for each thread. halves: the lower half of a warp reads its lanes' columns from the address,
        the upper half reads the same lanes' columns, `halves` further; None: every thread has its own lane."""
        lane, column, active = self._places(S, address, count, halves, mask, "tcgen05.ld")
        place = self._bytes(S, lane, column)
        move = self._move(place.reshape(S.count, -1), self._each(active, count))
        # Triton may load the result of a product that it skipped, and ignores it; unwritten memory reads as NaN.
        self._shadow.read(move.place, 4, self._each(active, count), self._who(S, count), expect_written=False)
        self._shadow.read_goes_on(move.place[move.pending] >> 2)
        self._loads.append(move)
        words = self._values[np.arange(S.count)[:, None, None], lane[..., None], column]
        return [np.ascontiguousarray(words[..., n]) for n in range(count)]

    def store(self, S: State, address, registers: list, halves: int | None, mask) -> None:
        """Like `load`. The values are visible to others after the warp has waited."""
        count = len(registers)
        lane, column, active = self._places(S, address, count, halves, mask, "tcgen05.st")
        place = self._bytes(S, lane, column).reshape(S.count, -1)
        each = self._each(active, count)
        self._shadow.fly(place, 4, each, self._who(S, count))
        self._issuer[(place if each is None else place[each]) >> 2] = -1
        self._stores.append(self._move(place, each))
        words = np.stack([S.full(r) for r in registers], -1)
        programs = np.broadcast_to(np.arange(S.count)[:, None, None], words.shape)
        lane = np.broadcast_to(lane[..., None], words.shape)
        chosen = slice(None) if active is None else active
        self._values[programs[chosen], lane[chosen], column[chosen]] = words[chosen]

    def wait_loads(self, S: State, mask) -> None:
        expect_whole_warps(S, mask, "tcgen05.wait::ld")
        for place, done in self._waited(S, self._loads, mask):
            who = np.broadcast_to(self._who(S, place.shape[1] // S.threads), place.shape)
            self._shadow.read_is_over(place[done] >> 2, who[done])
        self._loads = [load for load in self._loads if load.pending.any()]

    def wait_stores(self, S: State, mask) -> None:
        expect_whole_warps(S, mask, "tcgen05.wait::st")
        for place, done in self._waited(S, self._stores, mask):
            self._shadow.land(place, 4, done, self._who(S, place.shape[1] // S.threads))
        self._stores = [store for store in self._stores if store.pending.any()]

    @staticmethod
    def _move(place: np.ndarray, each: np.ndarray | None) -> _Move:
        return _Move(place, np.ones(place.shape, bool) if each is None else each.copy())

    @staticmethod
    def _waited(S: State, moves: list[_Move], mask) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(places, mask of the places) of moves that the threads of the mask have now waited for."""
        for move in moves:
            columns = move.place.shape[1] // S.threads
            done = move.pending if mask is None else move.pending & S.full(mask).repeat(columns, 1)
            move.pending = move.pending & ~done
            yield move.place, done

    def _places(self, S: State, address, count: int, halves: int | None, mask, what: str):
        """(lane [programs, threads], column [programs, threads, count], mask)."""
        expect_whole_warps(S, mask, what)
        active = None if mask is None else S.full(mask)
        address = S.full(address).astype(i64)
        if active is not None:
            address = np.where(active, address, S.lane * 0)
        lane, column = address >> 16, address & 0xFFFF
        if halves is None:
            lane = lane + S.lane
        else:
            lane, column = lane + S.lane % 16, column + S.lane // 16 * halves
        column = column[..., None] + np.arange(count)
        reached = np.arange(S.threads)[None] // 32 % 4
        outside = (column.max(-1) >= self._columns[:, None]) | (lane >= LANES)
        wrong = lane // 32 != reached
        if active is not None:
            outside, wrong = outside & active, wrong & active
            lane, column = np.where(active, lane, 0), np.where(active[..., None], column, 0)
        if outside.any():
            raise OutOfBounds(
                f"{what} beyond the {int(self._columns.max())} columns of tensor memory that are allocated"
            )
        if wrong.any():
            thread = int(np.argwhere(wrong)[0, 1])
            raise InvalidOperand(f"{what}: thread {thread} accesses a lane of another warp")
        return lane, column, active

    def _bytes(self, S: State, lane: np.ndarray, column: np.ndarray) -> np.ndarray:
        start = np.arange(S.count, dtype=i64)[:, None, None] * _STRIDE
        return start + (lane[..., None] * COLUMNS + column) * 4

    @staticmethod
    def _each(mask: np.ndarray | None, count: int) -> np.ndarray | None:
        return None if mask is None else mask.repeat(count, 1)

    @staticmethod
    def _who(S: State, count: int) -> np.ndarray:
        """Codes of the accessing threads. A warp moves and waits as a whole, so its first thread stands for all."""
        return (np.arange(S.threads, dtype=i64) // 32 * 32).repeat(count)[None]

    # ---- products

    def issue(self, S: State, d, a, b, instruction, keeps, a_in_tensor_memory: bool, mask) -> None:
        """One thread of each program of the mask starts D = A B + D, or D = A B."""
        programs, thread = self._one_thread(S, mask, "tcgen05.mma")
        pick = lambda x: S.full(x)[programs, thread].astype(u64)  # noqa: E731
        operands = np.stack([pick(x) for x in (d, a, b, instruction, keeps)], 1)
        for one in np.unique(operands, axis=0):
            here = (operands == one).all(1)
            self._issue(S, *(int(x) for x in one), a_in_tensor_memory, programs[here], thread[here] // 32)

    def _issue(self, S: State, d, a, b, instruction, keeps, a_in_tensor_memory: bool, programs, warp) -> None:
        m, n = (instruction >> 24 & 31) * 16, (instruction >> 17 & 63) * 8
        kinds = [_KINDS.get(instruction >> at & 7) for at in (7, 10)]
        if instruction & 0b1111 or instruction >> 4 & 3 != 1 or None in kinds or m not in (64, 128) or not n:
            raise InvalidOperand(f"the instruction descriptor {instruction:#x} of a tcgen05.mma")
        reads: list[np.ndarray] = []
        operand = None
        if a_in_tensor_memory:
            lanes, cells = self._tile(a, m, _K // 2, programs)
            operand = self._shadow.read_async(cells[:, ::4] * 4, programs, warp[:, None], fenced=False)
            words = np.ascontiguousarray(self._values[programs[:, None, None], lanes[:, None], self._span(a, _K // 2)])
            left = halves_to_f32(words.view(u16), kinds[0]).astype(f64)
        else:
            left = self._operand(S, a, m, kinds[0], bool(instruction >> 15 & 1), programs, warp, reads).swapaxes(-1, -2)
        right = self._operand(S, b, n, kinds[1], bool(instruction >> 16 & 1), programs, warp, reads)
        total = left @ right
        if (instruction >> 13 ^ instruction >> 14) & 1:
            total = -total
        lanes, cells = self._tile(d, m, n, programs)
        if keeps:
            self._shadow.expect_written(cells)
        self._shadow.start_result(cells, programs, warp, self._issuer.take(cells) == warp[:, None])
        self._issuer[cells] = warp[:, None]
        where = programs[:, None, None], lanes[:, None], self._span(d, n)
        if keeps:
            total = total + self._values[where].view(f32)
        self._values[where] = total.astype(f32).view(u32)
        none = np.full(len(programs), -1)
        self._products.append(
            _Product(programs, warp, cells, reads, operand, np.ones(len(programs), bool), none, none.copy())
        )

    @staticmethod
    def _span(address: int, columns: int) -> np.ndarray:
        return (address & 0xFFFF) + np.arange(columns)

    def _tile(self, address: int, m: int, columns: int, programs) -> tuple[np.ndarray, np.ndarray]:
        """Lanes [m] of the rows of a tile, and numbers of the pieces of the tile, [programs, m * columns]."""
        row = np.arange(m)
        lanes = (address >> 16) + (row if m == LANES else row // 16 * 32 + row % 16)
        if (self._columns[programs] < (address & 0xFFFF) + columns).any() or lanes.max() >= LANES:
            raise OutOfBounds(f"a product uses tensor memory from {address:#x} that is not allocated")
        cells = (lanes[:, None] * COLUMNS + self._span(address, columns)).reshape(-1)
        return lanes, programs[:, None] * (_STRIDE // 4) + cells

    def _operand(self, S: State, descriptor, rows, kind, transposed, programs, warp, reads) -> np.ndarray:
        """[programs, 16, rows] float64: an operand in shared memory."""
        if descriptor >> 61 & 1:
            raise InvalidOperand("a matrix descriptor with a swizzle of 128 bytes in pieces of 32")
        places = layout(descriptor, rows, transposed)
        if places.max() + 16 > S.shared.size:
            raise OutOfBounds(f"tcgen05.mma reads byte {places.max()} of shared memory, which has {S.shared.size}")
        places = places + S.shared.base[programs][..., None]
        reads.append(S.shared.shadow.read_async(places.reshape(len(programs), -1), programs, warp[:, None]))
        values = halves_to_f32(S.shared.view(128).take(places // 16).view(u16), kind).astype(f64)
        return values if transposed else values.swapaxes(-1, -2)

    @staticmethod
    def _one_thread(S: State, mask, what: str) -> tuple[np.ndarray, np.ndarray]:
        active = np.ones(S.shape, bool) if mask is None else S.full(mask)
        if (active.sum(1) > 1).any():
            raise DivergentWarp(f"{what} by more than one thread of a program")
        programs = np.flatnonzero(active.any(1))
        return programs, active.argmax(1)[programs]

    def commit(self, S: State, address, mask) -> None:
        """An mbarrier will be signalled when all products that these threads have started are complete."""
        programs, thread = self._one_thread(S, mask, "tcgen05.commit")
        if not len(programs):
            return
        at = S.full(address)[programs, thread].astype(i64)
        for product in self._products:
            of = np.searchsorted(programs, product.programs).clip(max=len(programs) - 1)
            mine = (programs[of] == product.programs) & (thread[of] // 32 == product.warp) & (product.barrier < 0)
            for n in np.flatnonzero(mine & product.pending):
                number = int(at[of[n]])
                product.barrier[n] = number
                if number in S.barriers.mbarriers:  # otherwise `arrive` raises
                    product.phase[n] = S.barriers.mbarriers[number].phase[product.programs[n]]
        S.barriers.arrive(S, address, u32(1), u32(0), mask)

    def deliver(self, S: State, barrier: int, programs: np.ndarray, phase: np.ndarray, code: int) -> np.ndarray:
        """Like `AsyncCopies.deliver`. code: the mbarrier's code in stamps."""
        came = np.zeros(S.count, bool)
        for product in self._products:
            of = product.programs
            done = product.pending & (product.barrier == barrier) & programs[of] & (product.phase < phase[of])
            if done.any():
                self._shadow.end_result(product.result[done], code)
                for pieces in product.shared:
                    S.shared.shadow.read_is_over(pieces[done], code)
                if product.operand is not None:
                    self._shadow.read_is_over(product.operand[done], code)
                product.pending = product.pending & ~done
                came[of[done]] = True
        if not came.any():
            return came
        self._products = [product for product in self._products if product.pending.any()]
        for product in self._products:  # an operand of a finished product may still be in use by another product
            self._shadow.start_result_again(product.result[product.pending], product.warp[product.pending])
            for pieces in product.shared:
                S.shared.shadow.read_goes_on(pieces[product.pending])
            if product.operand is not None:
                self._shadow.read_goes_on(product.operand[product.pending])
        return came


# ---- translators -------------------------------------------------------------------------------------------


@translates("tcgen05")
def _tcgen05(emit: Emitter, i: Instruction) -> None:
    operation = i.parts[1]
    if operation in ("alloc", "dealloc", "mma", "commit") and "cta_group::1" not in i.parts:
        refuse(i)
    if operation == "relinquish_alloc_permit":
        return
    if operation == "alloc":
        emit.line(f"S.tensor.allocate(S, {emit.address(i.operands[0], 32)}, {i.operands[1].value}, {emit.mask})")
    elif operation == "dealloc":
        emit.line(f"S.tensor.free(S, {emit.read(i.operands[0], 'b32')}, {i.operands[1].value}, {emit.mask})")
    elif operation in ("ld", "st"):
        _move(emit, i)
    elif i.opcode == "tcgen05.wait::ld.sync.aligned":
        emit.line(f"S.tensor.wait_loads(S, {emit.mask})")
    elif i.opcode == "tcgen05.wait::st.sync.aligned":
        emit.line(f"S.tensor.wait_stores(S, {emit.mask})")
    elif operation == "mma" and i.parts[2:] == ["cta_group::1", "kind::f16"] and len(i.operands) == 5:
        _mma(emit, i)
    elif operation == "commit" and i.parts[3] == "mbarrier::arrive::one" and "multicast::cluster" not in i.parts:
        emit.line(f"S.tensor.commit(S, {emit.address(i.operands[0], 32)}, {emit.mask})")
    else:
        refuse(i)


def _move(emit: Emitter, i: Instruction) -> None:
    """tcgen05.ld and st."""
    operands = list(i.operands) if i.parts[1] == "ld" else [i.operands[-1], *i.operands[:-1]]
    vector, address, *rest = operands
    registers = vector.items if isinstance(vector, Vector) else (vector,)
    shape, count = i.parts[4], re.fullmatch(r"x(\d+)", i.parts[5])
    halves = rest[0].value if rest and isinstance(rest[0], Immediate) else None
    if shape not in ("32x32b", "16x32bx2") or count is None or int(count[1]) != len(registers) or i.type != "b32":
        refuse(i)
    if (shape == "16x32bx2") != (halves is not None) or "pack::16b" in i.parts or "unpack::16b" in i.parts:
        refuse(i)
    where = emit.address(address, 32)
    if i.parts[1] == "st":
        values = ", ".join(emit.read(r, "b32") for r in registers)
        emit.line(f"S.tensor.store(S, {where}, [{values}], {halves}, {emit.mask})")
        return
    got = emit.new(f"S.tensor.load(S, {where}, {len(registers)}, {halves}, {emit.mask})", "got")
    for n, register in enumerate(registers):
        emit.write(register, f"{got}[{n}]")


def _mma(emit: Emitter, i: Instruction) -> None:
    d, a, b, instruction, keeps = i.operands
    a_in_tensor_memory = isinstance(a, Address)
    left = emit.address(a, 32) if a_in_tensor_memory else emit.read(a, "b64")
    emit.line(
        f"S.tensor.issue(S, {emit.address(d, 32)}, {left}, {emit.read(b, 'b64')}, {emit.read(instruction, 'b32')}, "
        f"{emit.read(keeps, 'pred')}, {a_in_tensor_memory}, {emit.mask})"
    )

"""wgmma: the matrix unit of four warps, which reads shared memory itself and runs asynchronously.

D of the 128 threads, n / 2 registers each, is held as a matrix from the first product until `wgmma.wait_group`; the
registers are a NaN in between. Products are exact; each instruction's sum over k = 16 and the accumulator is taken in
float64 and rounded once to float32.

An operand in shared memory is laid out in pieces of 8 rows by 16 bytes, swizzled over `span` bytes. Along k (k in
neighbouring bytes): rows of `span` bytes, eight of them a piece, the next eight rows at the stride offset. Across
(row index in neighbouring bytes, "transposed"): span / 2 elements at one k, eight k a piece, the next eight k at the
stride offset, the next span / 2 elements at the leading offset. Not swizzled: 8 rows of 16 bytes a piece, the next
piece along k at the leading offset, along the rows at the stride offset.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import numpy as np

from .copies import swizzle
from .errors import DivergentWarp, InvalidOperand, Misaligned, MissingFence, MissingWait, OutOfBounds
from .formats import f32, f64, i64, u16, u32, u64
from .matrix import halves_to_f32
from .ptx import Immediate, Instruction, Vector
from .state import State
from .translate import POISON, Emitter, refuse, translates

_SPANS = {0: 0, 1: 128, 2: 64, 3: 32}  # of the descriptor's layout field
_M, _K = 64, 16


@dataclass
class _Accumulator:
    value: np.ndarray  # [programs, warpgroups, 64, n] float32
    flying: np.ndarray  # [programs, warpgroups] bool
    group: np.ndarray  # [programs, warpgroups] of the newest instruction


@dataclass
class _Read:
    """An operand in shared memory that an instruction in flight reads."""

    index: np.ndarray  # pieces of it, [warpgroups that read, pieces]
    flying: np.ndarray  # [programs, warpgroups]
    here: np.ndarray  # [programs, warpgroups] that `index` belongs to
    group: np.ndarray


class MatrixQueue:
    """The matrix instructions in flight, by their destination registers, with the rules for these registers.

    Registers of D and A that ordinary instructions have used need a `wgmma.fence` before the next `wgmma`.
    """

    def __init__(self, machine: State):
        self.groups = machine.count, max(machine.threads // 128, 1)
        self.flying: dict[tuple[int, ...], _Accumulator] = {}
        self._sources: list[tuple[frozenset[int], np.ndarray, np.ndarray]] = []  # A in registers, flying, group
        self._reads: list[_Read] = []
        self._touched: dict[int, np.ndarray] = {}  # register -> [programs, warpgroups]
        self._unfenced = np.ones(self.groups, bool)  # warpgroups without any fence so far
        self._committed = np.zeros(self.groups, i64)

    # ---- registers that instructions in flight use

    def touch(self, S: State, read: frozenset[int], written: frozenset[int], mask) -> None:
        """An ordinary instruction reads and writes registers that a wgmma uses."""
        here = self._parts(S, mask)
        for registers, accumulator in self.flying.items():
            if not (read | written).isdisjoint(registers) and (accumulator.flying & here).any():
                raise MissingWait("a register of an accumulator is used before wgmma.wait_group")
        for registers, flying, _ in self._sources:
            if not written.isdisjoint(registers) and (flying & here).any():
                raise MissingWait("a register that a wgmma in flight reads is written before wgmma.wait_group")
        for register in read | written:
            before = self._touched.get(register)
            self._touched[register] = here if before is None else before | here

    def fence(self, S: State, mask) -> None:
        here = self._warpgroups(S, mask)
        self._unfenced = self._unfenced & ~here
        self._touched = {r: left for r, at in self._touched.items() if (left := at & ~here).any()}

    def _expect_fenced(self, registers, here: np.ndarray) -> None:
        if (self._unfenced & here).any():
            raise MissingFence("no wgmma.fence before the first wgmma")
        for register in registers:
            if register in self._touched and (self._touched[register] & here).any():
                raise MissingFence("no wgmma.fence between the use of a register and the wgmma that uses it too")

    # ---- the instructions

    def issue(
        self, S: State, kind: str, registers: tuple[int, ...], sources: tuple[int, ...], d: list, a, b, scale_d,
        negated: tuple[bool, bool], transposed: tuple[bool, bool], mask,
    ) -> None:  # fmt: skip
        """D = A B + D. a: a descriptor, or four registers (`sources` are their numbers); b: a descriptor."""
        here = self._warpgroups(S, mask)
        self._expect_fenced((*registers, *sources), here)
        for others, accumulator in self.flying.items():
            used = others != registers and not set(others).isdisjoint((*registers, *sources))
            if used and (accumulator.flying & here).any():
                raise MissingWait("a wgmma uses a part of the registers of another one in flight")
        n = len(registers) * 2
        product = self._operand_a(S, a, kind, transposed[0], here) @ self._tile(S, b, n, kind, transposed[1], here)
        if negated[0] != negated[1]:
            product = -product
        keeps = self._uniform(S, scale_d, here, "scale-d")
        old = self.flying.get(registers)
        if old is None:
            old = self.flying[registers] = _Accumulator(_to_matrix(S, d), here.copy(), self._committed.copy())
        elif not old.flying[here].all():
            fresh = (here & ~old.flying)[..., None, None]
            old.value = np.where(fresh, _to_matrix(S, d), old.value)
        total = (product + np.where(keeps[..., None, None], old.value, f32(0))).astype(f32)
        old.value = total if here.all() else np.where(here[..., None, None], total, old.value)
        old.flying = old.flying | here
        old.group = np.where(here, self._committed, old.group)
        if sources:
            self._sources.append((frozenset(sources), here, self._committed))

    def commit(self, S: State, mask) -> None:
        self._committed = self._committed + self._warpgroups(S, mask)

    def wait(self, S: State, R: list, allowed: int, mask) -> None:
        here = self._warpgroups(S, mask)
        is_over = lambda flying, group: flying & here & (group < self._committed - allowed)  # noqa: E731
        for registers, accumulator in list(self.flying.items()):
            done = is_over(accumulator.flying, accumulator.group)
            if not done.any():
                continue
            for register, value in zip(registers, _to_registers(S, accumulator.value), strict=True):
                if done.all():
                    R[register] = value
                else:
                    R[register] = np.where(done.repeat(128, 1), value, R[register])
            accumulator.flying = accumulator.flying & ~done
            if not accumulator.flying.any():
                del self.flying[registers]
        left = [(r, flying & ~is_over(flying, group), group) for r, flying, group in self._sources]
        self._sources = [source for source in left if source[1].any()]
        self._end_reads(S, is_over)

    def _end_reads(self, S: State, is_over) -> None:
        for read in self._reads:
            done = is_over(read.flying, read.group)
            if done.any():
                S.shared.shadow.read_is_over(read.index[done[read.here]])
                read.flying = read.flying & ~done
        self._reads = [read for read in self._reads if read.flying.any()]
        for read in self._reads:  # an operand of a finished instruction may still be read by another one
            S.shared.shadow.read_goes_on(read.index[read.flying[read.here]])

    def expect_none(self) -> None:
        if self.flying:
            raise MissingWait("a program ends before it has waited for its wgmma")

    def _parts(self, S: State, mask) -> np.ndarray:
        """[programs, warpgroups] with a thread in the mask."""
        if mask is None:
            return np.ones(self.groups, bool)
        return S.full(mask).reshape(*self.groups, -1).any(-1)

    def _warpgroups(self, S: State, mask) -> np.ndarray:
        """[programs, warpgroups] that run this."""
        if mask is None:
            return np.ones(self.groups, bool)
        by_group = S.full(mask).reshape(*self.groups, 128)
        missing = by_group.any(-1, keepdims=True) & ~by_group
        if missing.any():
            program, group, thread = np.argwhere(missing)[0]
            raise DivergentWarp(f"wgmma without thread {group * 128 + thread} of program {program} of the batch")
        return by_group.all(-1)

    def _uniform(self, S: State, value, here: np.ndarray, what: str) -> np.ndarray:
        """A value that must be the same in all threads of a warpgroup, [programs, warpgroups]."""
        if np.ndim(value) == 0:
            return np.full(self.groups, value)
        by_group = S.full(value).reshape(*self.groups, 128)
        if (by_group != by_group[..., :1])[here].any():
            raise InvalidOperand(f"{what} differs within a warpgroup")
        return by_group[..., 0]

    def _operand_a(self, S: State, a, kind: str, transposed: bool, here: np.ndarray) -> np.ndarray:
        """[programs, warpgroups, 64, 16] float64."""
        if not isinstance(a, list):
            return self._tile(S, a, _M, kind, transposed, here).swapaxes(-1, -2)
        words = np.stack([S.full(x) for x in a], -1)  # register r: rows + 8 (r % 2), k + 8 (r / 2)
        values = halves_to_f32(words.view(u16), kind).reshape(*self.groups, 4, 8, 4, 2, 2, 2)  # w g t rk rr h
        return values.transpose(0, 1, 2, 6, 3, 5, 4, 7).reshape(*self.groups, _M, _K).astype(f64)

    def _tile(self, S: State, descriptor, rows: int, kind: str, transposed: bool, here: np.ndarray) -> np.ndarray:
        """[programs, warpgroups, 16, rows] float64: an operand in shared memory."""
        d = self._uniform(S, descriptor, here, "a matrix descriptor").astype(u64)
        d = np.where(here, d, d[tuple(np.argwhere(here)[0])])
        places = np.empty((*self.groups, *_pieces(rows, transposed)), i64)
        for one in np.unique(d).tolist():
            places[d == one] = layout(one, rows, transposed)
        if places.max() + 16 > S.shared.size:
            raise OutOfBounds(f"wgmma reads byte {places.max()} of shared memory, which has {S.shared.size}")
        places += S.shared.base[..., None, None]
        program, group = np.nonzero(here)
        index = S.shared.shadow.read_async(
            places[here].reshape(len(program), -1), program, group[:, None] * 4 + np.arange(4)
        )
        self._reads.append(_Read(index, here, here, self._committed))
        bits = S.shared.view(128).take(places // 16).view(u16)
        values = halves_to_f32(bits, kind).astype(f64)
        return values if transposed else values.swapaxes(-1, -2)


def _pieces(rows: int, transposed: bool) -> tuple[int, int]:
    return (_K, rows // 8) if transposed else (rows, _K // 8)


@functools.cache
def layout(descriptor: int, rows: int, transposed: bool) -> np.ndarray:
    """Addresses of an operand's pieces of 16 bytes, [rows, 2], or transposed [16, rows / 8]."""
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    span = _SPANS[descriptor >> 62]
    if descriptor >> 49 & 7:
        raise InvalidOperand("a matrix descriptor with a base offset")
    first, second = (
        np.arange(n)[:, None] if axis == 0 else np.arange(n) for axis, n in enumerate(_pieces(rows, transposed))
    )
    if not span:
        if transposed:
            raise InvalidOperand("a transposed matrix that is not swizzled")
        address = start + first // 8 * stride + first % 8 * 16 + second * leading
    elif transposed:
        per_row = span // 16
        address = start + second // per_row * leading + second % per_row * 16 + first % 8 * span + first // 8 * stride
    else:
        address = start + first // 8 * stride + first % 8 * span + second * 16
    if (address % 16).any():
        raise Misaligned("a matrix descriptor whose address is no multiple of 16")
    return swizzle(address, span)


def _to_matrix(S: State, registers: list) -> np.ndarray:
    """n / 2 registers of 128 threads -> [programs, warpgroups, 64, n]: register j of thread (w, g, t) is row
    16 w + g + 8 (j / 2 % 2), column 8 (j / 4) + 2 t + j % 2."""
    if all(np.ndim(r) == 0 for r in registers) and len({int(r) for r in registers}) == 1:
        return np.full((S.count, S.threads // 128, _M, len(registers) * 2), registers[0].view(f32))
    n = len(registers) // 4
    values = np.stack([S.full(r) for r in registers], -1).view(f32)
    values = values.reshape(S.count, S.threads // 128, 4, 8, 4, n, 2, 2)
    return values.transpose(0, 1, 2, 6, 3, 5, 4, 7).reshape(S.count, -1, _M, n * 8)


def _to_registers(S: State, matrix: np.ndarray) -> list[np.ndarray]:
    count = matrix.shape[-1] // 8
    parts = matrix.view(u32).reshape(S.count, -1, 4, 2, 8, count, 4, 2)  # w half g c t lo
    parts = np.ascontiguousarray(parts.transpose(5, 3, 7, 0, 1, 2, 4, 6)).reshape(-1, *S.shape)
    return list(parts)


@translates("wgmma")
def _wgmma(emit: Emitter, i: Instruction) -> None:
    operation = i.parts[1]
    if operation == "mma_async":
        _mma_async(emit, i)
    elif operation == "commit_group":
        emit.line(f"S.queue.commit(S, {emit.mask})")
    elif operation == "wait_group":
        emit.line(f"S.queue.wait(S, R, {i.operands[0].value}, {emit.mask})")
    elif operation == "fence":
        emit.line(f"S.queue.fence(S, {emit.mask})")
    else:
        refuse(i)


def _mma_async(emit: Emitter, i: Instruction) -> None:
    shape, kind = re.fullmatch(r"m64n(\d+)k16", i.parts[4]), i.parts[-1]
    if shape is None or kind not in ("f16", "bf16") or i.parts[5] != "f32" or i.guard is not None:
        refuse(i)
    d, a, b, scale_d, *flags = i.operands
    if not all(isinstance(flag, Immediate) for flag in flags):
        refuse(i)
    scale_a, scale_b, *transposed = (flag.value for flag in flags)
    in_registers = isinstance(a, Vector)
    transposed = (False, bool(transposed[0])) if in_registers else tuple(map(bool, transposed))
    registers = tuple(r.index for r in d.items)
    sources = tuple(r.index for r in a.items) if in_registers else ()
    a_text = f"[{', '.join(emit.read(r, 'b32') for r in a.items)}]" if in_registers else emit.read(a, "b64")
    d_text = ", ".join(emit.read(r, "b32") for r in d.items)
    emit.line(
        f"S.queue.issue(S, {kind!r}, {registers}, {sources}, [{d_text}], {a_text}, {emit.read(b, 'b64')}, "
        f"{emit.read(scale_d, 'pred')}, {(scale_a == -1, scale_b == -1)}, {transposed}, {emit.mask})"
    )
    poison = emit.constant(POISON[32])
    for register in d.items:
        emit.write(register, poison)

"""Global memory: the tensors of a launch, and nothing else.

A pointer argument has the number of its tensor in its upper 16 bits and the real address below, so that every access is
checked against the tensor from whose pointer it was computed, even if another tensor is adjacent.
"""

from __future__ import annotations

import numpy as np

from .errors import Misaligned, OutOfBounds, StoreConflict
from .formats import RAW, i64, u64
from .ownership import Ownership
from .ptx import WIDTHS, Instruction, Sink, Symbol, Vector
from .region import Region
from .translate import Emitter, refuse, translates

_SHIFT = u64(48)
_ADDRESS = (1 << 48) - 1


def pointer(number: int, address: int) -> np.uint64:
    """The pointer argument for an address in region `number`."""
    return u64((number + 1) << 48 | address)


def region_of(bits: np.generic) -> int:
    """The number of the region that a parameter points into; -1 if it is no pointer."""
    return (int(bits) >> 48) - 1


class GlobalMemory:
    """All tensors of a launch."""

    def __init__(self, regions: list[Region], stored: set[int] = frozenset(), piece: int = 1):
        """stored: numbers of the regions that a launch may write. piece: bytes of its smallest access."""
        self.regions = regions
        self.ownership = Ownership(regions, stored, piece)
        self._views: dict[tuple[int, np.dtype], np.ndarray] = {}

    def view(self, number: int, kind: np.dtype) -> np.ndarray:
        """A region's bytes as elements of a numpy type."""
        key = number, kind
        if key not in self._views:
            if number not in self._views:
                self._views[number] = self.regions[number].bytes() if self._mapped(number) else np.zeros(16, np.uint8)
            self._views[key] = self._views[number].view(kind)
        return self._views[key]

    def _mapped(self, number: int) -> bool:
        return self.regions[number].end > self.regions[number].start

    def locate(self, address: np.ndarray, size: int, mask: np.ndarray | None) -> list[tuple[int, np.ndarray, object]]:
        """For accesses of `size` bytes: (region, offsets from its origin, mask of the threads that access it) for each
        region; offsets outside the mask are 0. Raises OutOfBounds or Misaligned."""
        if mask is not None:
            active = np.flatnonzero(mask)
            if active.size == 0:
                return []
            first = address.flat[active[0]]
            address = np.where(mask, address, first)
        number = int(address.flat[0] >> _SHIFT) - 1
        low, high = int(address.min()), int(address.max())
        if low >> 48 != high >> 48:
            return self._locate_each(address, size, mask)
        self._check(number, low, high, address, size, mask)
        return [(number, (address - pointer(number, self.regions[number].origin)).view(i64), mask)]

    def _locate_each(self, address, size, mask):
        found, numbers = [], (address >> _SHIFT).astype(i64) - 1
        for number in np.unique(numbers).tolist():
            here = numbers == number if mask is None else mask & (numbers == number)
            if here.any():
                found += self.locate(address, size, here)
        return found

    def _check(self, number: int, low: int, high: int, address, size: int, mask) -> None:
        if not 0 <= number < len(self.regions):
            raise OutOfBounds(f"address {low:#x} belongs to no tensor argument")
        region = self.regions[number]
        low, high = low & _ADDRESS, high & _ADDRESS
        if low < region.start or high + size > region.end:
            true = address & u64(_ADDRESS)
            outside = (true < u64(region.start)) | (true + u64(size) > u64(region.end))
            where = np.argwhere(outside)[0]
            at = int(true[tuple(where)]) - region.start
            raise OutOfBounds(
                f"program {where[0]} of the batch, thread {where[1]}: {size} bytes at byte {at} of {region.name}, "
                f"which has {region.end - region.start} ({int(outside.sum())} threads outside)"
            )
        if size > 1 and (address & u64(size - 1)).any():
            raise Misaligned(f"{size} bytes at an address of {region.name} that is no multiple of {size}")

    def load(self, S, address, width: int, count: int, mask) -> list[np.ndarray]:
        """`count` adjacent elements of `width` bits for each thread; 0 for threads outside the mask."""
        kind, bytes_ = np.dtype(RAW[width]), width // 8 * count
        found = self.locate(S.full(address), bytes_, mask if mask is None else S.full(mask))
        for number, offset, here in found:
            self.ownership.read(S, number, offset, bytes_, here)
        if len(found) == 1:
            return self._gather(found[0], kind, bytes_, count)
        result = [np.zeros(S.shape, kind) for _ in range(count)]
        for place in found:
            values = self._gather(place, kind, bytes_, count)
            result = [np.where(place[2], v, r) for v, r in zip(values, result, strict=True)]
        return result

    def _gather(self, place, kind: np.dtype, size: int, count: int) -> list[np.ndarray]:
        number, offset, _ = place
        if count == 1:
            return [self.view(number, kind).take(offset // size)]
        if size <= 8:
            whole = self.view(number, np.dtype(f"u{size}")).take(offset // size)
        else:
            whole = self.view(number, np.dtype(np.complex128)).take(offset // size)
        pieces = np.ascontiguousarray(whole).view(kind).reshape(*whole.shape, count)
        return [np.ascontiguousarray(pieces[..., n]) for n in range(count)]

    def store(self, S, address, width: int, values: list, mask) -> None:
        kind, count = np.dtype(RAW[width]), len(values)
        mask = mask if mask is None else S.full(mask)
        for number, offset, here in self.locate(S.full(address), width // 8 * count, mask):
            several = self.ownership.write(S, number, offset, width // 8 * count, here)
            view, index = self.view(number, kind), offset // (width // 8)
            chosen = index if here is None else index[here]
            for n, value in enumerate(values):
                value = S.full(value) if here is None else S.full(value)[here]
                view[chosen + n] = value
                if several and (view[chosen + n] != value).any():
                    at = int(chosen[view[chosen + n] != value].flat[0] + n) * (width // 8)
                    region = self.regions[number]
                    raise StoreConflict(
                        f"two threads store different values to byte {at + region.origin - region.start} of "
                        f"{region.name} at once"
                    )

    def atomic(self, S, operation: str, kind: str, address, value, mask, compare=None) -> np.ndarray:
        """An atomic operation, thread by thread in the order of programs and threads; returns the old values."""
        width = WIDTHS[kind]
        raw = np.dtype(RAW[width])
        old = np.zeros(S.shape, raw)
        value, compare = S.full(value), None if compare is None else S.full(compare)
        for number, offset, here in self.locate(S.full(address), width // 8, mask if mask is None else S.full(mask)):
            view = self.view(number, raw)
            which = np.ones(S.shape, bool) if here is None else here
            for p, t in np.argwhere(which).tolist():
                at = offset[p, t] // (width // 8)
                old[p, t] = view[at]
                view[at] = combine(operation, kind, view[at : at + 1], value[p, t : t + 1], compare, (p, t))[0]
        return old


def combine(operation: str, kind: str, old: np.ndarray, value: np.ndarray, compare, place) -> np.ndarray:
    """The new bits of one atomic operation on one element."""
    typed = {"s": "i", "f": "f"}.get(kind[0], "u") + str(old.dtype.itemsize)
    a, b = old.view(typed), value.view(typed)
    match operation:
        case "add":
            result = a + b
        case "min":
            result = np.minimum(a, b)
        case "max":
            result = np.maximum(a, b)
        case "and":
            result = a & b
        case "or":
            result = a | b
        case "xor":
            result = a ^ b
        case "exch":
            result = b
        case "cas":
            result = np.where(old == compare[place], value, old)
    return result.view(old.dtype)


# ---- translators -------------------------------------------------------------------------------------------


_UNITS = {"global": "memory", "shared": "shared"}  # of the machine


def _space(i: Instruction) -> str:
    space = next((p.split("::")[0] for p in i.parts if p.split("::")[0] in ("global", "shared", "param")), None)
    if space is None:
        refuse(i)
    return space


@translates("ld")
def _ld(emit: Emitter, i: Instruction) -> None:
    space, kind = _space(i), i.type
    width = WIDTHS[kind]
    targets = i.operands[0].items if isinstance(i.operands[0], Vector) else (i.operands[0],)
    if space == "param":
        address = i.operands[1]
        if not isinstance(address.base, Symbol) or address.offset or len(targets) != 1:
            refuse(i)
        value = f"P[{emit.program.parameters[address.base.name]}].astype(u{width})"
        emit.write(targets[0], emit.resize(value, width, targets[0], kind[0] == "s"))
        return
    where = emit.address(i.operands[1], 64 if space == "global" else 32)
    loaded = emit.new(f"S.{_UNITS[space]}.load(S, {where}, {width}, {len(targets)}, {emit.mask})", "loaded")
    for n, target in enumerate(targets):
        if not isinstance(target, Sink):
            emit.write(target, emit.resize(f"{loaded}[{n}]", width, target, kind[0] == "s"))


@translates("st")
def _st(emit: Emitter, i: Instruction) -> None:
    space, width = _space(i), WIDTHS[i.type]
    sources = i.operands[1].items if isinstance(i.operands[1], Vector) else (i.operands[1],)
    values = ", ".join(emit.read(s, f"b{width}") for s in sources)
    where = emit.address(i.operands[0], 64 if space == "global" else 32)
    emit.line(f"S.{_UNITS[space]}.store(S, {where}, {width}, [{values}], {emit.mask})")


@translates("atom", "red")
def _atom(emit: Emitter, i: Instruction) -> None:
    space, kind = _space(i), i.type
    operations = ("add", "min", "max", "and", "or", "xor", "exch", "cas")
    operation = next((p for p in i.parts if p in operations), None)
    operands = i.operands if i.name == "red" else i.operands[1:]
    if operation is None or kind.endswith("x2") or isinstance(operands[1], Vector) or WIDTHS[kind] < 32:
        refuse(i)
    where = emit.address(operands[0], 64 if space == "global" else 32)
    bits = f"b{WIDTHS[kind]}"
    values = [emit.read(o, bits) for o in operands[1:]]
    compare = None
    if operation == "cas":
        compare, values = values[0], values[1:]
    call = f"S.{_UNITS[space]}.atomic(S, {operation!r}, {kind!r}, {where}, {values[0]}, {emit.mask}, {compare})"
    if i.name == "red":
        emit.line(call)
    else:
        emit.write(i.operands[0], call)

"""Shared memory of every program. Unwritten memory is NaN in every format."""

from __future__ import annotations

import numpy as np

from .errors import Misaligned, OutOfBounds, StoreConflict
from .formats import RAW, i64
from .memory import combine
from .ptx import WIDTHS
from .shadow import Shadow
from .state import State

_UNWRITTEN = 0xFF
_UNIT = 128  # bytes; programs start at multiples


class SharedMemory:
    """One array of bytes: program p has `size` from p * `stride`."""

    def __init__(self, machine: State, size: int, piece: int):
        self.size = size
        self.stride = -(-size // _UNIT) * _UNIT + _UNIT
        self.bytes = np.full(machine.count * self.stride, _UNWRITTEN, np.uint8)
        self.base = (np.arange(machine.count, dtype=i64) * self.stride)[:, None]
        self.shadow = Shadow(machine, len(self.bytes), self.stride, piece)
        self._views = {width: self.bytes.view(RAW[width]) for width in (8, 16, 32, 64)}
        self._views[128] = self.bytes.view(np.complex128)

    def view(self, width: int) -> np.ndarray:
        return self._views[width]

    def locate(self, S: State, address, size: int, mask, alignment: int = 0) -> np.ndarray:
        """Places in `bytes` of accesses of `size` bytes, [programs, threads]; for threads outside the mask any valid
        place. Raises OutOfBounds or Misaligned."""
        address = S.full(address).astype(i64)
        if mask is not None:
            address = np.where(mask, address, 0)
        if address.max() + size > self.size or address.min() < 0:
            if self.size == 0 and mask is not None and not np.any(mask):
                return address
            program, thread = np.argwhere((address + size > self.size) | (address < 0))[0]
            raise OutOfBounds(
                f"program {program} of the batch, thread {thread}: {size} bytes at byte {address[program, thread]} of "
                f"shared memory, which has {self.size}"
            )
        if (address & ((alignment or size) - 1)).any():
            raise Misaligned(f"{size} bytes of shared memory at an address that is no multiple of {alignment or size}")
        return address + self.base

    def load(self, S: State, address, width: int, count: int, mask) -> list[np.ndarray]:
        if mask is not None and not np.any(mask):
            return [np.zeros(S.shape, RAW[width])] * count
        size = width // 8 * count
        place = self.locate(S, address, size, mask)
        self.shadow.read(place, size, mask if mask is None else S.full(mask))
        if count == 1:
            return [self.view(width).take(place // size)]
        whole = self.view(size * 8).take(place // size)
        pieces = np.ascontiguousarray(whole).view(RAW[width]).reshape(*whole.shape, count)
        return [np.ascontiguousarray(pieces[..., n]) for n in range(count)]

    def store(self, S: State, address, width: int, values: list, mask) -> None:
        if mask is not None and not np.any(mask):
            return
        place = self.locate(S, address, width // 8 * len(values), mask)
        mask = None if mask is None else S.full(mask)
        several = self.shadow.write(place, width // 8 * len(values), mask)
        index = place // (width // 8)
        chosen, view = index if mask is None else index[mask], self.view(width)
        for n, value in enumerate(values):
            value = S.full(value) if mask is None else S.full(value)[mask]
            view[chosen + n] = value
            if several and (differs := view[chosen + n] != value).any():
                at = int(chosen[differs].flat[0] + n) * (width // 8) % self.stride
                raise StoreConflict(f"two threads store different values to byte {at} of shared memory at once")

    def atomic(self, S: State, operation: str, kind: str, address, value, mask, compare=None) -> np.ndarray:
        width = WIDTHS[kind]
        old = np.zeros(S.shape, RAW[width])
        which = np.ones(S.shape, bool) if mask is None else S.full(mask)
        place = self.locate(S, address, width // 8, mask)
        self.shadow.read(place, width // 8, which)
        place = place // (width // 8)
        value, compare = S.full(value), None if compare is None else S.full(compare)
        view = self.view(width)
        for p, t in np.argwhere(which).tolist():
            at = place[p, t]
            old[p, t] = view[at]
            view[at] = combine(operation, kind, view[at : at + 1], value[p, t : t + 1], compare, (p, t))[0]
        return old

"""Where a tensor argument lies in memory."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

_WIDEST = 16  # bytes of the widest access


@dataclass(frozen=True)
class Region:
    """One tensor argument: true addresses [start, end), and bytes from a multiple of 16 at or below `start`."""

    name: str
    start: int
    end: int

    @property
    def origin(self) -> int:
        return self.start & -_WIDEST

    def bytes(self) -> np.ndarray:
        size = -(-(self.end - self.origin) // _WIDEST) * _WIDEST
        return np.ctypeslib.as_array((ctypes.c_uint8 * max(size, _WIDEST)).from_address(self.origin))

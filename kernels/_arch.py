"""The features of an architecture by its compiler name: matrix unit, shared memory, bulk copies.

The tables of launch parameters depend on these features, never on a name, so that a GPU newer than this file gets the
tiles of its class.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

KB = 1024


@dataclass(frozen=True)
class Hardware:
    """matrix: the matrix instructions for 16-bit types. shared: the most shared memory of a program, in bytes.

    "mma.sync"  operands and sums in registers, synchronous: all NVIDIA GPUs from 8.0 on except the next two classes
    "wgmma"     operands from shared memory, sums in registers, asynchronous: 9.x (Hopper)
    "tcgen05"   operands from shared memory, sums in tensor memory: 10.x (data centre Blackwell), 11.x (Thor)
    "mfma"      operands and sums in registers, 64 lanes a warp: AMD's CDNA

    bulk_copy: whether a copy engine copies blocks of a tensor, given a descriptor.
    """

    matrix: str
    shared: int
    bulk_copy: bool


_EXACTLY = {  # by compute capability
    80: Hardware("mma.sync", 163 * KB, bulk_copy=False),
    87: Hardware("mma.sync", 163 * KB, bulk_copy=False),
}
_OF_MAJOR = {
    8: Hardware("mma.sync", 99 * KB, bulk_copy=False),
    9: Hardware("wgmma", 227 * KB, bulk_copy=True),
    10: Hardware("tcgen05", 227 * KB, bulk_copy=True),
    11: Hardware("tcgen05", 227 * KB, bulk_copy=True),
    12: Hardware("mma.sync", 99 * KB, bulk_copy=True),
}
_UNKNOWN = Hardware("mma.sync", 99 * KB, bulk_copy=False)  # every NVIDIA GPU from 8.0 on has at least this
_AMD = Hardware("mfma", 64 * KB, bulk_copy=False)


@functools.cache
def hardware(arch: str) -> Hardware:
    """The features of "sm_80", "sm_90a", "sm_100", "gfx942", ... Raises ValueError for any other name."""
    if arch.startswith("gfx"):
        return _AMD
    if not (number := re.fullmatch(r"sm_(\d{2,})[af]?", arch)):
        raise ValueError(f'expected an architecture such as "sm_90" or "gfx942", got {arch!r}')
    capability = int(number[1])
    return _EXACTLY.get(capability) or _OF_MAJOR.get(capability // 10, _UNKNOWN)

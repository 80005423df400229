"""What an architecture offers, by the name that compilers give it: matrix unit, shared memory, bulk copies.

The ladders ask for these, never for a name: a card newer than this file gets the tiles of the class it is of.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

KB = 1024


@dataclass(frozen=True)
class Hardware:
    """matrix: the matrix instructions for 16-bit types; shared: bytes of shared memory that one program may take.

    "mma.sync"  operands and sums in registers, synchronous: all NVIDIA cards from 8.0 on but for the next two
    "wgmma"     operands from shared memory, sums in registers, asynchronous: 9.x (Hopper)
    "tcgen05"   operands from shared memory, sums in a memory of their own: 10.x (data centre Blackwell), 11.x (Thor)
    "mfma"      operands and sums in registers, 64 lanes a warp: AMD's CDNA

    bulk_copy: has an engine that copies blocks of a tensor by its descriptor.
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
_UNKNOWN = Hardware("mma.sync", 99 * KB, bulk_copy=False)  # every NVIDIA card from 8.0 on has this
_AMD = Hardware("mfma", 64 * KB, bulk_copy=False)


@functools.cache
def hardware(arch: str) -> Hardware:
    """Of "sm_80", "sm_90a", "sm_100", "gfx942"; ValueError where it is no such name."""
    if arch.startswith("gfx"):
        return _AMD
    if not (number := re.fullmatch(r"sm_(\d{2,})[af]?", arch)):
        raise ValueError(f'expected an architecture such as "sm_90" or "gfx942", got {arch!r}')
    capability = int(number[1])
    return _EXACTLY.get(capability) or _OF_MAJOR.get(capability // 10, _UNKNOWN)

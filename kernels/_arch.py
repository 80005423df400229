"""What an architecture offers, by the name that compilers give it: its matrix unit, and shared memory for a program.

The ladders ask for these two, never for a name: a card newer than this file gets the tiles of the class it is of.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

KB = 1024


@dataclass(frozen=True)
class Hardware:
    """matrix: which matrix instructions there are; shared: bytes of shared memory one program may take.

    "mma.sync"  operands and sums in registers, synchronous: every NVIDIA card from 8.0 on that is not below
    "wgmma"     operands from shared memory, sums in registers, asynchronous: 9.x (Hopper)
    "tcgen05"   operands from shared memory, sums in a memory of their own: 10.x and 11.x (data centre Blackwell, Thor)
    "mfma"      operands and sums in registers, 64 lanes a warp: AMD's CDNA
    """

    matrix: str
    shared: int


# compute capability: exactly this one, or of this major version
_OF_CAPABILITY = {
    80: Hardware("mma.sync", 163 * KB),
    87: Hardware("mma.sync", 163 * KB),
}
_OF_MAJOR = {
    9: Hardware("wgmma", 227 * KB),
    10: Hardware("tcgen05", 227 * KB),
    11: Hardware("tcgen05", 227 * KB),
}
# 8.6, 8.9, 12.x, and what is not known: every NVIDIA card has this much
_LEAST = Hardware("mma.sync", 99 * KB)
_AMD = Hardware("mfma", 64 * KB)


@functools.cache
def hardware(arch: str) -> Hardware:
    """Of "sm_80", "sm_90a", "sm_100", "gfx942"; ValueError where it is no such name."""
    if arch.startswith("gfx"):
        return _AMD
    if not (number := re.fullmatch(r"sm_(\d{2,})[af]?", arch)):
        raise ValueError(f'expected an architecture such as "sm_90" or "gfx942", got {arch!r}')
    capability = int(number[1])
    return _OF_CAPABILITY.get(capability) or _OF_MAJOR.get(capability // 10, _LEAST)

"""Memory that a step frees stays in the process, for the next step to use."""

from __future__ import annotations

import ctypes
import os

# Parameters of glibc's mallopt(3), from malloc.h, and what they are set to: no mmap, never trim, grow by 64 MB.
SETTINGS = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_TOP_PAD": (-2, 64 << 20)}


def keep_freed_memory() -> bool:
    """Have glibc's malloc keep large buffers when they are freed. Returns whether it does from now on.

    Each step of training allocates and frees the same large tensors. By default glibc hands those above a threshold
    back to the kernel, which maps and zeroes their pages again in the next step. This holds for the whole process, so
    it is for commands, which own theirs; a program may call it as well.

    False, and nothing is changed, where there is no glibc, or where the environment has settings of malloc.
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 (other C libraries have no such function)
    except (AttributeError, OSError, TypeError):
        return False
    taken = [libc.mallopt(name, value) for name, value in SETTINGS.values()]
    return all(taken)

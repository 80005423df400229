"""Keeps memory that a training step frees in the process, for the next step."""

from __future__ import annotations

import ctypes
import os

# Parameters of glibc's mallopt(3), their numbers in malloc.h, and their values: no mmap, never trim, grow by 64 MB.
SETTINGS = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_TOP_PAD": (-2, 64 << 20)}


def keep_freed_memory() -> bool:
    """Makes glibc's malloc keep large buffers when they are freed. Returns whether it does so now.

    Each step of training allocates and frees the same large tensors. By default glibc returns large buffers to the
    kernel, which maps and zeroes their pages again in the next step. The setting is for the whole process, so it is
    made by our commands; a program may call this too.

    Without glibc, or if the environment sets parameters of malloc, nothing is changed and the result is False.
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

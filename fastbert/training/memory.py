"""Keeps memory that a training step frees in the process, for the next step, and asks for large pages there."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

# Parameters of glibc's mallopt(3), their numbers in malloc.h, and their values: no mmap, never trim, grow by 64 MB.
SETTINGS = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_TOP_PAD": (-2, 64 << 20)}


# Bytes by which the heap grows at once, tried in this order. Memory is used only where something is written.
HEAP = (8 << 30, 2 << 30, 512 << 20)


def keep_freed_memory() -> bool:
    """Makes glibc's malloc keep large buffers when they are freed. Returns whether it does so now.

    Each step of training allocates and frees the same large tensors. By default glibc returns large buffers to the
    kernel, which maps and zeroes their pages again in the next step. The setting is for the whole process, so it is
    made by our commands; a program may call this too. Where the system has large pages for programs that ask for them
    (Linux with `madvise` or `always` in /sys/kernel/mm/transparent_hugepage/enabled), the heap gets them.

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
    if all(taken):
        _ask_for_large_pages(libc)
    return all(taken)


def _ask_for_large_pages(libc: ctypes.CDLL) -> None:
    """Lets the heap grow, and asks for large pages for what it grew by. With the settings above it never shrinks. Not
    where the kernel counts memory that nothing was written to (vm.overcommit_memory = 2)."""
    if not hasattr(mmap, "MADV_HUGEPAGE") or _counts_unwritten():
        return
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for size in HEAP:
        if begin := libc.malloc(size):  # fails under a limit of memory
            page = mmap.PAGESIZE
            first = -(-begin // page) * page
            libc.madvise(first, (begin + size - first) // page * page, mmap.MADV_HUGEPAGE)
            libc.free(begin)
            return


def _counts_unwritten() -> bool:
    try:
        return Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2"
    except OSError:
        return True

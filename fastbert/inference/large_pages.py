"""Weights in large pages of memory, which speeds up a single short text: it reads every weight once.

With pages of 4 KB the processor looks up an address and restarts its prefetching after every 64 cache lines. Linux
gives pages of 2 MB to memory for which madvise(2) with MADV_HUGEPAGE is called before it is filled.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor, nn

LARGE = 2 << 20  # bytes of a large page
LEAST = 4 * LARGE  # least bytes of all moved parameters; below, the copy is not worth it
LINE = 64  # bytes of a cache line; every parameter begins at a multiple
# Elements that torch converts on the calling thread alone; longer copies are shared among OpenMP's threads. On a busy
# machine each such copy waits for threads that the system runs late, a hundred times for a model.
PIECE = 32768


def move_to_large_pages(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`model.to(dtype)` for a model on the CPU that no other code uses; its parameters end up in large pages, each in a
    storage by itself. The Parameter objects stay the same. Returns the model.

    Embedding tables, of which a text reads only a few rows, are not moved if they have the dtype already, since they
    may be mapped from a file. Small models, and all models on systems without large pages, are converted in ordinary
    memory.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    moved = [p for p in model.parameters() if id(p) not in tables or p.dtype is not dtype]
    sizes = [-(-p.numel() * dtype.itemsize // LINE) * LINE for p in moved]
    memory = _large_pages(sum(sizes)) if sum(sizes) >= LEAST else None
    at = 0
    for p, size in zip(moved, sizes, strict=True) if memory is not None else ():
        p.data = _at(memory, at, p, dtype)
        at += size
    return model.to(dtype)


def _at(memory: mmap.mmap, offset: int, t: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of t in this dtype, placed at byte `offset` of the memory."""
    copy = torch.frombuffer(memory, dtype=dtype, count=t.numel(), offset=offset)
    for piece, source in zip(copy.split(PIECE), t.detach().reshape(-1).split(PIECE), strict=True):
        piece.copy_(source)
    return copy.view(t.shape)


def _large_pages(size: int) -> mmap.mmap | None:
    """At least `size` bytes of private memory in large pages; None if the system has no such pages or too little."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # not on Linux
        return None
    try:
        memory = mmap.mmap(-1, -(-size // LARGE) * LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # the process's memory limit, or a Linux kernel built without large pages
        return None
    return memory

"""Weights in large pages of memory, where one short text, which reads all of them once, finds them faster.

In pages of 4 KB the processor looks up an address, and begins anew to fetch ahead, after each 64 lines of its cache.
Linux has pages of 2 MB for memory that asks for them before it is filled (madvise(2), MADV_HUGEPAGE).
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor, nn

LARGE = 2 << 20  # bytes of a large page
LEAST = 4 * LARGE  # of all that is moved, from which on it is worth the copy
LINE = 64  # bytes of a cache's line, where every parameter begins


def move_to_large_pages(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`model.to(dtype)` of a model on the CPU that nobody else holds; its parameters end up in large pages, each in a
    storage of its own. The Parameter objects stay. Returns the model.

    Tables of embeddings, of which a text reads a few rows, are left where they are if they are of that dtype, since
    they may be mapped from a file. A small model, and one on a system without such pages, is converted in ordinary
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
    """A copy of t in this dtype, `offset` bytes into the memory."""
    copy = torch.frombuffer(memory, dtype=dtype, count=t.numel(), offset=offset)
    return copy.view(t.shape).copy_(t.detach())


def _large_pages(size: int) -> mmap.mmap | None:
    """At least `size` bytes of private memory; None where the system has no large pages or not as much memory."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # not on Linux
        return None
    try:
        memory = mmap.mmap(-1, -(-size // LARGE) * LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a limit of this process's memory, or a kernel that was built without large pages
        return None
    return memory

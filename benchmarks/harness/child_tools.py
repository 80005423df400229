"""Tools of a measured process: its messages, its memory, and its arrays. Nothing here imports torch."""

from __future__ import annotations

import contextlib
import ctypes
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Encode = Callable[[list[list[int]]], np.ndarray]  # lists of ids -> a mean-pooled vector each, [B, C] float32


def say(event: str, **more: Any) -> None:
    print(json.dumps({"event": event, **more}), flush=True)


# ---- memory ----------------------------------------------------------------------------------------------


class Memory:
    """Bytes that the process, or its GPU, holds (`now`), and the peak since `reset`."""

    def __init__(self, device: str):
        self.device = device

    def now(self) -> int:
        if self.device == "cuda":
            return _cuda().memory_allocated()
        return _status("VmRSS")

    def reset(self) -> None:
        """Resets the peak. Returns freed memory to the system first, so that a later use of it counts."""
        if self.device == "cuda":
            _cuda().synchronize()
            _cuda().empty_cache()
            _cuda().reset_peak_memory_stats()
            return
        with contextlib.suppress(OSError, AttributeError):  # not glibc: nothing to give back
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        if self.device == "cuda":
            _cuda().synchronize()
            return _cuda().max_memory_allocated()
        return _status("VmHWM")

    def whole(self) -> int:
        """Peak of reserved memory: on a GPU what torch's allocator took, on a CPU the peak itself."""
        return _cuda().max_memory_reserved() if self.device == "cuda" else self.peak()


def _cuda() -> Any:
    import torch

    return torch.cuda


def _status(name: str) -> int:
    """VmRSS or VmHWM of this process; Linux only, and the error says so."""
    return 1024 * int(re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


# ---- lists of ids to vectors -----------------------------------------------------------------------------


def padded_groups(ids: list[list[int]], size: int) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Longest first, `size` at a time: which rows, and their input_ids and attention_mask [B, S], int64."""
    order = sorted(range(len(ids)), key=lambda n: len(ids[n]), reverse=True)
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        mask = np.arange(len(ids[rows[0]])) < np.array([[len(ids[n])] for n in rows])
        padded = np.zeros(mask.shape, dtype=np.int64)
        padded[mask] = [token for n in rows for token in ids[n]]
        yield rows, padded, mask.astype(np.int64)


def mean(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return (hidden * mask[..., None].astype(np.float32)).sum(1) / mask.sum(1, keepdims=True)


def in_batches(call: Callable[[np.ndarray, np.ndarray], np.ndarray], size: int) -> Encode:
    def encode(ids: list[list[int]]) -> np.ndarray:
        vectors: dict[int, np.ndarray] = {}
        for rows, padded, mask in padded_groups(ids, size):
            vectors.update(zip(rows, mean(call(padded, mask), mask), strict=True))
        return np.stack([vectors[n] for n in range(len(ids))])

    return encode

"""A named array of a checkpoint, whose bytes are read on access; every format's reader returns these."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

_WRITTEN_AT_ONCE = 256 << 10  # bytes


@dataclass(frozen=True)
class Variable:
    """One array of a checkpoint.

    Attributes:
        name: the name in the file.
        shape: the shape in the file, before any transposing.
        kind: the file's name of the type: "float32", "q8_0", "string".
        dtype: dtype of the result of `read`; None if torch has no such numbers.
        read: returns the array on the CPU, contiguous, [*shape]; memory-mapped and private if the file allows it. If
            dtype is None, it raises an error or returns the file's bytes, uint8 [size].
        verify: raises CheckpointError if the bytes do not have the file's checksum; None if the format has no
            checksums.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    dtype: torch.dtype | None
    read: Callable[[], Tensor]
    verify: Callable[[], None] | None = None

    @classmethod
    def of_tensor(cls, name: str, t: Tensor) -> Variable:
        """A variable for a tensor in memory."""
        return cls(name, tuple(t.shape), str(t.dtype).removeprefix("torch."), t.dtype, lambda: t)

    def as_dtype(self, dtype: torch.dtype) -> Variable:
        """The same variable in another dtype, converted when it is read."""
        if self.dtype == dtype:
            return self
        return replace(self, dtype=dtype, read=lambda: self.read().to(dtype))


def map_bytes(path: str | os.PathLike, offset: int, size: int) -> np.ndarray:
    """Bytes of a file as an array of uint8, memory-mapped and private: writing into it does not change the file."""
    if size == 0:  # nothing to map
        return np.empty(0, dtype=np.uint8)
    return np.memmap(path, dtype=np.uint8, mode="c", offset=offset, shape=(size,))


def bytes_of(t: Tensor) -> np.ndarray:
    """A tensor's bytes in order, as uint8; copied only where it is not contiguous, or not on the CPU."""
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def write_bytes(file: BinaryIO, data: np.ndarray) -> None:
    """Writes an array of uint8 in small pieces. For a long write Linux searches a contiguous piece of free memory,
    which can take longer than the write itself (Linux 6.18 and ext4, 438 MB: 0.8 s in writes of 9 MB, 0.09 s in writes
    of 256 KiB)."""
    for start in range(0, data.size, _WRITTEN_AT_ONCE):
        file.write(data[start : start + _WRITTEN_AT_ONCE])


def as_tensor(data: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """An array of uint8 as a tensor of this dtype; copied only if its address is not aligned for the dtype."""
    if data.size == 0:  # torch does not view an empty array as another dtype
        return torch.empty(shape, dtype=dtype, device="cpu")
    if data.ctypes.data % dtype.itemsize:
        data = np.array(data)
    return torch.from_numpy(data.view(np.ndarray)).view(dtype).reshape(shape)

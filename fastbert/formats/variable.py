"""What every reader of a file format yields: a named array whose bytes are read when they are asked for."""

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
    """One array of somebody's checkpoint.

    Attributes:
        name: as the file has it.
        shape: as the file has it, before anything is transposed.
        kind: the file's word for its numbers: "float32", "q8_0", "string".
        dtype: of what `read` gives; None where the variable holds no numbers that torch has.
        read: the array on the CPU, contiguous, [*shape]; memory-mapped and private where the file allows it. Where
            dtype is None, an error, or the bytes as the file has them, uint8 [size].
        verify: raises CheckpointError where the bytes do not have the checksum that the file gives; None where the
            format has no checksums.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    dtype: torch.dtype | None
    read: Callable[[], Tensor]
    verify: Callable[[], None] | None = None

    @classmethod
    def of_tensor(cls, name: str, t: Tensor) -> Variable:
        """A variable whose tensor is there already."""
        return cls(name, tuple(t.shape), str(t.dtype).removeprefix("torch."), t.dtype, lambda: t)

    def as_dtype(self, dtype: torch.dtype) -> Variable:
        """The same numbers in another dtype, turned into it when they are read."""
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
    """Writes an array of uint8, in pieces. For a long write Linux looks for free memory that is as long in one piece,
    which can take several times as long as the write itself (Linux 6.18 and ext4, 438 MB: 0.8 s in writes of 9 MB,
    0.09 s in writes of 256 KiB)."""
    for start in range(0, data.size, _WRITTEN_AT_ONCE):
        file.write(data[start : start + _WRITTEN_AT_ONCE])


def as_tensor(data: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """An array of uint8, seen as a tensor; copied only where it lies at an address that the dtype cannot have."""
    if data.size == 0:  # torch does not view an empty array as another dtype
        return torch.empty(shape, dtype=dtype, device="cpu")
    if data.ctypes.data % dtype.itemsize:
        data = np.array(data)
    return torch.from_numpy(data.view(np.ndarray)).view(dtype).reshape(shape)

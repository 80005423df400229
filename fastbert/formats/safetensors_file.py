"""A .safetensors file written one tensor at a time, so that a model larger than memory can be converted.

8 bytes: the header's length; the header, JSON: name -> dtype, shape, data_offsets; the tensors' bytes
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from .variable import Variable, bytes_of, write_bytes

# in the order of safetensors' own writer: the widest dtype first
_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_RANK = {dtype: rank for rank, dtype in enumerate(_DTYPES)}


def total_size(tensors: dict[str, Variable]) -> int:
    """Bytes of the tensors, without the header."""
    return sum(_size(t) for t in tensors.values())


def write_safetensors(path: Path, tensors: dict[str, Variable]) -> None:
    """Writes the tensors, read one after another, byte for byte as safetensors' own writer does; synced to disk.

    Raises: ValueError on a dtype that the format lacks; OSError; whatever reading raises.
    """
    for name, t in tensors.items():
        if t.dtype not in _DTYPES:
            raise ValueError(f"safetensors has no type for {name}, which is {t.dtype}")
    # In this order each tensor begins at a multiple of its element size.
    names = sorted(tensors, key=lambda name: (_RANK[tensors[name].dtype], name))
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        t = tensors[name]
        end = offset + _size(t)
        header[name] = {"dtype": _DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            write_bytes(file, bytes_of(tensors[name].read()))
        file.flush()
        os.fsync(file.fileno())


def _size(t: Variable) -> int:
    size = t.dtype.itemsize
    for length in t.shape:
        size *= length
    return size

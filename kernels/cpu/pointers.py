"""The address of a tensor that the C++ operators read or write, once it is what they take it for.

The library sees addresses and sizes, so a tensor of another dtype, device, layout or size would be read and written
past its end. Every tensor goes to it through `address`, `strided_address` or `addresses`, and no other code of the C++
operators asks for a `data_ptr`. A tensor must be held by a name until the call is over: its address does not hold it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

# A subclass's memory need not be what its shape says.
PLAIN = (Tensor, torch.nn.Parameter)


def address(name: str, t: Tensor, dtype: torch.dtype, count: int) -> int:
    """Of a contiguous tensor of `count` elements. Raises TypeError for what is no plain tensor or of another dtype, and
    ValueError for another device, layout or size."""
    if type(t) in PLAIN and t.dtype is dtype and t.is_cpu and t.is_contiguous() and t.numel() == count:
        return t.data_ptr()
    raise _unfit(name, t, dtype, f"contiguous, of {count} elements")


def address_or_none(name: str, t: Tensor | None, dtype: torch.dtype, count: int) -> int | None:
    """`address`, or None where there is no such tensor."""
    return None if t is None else address(name, t, dtype, count)


def address_of_starts(name: str, starts: Tensor) -> tuple[int, int]:
    """(address, B) of cu_seqlens [B + 1] int32. Raises as `address`, and ValueError where it has other dimensions."""
    where = address(name, starts, torch.int32, max(starts.numel(), 1))
    if starts.dim() != 1:
        raise _unfit(name, starts, torch.int32, "of shape [B + 1]")
    return where, len(starts) - 1


def strided_address(name: str, t: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Of a tensor of this shape whose last dimension is contiguous, else as `address`."""
    if type(t) in PLAIN and t.dtype is dtype and t.is_cpu and t.shape == shape and t.stride(-1) == 1:
        return t.data_ptr()
    raise _unfit(name, t, dtype, f"of shape {shape}, its last dimension contiguous")


def addresses(tensors: Sequence[Tensor], dtype: torch.dtype, shapes: Sequence[tuple[int, ...]]) -> array | None:
    """Of contiguous tensors of these shapes; None where there are none, or one of them is something else."""
    fit = (
        [t.shape for t in tensors] == shapes
        and {*map(type, tensors)} <= {*PLAIN}
        and {t.dtype for t in tensors} == {dtype}
        and all(t.is_cpu and t.is_contiguous() for t in tensors)
    )
    return array("Q", [t.data_ptr() for t in tensors]) if fit else None


def _unfit(name: str, t: object, dtype: torch.dtype, layout: str) -> Exception:
    if type(t) not in PLAIN:
        return TypeError(f"{name} must be a plain tensor, got a {type(t).__name__}")
    if t.dtype != dtype:
        return TypeError(f"{name} must be {dtype}, got {t.dtype}")
    return ValueError(
        f"{name} must be on the CPU, {layout}; got shape {tuple(t.shape)} with strides {t.stride()} on {t.device}"
    )

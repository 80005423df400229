"""Addresses of tensors for the C++ operators, after a check of dtype, device, layout and size.

The library gets addresses and sizes only, so a wrong tensor would make it read or write past the tensor's end. Every
tensor is passed through `address`, `strided_address` or `addresses`; no other code around the C++ operators calls
`data_ptr`. An address does not keep a tensor alive: the caller must hold the tensor until the call returns.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

# The memory of a subclass need not match its shape.
PLAIN = (Tensor, torch.nn.Parameter)


def address(name: str, t: Tensor, dtype: torch.dtype, count: int) -> int:
    """The address of a contiguous tensor of `count` elements. Raises TypeError for a subclass of Tensor or another
    dtype, and ValueError for another device, layout or size."""
    if type(t) in PLAIN and t.dtype is dtype and t.is_cpu and t.is_contiguous() and t.numel() == count:
        return t.data_ptr()
    raise _unfit(name, t, dtype, f"contiguous, of {count} elements")


def address_or_none(name: str, t: Tensor | None, dtype: torch.dtype, count: int) -> int | None:
    """`address` of t, or None where t is None."""
    return None if t is None else address(name, t, dtype, count)


def address_of_starts(name: str, starts: Tensor) -> tuple[int, int]:
    """(address, B) of cu_seqlens [B + 1] int32. Raises like `address`, and ValueError unless it has one dimension."""
    where = address(name, starts, torch.int32, max(starts.numel(), 1))
    if starts.dim() != 1:
        raise _unfit(name, starts, torch.int32, "of shape [B + 1]")
    return where, len(starts) - 1


def strided_address(name: str, t: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """The address of a tensor of this shape with a contiguous last dimension. Raises like `address`."""
    if type(t) in PLAIN and t.dtype is dtype and t.is_cpu and t.shape == shape and t.stride(-1) == 1:
        return t.data_ptr()
    raise _unfit(name, t, dtype, f"of shape {shape}, its last dimension contiguous")


def addresses(tensors: Sequence[Tensor], dtype: torch.dtype, shapes: Sequence[tuple[int, ...]]) -> array | None:
    """The addresses of contiguous tensors of these shapes; None where there is no tensor, or one does not fit."""
    return plain_addresses(tensors, dtype) if [t.shape for t in tensors] == shapes else None


def plain_addresses(tensors: Sequence[Tensor], dtype: torch.dtype) -> array | None:
    """The addresses of contiguous tensors of any shape; None where there is no tensor, or one does not fit."""
    fit = (
        {*map(type, tensors)} <= {*PLAIN}
        and {t.dtype for t in tensors} == {dtype}
        and {t.layout for t in tensors} == {torch.strided}
        and False not in {t.is_cpu and t.is_contiguous() for t in tensors}
    )
    return places(tensors) if fit else None


def places(tensors: Sequence[Tensor]) -> array:
    """The addresses of tensors without a check, to compare them with addresses that were checked."""
    return array("Q", [t.data_ptr() for t in tensors])


def _unfit(name: str, t: object, dtype: torch.dtype, layout: str) -> Exception:
    if type(t) not in PLAIN:
        return TypeError(f"{name} must be a plain tensor, got a {type(t).__name__}")
    if t.dtype != dtype:
        return TypeError(f"{name} must be {dtype}, got {t.dtype}")
    return ValueError(
        f"{name} must be on the CPU, {layout}; got shape {tuple(t.shape)} with strides {t.stride()} on {t.device}"
    )

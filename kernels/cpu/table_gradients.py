"""Gradients of tables in memory that is used again in each step, with a record of the rows that are not zero.

A step uses some hundreds of the 30,522 rows of a word table, but autograd's gradient has all rows. In a `Kept` block
the gradient is still a whole tensor, but only the rows of the last step and of this one are written, and its reader can
ask which rows may be other than zero.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from .pointers import addresses


class _Memory(NamedTuple):
    """A gradient [rows, width] float32, `touched` [rows] uint8, 0 where a row is zero, and the version of the gradient
    that this is known for."""

    gradient: Tensor
    touched: Tensor
    version: int


class Kept:
    """A block in which the C++ backward pass of embeddings writes a word table's gradient into kept memory, in the
    thread that entered the block.

    For a training loop that calls `give_back` before it drops its gradients. A gradient that something else still
    refers to after that keeps its memory.
    """

    def __init__(self) -> None:
        self._free: dict[torch.Size, _Memory] = {}
        self._given: dict[torch.Size, _Memory] = {}

    def __enter__(self) -> Kept:
        self._before, _here.block = _current(), self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _here.block = self._before

    def take(self, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
        """(gradient, touched) for the backward pass to write. Rows that are not `touched` are zeros. Without `touched`,
        for a second gradient of this shape before `give_back`, all elements must be written."""
        if shape in self._given:
            return torch.empty(shape, dtype=torch.float32, device="cpu"), None
        kept = self._free.pop(shape, None)
        if kept is None or _holders(kept.gradient) > 1:
            gradient = torch.empty(shape, dtype=torch.float32, device="cpu")
            touched = torch.ones(shape[0], dtype=torch.uint8, device="cpu")
            kept = _Memory(gradient, touched, gradient._version)
        self._given[shape] = kept
        return kept.gradient.detach(), kept.touched  # detach: autograd takes a gradient whose tensor nobody else holds

    def touched(self, gradient: Tensor) -> Tensor | None:
        """[rows] uint8, 0 where a row of this gradient is zero; None if that is not known."""
        kept = self._given.get(gradient.shape)
        if kept is None or gradient._version != kept.version:
            return None
        where = addresses([gradient], torch.float32, [gradient.shape])
        return kept.touched if where == addresses([kept.gradient], torch.float32, [gradient.shape]) else None

    def among(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Those of the gradients of which something may be known."""
        return [g for g in gradients if g.dim() == 2 and g.shape in self._given] if self._given else []

    def give_back(self, gradients: list[Tensor]) -> None:
        """These gradients are no longer needed; the memory of those from `take` may be written again."""
        for gradient in self.among(gradients):
            if self.touched(gradient) is not None:
                self._free[gradient.shape] = self._given[gradient.shape]
        self._given.clear()  # a gradient that something else wrote into is dropped


_here = threading.local()


def _current() -> Kept | None:
    """The block that this thread is in. On a CPU the backward pass runs in the thread that calls it."""
    return getattr(_here, "block", None)


def _holders(t: Tensor) -> int:
    """How many tensors and arrays refer to the memory of t, apart from Python's object of its storage."""
    return torch._C._storage_Use_Count(t.untyped_storage()._cdata) - 1


def take(shape: torch.Size) -> tuple[Tensor, Tensor | None]:
    """`Kept.take` of the current block; outside, new memory and None."""
    if (block := _current()) is not None:
        return block.take(shape)
    return torch.empty(shape, dtype=torch.float32, device="cpu"), None


def touched_of(gradients: Sequence[Tensor]) -> list[Tensor | None]:
    """`touched` of each gradient."""
    found: list[Tensor | None] = [None] * len(gradients)
    if (block := _current()) is not None and (among := block.among(gradients)):
        known = {id(gradient): block.touched(gradient) for gradient in among}
        found = [known.get(id(gradient)) for gradient in gradients]
    return found


def touched(gradient: Tensor) -> Tensor | None:
    """`Kept.touched` of the current block; None outside."""
    return None if (block := _current()) is None else block.touched(gradient)


def give_back(gradients: list[Tensor]) -> None:
    """`Kept.give_back` of the current block; nothing outside."""
    if (block := _current()) is not None:
        block.give_back(gradients)

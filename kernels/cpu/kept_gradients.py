"""What is known of gradients in a training loop: the rows of a table's that are not zero, and sums of squares.

A step uses some hundreds of the 30,522 rows of a word table, but autograd's gradient has all rows. In a `Kept` block
the gradient is still a whole tensor, but only the rows of the last step and of this one are written, and its reader can
ask which rows may be other than zero. The C++ backward pass of layers also sums the squares of the gradients that it
writes, so that the norm of all gradients need not read them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from .pointers import addresses, places


class _Memory(NamedTuple):
    """A gradient [rows, width] float32, `touched` [rows] uint8, 0 where a row is zero, and the version of the gradient
    that this is known for."""

    gradient: Tensor
    touched: Tensor
    version: int


class _Squares(NamedTuple):
    """The sum of the squares of a gradient's elements, how many they are, and the gradient's memory: while it is held,
    no other tensor can have this address."""

    total: float
    count: int
    memory: torch.UntypedStorage


class Kept:
    """A block in which the C++ backward pass of embeddings writes a word table's gradient into kept memory, in the
    thread that entered the block.

    For a training loop that calls `give_back` before it drops its gradients. A gradient that something else still
    refers to after that keeps its memory.
    """

    def __init__(self) -> None:
        self._free: dict[torch.Size, _Memory] = {}
        self._given: dict[torch.Size, _Memory] = {}
        self._squares: dict[int, _Squares] = {}
        self._backward: int | None = None  # the number of the backward pass that wrote these gradients

    def __enter__(self) -> Kept:
        self._before, _here.block = _current(), self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _here.block = self._before
        self._squares.clear()

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

    def note_squares(self, gradients: Sequence[Tensor | None], totals: Sequence[float]) -> None:
        """These new gradients, None for those that are not wanted, have these sums of squares; -1 if not known."""
        now = torch._C._current_graph_task_id()
        if now != self._backward:
            self._squares.clear()
            # The gradients of a second backward pass before `give_back` are added to those of the first.
            self._backward = now if self._backward is None else -1
        if self._backward != now:
            return
        for gradient, total in zip(gradients, totals, strict=True):
            if gradient is not None and total >= 0.0:
                (where,) = places([gradient])
                self._squares[where] = _Squares(total, gradient.numel(), gradient.untyped_storage())

    def squares_of(self, gradients: Sequence[Tensor], where: Sequence[int]) -> list[float | None]:
        """The sum of squares of each gradient, None if that is not known. where: their addresses."""
        known = self._squares
        found: list[float | None] = [None] * len(gradients)
        for i, (gradient, place) in enumerate(zip(gradients, where, strict=True)):
            if (of := known.get(place)) is not None and gradient._version == 0 and gradient.numel() == of.count:
                found[i] = of.total
        return found

    def give_back(self, gradients: list[Tensor]) -> None:
        """These gradients are no longer needed; the memory of those from `take` may be written again."""
        for gradient in self.among(gradients):
            if self.touched(gradient) is not None:
                self._free[gradient.shape] = self._given[gradient.shape]
        self._given.clear()  # a gradient that something else wrote into is dropped
        self._squares.clear()
        self._backward = None


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


def is_kept() -> bool:
    """Whether this thread is in a block."""
    return _current() is not None


def note_squares(gradients: Sequence[Tensor | None], totals: Sequence[float]) -> None:
    """`Kept.note_squares` of the current block."""
    if (block := _current()) is not None:
        block.note_squares(gradients, totals)


def squares_of(gradients: Sequence[Tensor], where: Sequence[int]) -> list[float | None]:
    """`Kept.squares_of` of the current block; outside None for each."""
    block = _current()
    return [None] * len(gradients) if block is None else block.squares_of(gradients, where)


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

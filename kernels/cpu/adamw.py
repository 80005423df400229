"""AdamW's step in one pass of C++ over many tensors, and the norm of gradients. adamw.cpp has the equations."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import kept_gradients
from . import operators as cpp
from .library import DEFERRED
from .pointers import PLAIN, address, address_or_none, addresses, places, plain_addresses

BLOCK = 4096  # elements that `step` updates at a time in a tensor of one dimension


class Numbers(NamedTuple):
    """The scalars of one tensor's update at one step, in the order of the structure `Numbers` in adamw.cpp."""

    scale: float
    keep: float
    of_m: float
    beta2: float
    of_v: float
    step: float
    of_root: float
    eps: float
    kept: tuple[float, ...]


def numbers(
    step: float, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, scale: float,
    before: tuple[float, ...],
) -> Numbers:  # fmt: skip
    """The scalars of step number `step`, which counts from 1. The gradient is multiplied by `scale`. before: `kept` of
    the step before, or `NOTHING_KEPT`."""
    beta1, beta2 = betas
    keep = 1.0 - lr * weight_decay
    return Numbers(
        scale, keep, 1.0 - beta1, beta2, 1.0 - beta2, lr / (1.0 - beta1**step), 1.0 / math.sqrt(1.0 - beta2**step), eps,
        (*before[1:], keep),
    )  # fmt: skip


NOTHING_KEPT = (1.0,) * DEFERRED


def takes(*tensors: Tensor) -> bool:
    """Whether the C++ supports these tensors: dense, contiguous, on the CPU, and of a dtype that it computes in."""
    known, strided = cpp.dtypes(), torch.strided
    for t in tensors:
        if not (type(t) in PLAIN and t.layout is strided and t.is_cpu and t.dtype in known and t.is_contiguous()):
            return False
    return True


def block_of(p: Tensor) -> int:
    """How many elements are updated at a time: a row where p has rows, else BLOCK elements."""
    return max(1, p.shape[-1]) if p.dim() > 1 else BLOCK


def at_rest(p: Tensor, are_zero: bool) -> Tensor:
    """A new `resting` tensor for `Update`, [blocks of p] uint8. are_zero: m and v of p are known to be zero."""
    return torch.full((_blocks(p),), int(are_zero), dtype=torch.uint8, device="cpu")


def _blocks(p: Tensor) -> int:
    return -(-p.numel() // block_of(p))


class Update:
    """AdamW's steps of some parameters. The tensors are checked here, so that a step checks the gradients alone.

    Args:
        parameters, means, squares: of one dtype; a parameter, its means and its squares have one shape.
        counts: the number of steps of each parameter, float32 scalars.
        resting: for each parameter the tensor from `at_rest`, or None where eps is 0.
        places: for each parameter, the index of its numbers in the `by` of a step.
        late: for each parameter None, or zeros [rows] uint8 in which the steps are counted for which a row at rest has
            not decayed. `settle` applies them, which the caller must call before it reads such rows.

    Raises: ValueError or TypeError if a tensor does not fit, or `takes` does not support it.
    """

    def __init__(
        self, parameters: Sequence[Tensor], means: Sequence[Tensor], squares: Sequence[Tensor],
        counts: Sequence[Tensor], resting: Sequence[Tensor | None], places: Sequence[int],
        late: Sequence[Tensor | None],
    ) -> None:  # fmt: skip
        self.dtype, self.shapes, self.most = parameters[0].dtype, [p.shape for p in parameters], max(places)
        self._held = [*parameters], [*means], [*squares]
        self._resting, self._counts, self._late = [*resting], [*counts], [*late]  # addresses do not keep tensors alive
        self._shapes_of_counts = [count.shape for count in counts]
        self._pointers, self._sizes = array("Q"), array("q")
        self._found: array | None = None  # the addresses of the gradients that `takes` was last called with
        for p, mean, square, count, rest, place, of_late in zip(
            parameters, means, squares, counts, resting, places, late, strict=True
        ):
            size = p.numel()
            self._pointers.extend((
                address("parameter", p, self.dtype, size), 0, address("exp_avg", mean, self.dtype, size),
                address("exp_avg_sq", square, self.dtype, size),
                address_or_none("at_rest", rest, torch.uint8, _blocks(p)) or 0, 0,
                address("step", count, torch.float32, 1),
                address_or_none("late", of_late, torch.uint8, _blocks(p)) or 0,
            ))  # fmt: skip
            self._sizes.extend((size, block_of(p), place))

    def takes(self, gradients: Sequence[Tensor]) -> bool:
        """Whether `step` supports these gradients, and `is_in_place`."""
        self._found = addresses(gradients, self.dtype, self.shapes) if self.is_in_place() else None
        return self._found is not None

    def is_in_place(self) -> bool:
        """Whether parameters, moments and counts still are at the addresses that were checked: `tensor.data = other`
        gives a tensor other memory, or other strides in the same memory."""
        return (
            places(self._counts) == self._pointers[6::8]
            and all(
                places(tensors) == self._pointers[place::8]
                for place, tensors in zip((0, 2, 3), self._held, strict=True)
            )
            and False not in [p.is_contiguous() for p in self._held[0]]
        )

    def step(self, gradients: Sequence[Tensor], touched: Sequence[Tensor | None], by: Sequence[Numbers]) -> None:
        """Updates parameters, moments, `resting` and `counts` in place.

        touched: for each parameter None, or [rows] uint8, 0 where a row of the gradient is known to be zero.

        Raises: ValueError or TypeError if a gradient does not have its parameter's shape and dtype.
        """
        if len(by) <= self.most:
            raise ValueError(f"adamw: got numbers for {len(by)} places, but a parameter has place {self.most}")
        found, self._found = self._found, None
        if found is None or found != places(gradients):
            found = addresses(gradients, self.dtype, self.shapes)
        if found is None:
            for g, p in zip(gradients, self._held[0], strict=True):
                address("gradient", g, self.dtype, p.numel())
            raise ValueError("adamw: a gradient does not have its parameter's shape")
        self._pointers[1::8] = found
        self._pointers[5::8] = array("Q", [
            0 if rows is None else address("touched", rows, torch.uint8, _blocks(p))
            for rows, p in zip(touched, self._held[0], strict=True)
        ])  # fmt: skip
        flat = array("f", [number for of in by for number in (*of[:-1], *of.kept)])
        cpp.call(
            "adamw", self.dtype, self._pointers.buffer_info()[0], self._sizes.buffer_info()[0], flat.buffer_info()[0],
            len(self.shapes),
        )  # fmt: skip


def settle(p: Tensor, late: Tensor, kept: tuple[float, ...], rows: Tensor | None) -> None:
    """Applies the decay that `late` [rows of p] counts to rows [N] int64 of p, or to all, in place.

    kept: of the numbers of the last step.
    """
    size, width, factors = p.numel(), block_of(p), array("f", kept)
    if rows is not None and rows.numel() == 0:
        return
    if rows is not None:
        least, most = (int(t) for t in rows.aminmax())
        if least < 0 or most >= _blocks(p):
            raise ValueError(f"adamw: rows must be from 0 to {_blocks(p) - 1}, got {least} to {most}")
    cpp.call(
        "adamw_settle", p.dtype, address("parameter", p, p.dtype, size),
        address("late", late, torch.uint8, _blocks(p)),
        None if rows is None else address("rows", rows, torch.int64, rows.numel()),
        0 if rows is None else rows.numel(), size, width, factors.buffer_info()[0],
    )  # fmt: skip


def norm(gradients: Sequence[Tensor], touched: Sequence[Tensor | None] | None = None) -> float | None:
    """The square root of the sum of squares of all elements; None if the C++ does not support these gradients, or they
    have several dtypes. What `kept_gradients` knows of them is not read. touched: as in `Update`, in its place."""
    if not gradients:
        return 0.0
    dtype = gradients[0].dtype
    found = plain_addresses(gradients, dtype) if dtype in cpp.dtypes() else None
    if found is None:
        return None
    known = kept_gradients.squares_of(gradients, found)
    read = [i for i, total in enumerate(known) if total is None]
    rest = [gradients[i] for i in read]
    of_rest = kept_gradients.touched_of(rest) if touched is None else [touched[i] for i in read]
    pointers, sizes = array("Q"), array("q")
    for i, g, rows in zip(read, rest, of_rest, strict=True):
        pointers.extend((found[i], address_or_none("touched", rows, torch.uint8, _blocks(g)) or 0))
        sizes.extend((g.numel(), 1 if rows is None else block_of(g)))
    sum_of_squares = array("d", [0.0])
    cpp.call(
        "sum_squares", dtype, pointers.buffer_info()[0], sizes.buffer_info()[0], len(rest),
        sum_of_squares.buffer_info()[0],
    )  # fmt: skip
    return math.sqrt(sum_of_squares[0] + sum(total for total in known if total is not None))

"""AdamW's step in one pass of C++ over many tensors, and the norm of gradients. adamw.cpp has the equations."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import operators as cpp
from .pointers import PLAIN, address, address_or_none, addresses

NAMES = ("parameter", "gradient", "exp_avg", "exp_avg_sq")
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


def numbers(
    step: float, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, scale: float
) -> Numbers:
    """The scalars of step number `step`, which counts from 1. The gradient is multiplied by `scale`."""
    beta1, beta2 = betas
    return Numbers(
        scale, 1.0 - lr * weight_decay, 1.0 - beta1, beta2, 1.0 - beta2, lr / (1.0 - beta1**step),
        1.0 / math.sqrt(1.0 - beta2**step), eps,
    )  # fmt: skip


def takes(*tensors: Tensor) -> bool:
    """Whether `step` can update these tensors: dense, contiguous, on the CPU, and of a dtype that the C++ supports."""
    known, strided = cpp.dtypes(), torch.strided
    for t in tensors:
        if not (type(t) in PLAIN and t.layout is strided and t.is_cpu and t.dtype in known and t.is_contiguous()):
            return False
    return True


def block_of(p: Tensor) -> int:
    """How many elements `step` updates at a time: a row where p has rows, else BLOCK elements."""
    return max(1, p.shape[-1]) if p.dim() > 1 else BLOCK


def at_rest(p: Tensor, are_zero: bool) -> Tensor:
    """A new `resting` tensor for `step`, [blocks of p] uint8. are_zero: m and v of p are known to be zero."""
    blocks = -(-p.numel() // block_of(p))
    return torch.full((blocks,), int(are_zero), dtype=torch.uint8, device="cpu")


def step(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], means: Sequence[Tensor], squares: Sequence[Tensor],
    resting: Sequence[Tensor | None], by: Sequence[Numbers],
) -> None:  # fmt: skip
    """Updates parameters, means and squares in place. All have one dtype, and a parameter's four tensors one shape.

    resting: for each parameter the tensor from `at_rest`, which is updated as well, or None where eps is 0.
    """
    if not parameters:
        return
    dtype, shapes = parameters[0].dtype, [p.shape for p in parameters]
    if len(by) != len(parameters):
        raise ValueError(f"adamw: got {len(parameters)} parameters, but numbers for {len(by)}")
    columns = [
        addresses(tensors, dtype, shapes) or array("Q", [
            address(name, t, dtype, p.numel()) for t, p in zip(tensors, parameters, strict=True)
        ])
        for name, tensors in zip(NAMES, (parameters, gradients, means, squares), strict=True)
    ]  # fmt: skip
    pointers, sizes = array("Q"), array("q")
    for p, rest, *of in zip(parameters, resting, *columns, strict=True):
        size, block = p.numel(), block_of(p)
        pointers.extend((*of, address_or_none("at_rest", rest, torch.uint8, -(-size // block)) or 0))
        sizes.extend((size, block))
    flat = array("f", [number for of in by for number in of])
    cpp.call("adamw", dtype, pointers.buffer_info()[0], sizes.buffer_info()[0], flat.buffer_info()[0], len(parameters))


def norm(gradients: Sequence[Tensor]) -> float:
    """The square root of the sum of the squares of all elements. All gradients have one dtype."""
    if not gradients:
        return 0.0
    dtype, sum_of_squares = gradients[0].dtype, array("d", [0.0])
    pointers = array("Q", [address("gradient", g, dtype, g.numel()) for g in gradients])
    sizes = array("q", map(Tensor.numel, gradients))
    cpp.call(
        "sum_squares", dtype, pointers.buffer_info()[0], sizes.buffer_info()[0], len(gradients),
        sum_of_squares.buffer_info()[0],
    )  # fmt: skip
    return math.sqrt(sum_of_squares[0])

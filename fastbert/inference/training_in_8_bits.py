"""Linear layers trained for weights in 8 bits (quantisation-aware training, Jacob et al., arXiv:1712.05877): they
multiply as inference will, by the very operator, and their gradients are those of the product without its rounding.

    forward     y = Int8Weight(W, b, factors).linear(x)     the integers made again from W if W has changed
    backward    dx = dy W',  dW = dy^T x,  db = sum of dy    W' what the integers say W is
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from ..formats.integers import Integers
from ..kernels.cpu.int8 import Int8Weight
from .eight_bits import Int8Linear


def in_8_bits(weight: Tensor, bias: Tensor | None, factors: Tensor | None) -> Int8Weight:
    """The weight [N, K] with one scale for each of its rows, so that every machine multiplies by the same integers."""
    return Int8Weight(weight, bias, factors, group=weight.shape[1])


def integers_of(weight: Tensor, factors: Tensor | None) -> Integers:
    """The same as a checkpoint holds it."""
    packed = in_8_bits(weight, None, factors)
    return Integers(packed.integers.contiguous(), packed.scales_of_groups.contiguous(), factors)


class TrainedInt8Linear(nn.Linear):
    """nn.Linear with the parameters of another one, whose product is that of `Int8Linear` made of it at this moment.

    factors: [K] float32 of x, or None.
    """

    def __init__(self, linear: nn.Linear, factors: Tensor | None = None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("factors", factors, persistent=False)
        self.training = linear.training
        self._made: tuple[tuple, Int8Weight] | None = None

    def packed(self) -> Int8Weight:
        """Of the parameters as they are now."""
        state = tuple((id(p), p._version) for p in (self.weight, self.bias) if p is not None)
        if self._made is None or self._made[0] != state:
            with torch.no_grad():
                self._made = state, in_8_bits(self.weight, self.bias, self.factors)
        return self._made[1]

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N], in x's dtype, under autocast in its."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        with torch.autocast(x.device.type, enabled=False):
            return _Product.apply(x, self.weight, self.bias, self.packed())

    def frozen(self) -> Int8Linear:
        """The layer that inference has."""
        return Int8Linear(self, packed=self.packed())

    def __getstate__(self) -> dict:
        """A pickled or deep-copied one makes its own integers."""
        return {**self.__dict__, "_made": None}


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, packed: Int8Weight) -> Tensor:
        ctx.save_for_backward(x)
        ctx.packed, ctx.dtypes = packed, (weight.dtype, None if bias is None else bias.dtype)
        return packed.linear(x)

    @staticmethod
    def backward(ctx, dy: Tensor):
        (x,) = ctx.saved_tensors
        of_weight, of_bias = ctx.dtypes
        rows, inputs = dy.flatten(0, -2), x.flatten(0, -2)
        dx = dy @ ctx.packed.weight().to(dy.dtype) if ctx.needs_input_grad[0] else None
        dweight = (rows.T @ inputs).to(of_weight) if ctx.needs_input_grad[1] else None
        dbias = rows.sum(0, dtype=torch.float32).to(of_bias) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias, None

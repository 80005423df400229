"""Building blocks as nn.Module, with the names and the parameters that transformers gives them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor

from . import functional as F


class JoinedLinears:
    """Linear layers over one input as a single product: x [..., C] -> [..., sum of their widths].

    The joined weight is made anew where a gradient must reach the parts; without gradients it is kept until a part
    changes. The layers are given at every call and not held.
    """

    def __init__(self):
        self._weight_and_bias: tuple[Tensor, Tensor | None] | None = None
        self._made_of: tuple = ()

    def __call__(self, x: Tensor, linears: Sequence[nn.Linear], impl: F.Impl | None = None) -> Tensor:
        return F.linear(x, *self._joined(linears), impl=impl)

    def _joined(self, linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._join(linears)
        parameters = [p for linear in linears for p in (linear.weight, linear.bias) if p is not None]
        if any(p.is_inference() for p in parameters):  # made in inference mode: nothing tells when they change
            return self._join(linears)
        state = tuple((p.data_ptr(), p._version) for p in parameters)
        if self._weight_and_bias is None or self._made_of != state:
            self._weight_and_bias, self._made_of = self._join(linears), state
        return self._weight_and_bias

    @staticmethod
    def _join(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
        weight = torch.cat([linear.weight for linear in linears])
        return weight, None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])

    def __getstate__(self) -> dict:
        """A pickled or deep-copied one leaves the joined copy behind."""
        return {"_weight_and_bias": None, "_made_of": ()}


class FusedLinears(nn.ModuleDict):
    """`JoinedLinears` that hold their layers: each stays a module with its own weight and bias, so names, checkpoints
    and optimisers see what they know."""

    def __init__(self, linears: dict[str, nn.Linear]):
        super().__init__(linears)
        self._joined = JoinedLinears()

    def forward(self, x: Tensor, impl: F.Impl | None = None) -> Tensor:
        return self._joined(x, list(self.values()), impl)

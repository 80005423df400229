"""Building blocks as nn.Module, with the names and the parameters that transformers gives them."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor


class FusedLinears(nn.ModuleDict):
    """Linear layers over one input as a single product: x [..., C] -> [..., sum of their widths].

    Each stays a module with its own weight and bias, so names, checkpoints and optimisers see what they know. The
    joined weight is made anew where a gradient must reach the parts; without gradients it is kept until a part changes.
    """

    _joined: tuple[Tensor, Tensor] | None = None
    _joined_of: tuple = ()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, *self._weight_and_bias())

    def _weight_and_bias(self) -> tuple[Tensor, Tensor]:
        parts = list(self.values())
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._join(parts)
        state = tuple((p.data_ptr(), p._version) for part in parts for p in (part.weight, part.bias))
        if self._joined is None or self._joined_of != state:
            self._joined, self._joined_of = self._join(parts), state
        return self._joined

    @staticmethod
    def _join(parts: list[nn.Linear]) -> tuple[Tensor, Tensor]:
        return torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])

    def __getstate__(self) -> dict:
        """A pickled or deep-copied module leaves the joined copy behind."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_joined", "_joined_of")}

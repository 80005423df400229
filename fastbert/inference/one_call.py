"""A stack of post-norm layers in one call of C++ on a CPU, where going from operator to operator can cost as much as
the operators do: kernels/cpu/layer.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import functional as F
from ..kernels.cpu import layouts
from ..kernels.cpu import operators as cpp

# what may stand between up and down
ACTIVATIONS = (*cpp.ACTIVATION_NUMBERS,)


def is_ahead(nbytes: int, dtype: torch.dtype) -> bool:
    """Whether one call is ahead of the layers one by one, with hidden states of so many bytes in all."""
    return cpp.whole_layers(nbytes, dtype)


def run(x: Tensor, tensors: list[Tensor], options: F.LayerOptions, cu_seqlens: Tensor) -> Tensor | None:
    """x [T, C] of the last layer, or None where the layers have to be called one after another.

    Args:
        tensors: what `functional.LayerWeights` holds of each layer, one layer after another, as `is_plain` found them.
        options: of every layer; its activation is one of `ACTIVATIONS`, and nothing is dropped.
        cu_seqlens: [B + 1] int32.
    """
    return cpp.encoder_layers(x, tensors, options, cu_seqlens)


def is_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether all are there, and none is multiplied by in 8 bits."""
    return not (any(t is None for t in tensors) or layouts.any_int8(tensors))

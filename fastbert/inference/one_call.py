"""A stack of post-norm layers in one call of C++ on a CPU, where going from operator to operator can cost as much as
the operators do: kernels/cpu/layer.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.cpu import layouts
from ..kernels.cpu import operators as cpp


def is_ahead(nbytes: int, dtype: torch.dtype) -> bool:
    """Whether one call is ahead of the layers one by one, with hidden states of so many bytes in all."""
    return cpp.whole_layers(nbytes, dtype)


def run(x: Tensor, tensors: list[Tensor], cu_seqlens: Tensor, heads: int, inner: int, eps: float) -> Tensor | None:
    """x [T, C] of the last layer, or None where the layers have to be called one after another.

    Args:
        tensors: of each layer the weight and bias of query, key, value, output, norm, up, down and last norm, as
            `is_plain` found them; both norms have this `eps`, and between up and down stands GELU.
        cu_seqlens: [B + 1] int32.
        inner: rows of the weight of up.
    """
    if torch.compiler.is_compiling():
        return None
    return cpp.encoder_layers(x, tensors, cu_seqlens, heads, inner, eps)


def is_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether all are there, and none is multiplied by in 8 bits."""
    return not any(t is None or layouts.is_int8(t) for t in tensors)

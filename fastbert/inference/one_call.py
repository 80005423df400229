"""A stack of post-norm layers in one C++ call on a CPU (kernels/cpu/layer.cpp). For few tokens, calling operators one
by one costs as much as computing them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import functional as F
from ..kernels.cpu import int8
from ..kernels.cpu import operators as cpp
from ..kernels.cpu.int8 import Int8Layer as Int8Layer
from ..kernels.cpu.int8 import fit_in_one_call as fit_in_one_call

# activations of the feed-forward block that the C++ has
ACTIVATIONS_IN_CPP = (*cpp.ACTIVATION_NUMBERS,)


def is_ahead(nbytes: int, dtype: torch.dtype) -> bool:
    """Whether one call is faster than calling the layers one by one, for hidden states of `nbytes` bytes in all."""
    return cpp.whole_layers(nbytes, dtype)


def run(x: Tensor, tensors: list[Tensor], options: F.LayerOptions, cu_seqlens: Tensor) -> Tensor | None:
    """x [T, C] after the last layer, or None if the layers have to be called one after another.

    Args:
        tensors: the fields of `functional.LayerWeights` of each layer, one layer after another.
        options: for all layers; the activation is one of `ACTIVATIONS_IN_CPP`, and every dropout is 0.
        cu_seqlens: [B + 1] int32.
    """
    return cpp.encoder_layers(x, tensors, options, cu_seqlens)


def run_in_8_bits(
    x: Tensor, layers: Sequence[Int8Layer], options: F.LayerOptions, cu_seqlens: Tensor
) -> Tensor | None:  # fmt: skip
    """`run` with 8-bit weights, for layers of which `fit_in_one_call` is true."""
    return int8.encoder_layers(x, layers, options, cu_seqlens)

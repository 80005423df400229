"""A stack of post-norm layers in one call of C++ on a CPU, where going from operator to operator can cost as much as
the operators do: kernels/cpu/layer.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import functional as F
from ..kernels.cpu import int8
from ..kernels.cpu import operators as cpp
from ..kernels.cpu.int8 import Int8Layer as Int8Layer
from ..kernels.cpu.int8 import fit_in_one_call as fit_in_one_call

# what may stand between up and down
ACTIVATIONS_IN_CPP = (*cpp.ACTIVATION_NUMBERS,)


def is_ahead(nbytes: int, dtype: torch.dtype) -> bool:
    """Whether one call is ahead of the layers one by one, with hidden states of so many bytes in all."""
    return cpp.whole_layers(nbytes, dtype)


def run(x: Tensor, tensors: list[Tensor], options: F.LayerOptions, cu_seqlens: Tensor) -> Tensor | None:
    """x [T, C] of the last layer, or None where the layers have to be called one after another.

    Args:
        tensors: what `functional.LayerWeights` holds of each layer, one layer after another, as `is_plain` found them.
        options: of every layer; its activation is one of `ACTIVATIONS_IN_CPP`, and nothing is dropped.
        cu_seqlens: [B + 1] int32.
    """
    return cpp.encoder_layers(x, tensors, options, cu_seqlens)


def run_in_8_bits(
    x: Tensor, layers: Sequence[Int8Layer], options: F.LayerOptions, cu_seqlens: Tensor
) -> Tensor | None:  # fmt: skip
    """`run` with weights in 8 bits, of layers that fit (`fit_in_one_call`)."""
    return int8.encoder_layers(x, layers, options, cu_seqlens)

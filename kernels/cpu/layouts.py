"""Weights in the blocked layout that oneDNN multiplies from, made once, for inference on a CPU.

A product with an ordinary weight lays it out anew at every call: of float32 products with 768 to 3,072 columns that is
half the time at 16 rows and a seventh at 2,048. The owner of a model that no longer changes marks its weights; where
`operators.linear` is not ahead, a marked one is laid out at its first use and from then on held twice. A change that
torch counts (`_version`) or a new storage is noticed. One through `.data` or in inference mode torch does not count:

    promised      somebody said that there will be none (`prepack`, `quantise`, an `Encoder` of its own model). A
                  glimpse of the weight still notices an optimiser's step or an average, which change all of it
    not promised  the weight is read as a whole before each use: sums of its rows and columns, as integers
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

GLIMPSE = 64  # bytes
DTYPES = (torch.float32, torch.bfloat16)
# our activations -> oneDNN's name and algorithm
EPILOGUES = {
    None: ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
}


@dataclass
class _Marked:
    promised: bool
    state: tuple | None = None  # of the weight that was laid out
    sums: Tensor | None = None  # of the same, where nothing was promised
    packed: Tensor | None = None


_marked: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def mark(weight: Tensor, promised: bool = True) -> None:
    """Say that `weight` [N, K] will be multiplied from again and again, and not be trained; `promised`: nobody will
    write to it in a way that torch does not count."""
    if weight not in _marked:
        _marked[weight] = _Marked(promised)
    else:
        _marked[weight].promised |= promised


def unmark(weight: Tensor) -> None:
    """Takes `mark` back, and the copy with it."""
    if weight in _marked:
        del _marked[weight]


def state_of(weight: Tensor) -> tuple:
    """What a copy of `weight` was made of: another one, or another state, and the copy has to be made anew."""
    return weight.data_ptr(), weight.dtype, None if weight.is_inference() else weight._version, _glimpse(weight)


def _glimpse(weight: Tensor) -> bytes:
    """A few bytes out of its middle: half a microsecond where an operator of torch takes several."""
    ordinary = type(weight) in (Tensor, torch.nn.Parameter) and weight.device.type == "cpu" and weight.is_contiguous()
    size = weight.numel() * weight.element_size() if ordinary else 0
    if size == 0:
        return b""
    count = min(GLIMPSE, size)
    return ctypes.string_at(weight.data_ptr() + (size - count) // 2, count)


def sums_of(weight: Tensor) -> Tensor:
    """Sums over the rows and over the columns of the bits of `weight` [N, K], as integers [some + N].

    Any one element that changes changes both; what leaves all of them as they were is no change that a program makes.
    """
    weight = weight.detach().contiguous()
    row = weight.shape[1] * weight.element_size()
    words = weight.view(torch.int64 if row % 8 == 0 else torch.int32 if row % 4 == 0 else torch.int16)
    return torch.cat([words.sum(axis, dtype=torch.int64) for axis in (0, 1)])


def is_promised(weight: Tensor) -> bool:
    """Is it marked, and will nobody write to it in a way that torch does not count?"""
    marked = _marked.get(weight)
    return marked is not None and marked.promised


def mark_joined(joined: Tensor, parts: list[Tensor]) -> None:
    """Mark `joined`, made of `parts`, as they are; not where one of them is not."""
    if all(part in _marked for part in parts):
        mark(joined)


def find(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The blocked copy of `weight` for x weight^T + bias, or None where the product has to go the ordinary way."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not _marked:
        return None
    marked = _marked.get(weight)
    if marked is None or weight.device.type != "cpu" or weight.dtype not in DTYPES:
        return None
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype) or x.numel() == 0:
        return None
    state = state_of(weight)
    sums = None if marked.promised else sums_of(weight)
    same = marked.state == state and (sums is None or (marked.sums is not None and torch.equal(marked.sums, sums)))
    if not same:
        if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
            return None
        if weight.dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return None  # a CPU with AVX2 alone: oneDNN has no bfloat16 there
        marked.packed = _blocked(weight)
        marked.state, marked.sums = state, sums
    return marked.packed


def _blocked(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
    """activation(x weight^T + bias) from what `find` gave, the activation on the float32 sums."""
    name, algorithm = EPILOGUES[activation]
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, name, [], algorithm)

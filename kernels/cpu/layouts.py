"""Copies of weights in oneDNN's blocked layout, made once, for inference on a CPU.

Given an ordinary weight, oneDNN makes such a copy in every call. That takes half of the time of a float32 product with
768 to 3,072 columns at 16 rows, and a seventh at 2,048. So the owner of a model that is not trained marks its weights.
Where `operators.linear` is not faster, the first use of a marked weight makes the copy, which is then kept beside the
weight. A copy is made again when the weight's `_version` or storage has changed. Writes through `.data` or in
inference mode change neither:

    promised      the owner excludes such writes (`prepack`, `quantise`, an `Encoder` of its own model). A few bytes of
                  the weight are still compared, which finds an optimiser's step or averaged weights
    not promised  the whole weight is read before each use: sums of its rows and columns, as integers
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

GLIMPSE = 64  # bytes that `_glimpse` returns
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
    state: tuple | None = None  # `state_of` the weight when it was copied
    sums: Tensor | None = None  # `sums_of` the weight when it was copied; None where promised
    packed: Tensor | None = None


_marked: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def mark(weight: Tensor, promised: bool = True) -> None:
    """Allows a blocked copy of `weight` [N, K]: many products will use it, and it will not be trained. promised: no
    write to it will leave its `_version` unchanged."""
    if weight not in _marked:
        _marked[weight] = _Marked(promised)
    else:
        _marked[weight].promised |= promised


def unmark(weight: Tensor) -> None:
    """Undoes `mark` and frees the copy."""
    if weight in _marked:
        del _marked[weight]


def state_of(weight: Tensor) -> tuple:
    """A value that differs when `weight` has another storage, dtype or version, or other bytes in its middle."""
    return weight.data_ptr(), weight.dtype, None if weight.is_inference() else weight._version, _glimpse(weight)


def _glimpse(weight: Tensor) -> bytes:
    """A few bytes from the middle of the weight. Reading them takes 0.5 us; an operator of torch takes several."""
    ordinary = type(weight) in (Tensor, torch.nn.Parameter) and weight.device.type == "cpu" and weight.is_contiguous()
    size = weight.numel() * weight.element_size() if ordinary else 0
    if size == 0:
        return b""
    count = min(GLIMPSE, size)
    return ctypes.string_at(weight.data_ptr() + (size - count) // 2, count)


def sums_of(weight: Tensor) -> Tensor:
    """Sums over the rows and over the columns of `weight` [N, K], its bits read as integers: [words in a row + N].

    A change of one element changes two sums. No ordinary change of several elements keeps all sums.
    """
    weight = weight.detach().contiguous()
    row = weight.shape[1] * weight.element_size()
    words = weight.view(torch.int64 if row % 8 == 0 else torch.int32 if row % 4 == 0 else torch.int16)
    return torch.cat([words.sum(axis, dtype=torch.int64) for axis in (0, 1)])


def is_promised(weight: Tensor) -> bool:
    """Whether the weight was marked with `promised`."""
    marked = _marked.get(weight)
    return marked is not None and marked.promised


def mark_joined(joined: Tensor, parts: list[Tensor]) -> None:
    """Marks `joined`, a concatenation of `parts`, if all parts are marked."""
    if all(part in _marked for part in parts):
        mark(joined)


def find(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The blocked copy of `weight` for x weight^T + bias, or None where an ordinary product has to be used."""
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
            return None  # oneDNN has no bfloat16 on a CPU with AVX2 only
        marked.packed = _blocked(weight)
        marked.state, marked.sums = state, sums
    return marked.packed


def _blocked(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
    """activation(x weight^T + bias), with the copy from `find`. The activation is applied to the float32 sums."""
    name, algorithm = EPILOGUES[activation]
    bias = None if bias is None else bias.contiguous()  # oneDNN's product reads a bias whatever its stride
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, name, [], algorithm)

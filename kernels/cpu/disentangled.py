"""Calls disentangled attention's C++ operators, forward and backward. disentangled.cpp describes the method;
`../_disentangled_native.py` has the autograd function."""

from __future__ import annotations

import torch
from torch import Tensor

from . import operators as cpp
from .attention import Dropout
from .library import NO_MEMORY, WIDTH
from .pointers import address, address_of_starts, address_or_none, strided_address


def takes(
    q: Tensor, k: Tensor, v: Tensor, pk: Tensor | None, pq: Tensor | None, lut: Tensor, cu_seqlens: Tensor, scale: float
) -> bool:
    """Whether `attention` and `attention_backward` support these arguments."""
    tensors = [t for t in (q, k, v, pk, pq) if t is not None]
    fit = all(cpp.is_plain(t, torch.int32) for t in (lut, cu_seqlens))
    return fit and q.shape[-1] % WIDTH == 0 and scale > 0.0 and cpp.knows(*tensors)


def _attend(
    function: str, before: tuple, q: Tensor, k: Tensor, v: Tensor, pk: Tensor | None, pq: Tensor | None, lut: Tensor,
    after: tuple, strides: tuple[int, ...], cu_seqlens: Tensor, scale: float, dropout: Dropout | None,
) -> None:  # fmt: skip
    """Calls the C++ `function`. Its tensor arguments are the addresses `before`, those of q, k, v, pk, pq, lut, and
    `after`.

    Raises: ValueError where shapes do not fit, scale is not positive, cu_seqlens does not rise from 0 to T, or lut is
        too short for the longest sequence; MemoryError.
    """
    tokens, heads, head_dim = shape = tuple(q.shape)
    starts, sequences = address_of_starts("cu_seqlens", cu_seqlens)
    cpp.expect_multiple(function, "head_dim", head_dim)
    if not scale > 0.0 or lut.numel() % 2 == 0:
        raise ValueError(f"{function}: got scale {scale} and a lut of {lut.numel()} entries")
    rows = next((t.shape[0] for t in (pk, pq) if t is not None), 0)
    tables = [None if t is None else t.contiguous() for t in (pk, pq)]  # this name keeps copies alive during the call
    outcome = cpp.call(
        function, q.dtype, *before,
        *(strided_address(n, t, q.dtype, shape) for n, t in zip("qkv", (q, k, v), strict=True)),
        *(address_or_none(n, t, q.dtype, rows * heads * head_dim) for n, t in zip(("pk", "pq"), tables, strict=True)),
        address("lut", lut, torch.int32, lut.numel()), *after, starts, sequences, tokens, heads, head_dim,
        lut.numel() // 2 + 1, rows, *strides, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], scale,
        None if dropout is None else dropout.address(sequences),
    )  # fmt: skip
    if outcome == NO_MEMORY:
        raise MemoryError(f"{function}: no memory for {heads} heads over distances up to {lut.numel() // 2}")
    if outcome:
        raise ValueError(
            f"{function}: cu_seqlens must rise from 0 to {tokens} by at most {lut.numel() // 2 + 1}, and lut name rows "
            f"0 to {rows - 1}; got {cu_seqlens.tolist()} and rows {lut.min()} to {lut.max()}"
        )


def attention(
    q: Tensor, k: Tensor, v: Tensor, pk: Tensor | None, pq: Tensor | None, lut: Tensor, cu_seqlens: Tensor,
    scale: float, dropout: Dropout | None = None, softmax_stats: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """q, k, v [T, H, D], strided over tokens and heads, pk, pq [R, H, D] or None, lut [2 S - 1] int32 -> [T, H, D];
    fills softmax_stats [2, H, T] float32 for the backward pass."""
    o = torch.empty(q.shape, dtype=q.dtype, device="cpu")
    after = (
        address("o", o, q.dtype, q.numel()),
        address_or_none("softmax_stats", softmax_stats, torch.float32, 2 * q.shape[0] * q.shape[1]),
    )
    _attend("disentangled_attention", (), q, k, v, pk, pq, lut, after, (), cu_seqlens, scale, dropout)
    return o


def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, pk: Tensor | None, pq: Tensor | None, lut: Tensor,
    softmax_stats: Tensor, cu_seqlens: Tensor, scale: float, dropout: Dropout | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dq, dk, dv, dpk, dpq from do [T, H, D] and from the arguments and results of `attention`."""
    do = do if do.stride(-1) == 1 else do.contiguous()
    grads = [None if t is None else torch.empty(t.shape, dtype=t.dtype, device="cpu") for t in (q, k, v, pk, pq)]
    names = ("dq", "dk", "dv", "dpk", "dpq")
    after = (
        address("softmax_stats", softmax_stats, torch.float32, 2 * q.shape[0] * q.shape[1]),
        *(address_or_none(n, t, q.dtype, 0 if t is None else t.numel()) for n, t in zip(names, grads, strict=True)),
    )
    before = (strided_address("do", do, q.dtype, tuple(q.shape)),)
    _attend(
        "disentangled_attention_backward", before, q, k, v, pk, pq, lut, after, do.stride()[:2], cu_seqlens, scale,
        dropout,
    )  # fmt: skip
    return tuple(grads)

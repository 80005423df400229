"""Calls attention's C++ operators, forward and backward, with or without dropout. attention.cpp describes the method;
`../_attention_native.py` has the autograd function."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .._random import keep_threshold
from . import library
from . import operators as cpp
from .library import NO_MEMORY, UNBOUNDED, WIDTH
from .pointers import address, address_of_starts, address_or_none, strided_address


class Dropout(ctypes.Structure):
    """Dropout of probabilities with the masks of `_random.py`, as a C structure."""

    _fields_ = tuple((name, library.TYPES[letter]) for name, letter in library.DROPOUT_FIELDS)

    def __init__(self, dropout_p: float, seed: Tensor, sequence_ids: Tensor, stream: int = 0) -> None:
        ids = sequence_ids.to(torch.int64).contiguous()
        # The caller may change its seed later, so a copy is kept. This dictionary also keeps `ids` alive.
        self.options = {"dropout_p": dropout_p, "seed": seed.clone(), "sequence_ids": ids, "stream": stream}
        where = address("sequence_ids", ids, torch.int64, ids.numel())
        super().__init__(where, int(seed), stream, keep_threshold(dropout_p), 1.0 / (1.0 - dropout_p))

    def address(self, sequences: int) -> int:
        """The address of this structure. Raises ValueError unless there is one sequence id for each sequence."""
        if (named := self.options["sequence_ids"].numel()) != sequences:
            raise ValueError(f"attention: sequence_ids must be {sequences}, one for each sequence, got {named}")
        return ctypes.addressof(self)


def takes_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float | None = None, cu_seqlens_k: Tensor | None = None,
    window: tuple[int, int] | None = None,
) -> bool:  # fmt: skip
    """Whether `attention` and `attention_backward` support these arguments."""
    lengths = (cu_seqlens,) if cu_seqlens_k is None else (cu_seqlens, cu_seqlens_k)
    fit = all(cpp.is_plain(t, torch.int32) for t in lengths)
    if window is not None and (cu_seqlens_k is not None or scale == 0.0):
        return False  # with own key lengths a row might see no key; with scale 0, 0 * -inf is NaN
    return fit and q.shape[-1] % WIDTH == 0 and (scale is None or scale >= 0.0) and cpp.knows(q, k, v)


def _attend(
    function: str, before: tuple, q: Tensor, k: Tensor, v: Tensor, after: tuple, strides: tuple[int, ...],
    cu_seqlens: Tensor, scale: float | None, dropout: Dropout | None, cu_seqlens_k: Tensor | None,
    window: tuple[int, int] | None,
) -> None:  # fmt: skip
    """Calls the C++ `function`. Its tensor arguments are the addresses `before`, those of q, k, v, and `after`.

    Raises: ValueError where shapes do not fit, scale is negative, or cu_seqlens does not rise from 0 to T, or
        cu_seqlens_k from 0 to Tk; MemoryError.
    """
    (tokens, heads, head_dim), (of_keys, kv_heads) = q.shape, k.shape[:2]
    starts, sequences = address_of_starts("cu_seqlens", cu_seqlens)
    cpp.expect_multiple(function, "head_dim", head_dim)
    if kv_heads < 1 or heads % kv_heads or (scale is not None and not scale >= 0.0):
        raise ValueError(f"{function}: got {heads} heads over {kv_heads} and scale {scale}")
    if cu_seqlens_k is None:
        cu_seqlens_k, of_keys = cu_seqlens, tokens
    starts_k, sequences_k = address_of_starts("cu_seqlens_k", cu_seqlens_k)
    if sequences_k != sequences:
        raise ValueError(f"{function}: cu_seqlens names {sequences} sequences, cu_seqlens_k {sequences_k}")
    keys = (of_keys, kv_heads, head_dim)
    outcome = cpp.call(
        function, q.dtype, *before, strided_address("q", q, q.dtype, (tokens, heads, head_dim)),
        strided_address("k", k, q.dtype, keys), strided_address("v", v, q.dtype, keys), *after,
        starts, starts_k, sequences, tokens, of_keys, heads, kv_heads, head_dim, *strides, *q.stride()[:2],
        *k.stride()[:2], *v.stride()[:2], *(min(side, UNBOUNDED) for side in window or (UNBOUNDED, UNBOUNDED)),
        head_dim**-0.5 if scale is None else scale, None if dropout is None else dropout.address(sequences),
    )  # fmt: skip
    if outcome == NO_MEMORY:
        longest = int(cu_seqlens_k.diff().max())
        raise MemoryError(f"attention: no memory for the keys of a sequence of {longest} tokens")
    if outcome:
        for name, bounds, rows in (("cu_seqlens", cu_seqlens, tokens), ("cu_seqlens_k", cu_seqlens_k, of_keys)):
            if bounds[0] != 0 or bounds[-1] != rows or (bounds.diff() < 0).any():
                raise ValueError(f"attention: {name} must rise from 0 to {rows}, got {bounds.tolist()}")


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float | None,
    dropout: Dropout | None = None, softmax_stats: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    window: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """q [T, H, D], k, v [Tk, Hk, D], strided over tokens and heads -> [T, H, D]. Fills softmax_stats [2, H, T] float32
    for the backward pass. Without cu_seqlens_k [B + 1], Tk is T and keys have the queries' sequences. With window
    (left, right), position i sees positions i - left to i + right."""
    o = torch.empty(q.shape, dtype=q.dtype, device="cpu")
    written = address("o", o, q.dtype, q.numel())
    of_rows = address_or_none("softmax_stats", softmax_stats, torch.float32, 2 * q.shape[0] * q.shape[1])
    _attend("attention", (), q, k, v, (written, of_rows), (), cu_seqlens, scale, dropout, cu_seqlens_k, window)
    return o


def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, softmax_stats: Tensor, cu_seqlens: Tensor,
    scale: float | None, dropout: Dropout | None = None, cu_seqlens_k: Tensor | None = None,
    window: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv from do [T, H, D] and from the arguments and results of `attention`."""
    do = do if do.stride(-1) == 1 else do.contiguous()
    grads = tuple(torch.empty(t.shape, dtype=t.dtype, device="cpu") for t in (q, k, v))
    before = (strided_address("do", do, q.dtype, tuple(q.shape)),)
    after = (
        address("o", o, q.dtype, q.numel()),
        address("softmax_stats", softmax_stats, torch.float32, 2 * q.shape[0] * q.shape[1]),
        *(address(f"d{name}", grad, q.dtype, grad.numel()) for name, grad in zip("qkv", grads, strict=True)),
        *(grad.shape[1] * grad.shape[2] for grad in grads[:2]),
    )
    strides = do.stride()[:2]
    _attend(
        "attention_backward", before, q, k, v, after, strides, cu_seqlens, scale, dropout, cu_seqlens_k, window
    )  # fmt: skip
    return grads

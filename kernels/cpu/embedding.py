"""Embeddings for training on a CPU, in C++. embedding_training.cpp has the equations.

The forward pass saves the indices and the dropout keys; the backward pass looks the rows up again.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .._library import by_torch, plain_gradients
from .._random import keep_mask, keep_threshold
from . import kept_gradients
from . import operators as cpp
from .library import NORM_BLOCK
from .pointers import address, address_or_none

INDICES, TABLES = ("input_ids", "token_type_ids", "positions"), ("word", "token_type", "position", "weight", "bias")


def embedding_layer_norm(
    indices: Sequence[Tensor], tables: Sequence[Tensor], eps: float, padding_idx: int | None, keys: Tensor | None,
    dropout_p: float,
) -> Tensor:  # fmt: skip
    """dropout(LayerNorm(sum of three look-ups)) [T, C]. The caller has checked `cpp.fits_embedding`.

    Args:
        indices: ids, segments and positions [T] int64.
        tables: word, segment, position [., C], and LayerNorm's weight and bias [C].
        padding_idx: the row of `word` that gets no gradient.
        keys: [T] int64 row keys of `_random.row_keys`, or None for no dropout.

    Raises: IndexError if an index is outside of its table.
    """
    if not cpp.want_gradients(*tables):
        return forward(indices, tables, eps, keys, dropout_p)
    return _Embedding.apply(*indices, *tables, eps, padding_idx, keys, dropout_p)


def _given(indices: Sequence[Tensor], tables: Sequence[Tensor], keys: Tensor | None, rows: int, width: int) -> list:
    """The addresses of the indices, of the tables, of LayerNorm's parameters, and of keys."""
    dtype, counts = tables[0].dtype, [len(table) * width for table in tables[:3]] + [width] * 2
    return [
        *(address(name, t, torch.int64, rows) for name, t in zip(INDICES, indices, strict=True)),
        *(address(name, t, dtype, count) for name, t, count in zip(TABLES, tables, counts, strict=False)),
        address_or_none("keys", keys, torch.int64, rows),
    ]


def forward(
    indices: Sequence[Tensor], tables: Sequence[Tensor], eps: float, keys: Tensor | None, dropout_p: float
) -> Tensor:
    """y [T, C] of `embedding_layer_norm`."""
    rows, (_, width), dtype = indices[0].numel(), cpp.rows_and_width("embedding_layer_norm", tables[0]), tables[0].dtype
    y = torch.empty(rows, width, dtype=dtype, device="cpu")
    sizes = array("q", map(len, tables[:3]))
    outside = cpp.call(
        "embedding_training", dtype, *_given(indices, tables, keys, rows, width),
        address("y", y, dtype, rows * width), rows, sizes.buffer_info()[0], width, eps, keep_threshold(dropout_p),
        1.0 / (1.0 - dropout_p),
    )  # fmt: skip
    _expect_inside(outside, sizes)
    return y


def _expect_inside(outside: int | None, sizes: Sequence[int]) -> None:
    if outside:
        raise IndexError(f"index out of range: an id, segment or position is outside of tables of {[*sizes]} rows")


def backward(
    dy: Tensor, indices: Sequence[Tensor], tables: Sequence[Tensor], eps: float, padding_idx: int | None,
    keys: Tensor | None, dropout_p: float, wanted: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of word, segment and position, each None unless wanted, and of LayerNorm's weight and bias, all in
    float32. `tables` are word, segment, position and LayerNorm's weight.

    Raises: IndexError if an index is outside of its table, because it was changed after the forward pass.
    """
    rows, (_, width), dtype = indices[0].numel(), cpp.rows_and_width("embedding_layer_norm", tables[0]), tables[0].dtype
    dy = dy.contiguous()
    new = {"dtype": torch.float32, "device": "cpu"}
    dz = torch.empty(rows, width, **new)
    parts = torch.zeros(max(1, -(-rows // NORM_BLOCK)), 2, width, **new)
    of_word, touched = kept_gradients.take(tables[0].shape) if wanted[0] else (None, None)
    others = zip(tables[1:3], wanted[1:], strict=True)
    grads = [of_word, *(torch.empty(table.shape, **new) if want else None for table, want in others)]
    sizes = array("q", map(len, tables[:3]))
    outside = cpp.call(
        "embedding_backward", dtype, *_given(indices, tables, keys, rows, width),
        address("dy", dy, dtype, rows * width), address("dz", dz, torch.float32, rows * width),
        address("parts", parts, torch.float32, parts.numel()),
        *(
            address_or_none(f"d{name}", grad, torch.float32, table.numel())
            for name, grad, table in zip(TABLES[:3], grads, tables[:3], strict=True)
        ),
        address_or_none("touched", touched, torch.uint8, len(tables[0])),
        rows, sizes.buffer_info()[0], -1 if padding_idx is None else padding_idx % len(tables[0]), width, eps,
        keep_threshold(dropout_p), 1.0 / (1.0 - dropout_p),
    )  # fmt: skip
    _expect_inside(outside, sizes)
    return [*grads, *parts[0].unbind()]


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, ids: Tensor, types: Tensor, places: Tensor, word: Tensor, segment: Tensor, position: Tensor,
        weight: Tensor, bias: Tensor, eps: float, padding_idx: int | None, keys: Tensor | None, dropout_p: float,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(ids, types, places, word, segment, position, weight, bias, keys)
        ctx.options = eps, padding_idx, dropout_p
        return forward((ids, types, places), (word, segment, position, weight, bias), eps, keys, dropout_p)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        *indices, word, segment, position, weight, bias, keys = ctx.saved_tensors
        (eps, padding_idx, dropout_p), wanted = ctx.options, ctx.needs_input_grad[3:8]
        tables = word, segment, position, weight, bias
        if by_torch(dy):

            def function(word: Tensor, segment: Tensor, position: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                pairs = zip(indices[1:], (segment, position), strict=True)
                z = F.embedding(indices[0], word, padding_idx) + sum(F.embedding(*pair) for pair in pairs)
                y = F.layer_norm(z, z.shape[-1:], weight, bias, eps)
                if keys is None:
                    return y
                return torch.where(keep_mask(keys, y.shape[-1], dropout_p), y / (1.0 - dropout_p), 0.0)

            grads = plain_gradients(function, tables, wanted, dy)
        else:
            grads = backward(dy, indices, tables[:4], eps, padding_idx, keys, dropout_p, wanted[:3])
            grads = [grad.to(word.dtype) if want else None for grad, want in zip(grads, wanted, strict=True)]
        return None, None, None, *grads, None, None, None, None

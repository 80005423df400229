"""The operators before and after the layers: embeddings, pooling, the loss."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..kernels._checks import expect_indices, expect_sequences
from ._choice import Impl, choose_impl, resolve
from ._expect import expect_cu_seqlens, expect_dropout, expect_integers, expect_one_device
from ._feed_forward import expect_linear

__all__ = ["POOLING_MODES", "embedding_layer_norm", "linear_cross_entropy", "pool"]

POOLING_MODES = ("mean", "cls", "max")


def embedding_layer_norm(
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    positions: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float = 1e-12,
    *,
    padding_idx: int | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    row_ids: Tensor | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """dropout(LayerNorm(word[input_ids] + token_type[token_type_ids] + position[positions])): [T] -> [T, C].

    Args:
        input_ids, token_type_ids, positions: [T] int64 or int32. Numbers out of range raise IndexError or ValueError,
            on a GPU only with FASTBERT_CHECK=1 in the environment.
        word: [vocab, C]; position: [max_position, C]; token_type: [types, C] or None (with token_type_ids None).
        weight, bias: [C] of the LayerNorm.
        padding_idx: the row of `word` that gets no gradient, as in nn.Embedding.
        dropout_p, seed, stream, row_ids: as in `add_layer_norm`.
    """
    op = "embedding_layer_norm"
    for name, t in (("token_type_ids", token_type_ids), ("positions", positions)):
        if t is not None and t.shape != input_ids.shape:
            raise ValueError(f"{op}: input_ids is {tuple(input_ids.shape)}, {name} is {tuple(t.shape)}")
    if input_ids.dim() != 1:
        raise ValueError(f"{op}: input_ids must be [T], got {tuple(input_ids.shape)}")
    if (token_type is None) != (token_type_ids is None):
        raise ValueError(f"{op}: token_type and token_type_ids go together")
    for name, t in (("position", position), ("token_type", token_type)):
        if t is not None and t.shape[1] != word.shape[1]:
            raise ValueError(f"{op}: word has width {word.shape[1]}, {name} has {t.shape[1]}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.shape != word.shape[1:]:
            raise ValueError(f"{op}: {name} must be [{word.shape[1]}] like a row of word, got {tuple(t.shape)}")
    expect_integers(op, "row_ids", row_ids, input_ids.shape[0])
    expect_dropout(op, dropout_p, seed)
    expect_one_device(
        op, input_ids=input_ids, token_type_ids=token_type_ids, positions=positions, word=word, position=position,
        token_type=token_type, weight=weight, bias=bias, row_ids=row_ids,
    )  # fmt: skip
    if choose_impl(impl, word.device) == "triton":  # the other implementations raise IndexError themselves
        for name, ids, table in (
            ("input_ids", input_ids, word),
            ("token_type_ids", token_type_ids, token_type),
            ("positions", positions, position),
        ):
            if ids is not None:
                expect_indices(op, name, ids, table.shape[0])
    return resolve(op, impl, word)(
        input_ids, token_type_ids, positions, word, position, token_type, weight, bias, eps,
        padding_idx=padding_idx, dropout_p=dropout_p, seed=seed, stream=stream, row_ids=row_ids,
    )  # fmt: skip


def pool(
    x: Tensor, cu_seqlens: Tensor, mode: str = "mean", normalize: bool = False, *, impl: Impl | None = None
) -> Tensor:
    """One vector a packed sequence: x [T, C], cu_seqlens [B + 1] int32 -> [B, C].

    mode: mean of its tokens, cls (its first), max over them. An empty sequence gives zeros.
    normalize: divide by max(L2 norm, 1e-12), as torch.nn.functional.normalize does.
    """
    if mode not in POOLING_MODES:
        raise ValueError(f"pool: mode must be one of {POOLING_MODES}, got {mode!r}")
    if x.dim() != 2:
        raise ValueError(f"pool: x must be [T, C], got {tuple(x.shape)}")
    if not x.is_floating_point():  # a mean of integers would be truncated
        raise ValueError(f"pool: x must be floating-point, got {x.dtype}")
    expect_cu_seqlens("pool", cu_seqlens)
    expect_one_device("pool", x=x, cu_seqlens=cu_seqlens)
    expect_sequences("pool", "cu_seqlens", cu_seqlens, x.shape[0])
    return resolve("pool", impl, x)(x, cu_seqlens, mode, normalize)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    impl: Impl | None = None,
) -> Tensor:
    """cross_entropy(hidden weight^T + bias, labels) without the [N, V] logits in memory as a whole.

    Args:
        hidden: [N, C], the rows with a label (masked positions); weight: [V, C], often the word embedding.
        bias: [V] or None; labels: [N] int64, `ignore_index` where a row does not count.
        label_smoothing, reduction: as in torch.nn.functional.cross_entropy.

    Returns: a scalar float32 ("mean" over the rows that count, "sum"), or [N] float32 ("none").
    """
    op = "linear_cross_entropy"
    if hidden.dim() != 2:
        raise ValueError(f"{op}: hidden must be [N, C], got {tuple(hidden.shape)}")
    expect_linear(op, "weight", hidden.shape[1], weight, bias)
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"{op}: labels must be [{hidden.shape[0]}], got {tuple(labels.shape)}")
    if labels.dtype != torch.int64:
        raise ValueError(f"{op}: labels must be int64, got {labels.dtype}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: reduction must be mean, sum or none, got {reduction!r}")
    expect_one_device(op, hidden=hidden, weight=weight, bias=bias, labels=labels)
    if choose_impl(impl, hidden.device) == "triton":  # the other implementations raise IndexError themselves
        expect_indices(op, "labels", labels, weight.shape[0], ignored=ignore_index)
    return resolve(op, impl, hidden)(
        hidden, weight, bias, labels,
        ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction,
    )  # fmt: skip

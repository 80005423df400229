"""The inputs of the layers of transformers' encoders: embeddings, and tables that attention reads by position."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from .. import functional as F
from ..stack.shared import Pass
from ..stack.steps import multiply, norm_only
from . import distances
from .facts import Family, at, has
from .inspection import Seen
from .kinds import kind_of, windows_of
from .parts import bias_of, layers_of, part, probability_at


def embeddings(encoder: nn.Module, facts: Family, shared: Pass, seen: Seen, given: dict[str, Any]) -> Tensor:
    """dropout(norm(word + position + segment)) [T, C], projected to the width of the layers."""
    batch, embeds = shared.batch, given.get("inputs_embeds")
    if facts.called is not None:
        return batch.unpad(called_embeddings(encoder, facts.called, given))
    word = at(encoder, facts.word)
    norm = None if facts.norm is None else at(encoder, facts.norm)
    position = None if facts.position is None else at(encoder, facts.position)
    segment = None if facts.token_type is None else at(encoder, facts.token_type)
    types = batch.token_type_ids
    if segment is not None and types is None:
        types = torch.zeros_like(batch.positions)
    p = 0.0 if facts.dropout is None else probability_at(encoder, facts.dropout)

    if embeds is None and seen.tables:
        x = F.embedding_layer_norm(
            batch.input_ids, types if segment is not None else None, batch.positions,
            word.weight, frozen_row(position), None if segment is None else frozen_row(segment),
            norm.weight, norm.bias, norm.eps,
            padding_idx=word.padding_idx, impl=shared.impl, **shared.dropout(p, stream=0),
        )  # fmt: skip
    else:
        x = word(batch.input_ids) if embeds is None else batch.unpad(embeds)
        if segment is not None:
            x = x + segment(types)
        if position is not None:
            if facts.position_class is not None:
                x = x + nn.functional.embedding(batch.positions + position.offset, position.weight)
            else:
                x = x + position(batch.positions)
        if norm is not None:
            x = norm_only(x, part(encoder, facts.norm, seen.norm, facts.layer.norm), shared)
        x = shared.drop(x, p, stream=0)
    if facts.masks_embeddings and shared.real() is not None:
        x = x * shared.real().flatten()[:, None]
    if facts.project is not None and has(encoder, facts.project):
        x = multiply(part(encoder, facts.project, seen.project), x, shared)
    return x


def called_embeddings(
    encoder: nn.Module, called: dict[str, tuple[int | str, ...] | None], given: dict[str, Any]
) -> Tensor:
    """The output [B, S, C] of the encoder's own embeddings for these arguments."""
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    if embeds is not None and "inputs_embeds" not in called:
        return embeds
    like, config = ids if embeds is None else embeds, encoder.config
    inputs = {"input_ids": ids}
    for name, zeros in called.items():
        value = given.get(name)
        if value is None and zeros is not None:
            sizes = (len(getattr(config, size)) if isinstance(size, str) else size for size in zeros)
            value = torch.zeros((*like.shape[:2], *sizes), dtype=torch.int64, device=like.device)
        inputs[name] = value
    return encoder.embeddings(**inputs)


def frozen_row(table: nn.Embedding) -> Tensor:
    """The weight of a table, without a gradient for the row `padding_idx`."""
    if table.padding_idx is None or not (torch.is_grad_enabled() and table.weight.requires_grad):
        return table.weight
    rows = torch.arange(table.weight.shape[0], dtype=torch.int64, device=table.weight.device)
    return torch.where((rows == table.padding_idx)[:, None], table.weight.detach(), table.weight)


def count_positions(padding_idx: int, ids: Tensor | None, embeds: Tensor | None) -> Tensor:
    """Positions [B, S] int64, or [1, S] for `embeds`: tokens other than padding are counted from `padding_idx` + 1."""
    if ids is None:
        first, device = padding_idx + 1, embeds.device
        return torch.arange(first, embeds.shape[1] + first, dtype=torch.int64, device=device)[None]
    real = ids != padding_idx
    return real.cumsum(1) * real + padding_idx


def pooled_columns(encoder: nn.Module, facts: Family, ids: Tensor) -> Tensor:
    """[B] int64: the column of the token of each sequence of `ids` [B, S] that `pooler_output` is made of."""
    if facts.pooled == "last":
        return ids.new_full(ids.shape[:1], ids.shape[1] - 1, dtype=torch.int64)
    whole = ids.to(torch.int32)  # as the original's code compares them
    if facts.pooled == "largest" or (facts.pooled == "eos_or_largest" and encoder.eos_token_id == 2):
        return whole.argmax(-1)
    return (whole == encoder.eos_token_id).to(torch.int32).argmax(-1)


def pooled_output(encoder: nn.Module, facts: Family, states: Tensor, ids: Tensor) -> Tensor:
    """[B, C] of the last hidden state [B, S, C]."""
    rows = torch.arange(len(ids), dtype=torch.int64, device=ids.device)
    pooled = states[rows, pooled_columns(encoder, facts, ids)]
    return pooled if facts.pooled_by is None else at(encoder, facts.pooled_by)(pooled)


def position_tables(encoder: nn.Module, facts: Family, width: int, device: torch.device) -> dict[str, Any]:
    """The tables that attention reads by position, for sequences of at most `width` tokens, as fields of a `Pass`."""
    bias = {
        "bias": position_bias(encoder, facts, width),
        "bias_width": width if facts.layer.bias is not None else None,
        "distances": distances.table_of(encoder, facts, width, device),
    }
    of_kinds = facts.positions == "rotary" or facts.layer.looks_back
    return bias | (rotary(encoder, facts, width, device) if of_kinds else {})


def position_bias(encoder: nn.Module, facts: Family, width: int) -> Tensor | None:
    if facts.bias is None:
        return None
    holder = at(encoder, facts.bias)
    if not hasattr(holder, "compute_position_bias"):
        return bias_of(holder, width)
    like = holder.relative_attention_bias.weight.new_empty(1, width)
    return holder.compute_position_bias(like)


def rotary(encoder: nn.Module, facts: Family, width: int, device: torch.device) -> dict[str, Any]:
    columns = torch.arange(width, dtype=torch.int64, device=device)[None]
    like = torch.empty(0, dtype=torch.float32, device=device)
    of_layer = facts.layer
    one_of = {kind_of(layer, of_layer): layer for _, layer in layers_of(encoder, facts)}
    if facts.positions != "rotary":
        return {"rotary": dict.fromkeys(one_of), "windows": windows_of(encoder, facts, one_of)}
    half = at(next(iter(one_of.values())), of_layer.head_dim) // 2
    make = at(encoder, facts.tables_of_rotation) if of_layer.rotary is None else None
    if of_layer.rotates:
        tables = dict.fromkeys(one_of, make(like, columns))
    elif make is not None:
        tables = {kind: make(like, columns, kind) for kind in sorted(one_of)}
    else:
        tables = {kind: at(layer, of_layer.rotary)(like, columns) for kind, layer in one_of.items()}
    rotary = {kind: tuple(t[0, :, :half] for t in pair) for kind, pair in tables.items()}
    return {"rotary": rotary, "windows": windows_of(encoder, facts, one_of)}

"""DeBERTa's relative positions: the encoder's table of vectors for distances between tokens, and its settings."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn

from ..stack.distances import Table
from . import facts as table
from .facts import at, has

OF_ENCODER = ("relative_attention", "position_buckets", "max_relative_positions", "norm_rel_ebd")
OF_LAYER = ("relative_attention", "pos_ebd_size")


def table_of(encoder: nn.Module, facts: table.Family, width: int, device: torch.device) -> Table | None:
    """The rows of the table that a batch of this width can need, with the encoder's norm applied."""
    if facts.distances is None:
        return None
    holder = at(encoder, facts.distances)
    rows, settings = holder.get_rel_embedding(), (holder.position_buckets, holder.max_relative_positions)
    if torch.compiler.is_compiling():
        return Table(rows, _lut(*settings, width, device))
    lut, first, last = _reachable(*settings, width, device)
    return Table(rows[first : last + 1], lut)


def span(buckets: int, farthest: int) -> int:
    """The number of rows of the table on either side of its middle."""
    return buckets if buckets > 0 else farthest


def _lut(buckets: int, farthest: int, width: int, device: torch.device) -> torch.Tensor:
    """[2 * width - 1] int32: the row of the table for each distance i - j, in rising order. The original's code gives
    the bucket. One row serves query and key, since the bucket of j - i is minus that of i - j."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    distance = torch.arange(1 - width, width, dtype=torch.int64, device=device)
    if buckets > 0 and farthest > 0:
        distance = make_log_bucket_position(distance, buckets, farthest).to(torch.int64)
    middle = span(buckets, farthest)
    return (distance + middle).clamp(0, 2 * middle - 1).to(torch.int32)


@functools.lru_cache(256)
def _reachable(buckets: int, farthest: int, width: int, device: torch.device) -> tuple[torch.Tensor, int, int]:
    """(`_lut`, with rows counted from the first one that a batch of this width reaches; that row; the last row)."""
    with torch.inference_mode(False):  # later backward passes save the cached tensor
        lut = _lut(buckets, farthest, width, device)
        first, last = (int(row) for row in (lut[0], lut[-1]))
        return lut - first, first, last


def why_not(encoder: nn.Module, facts: table.Family, layers: Iterable[nn.Module]) -> str | None:
    """Why the fused code does not compute an encoder's relative positions, or None."""
    if facts.distances is None:
        return None
    if getattr(encoder, "z_steps", 0) > 1:
        return f"z_steps of {encoder.z_steps} run its last layer more than once"
    holder = at(encoder, facts.distances)
    if not holder.relative_attention:
        return "its relative_attention is off"
    rows = span(holder.position_buckets, holder.max_relative_positions)
    if holder.rel_embeddings.weight.shape[0] < 2 * rows:
        return f"its table has {holder.rel_embeddings.weight.shape[0]} rows for distances, and {2 * rows} are read"
    for layer in layers:
        owner = at(layer, facts.layer.distances.terms.rpartition(".")[0])
        if not owner.relative_attention or owner.pos_ebd_size != rows:
            return f"a {facts.layer.kind} has other settings of relative_attention than its encoder"
        if not {"c2p", "p2c"} & set(at(layer, facts.layer.distances.terms)):
            return f"a {facts.layer.kind} has neither c2p nor p2c among its pos_att_type"
    return None


def places(encoder: nn.Module, facts: table.Family, layers: Iterable[nn.Module]) -> list[tuple[dict[str, Any], str]]:
    """(dictionary, key) of every setting that `why_not` and `projections_of` read."""
    if facts.distances is None:
        return []
    holder, of_layer = at(encoder, facts.distances), facts.layer.distances
    found = [(encoder.__dict__, "z_steps"), *((holder.__dict__, name) for name in OF_ENCODER)]
    for layer in layers:
        owner = at(layer, of_layer.terms.rpartition(".")[0])
        names = (*OF_LAYER, *(path.rpartition(".")[2] for path in (of_layer.terms, of_layer.shares)))
        found += [(owner.__dict__, name) for name in names]
    return found


def known(facts: table.Family, layers: Iterable[str]) -> list[str]:
    """The paths of the modules whose parameters belong to the relative positions."""
    if facts.distances is None:
        return []
    of_layer = facts.layer.distances
    around = [f"{facts.distances}.rel_embeddings", f"{facts.distances}.LayerNorm"]
    return around + [f"{path}.{part}" for path in layers for part in (of_layer.key, of_layer.query)]


def projections_of(layer: nn.Module, facts: table.Layer) -> tuple[str | None, ...]:
    """The paths of the linear layers that project the table to keys and to queries, None for a term that the layer does
    not have; () in a family without relative positions."""
    if facts.distances is None:
        return ()
    of, terms = facts.distances, at(layer, facts.distances.terms)
    query, key, _ = facts.qkv
    own = (key, query) if at(layer, of.shares) else (of.key, of.query)
    return tuple(path if term in terms else None for path, term in zip(own, ("c2p", "p2c"), strict=True))


def dropouts(layers: dict[str, nn.Module], facts: table.Layer) -> list[str]:
    """The paths of the dropouts on the table."""
    if facts.distances is None:
        return []
    path = facts.distances.dropout
    return [f"{of}.{path}" for of, layer in layers.items() if has(layer, path)]

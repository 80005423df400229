"""DeBERTa's distances between tokens: the encoder's table of them, and which of its settings are known."""

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
    """The rows of the table that a batch of this width can ask for, normalised as the encoder does it."""
    if facts.distances is None:
        return None
    holder = at(encoder, facts.distances)
    rows, settings = holder.get_rel_embedding(), (holder.position_buckets, holder.max_relative_positions)
    if torch.compiler.is_compiling():
        return Table(rows, _lut(*settings, width, device))
    lut, first, last = _reachable(*settings, width, device)
    return Table(rows[first : last + 1], lut)


def span(buckets: int, farthest: int) -> int:
    """Rows of the table on either side of its middle."""
    return buckets if buckets > 0 else farthest


def _lut(buckets: int, farthest: int, width: int, device: torch.device) -> torch.Tensor:
    """[2 * width - 1] int32: of each distance i - j, from the least on, the row of the table. The original's own code
    tells its bucket. A query and a key find the same row, since the bucket of j - i is minus that of i - j."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    distance = torch.arange(1 - width, width, dtype=torch.int64, device=device)
    if buckets > 0 and farthest > 0:
        distance = make_log_bucket_position(distance, buckets, farthest).to(torch.int64)
    middle = span(buckets, farthest)
    return (distance + middle).clamp(0, 2 * middle - 1).to(torch.int32)


@functools.lru_cache(256)
def _reachable(buckets: int, farthest: int, width: int, device: torch.device) -> tuple[torch.Tensor, int, int]:
    """(the same, counted from the first row that a batch of this width reaches; that row; the last)."""
    with torch.inference_mode(False):  # kept, and saved for backward passes to come
        lut = _lut(buckets, farthest, width, device)
        first, last = (int(row) for row in (lut[0], lut[-1]))
        return lut - first, first, last


def why_not(encoder: nn.Module, facts: table.Family, layers: Iterable[nn.Module]) -> str | None:
    """Why the distances of an encoder are not what the fused code takes them for."""
    if facts.distances is None:
        return None
    if getattr(encoder, "z_steps", 0) > 1:
        return f"z_steps of {encoder.z_steps} run its last layer more than once"
    holder = at(encoder, facts.distances)
    if not holder.relative_attention:
        return "its attention does not look at distances (relative_attention is off)"
    rows = span(holder.position_buckets, holder.max_relative_positions)
    if holder.rel_embeddings.weight.shape[0] < 2 * rows:
        return f"its table has {holder.rel_embeddings.weight.shape[0]} rows for distances, and {2 * rows} are read"
    for layer in layers:
        owner = at(layer, facts.layer.distances.terms.rpartition(".")[0])
        if not owner.relative_attention or owner.pos_ebd_size != rows:
            return f"a {facts.layer.kind} does not look at distances as its encoder does"
        if not {"c2p", "p2c"} & set(at(layer, facts.layer.distances.terms)):
            return f"a {facts.layer.kind} has neither c2p nor p2c among its pos_att_type"
    return None


def places(encoder: nn.Module, facts: table.Family, layers: Iterable[nn.Module]) -> list[tuple[dict[str, Any], str]]:
    """Where what `why_not` and `parts_of` read is written: (dictionary, key)."""
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
    """The modules, by path, whose parameters the distances account for."""
    if facts.distances is None:
        return []
    of_layer = facts.layer.distances
    around = [f"{facts.distances}.rel_embeddings", f"{facts.distances}.LayerNorm"]
    return around + [f"{path}.{part}" for path in layers for part in (of_layer.key, of_layer.query)]


def paths_of(layer: nn.Module, facts: table.Layer) -> tuple[str | None, str | None]:
    """(the linear layer that projects the table to keys, that to queries); None where the layer has no such term."""
    of, terms = facts.distances, at(layer, facts.distances.terms)
    query, key, _ = facts.qkv
    own = (key, query) if at(layer, of.shares) else (of.key, of.query)
    return tuple(path if term in terms else None for path, term in zip(own, ("c2p", "p2c"), strict=True))


def dropouts(layers: dict[str, nn.Module], facts: table.Layer) -> list[str]:
    """Where the dropouts on the table are."""
    if facts.distances is None:
        return []
    path = facts.distances.dropout
    return [f"{of}.{path}" for of, layer in layers.items() if has(layer, path)]

"""Removes heads, feed-forward columns or layers from a model's weights, which makes the matrices smaller.

Head h has the rows hD to hD + D of query, key and value, and the same columns of attention.output.dense.

    without heads     query, key, value lose rows (and biases elements), attention.output.dense loses columns
    without columns   intermediate.dense loses rows (and its bias elements), output.dense loses columns
    without layers    the remaining layers get new numbers, in order
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..config import BertConfig
from .heads import Heads, expect_heads, remaining_heads

State = dict[str, Tensor]
_LAYER = re.compile(r"(?P<before>(?:.*\.)?encoder\.layer\.)(?P<layer>\d+)\.(?P<part>.+)")
# part of a layer -> the dimension in which heads, or feed-forward columns, are removed
_HEADS = {f"attention.self.{name}.{kind}": 0 for name in ("query", "key", "value") for kind in ("weight", "bias")} | {
    "attention.output.dense.weight": 1
}
_COLUMNS = {"intermediate.dense.weight": 0, "intermediate.dense.bias": 0, "output.dense.weight": 1}


def _kept(state: State, of: dict[str, int], kept: dict[int, Tensor]) -> State:
    """The state with only the indices `kept[layer]` of the parts `of` that layer, in their dimension."""
    cut = dict(state)
    for name, t in state.items():
        match = _LAYER.fullmatch(name)
        if match and match["part"] in of and int(match["layer"]) in kept:
            cut[name] = t.index_select(of[match["part"]], kept[int(match["layer"])])
    return cut


def without_heads(config: BertConfig, state: State, heads: Heads) -> tuple[BertConfig, State]:
    """heads: the heads to remove, numbered as in the model before any pruning. Raises: ValueError, in one line."""
    expect_heads(heads, config)
    width, kept = config.head_dim, {}
    for layer, numbers in remaining_heads(config).items():
        places = [place for place, head in enumerate(numbers) if head not in heads.get(layer, ())]
        first = torch.tensor(places, dtype=torch.int64, device="cpu")[:, None] * width
        kept[layer] = (first + torch.arange(width, dtype=torch.int64, device="cpu")).flatten()
    gone = {
        layer: sorted({*(config.pruned_heads or {}).get(layer, ()), *heads.get(layer, ())})
        for layer in range(config.num_hidden_layers)
    }
    return replace(config, pruned_heads=gone), _kept(state, _HEADS, kept)


def without_columns(config: BertConfig, state: State, kept: Sequence[Tensor]) -> tuple[BertConfig, State]:
    """kept: the columns of each layer to keep, rising, as many in every layer. Raises: ValueError."""
    if len(kept) != config.num_hidden_layers or len({len(columns) for columns in kept}) != 1:
        raise ValueError(f"kept must be as many columns of each of {config.num_hidden_layers} layers")
    return replace(config, intermediate_size=len(kept[0])), _kept(state, _COLUMNS, dict(enumerate(kept)))


def without_layers(config: BertConfig, state: State, layers: Sequence[int]) -> tuple[BertConfig, State]:
    """layers: the numbers of the layers to remove, from 0. Raises: ValueError, in one line."""
    count = config.num_hidden_layers
    for layer in layers:
        if layer >= count:
            raise ValueError(f"there is no layer {layer}: the model has layers 0 to {count - 1}")
    kept = [layer for layer in range(count) if layer not in layers]
    if not kept:
        raise ValueError(f"all {count} layers would be gone")
    if not any(config.heads_of(layer) for layer in kept):
        raise ValueError("none of the remaining layers has heads: attention needs one at least")
    pruned = config.pruned_heads or {}
    gone = {number: pruned[layer] for number, layer in enumerate(kept) if layer in pruned}
    return replace(config, num_hidden_layers=len(kept), pruned_heads=gone), of_layers(state, kept)


def of_layers(state: State, layers: Sequence[int]) -> State:
    """The state with only these layers, renumbered in this order. A layer may be repeated."""
    found = {}
    for name, t in state.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            found[name] = t
            continue
        for new, old in enumerate(layers):
            if int(match["layer"]) == old:
                found[f"{match['before']}{new}.{match['part']}"] = t
    return found


def most_important(importance: Sequence[Tensor], share: float, multiple: int = 16) -> list[Tensor]:
    """The most important columns of each layer, rising, without about this share of all. Every layer keeps as many, a
    multiple of `multiple`, with which kernels multiply fast.

    Raises: ValueError if that is no column, or all of them.
    """
    columns = len(importance[0])
    keep = round((1.0 - share) * columns / multiple) * multiple
    if not 0 < keep < columns:
        raise ValueError(f"a share of {share} of {columns} feed-forward columns leaves {keep}; give another share")
    return [of_layer.topk(keep).indices.sort().values for of_layer in importance]

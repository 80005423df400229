"""Parts cut out of a model's weights: whole heads, feed-forward columns, layers. What is left is truly smaller.

With q, k, v of head h in rows hD to hD + D of their weights and o of it in the same columns of the output's:

    without heads     query, key, value lose rows (and biases elements), attention.output.dense columns
    without columns   intermediate.dense loses rows (and its bias elements), output.dense columns
    without layers    what is left is numbered anew, in order
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
# part of a layer -> which of its dimensions the heads, or the feed-forward columns, are in
_HEADS = {f"attention.self.{name}.{kind}": 0 for name in ("query", "key", "value") for kind in ("weight", "bias")} | {
    "attention.output.dense.weight": 1
}
_COLUMNS = {"intermediate.dense.weight": 0, "intermediate.dense.bias": 0, "output.dense.weight": 1}


def _kept(state: State, of: dict[str, int], kept: dict[int, Tensor]) -> State:
    """Of the parts `of` each layer in `kept` only these indices, in their dimension; all else as it is."""
    cut = dict(state)
    for name, t in state.items():
        match = _LAYER.fullmatch(name)
        if match and match["part"] in of and int(match["layer"]) in kept:
            cut[name] = t.index_select(of[match["part"]], kept[int(match["layer"])])
    return cut


def without_heads(config: BertConfig, state: State, heads: Heads) -> tuple[BertConfig, State]:
    """heads: as they are numbered in the model that nothing was cut out of. Raises: ValueError, in one line."""
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
    """kept: of each layer the columns that stay, rising, as many in every layer. Raises: ValueError."""
    if len(kept) != config.num_hidden_layers or len({len(columns) for columns in kept}) != 1:
        raise ValueError(f"kept must be as many columns of each of {config.num_hidden_layers} layers")
    return replace(config, intermediate_size=len(kept[0])), _kept(state, _COLUMNS, dict(enumerate(kept)))


def without_layers(config: BertConfig, state: State, layers: Sequence[int]) -> tuple[BertConfig, State]:
    """layers: numbers of those that go, from 0 up. Raises: ValueError, in one line."""
    count = config.num_hidden_layers
    for layer in layers:
        if layer >= count:
            raise ValueError(f"there is no layer {layer}: the model has layers 0 to {count - 1}")
    kept = [layer for layer in range(count) if layer not in layers]
    if not kept:
        raise ValueError(f"all {count} layers would be gone")
    pruned = config.pruned_heads or {}
    gone = {number: pruned[layer] for number, layer in enumerate(kept) if layer in pruned}
    return replace(config, num_hidden_layers=len(kept), pruned_heads=gone), of_layers(state, kept)


def of_layers(state: State, layers: Sequence[int]) -> State:
    """A state with these layers alone, numbered anew in this order; one that is named twice is there twice."""
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
    """Of each layer the columns that stay where about this share of them goes: those of most importance, rising, as
    many in every layer, a multiple of `multiple`, which is what the kernels multiply fast.

    Raises: ValueError where that is none of them, or all.
    """
    columns = len(importance[0])
    keep = round((1.0 - share) * columns / multiple) * multiple
    if not 0 < keep < columns:
        raise ValueError(f"a share of {share} of {columns} feed-forward columns leaves {keep}; give another share")
    return [of_layer.topk(keep).indices.sort().values for of_layer in importance]

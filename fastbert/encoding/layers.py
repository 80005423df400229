"""Features from several layers (Devlin et al., section 5.3): the choice of layers, and how their rows are combined."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .modules import wide

# name -> (function that combines several [T, C] to [T, C']; whether C' is C times their number)
COMBINE: dict[str, tuple[Callable[[Sequence[Tensor]], Tensor], bool]] = {
    "concat": (lambda states: torch.cat(list(states), dim=-1), True),
    "sum": (lambda states: sum(map(wide, states)), False),
    "mean": (lambda states: sum(map(wide, states)) / len(states), False),
}


def layer_numbers(layers: Sequence[int], count: int) -> tuple[int, ...]:
    """Non-negative indices into hidden_states: 0 is the embeddings, 1 the first of `count` layers. -1 is the last.

    Raises: ValueError if there is no such layer, a layer is repeated, or none is given.
    """
    if not layers:
        raise ValueError("layers must name one layer at least")
    for layer in layers:
        if not -count - 1 <= layer <= count:
            raise ValueError(f"layers must be {-count - 1} to {count} for a model of {count} layers, got {layer}")
    numbers = tuple(layer % (count + 1) for layer in layers)
    for place, number in enumerate(numbers):
        if number in numbers[:place]:
            raise ValueError(f"layers must differ, and {number} comes twice in {', '.join(map(str, layers))}")
    return numbers


def combined(states: Sequence[Tensor], how: str) -> Tensor:
    """One row per token from layers' outputs of [T, C] each: "concat" gives [T, layers * C], "sum" and "mean" give
    [T, C] in float32 or float64.

    Raises: ValueError for another name.
    """
    return _combine(how)[0](states)


def combined_width(width: int, layers: int, how: str) -> int:
    """Width of the rows of `combined`."""
    return width * layers if _combine(how)[1] else width


def _combine(how: str) -> tuple[Callable[[Sequence[Tensor]], Tensor], bool]:
    if how not in COMBINE:
        raise ValueError(f"combine must be one of {', '.join(COMBINE)}, got {how!r}")
    return COMBINE[how]

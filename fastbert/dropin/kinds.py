"""What differs between the layers of an encoder by their config: rotation, window, causal attention; and norms."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import torch.nn as nn

from ..stack.description import NormKind
from ..stack.shared import UNBOUNDED
from . import facts as table
from .facts import at
from .original import HOOKS, why_not_original
from .plain import why_not_plain, why_weight

TRANSFORMERS = "transformers.models."
SLIDING = "sliding_attention"


def kind_of(layer: nn.Module, facts: table.Layer) -> Hashable:
    """The key of a layer's rotation and window in the pass; None for a layer without either."""
    if facts.attention_type is not None:
        return at(layer, facts.attention_type)
    if facts.number is not None:
        owner, _, name = facts.number.rpartition(".")
        attention = at(layer, owner)
        return attention.config.layer_types[getattr(attention, name)]
    return "every layer's" if facts.rotates or facts.looks_back else None


def is_causal(encoder: nn.Module, layer: nn.Module, facts: table.Family) -> bool:
    """Whether tokens see no later ones in this layer. The config may turn that off."""
    if not facts.decoder or getattr(encoder.config, "is_causal", None) is False:
        return False
    return is_made_causal(layer, facts.layer)


def is_made_causal(layer: nn.Module, facts: table.Layer) -> bool:
    """Whether tokens see no later ones, as far as the layer says."""
    return facts.looks_back or bool(at(layer, facts.causal))


def windows_of(
    encoder: nn.Module, facts: table.Family, one_of: dict[Hashable, nn.Module]
) -> dict[Hashable, tuple[int, int] | None]:
    """`kind_of` a layer -> (left, right), the tokens that it sees on each side; None for all. one_of: kind -> layer."""
    if facts.layer.rotary is not None:  # the kind of a layer is its window; minus one means no bound
        return {kind: None if min(kind) < 0 else kind for kind in one_of}
    sliding, windows = getattr(encoder.config, "sliding_window", None), {}
    for kind, layer in one_of.items():
        slides = kind == SLIDING or (facts.slides and sliding is not None)
        left = sliding - facts.sees_less if slides else UNBOUNDED
        right = 0 if is_causal(encoder, layer, facts) else left
        windows[kind] = (left, right) if left < UNBOUNDED or right == 0 else None
    return windows


def why_window(encoder: nn.Module, facts: table.Family, layers: Iterable[tuple[int, nn.Module]]) -> str | None:
    """Why the layers' windows may differ from those of `windows_of`, or None. layers: (number, layer)."""
    causal = set()
    for number, layer in layers:
        if facts.layer.number is not None and at(layer, facts.layer.number) != number:
            return f"layer {number} of its list is numbered {at(layer, facts.layer.number)}"
        kind = kind_of(layer, facts.layer)
        if facts.layer.number is not None and kind != encoder.config.layer_types[number]:
            return f"layer {number} has a config of its own"
        if not facts.decoder:
            continue
        made_causal, now_causal = is_made_causal(layer, facts.layer), is_causal(encoder, layer, facts)
        if facts.bidirectional is None and not made_causal:
            return "its layers let tokens see later ones, and its masks do not"
        if facts.bidirectional is not None and bool(getattr(encoder.config, facts.bidirectional)) == made_causal:
            return f"its layers were made for another {facts.bidirectional} than its config has"
        if facts.layer.looks_back and not now_causal:
            return "its config turns causal attention off, and its code turns it on"
        slides = kind == SLIDING or (facts.slides and encoder.config.sliding_window is not None)
        if slides and made_causal and not now_causal:
            return "its config turns causal attention off, and it has a window"
        causal.add(now_causal)
    return "some of its layers are causal, and some are not" if len(causal) > 1 else None


def why_not_plain_norm(module: Any, kind: NormKind | None) -> str | None:
    """None if `module` is a norm of this kind, so that its parameters determine its output; else what it is."""
    if kind is None:
        return why_not_plain(module, nn.LayerNorm)
    if why := why_not_original(module, kind.classes, TRANSFORMERS):
        return why
    if any(getattr(module, name) for name in HOOKS):
        return "it has hooks"
    return why_weight(module)

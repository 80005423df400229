"""One inspection of an encoder: what a call may fuse, what it must call, and what has to stay the same for that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.nn as nn
from torch import Tensor

from ..stack.description import Layer
from . import distances
from . import facts as table
from .checks import attention_places, bypassed, dropout_paths, modules_below, why_every_call, why_hooked, why_lists
from .facts import at, has
from .kinds import TRANSFORMERS
from .original import LIBRARY, Watch, tensor_hooks, why_library, why_not_original, written_on
from .parts import Verdict, activation_of, layers_of, plain_table, verdict

# libraries whose wrappers around a layer call it with the arguments that they are given
LAYER_WRAPPERS = ("torch.distributed.", "torch._dynamo.", "torch.nn.parallel.")
# Attributes of a config or its class that `settings_of` reads, or that choose the attention function.
SETTINGS = (
    "is_decoder", "is_causal", "output_attentions", "_output_attentions", "output_hidden_states",
    "_attn_implementation_internal", "num_hidden_layers", "sliding_window", "layer_types",
    "use_bidirectional_attention",
)  # fmt: skip
# Attributes of an embedding that decide whether an operator may look up its rows, and how many it has.
OF_TABLES = ("num_embeddings", "max_norm", "scale_grad_by_freq", "sparse")


class Settings(NamedTuple):
    """What a model's config and its position table say about which calls the fused code can take.

    Attributes:
        decodes: tokens see no later ones.
        attentions: whether a call returns attention probabilities by default.
        states: which hidden states a call returns by default.
        longest: tokens of the longest sequence that the position table allows; None if there is no table.
    """

    decodes: bool
    attentions: bool
    states: Any
    longest: int | None


def settings_of(encoder: nn.Module, facts: table.Family) -> Settings:
    config = encoder.config
    decodes = not facts.decoder and (getattr(config, "is_decoder", False) or getattr(config, "is_causal", False))
    longest = None
    if facts.position is not None:
        positions = at(encoder, facts.position)
        first = positions.offset if facts.position_class is not None else 0
        first = first if facts.positions == "column" else encoder.embeddings.padding_idx + 1
        longest = positions.num_embeddings - first if hasattr(positions, "num_embeddings") else None
    attentions = getattr(config, "output_attentions", False)
    return Settings(bool(decodes), bool(attentions), getattr(config, "output_hidden_states", False), longest)


@dataclass(frozen=True)
class Seen:
    """The result of an inspection, valid as long as `watch.is_same()`.

    Attributes:
        reason: why every call runs the original's code, or None.
        whole: a called part that may look at more than one token, so that padding is computed; or None.
        pools: a pooler that may look at more than the first column; or None.
        dropouts: the modules whose training mode turns a dropout on.
        layers: the description of each layer; None under torch.compile, where each layer describes itself.
        tables: whether one operator computes the embeddings from their tables and their norm.
        norm, final_norm, project: the verdicts of these modules.
        settings: the model's settings.
        drops: under torch.compile, whether a dropout is on; False otherwise.
    """

    watch: Watch | None
    reason: str | None
    whole: str | None
    pools: str | None
    dropouts: Sequence[nn.Module]
    layers: dict[nn.Module, Layer] | None
    tables: bool
    norm: Verdict
    final_norm: Verdict
    project: Verdict
    settings: Settings
    drops: bool = False


def inspect(encoder: nn.Module, facts: table.Family, is_layer: Callable[[nn.Module], bool]) -> Seen:
    """Inspects an encoder. is_layer: whether a module's `forward` is an accelerated layer's."""
    layers = {}  # path -> layer: the entry of the list of layers, or the layer within a wrapper
    reason = why_lists(encoder, facts)
    paths = {module: path for path, module in encoder.named_modules()}
    for _, given in () if reason else layers_of(encoder, facts):
        layer = next((m for m in given.modules() if is_layer(m)), None)
        if layer is None or not (layer is given or type(given).__module__.startswith(LAYER_WRAPPERS)):
            reason = f"a {type(given).__name__} is in place of an accelerated layer"
            break
        layers[paths[layer]] = layer
    reason = reason or why_library() or why_every_call(encoder, facts, layers) or why_hooked(encoder, facts, layers)
    whole, described, tables = None, {}, False
    around = [
        (True, False) if path is None or not has(encoder, path) else verdict(at(encoder, path), kind, norm)
        for path, kind, norm in facts.around
    ]
    if reason is None:
        described = {layer: layer.__dict__["forward"].described() for layer in layers.values()}
        whole = _whole(encoder, facts, layers, described, around)
        tables = around[0][0] and facts.fuses_tables and all(plain_table(at(encoder, path)) for path in facts.tables)
    return Seen(
        _watch(encoder, facts, layers), reason, whole, _pools(encoder, facts), _dropouts(encoder, facts, layers),
        described, tables, *around, settings_of(encoder, facts),
    )  # fmt: skip


def _dropouts(encoder: nn.Module, facts: table.Family, layers: dict[str, nn.Module]) -> list[nn.Module]:
    modules = [at(encoder, path) for path in dropout_paths(encoder, facts, layers) if has(encoder, path)]
    modules += [encoder, *layers.values()] if facts.layerdrop is not None else []  # whose dropouts are numbers
    if facts.layer.probs_switch is not None:
        modules += [at(layer, facts.layer.probs_switch) for layer in layers.values()]
    return modules


def _pools(encoder: nn.Module, facts: table.Family) -> str | None:
    """Why the pooler, or a hook on it, may look at more than the first column; None if it cannot."""
    pooler = getattr(encoder, "pooler", None)
    if pooler is None or facts.pooler_activation is not None:  # such a pooler gets the first column alone
        return None
    return why_not_original(pooler, facts.pooler, TRANSFORMERS) or (
        "the pooler has a hook" if tensor_hooks(pooler) else None
    )


def _whole(
    encoder: nn.Module, facts: table.Family, layers: dict[str, nn.Module], described: dict[nn.Module, Layer],
    around: list[Verdict],
) -> str | None:  # fmt: skip
    """The first part that is called on [B, S, C], in words, or None."""
    for (path, _, _), (_, whole) in zip(facts.around, around, strict=True):
        if whole:
            return f"{path} is a {type(at(encoder, path)).__name__}"
    for path, layer in layers.items():
        of = described[layer]
        linears = (*of.qkv, of.out, of.up, of.down, of.gate)
        norms = (of.out_norm, of.down_norm, of.q_norm, of.k_norm, of.after_out, of.after_down)
        named = zip((*facts.layer.linears, *facts.layer.norms), filter(None, (*linears, *norms)), strict=True)
        for part, found in (*named, (facts.layer.activation, of.activation)):
            if found.whole:
                return f"{path}.{part} is a {type(found.module).__name__}"
    return None


def _watch(encoder: nn.Module, facts: table.Family, layers: dict[str, nn.Module]) -> Watch:
    config = encoder.config
    places = [*LIBRARY, (encoder.__dict__, "config"), *((config.__dict__, name) for name in SETTINGS)]
    attributes = [(type(config), name) for name in SETTINGS]
    tables = [at(encoder, path) for path in facts.tables if at(encoder, path) is not None]
    places += [(m.__dict__, name) for table in tables for m in table.modules() for name in OF_TABLES]
    if facts.positions == "after_padding_idx":
        places.append((encoder.embeddings.__dict__, "padding_idx"))
    passed = bypassed(encoder, facts, layers) | set(layers.values())
    activations = (activation_of(layer, facts.layer) for layer in layers.values())
    passed |= {activation for activation in activations if isinstance(activation, nn.Module)}
    places += [place for module in passed for place in written_on(module)]
    for layer in layers.values():
        row = facts.layer
        for path in (row.scale, row.causal, row.reach, row.activation, row.attention_type, row.number, row.divisor):
            if path is not None:
                owner, _, name = path.rpartition(".")
                places.append((at(layer, owner).__dict__, name))
    places += distances.places(encoder, facts, layers.values())
    places += attention_places(encoder)
    buffers = [path for path in facts.buffers if has(encoder, path)]
    for path in buffers:
        owner, _, name = path.rpartition(".")
        places.append((at(encoder, owner)._buffers, name))
    tensors = [t for path in buffers if isinstance(t := at(encoder, path), Tensor)]
    return Watch([encoder, *modules_below(encoder).values()], places, attributes, tensors)

"""The parts of an encoder, looked at once: what is taken apart, what is called and with which shape, what is refused.

A module is taken apart, and its parameters given to a fused operator, only where it is exactly torch's own and nobody
listens to it. What stands in its place is called: on packed tokens [T, C] where it is known to treat each token by
itself (a LoRA adapter, a parametrisation, a pruned weight), else on [B, S, C], padding computed, as the original does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from ..inference.weights import CONTAINERS, JoinedLinears
from ..stack.description import Distances, Layer, NormKind, Part
from . import distances
from . import facts as table
from .facts import at as at
from .facts import has as has
from .families import FAMILIES
from .forward import Forward
from .kinds import SLIDING, TRANSFORMERS, kind_of, why_not_plain_norm, why_window
from .own import LIBRARY, Watch, listeners, of_library, why_library, why_own, written_on
from .plain import by_token, fused_activation, why_not_plain

Verdict = tuple[bool, bool]  # plain, whole


def verdict(module: Any, kind: type[nn.Module], norm: NormKind | None = None) -> Verdict:
    """norm: of a norm that is not torch's LayerNorm."""
    plain = (why_not_plain(module, kind) if norm is None else why_not_plain_norm(module, norm)) is None
    return plain, not (plain or by_token(module))


@torch.compiler.assume_constant_result
def verdicts(layer: nn.Module, facts: table.Layer) -> tuple[tuple[Verdict, ...], tuple[Verdict, ...], bool, str | None]:
    """Of the linear layers, of the norms, whether the activation is called whole, and the operators' name for it."""
    linears = tuple(verdict(at(layer, path), nn.Linear) for path in facts.linears)
    norms = tuple(verdict(at(layer, path), nn.LayerNorm, facts.norm) for path in facts.norms)
    activation = activation_of(layer, facts)
    name = facts.activation_name if facts.activation is None else fused_activation(activation)
    return linears, norms, not by_token(activation), name


def activation_of(layer: nn.Module, facts: table.Layer) -> Any:
    """The module or function; torch's where the layer's own code calls one that computes the same."""
    if facts.activation is None:
        return getattr(nn.functional, facts.activation_name)
    return at(layer, facts.activation)


def layer_of(layer: nn.Module, facts: table.Layer, joined: JoinedLinears) -> Layer:
    """The description of a layer. joined: keeps its projections as one."""
    linears, norms, whole, name = verdicts(layer, facts)
    parts = [Part(at(layer, p), *v) for p, v in zip(facts.linears, linears, strict=True)]
    gate = parts.pop() if facts.gate is not None else None
    *qkv, out, up, down = parts
    of_table = None
    if facts.distances is not None:
        found = zip(distances.paths_of(layer, facts), distance_verdicts(layer, facts), strict=True)
        of_table = Distances(*(None if path is None else Part(at(layer, path), *v) for path, v in found))
    norm = {p: Part(at(layer, p), *v, facts.norm) for p, v in zip(facts.norms, norms, strict=True)}
    return Layer(
        tuple(qkv), out, norm[facts.out_norm], up, Part(activation_of(layer, facts), False, whole), down,
        norm[facts.down_norm], name, at(layer, facts.head_dim), joined, facts.pre_norm, facts.gated,
        kind_of(layer, facts), gate, of_table,
        q_norm=norm.get(facts.q_norm), k_norm=norm.get(facts.k_norm), norms_heads=facts.norms_heads,
        scale=at(layer, facts.scale) if facts.any_scale else None,
        after_out=norm.get(facts.after_out), after_down=norm.get(facts.after_down),
        divisor=1.0 if facts.divisor is None else at(layer, facts.divisor),
        bias=None if facts.bias is None else partial(bias_of, at(layer, facts.bias)),
    )  # fmt: skip


@torch.compiler.assume_constant_result
def distance_verdicts(layer: nn.Module, facts: table.Layer) -> tuple[Verdict | None, ...]:
    """Of the linear layers of the table of distances; None where there is none."""
    paths = distances.paths_of(layer, facts)
    return tuple(None if path is None else verdict(at(layer, path), nn.Linear) for path in paths)


def bias_of(holder: nn.Module, width: int) -> Tensor:
    """[1, H, S, S], what an attention module of T5's kind adds to its scores."""
    return holder.compute_bias(width, width)


def not_plain(layer: nn.Module, facts: table.Layer) -> dict[str, str]:
    """The parts that are called rather than taken apart: path -> why."""
    reasons = {path: why_not_plain(at(layer, path), nn.Linear) for path in facts.linears}
    reasons |= {
        path: why_not_plain_norm(at(layer, path), facts.norm)
        for path in facts.norms
        if not isinstance(at(layer, path), nn.Identity)
    }
    activation = None if facts.activation is None else at(layer, facts.activation)
    name = facts.activation_name if activation is None else fused_activation(activation)
    if name is None or (facts.gated and (name != "gelu" or facts.gate is not None)):
        reasons[facts.activation] = f"{type(activation).__name__} is not among the fused activations"
    return {path: reason for path, reason in reasons.items() if reason is not None}


# ---- all of them ------------------------------------------------------------------------------------------


class Settings(NamedTuple):
    """What a model's config and its position table say about which calls the fused code can take.

    Attributes:
        decodes: tokens see no later one.
        attentions: attention probabilities are returned where a call does not say.
        states: which hidden states are returned where a call does not say.
        longest: tokens of the longest sequence that the position table allows; None where there is no table.
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
        first = 0 if facts.positions == "column" else encoder.embeddings.padding_idx + 1
        longest = positions.num_embeddings - first if hasattr(positions, "num_embeddings") else None
    attentions = getattr(config, "output_attentions", False)
    return Settings(bool(decodes), bool(attentions), getattr(config, "output_hidden_states", False), longest)


@dataclass(frozen=True)
class Seen:
    """What a close look at an encoder found; good as long as `watch.is_same()`.

    Attributes:
        reason: why every call runs the original's code, or None.
        whole: a part that may look at more than a token: with it in place padding is computed; or None.
        pools: a pooler that may look at more than the first column; or None.
        dropouts: the modules whose training mode turns a dropout on.
        layers: the description of each layer; None while a graph is traced, where each layer gives its own.
        tables: the embeddings' tables and their norm are all taken apart.
        norm, final_norm, project: how these are used.
        settings: of the model.
        drops: is anything dropped? Known here only while a graph is traced.
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


def layers_of(encoder: nn.Module, facts: table.Family) -> Iterator[tuple[int, nn.Module]]:
    """(number of the pass, layer), in order; a shared layer comes as often as it runs."""
    layers = at(encoder, facts.layers)
    if not facts.groups:
        yield from enumerate(layers)
        return
    config, index = encoder.config, 0
    for i in range(config.num_hidden_layers):
        for layer in layers[int(i / (config.num_hidden_layers / config.num_hidden_groups))].albert_layers:
            yield index, layer
            index += 1


def look(encoder: nn.Module, facts: table.Family, is_layer: Callable[[nn.Module], bool]) -> Seen:
    """A close look at an encoder. is_layer: does this module's `forward` stand in for a layer's?"""
    layers = {}  # of its own or in a wrapper that calls it: path -> layer
    reason = why_lists(encoder, facts)
    paths = {module: path for path, module in encoder.named_modules()}
    for _, given in () if reason else layers_of(encoder, facts):
        layer = next((m for m in given.modules() if is_layer(m)), None)
        if layer is None or not (layer is given or type(given).__module__.startswith(WRAPPERS)):
            reason = f"a {type(given).__name__} came in place of an accelerated layer"
            break
        layers[paths[layer]] = layer
    reason = reason or why_library() or why_every_call(encoder, facts, layers) or _why_heard(encoder, facts, layers)
    whole, described, tables = None, {}, False
    around = [
        (True, False) if path is None or not has(encoder, path) else verdict(at(encoder, path), kind, norm)
        for path, kind, norm in facts.around
    ]
    if reason is None:
        described = {layer: layer.__dict__["forward"].described() for layer in layers.values()}
        whole = _whole(encoder, facts, layers, described)
        tables = around[0][0] and _plain_tables(encoder, facts)
    return Seen(
        _watch(encoder, facts, layers), reason, whole, _pools(encoder, facts), _dropouts(encoder, facts, layers),
        described, tables, *around, settings_of(encoder, facts),
    )  # fmt: skip


def _plain_tables(encoder: nn.Module, facts: table.Family) -> bool:
    """Are all of them, the positions' among them, torch's own, with ordinary gradients?"""
    tables = [at(encoder, path) for path in facts.tables]
    return facts.position is not None and facts.norm is not None and all(map(plain_table, tables))


def plain_table(module: nn.Module) -> bool:
    """An nn.Embedding whose gradient is an ordinary one."""
    return why_not_plain(module, nn.Embedding) is None and not module.sparse


def why_lists(encoder: nn.Module, facts: table.Family) -> str | None:
    """`why_list` of the encoder's lists of layers."""
    why = why_list(layers := at(encoder, facts.layers))
    if why or not facts.groups:
        return why
    return next((why for group in layers if (why := why_list(group.albert_layers))), None)


def why_list(layers: nn.Module) -> str | None:
    """Why nobody knows which layers of this list run, and in which order; None of a list of torch's own. A class
    derived from that may leave some out at random whenever it is iterated over, so the fused code must not do so."""
    return None if type(layers) is nn.ModuleList else f"a {type(layers).__name__} came in place of a ModuleList"


# libraries whose wrappers around a layer call it with what they are given
WRAPPERS = ("torch.distributed.", "torch._dynamo.", "torch.nn.parallel.")


def why_every_call(encoder: nn.Module, facts: table.Family, layers: dict[str, nn.Module]) -> str | None:
    """Why every call runs the original's code: something in the encoder is not what the fused code stands in for."""
    own = next(cls.__name__ for cls in type(encoder).__mro__ if cls.__name__ in FAMILIES)
    if why := why_own(encoder, (own,), TRANSFORMERS) or _why_unaccounted(encoder, facts, layers):
        return why
    if (
        facts.positions == "column"
        and facts.position is not None
        and getattr(at(encoder, "embeddings"), "padding_idx", None) is not None
    ):
        return "its embeddings count positions from padding_idx, where the table of known models has columns"
    for path, names in facts.modules.items():
        if why := why_own(at(encoder, path), names, TRANSFORMERS):
            return why
    if facts.groups:
        for group in at(encoder, facts.layers):
            if why := why_own(group, ("AlbertLayerGroup",), TRANSFORMERS):
                return why
    for layer in layers.values():
        for path, names in facts.layer.modules.items():
            if why := why_own(at(layer, path), names, TRANSFORMERS):
                return why
        if why := _why_setting(encoder, layer, facts):
            return why
    if why := distances.why_not(encoder, facts, layers.values()):
        return why
    for path in _dropout_paths(encoder, facts, layers):
        if why := why_not_dropout(at(encoder, path)):
            return f"{path}: {why}"
    for path in facts.tables:
        if at(encoder, path) is not None and (why := _why_table(at(encoder, path), facts)):
            return f"{path}: {why}"
    if why := why_window(encoder, facts, layers_of(encoder, facts)):
        return why
    if facts.ignores_rest and len(at(encoder, facts.layers)) > encoder.config.num_hidden_layers:
        return f"its config has {encoder.config.num_hidden_layers} of its {len(at(encoder, facts.layers))} layers run"
    for path, content in facts.buffers.items():
        if has(encoder, path) and not _holds(at(encoder, path), content):
            return f"{path} does not hold {content}"
    return _why_attention(encoder)


def _why_unaccounted(encoder: nn.Module, facts: table.Family, layers: dict[str, nn.Module]) -> str | None:
    """A parameter or buffer that the row of this family does not know would be left out in silence."""
    around = [*facts.tables, facts.norm, facts.final_norm, facts.project, facts.tables_of_rotation, *facts.unused]
    around += [
        "pooler",
        "embeddings" if facts.called is not None else None,
        None if facts.bias is None else f"{facts.bias}.relative_attention_bias",
    ]
    own_bias = None if facts.layer.bias is None else f"{facts.layer.bias}.relative_attention_bias"
    inside = (*facts.layer.linears, *facts.layer.norms, facts.layer.activation, facts.layer.rotary, own_bias)
    known = [*around, *(f"{path}.{part}" for path in layers for part in inside if part is not None)]
    known += distances.known(facts, layers)
    within = tuple(f"{path}." for path in known if path is not None)
    for name, _ in (*encoder.named_parameters(), *encoder.named_buffers()):
        if name not in facts.buffers and not name.startswith(within):
            return f"the table of known models has no {name}"
    return None


def _why_setting(encoder: nn.Module, layer: nn.Module, family: table.Family) -> str | None:
    facts = family.layer
    scale = at(layer, facts.scale) if facts.scale is not None and has(layer, facts.scale) else None
    if scale is not None and not facts.any_scale and scale != at(layer, facts.head_dim) ** -0.5:
        return f"a {facts.kind} scales its scores by {scale}"
    if not family.decoder and facts.causal is not None and has(layer, facts.causal) and at(layer, facts.causal):
        return f"a {facts.kind} is causal"
    if facts.reach is not None and has(layer, facts.reach):
        local = kind_of(layer, facts) == SLIDING
        if at(layer, facts.reach) != (encoder.config.sliding_window - family.sees_less + 1 if local else None):
            return f"a {facts.kind} has a window of its own"
    return None


def why_not_dropout(dropout: Any) -> str | None:
    """Why this is not a dropout whose probability says all."""
    if not isinstance(dropout, nn.Module) or isinstance(dropout, nn.Identity):
        return None if not isinstance(dropout, nn.Module) or type(dropout) is nn.Identity else "a subclass of Identity"
    if not isinstance(dropout, nn.Dropout) or type(dropout).forward is not nn.Dropout.forward:
        return f"a {type(dropout).__name__} came in place of a Dropout"
    if "forward" in dropout.__dict__ or not of_library(nn.Dropout.forward):
        return "the forward of a Dropout was replaced"
    return "it drops everything" if dropout.p >= 1.0 else None  # which no operator does


def _why_table(embedding: nn.Module, facts: table.Family) -> str | None:
    """Why the fused code cannot look up in this table, nor call it with other shapes of ids."""
    known = facts.word_class is not None and why_own(embedding, (facts.word_class,), TRANSFORMERS) is None
    if not known and not by_token(embedding):
        return f"a {type(embedding).__name__} came in place of an Embedding"
    base = embedding if isinstance(embedding, nn.Embedding) else getattr(embedding, "base_layer", embedding)
    if getattr(base, "max_norm", None) is not None:
        return "a table with max_norm is written to by every look-up"
    if getattr(base, "scale_grad_by_freq", False):
        return "a table with scale_grad_by_freq counts how often it is looked up"
    return None


def _holds(buffer: Any, content: str) -> bool:
    if not isinstance(buffer, Tensor) or buffer.is_meta:
        return False
    if content == "zeros":
        return not buffer.any()
    return torch.equal(buffer.flatten(), torch.arange(buffer.numel(), dtype=buffer.dtype, device=buffer.device))


def _attention_of(encoder: nn.Module) -> tuple[Any, str | None]:
    """(transformers' table of attention functions, the one that the model asks for)."""
    from transformers import modeling_utils

    return getattr(modeling_utils, "ALL_ATTENTION_FUNCTIONS", {}), encoder.config._attn_implementation


def _why_attention(encoder: nn.Module) -> str | None:
    functions, name = _attention_of(encoder)
    function = functions.get(name) if hasattr(functions, "get") else None
    if function is None:  # eager is a function of the model's own file
        return None if name in ("eager", None) else f"its attention is {name}"
    if getattr(function, "__module__", "").startswith(__name__.rpartition(".")[0]):
        return None  # our own
    return None if of_library(function) else f"its attention is somebody's own {name}"


def _past(encoder: nn.Module, facts: table.Family, layers: dict[str, nn.Module]) -> set[nn.Module]:
    """The modules that are walked past, and not called."""
    past = {at(encoder, path) for path in facts.modules}
    past |= {at(layer, path) for layer in layers.values() for path in facts.layer.modules if path}
    past |= set(at(encoder, facts.layers)) if facts.groups and layers else set()
    return past | {at(encoder, path) for path in _dropout_paths(encoder, facts, layers)}


def _inner(encoder: nn.Module) -> dict[str, nn.Module]:
    """Everything below an encoder, but for what is below its pooler."""
    return {path: m for path, m in encoder.named_modules() if path and not path.startswith("pooler.")}


def _why_heard(encoder: nn.Module, facts: table.Family, layers: dict[str, nn.Module]) -> str | None:
    past = _past(encoder, facts, layers)
    for path, module in _inner(encoder).items():
        if isinstance(module, CONTAINERS):
            continue  # it is never called
        if path != "pooler" and listeners(module, sharded=module not in past):
            return f"a {type(module).__name__} has a hook"
        if module in past and "forward" in module.__dict__ and not isinstance(module.__dict__["forward"], Forward):
            return f"the forward of a {type(module).__name__} was replaced"
    return None


def _dropout_paths(encoder: nn.Module, facts: table.Family, layers: dict[str, nn.Module]) -> list[str]:
    """Where the dropouts are that are modules."""
    paths = [path for path in (facts.dropout, facts.final_dropout) if path is not None]
    for path, layer in layers.items():
        paths += [f"{path}.{part}" for part in facts.layer.dropouts if isinstance(at(layer, part), nn.Module)]
    return paths + distances.dropouts(layers, facts.layer)


def _dropouts(encoder: nn.Module, facts: table.Family, layers: dict[str, nn.Module]) -> list[nn.Module]:
    modules = [at(encoder, path) for path in _dropout_paths(encoder, facts, layers) if has(encoder, path)]
    if facts.layer.probs_switch is not None:
        modules += [at(layer, facts.layer.probs_switch) for layer in layers.values()]
    return modules


def _pools(encoder: nn.Module, facts: table.Family) -> str | None:
    """What makes the pooler look at more than the first column, or lets somebody see what it is given."""
    pooler = getattr(encoder, "pooler", None)
    if pooler is None or facts.pooler_activation is not None:  # given the first column alone
        return None
    return why_own(pooler, facts.pooler, TRANSFORMERS) or ("the pooler has a hook" if listeners(pooler) else None)


def _whole(
    encoder: nn.Module, facts: table.Family, layers: dict[str, nn.Module], described: dict[nn.Module, Layer]
) -> str | None:
    for path, kind, norm in facts.around:
        if path is not None and has(encoder, path) and verdict(at(encoder, path), kind, norm)[1]:
            return f"{path} is a {type(at(encoder, path)).__name__}"
    for path, layer in layers.items():
        of = described[layer]
        linears = (*of.qkv, of.out, of.up, of.down, of.gate)
        norms = (of.out_norm, of.down_norm, of.q_norm, of.k_norm, of.after_out, of.after_down)
        named = zip((*facts.layer.linears, *facts.layer.norms), filter(None, (*linears, *norms)), strict=True)
        for part, found in named:
            if found.whole:
                return f"{path}.{part} is a {type(found.module).__name__}"
        if of.activation.whole:
            return f"{path}.{facts.layer.activation} is a {type(of.activation.module).__name__}"
    return None


# under these names a config, or its class, keeps what `settings_of` reads and what attention the model asks for
SETTINGS = (
    "is_decoder", "is_causal", "output_attentions", "_output_attentions", "output_hidden_states",
    "_attn_implementation_internal", "num_hidden_layers", "sliding_window", "layer_types",
    "use_bidirectional_attention",
)  # fmt: skip


# what an embedding has under these names says whether its rows may be looked up without calling it, and how many
OF_TABLES = ("num_embeddings", "max_norm", "scale_grad_by_freq", "sparse")


def _watch(encoder: nn.Module, facts: table.Family, layers: dict[str, nn.Module]) -> Watch:
    config = encoder.config
    places = [*LIBRARY, (encoder.__dict__, "config"), *((config.__dict__, name) for name in SETTINGS)]
    attributes = [(type(config), name) for name in SETTINGS]
    tables = [at(encoder, path) for path in facts.tables if at(encoder, path) is not None]
    places += [(m.__dict__, name) for table in tables for m in table.modules() for name in OF_TABLES]
    if facts.positions == "after_padding_idx":
        places.append((encoder.embeddings.__dict__, "padding_idx"))
    walked = _past(encoder, facts, layers) | set(layers.values())
    activations = (activation_of(layer, facts.layer) for layer in layers.values())
    walked |= {activation for activation in activations if isinstance(activation, nn.Module)}
    places += [place for module in walked for place in written_on(module)]
    for layer in layers.values():
        row = facts.layer
        for path in (row.scale, row.causal, row.reach, row.activation, row.attention_type, row.number, row.divisor):
            if path is not None:
                owner, _, name = path.rpartition(".")
                places.append((at(layer, owner).__dict__, name))
    places += distances.places(encoder, facts, layers.values())
    functions, name = _attention_of(encoder)
    for mapping in ("_global_mapping", "_local_mapping"):
        if isinstance(getattr(functions, mapping, None), dict):
            places.append((getattr(functions, mapping), name))
    buffers = [path for path in facts.buffers if has(encoder, path)]
    for path in buffers:
        owner, _, name = path.rpartition(".")
        places.append((at(encoder, owner)._buffers, name))
    tensors = [t for path in buffers if isinstance(t := at(encoder, path), Tensor)]
    return Watch([encoder, *_inner(encoder).values()], places, attributes, tensors)

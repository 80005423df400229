"""Checks of a whole encoder: why every call of it runs the original's code.

A *bypassed* module is one whose code the fused code replaces: it is part of the encoder, and is not called.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..inference.weights import CONTAINERS
from . import distances
from . import facts as table
from .facts import at, has
from .families import FAMILIES
from .forward import forward_of
from .kinds import SLIDING, TRANSFORMERS, kind_of, why_window
from .original import called_by, of_library, tensor_hooks, why_call, why_not_original
from .parts import layers_of
from .plain import by_token


def why_every_call(encoder: nn.Module, facts: table.Family, layers: dict[str, nn.Module]) -> str | None:
    """Why every call runs the original's code: something in the encoder is not what the fused code replaces. None if
    there is no such reason. layers: path -> layer."""
    own = next(cls.__name__ for cls in type(encoder).__mro__ if cls.__name__ in FAMILIES)
    if why := why_not_original(encoder, (own,), TRANSFORMERS) or _why_unaccounted(encoder, facts, layers):
        return why
    if (
        facts.positions == "column"
        and facts.position is not None
        and getattr(getattr(encoder, "embeddings", None), "padding_idx", None) is not None
    ):
        return (
            "its embeddings count positions from padding_idx, and its row in the table of known models counts columns"
        )
    for path, names in facts.modules.items():
        if why := why_not_original(at(encoder, path), names, TRANSFORMERS):
            return why
    if facts.groups:
        for group in at(encoder, facts.layers):
            if why := why_not_original(group, ("AlbertLayerGroup",), TRANSFORMERS):
                return why
    for layer in layers.values():
        for path, names in facts.layer.modules.items():
            if why := why_not_original(at(layer, path), names, TRANSFORMERS):
                return why
        if why := _why_setting(encoder, layer, facts):
            return why
    if why := distances.why_not(encoder, facts, layers.values()):
        return why
    for path in dropout_paths(encoder, facts, layers):
        if why := why_not_dropout(at(encoder, path)):
            return f"{path}: {why}"
    for path in facts.tables:
        cls = facts.word_class if path == facts.word else facts.position_class if path == facts.position else None
        if at(encoder, path) is not None and (why := _why_table(at(encoder, path), cls)):
            return f"{path}: {why}"
    if why := why_window(encoder, facts, layers_of(encoder, facts)):
        return why
    if facts.ignores_rest and len(at(encoder, facts.layers)) > encoder.config.num_hidden_layers:
        return f"its config has {encoder.config.num_hidden_layers} of its {len(at(encoder, facts.layers))} layers run"
    for path, content in facts.buffers.items():
        if has(encoder, path) and not _holds(at(encoder, path), content):
            return f"{path} does not hold {content}"
    return _why_attention(encoder)


def why_lists(encoder: nn.Module, facts: table.Family) -> str | None:
    """`why_list` of the encoder's lists of layers."""
    why = why_list(layers := at(encoder, facts.layers))
    if why or not facts.groups:
        return why
    return next((why for group in layers if (why := why_list(group.albert_layers))), None)


def why_list(layers: nn.Module) -> str | None:
    """None for torch's own ModuleList, else why the layers that run are not known. A subclass may leave layers out at
    random each time it is iterated over, so the fused code must not iterate over it."""
    return None if type(layers) is nn.ModuleList else f"a {type(layers).__name__} is in place of a ModuleList"


def _why_unaccounted(encoder: nn.Module, facts: table.Family, layers: dict[str, nn.Module]) -> str | None:
    """The fused code would silently leave out a parameter or buffer that the family's row does not name."""
    around = [*facts.tables, facts.norm, facts.final_norm, facts.project, facts.tables_of_rotation, *facts.unused]
    around += [
        facts.pooled_by,
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
    """None if this is torch's Dropout or Identity, or a number, so that its probability determines what it does."""
    if not isinstance(dropout, nn.Module) or isinstance(dropout, nn.Identity):
        return None if not isinstance(dropout, nn.Module) or type(dropout) is nn.Identity else "a subclass of Identity"
    if not isinstance(dropout, nn.Dropout) or type(dropout).forward is not nn.Dropout.forward:
        return f"a {type(dropout).__name__} is in place of a Dropout"
    if "forward" in dropout.__dict__ or not of_library(nn.Dropout.forward):
        return "the forward of a Dropout was replaced"
    return "it drops everything" if dropout.p >= 1.0 else None  # the operators need a probability below 1


def _why_table(embedding: nn.Module, cls: str | None) -> str | None:
    """Why the fused code can neither look up rows of this table itself nor call it with ids of another shape. cls:
    transformers' class of it; None for nn.Embedding."""
    known = cls is not None and why_not_original(embedding, (cls,), TRANSFORMERS) is None
    if not known and not by_token(embedding):
        return why_call(embedding) or f"a {type(embedding).__name__} is in place of an Embedding"
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


def attention_functions(encoder: nn.Module) -> tuple[Any, Any, str | None]:
    """(transformers' table of attention functions, its table of the functions that make their masks, the name in both
    that the model's config asks for)."""
    from transformers import modeling_utils

    try:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks
    except ImportError:  # older versions
        masks = {}
    return getattr(modeling_utils, "ALL_ATTENTION_FUNCTIONS", {}), masks, encoder.config._attn_implementation


def attention_places(encoder: nn.Module) -> list[tuple[dict, str]]:
    """(dictionary, key) of the functions that compute attention and its masks, and of the functions that these call."""
    *tables, name = attention_functions(encoder)
    places = []
    for functions in tables:
        mappings = (getattr(functions, mapping, None) for mapping in ("_global_mapping", "_local_mapping"))
        places += [(mapping, name) for mapping in mappings if isinstance(mapping, dict)]
        places += called_by(functions.get(name)).values() if hasattr(functions, "get") else []
    return places


def _why_attention(encoder: nn.Module) -> str | None:
    attention, masks, name = attention_functions(encoder)
    attend = attention.get(name) if hasattr(attention, "get") else None
    if attend is None and name not in ("eager", None):  # "eager" is a function in the model's own file
        return f"its attention is {name}"
    for what, function in (("attention", attend), ("mask", masks.get(name))):
        # the package itself registers `attention_interface.attention_forward`
        if function is None or getattr(function, "__module__", "").startswith(__name__.rpartition(".")[0]):
            continue
        if not of_library(function):
            return f"its {what} function {name!r} is not transformers' own"
        if why := next((f"{n} was replaced" for f, n in called_by(function).values() if not of_library(f[n])), None):
            return f"{why}, which its {what} function {name!r} calls"
    return None


def blind_is_zero(encoder: nn.Module) -> bool:
    """Whether attention of the original gives zeros to a row that sees no token, as ours does. Known of torch's SDPA on
    CPUs; eager attention, and the masks of transformers 4, give the mean of all values."""
    if encoder.config._attn_implementation != "sdpa" or next(encoder.parameters()).device.type != "cpu":
        return False
    import transformers

    return int(transformers.__version__.split(".")[0]) >= 5


# ---- hooks and dropouts -----------------------------------------------------------------------------------


def bypassed(encoder: nn.Module, facts: table.Family, layers: dict[str, nn.Module]) -> set[nn.Module]:
    """The bypassed modules, but for the layers themselves."""
    modules = {at(encoder, path) for path in facts.modules}
    modules |= {at(layer, path) for layer in layers.values() for path in facts.layer.modules if path}
    modules |= set(at(encoder, facts.layers)) if facts.groups and layers else set()
    modules |= {at(encoder, facts.position)} if facts.position_class is not None else set()
    return modules | {at(encoder, path) for path in dropout_paths(encoder, facts, layers)}


def modules_below(encoder: nn.Module) -> dict[str, nn.Module]:
    """path -> module for everything below an encoder, except what is below its pooler."""
    return {path: m for path, m in encoder.named_modules() if path and not path.startswith("pooler.")}


def why_hooked(encoder: nn.Module, facts: table.Family, layers: dict[str, nn.Module]) -> str | None:
    """Which module in the encoder has a hook or a replaced `forward` that the fused code would leave out, or None."""
    passed = bypassed(encoder, facts, layers)
    for path, module in modules_below(encoder).items():
        if isinstance(module, CONTAINERS):  # these are never called
            continue
        if why := why_call(module):
            return why
        if path != "pooler" and tensor_hooks(module, sharded=module not in passed):
            return f"a {type(module).__name__} has a hook"
        if module in passed and "forward" in module.__dict__ and forward_of(module) is None:
            return f"the forward of a {type(module).__name__} was replaced"
    return None


def dropout_paths(encoder: nn.Module, facts: table.Family, layers: dict[str, nn.Module]) -> list[str]:
    """The paths of dropouts that are modules."""
    around = (path for path in (facts.dropout, facts.final_dropout) if path is not None)
    paths = [path for path in around if isinstance(at(encoder, path), nn.Module)]
    for path, layer in layers.items():
        paths += [f"{path}.{part}" for part in facts.layer.dropouts if isinstance(at(layer, part), nn.Module)]
    return paths + distances.dropouts(layers, facts.layer)

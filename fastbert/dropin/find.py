"""Finds known modules in a model (encoders of transformers, modules of torch), and says why one is left alone."""

from __future__ import annotations

import torch.nn as nn

from . import torch_layers
from .checks import why_every_call, why_lists
from .facts import Family, has
from .families import FAMILIES, FAMILIES_OF_4
from .forward import forward_of
from .kinds import TRANSFORMERS
from .original import why_not_original
from .parts import layers_of

# torch's modules and their forwards, outermost first
TORCH = {
    nn.TransformerEncoder: torch_layers.StackForward,
    nn.TransformerEncoderLayer: torch_layers.TorchLayerForward,
    nn.MultiheadAttention: torch_layers.AttentionForward,
}
# libraries whose modules pass their arguments on to the module that they wrap, and return its output
WRAPPERS = ("torch.nn.parallel.", "torch.distributed.", "torch._dynamo.", "torch.optim.swa_utils", "peft.")


def family_of(module: nn.Module) -> Family | None:
    """The facts of a module's class, or of the class whose forward it inherits; None if it is not known."""
    for cls in type(module).__mro__:
        if cls.__name__ in FAMILIES and cls.__module__.startswith("transformers.models."):
            import transformers

            families = FAMILIES_OF_4 if transformers.__version__.startswith("4.") else FAMILIES
            family = families.get(cls.__name__) if type(module).forward is cls.forward else None
            if family is not None and family.variant is not None:
                setting, value, variant = family.variant
                family = variant if getattr(module.config, setting) == value else family
            return family
    return None


def why_no_family(module: nn.Module) -> str | None:
    """Why a module whose class is in the table of known models has no family, or None."""
    cls = type(module)
    if cls.__name__ not in FAMILIES or not cls.__module__.startswith("transformers.models."):
        return None
    import transformers

    if not transformers.__version__.startswith("4.") or cls.__name__ in FAMILIES_OF_4:
        return None
    return f"accelerated under transformers 5 only, this is {transformers.__version__}"


def is_bare(model: nn.Module, encoder: nn.Module, passes: tuple[str, ...] = ()) -> bool:
    """Whether `model` is the encoder or wrappers of it, so that the user's code reads the encoder's output. passes:
    names of transformers' classes that are such wrappers."""
    above = [m for m in model.modules() if m is not encoder and any(inner is encoder for inner in m.modules())]
    return all(
        type(m).__module__.startswith(WRAPPERS) or (passes and not why_not_original(m, passes, TRANSFORMERS))
        for m in above
    )


def why_left(encoder: nn.Module, family: Family) -> str | None:
    """Why an encoder of a known family cannot be accelerated, or None."""
    if "forward" in encoder.__dict__ and forward_of(encoder) is None:
        return "its forward was replaced already"
    config = encoder.config
    if getattr(config, "is_decoder", False) and not family.decoder:
        return "it is a decoder"
    kind = getattr(config, "position_embedding_type", None) or "absolute"
    if kind != family.position_type:
        return f"its positions are {kind}"
    facts, own_tables = family.layer, family.layer.rotary is not None  # own_tables: each layer makes its rotary tables
    if own_tables and config._attn_implementation == "flash_attention_2":
        return "its flash_attention_2 runs packed already, and rotates differently"
    paths = [family.layers, *family.tables, family.norm, family.dropout, family.final_norm, family.bias]
    paths += [family.tables_of_rotation if family.positions == "rotary" and not own_tables else None]
    for path in (*paths, *family.modules):
        if path is not None and not has(encoder, path):
            return f"this version of transformers has no {path} in it"
    if why := why_lists(encoder, family):
        return why
    parts = (*facts.linears, *facts.norms, *facts.dropouts, facts.activation, facts.head_dim)
    parts += (facts.attention_type, facts.number, facts.rotary, facts.probs_switch, facts.divisor, facts.bias)
    parts += tuple(filter(None, facts.modules))
    layers = {}
    paths = {module: path for path, module in encoder.named_modules()}
    for _, layer in layers_of(encoder, family):
        if facts.kind not in (cls.__name__ for cls in type(layer).__mro__):
            return f"a {type(layer).__name__} is in place of a {facts.kind}"
        for path in parts:
            if path is not None and not has(layer, path):
                return f"this version of transformers has no {path} in a {facts.kind}"
        layers[paths[layer]] = layer
    return why_every_call(encoder, family, layers)


def why_left_torch(module: nn.Module) -> str | None:
    """Why a module of torch cannot be accelerated, or None."""
    kind = next((kind for kind in TORCH if isinstance(module, kind)), None)
    if kind is None:
        return "it is not torch's own"
    if "forward" in module.__dict__ and forward_of(module) is None:
        return "its forward was replaced already"
    return TORCH[kind].why_left(module)

"""Whether a module is plain (torch's own, so that its parameters determine its output) or treats each token alone."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn as nn

from ..layers import activation_name
from ..stack.steps import usable
from .original import HOOKS, of_library, why_call

# torch's elementwise activations
ELEMENTWISE = {
    getattr(nn, name)
    for name in (
        "CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish ReLU ReLU6 SELU SiLU "
        "Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink Threshold"
    ).split()
}
# classes whose `forward` treats each token by itself, also in subclasses that inherit it
BY_TOKEN = {nn.Linear, nn.Embedding, nn.Identity, nn.LayerNorm, nn.RMSNorm, nn.Dropout, *ELEMENTWISE}
# the same for other libraries: module of the class -> names of classes
BY_TOKEN_ELSEWHERE = {
    "peft.tuners.lora.layer": {"Linear", "Embedding"},
    "peft.tuners.adalora.layer": {"SVDLinear"},
    "peft.tuners.ia3.layer": {"Linear"},
}


def why_not_plain(module: Any, kind: type[nn.Module]) -> str | None:
    """None if `module` is exactly torch's `kind`, so that its parameters determine its output; else what it is."""
    if type(module) is not kind:
        cls = type(module)
        return f"a {cls.__name__}" + (f" of {cls.__module__}" if cls.__name__ == kind.__name__ else "")
    if "forward" in module.__dict__:
        return "its forward was replaced"
    if not of_library(kind.forward):
        return f"{kind.__name__}.forward was replaced"
    if any(getattr(module, name) for name in HOOKS):
        return "it has hooks"
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
        return "it normalises several dimensions"
    return why_call(module) or why_weight(module)


def why_weight(module: nn.Module) -> str | None:
    """Which parameter of a module is not an ordinary tensor, or None. Sharded parameters count as ordinary: they are
    gathered while their module is called."""
    weights = (p for p in module._parameters.values() if not usable(p) and type(p).__name__ != "DTensor")
    kinds = (type(p).__name__ if p.layout is torch.strided else "sparse tensor" for p in weights)
    return next((f"its weight is a {kind}" for kind in kinds), None)


def by_token(module: Any) -> bool:
    """Whether this module is known to treat each token by itself, in inputs of any shape."""
    if not isinstance(module, nn.Module):
        return fused_activation(module) is not None
    cls = type(module)
    if "forward" in module.__dict__ or why_call(module) or not all(usable(p) for p in module.parameters()):
        return False
    if cls.__name__ in BY_TOKEN_ELSEWHERE.get(cls.__module__, ()):
        return True
    if cls.__module__ == "transformers.activations":
        return of_library(cls.forward)
    if cls is nn.Sequential:
        return of_library(cls.forward) and all(map(by_token, module))
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and len(module.normalized_shape) != 1:
        return False
    return any(isinstance(module, kind) and cls.forward is kind.forward for kind in BY_TOKEN) and of_library(
        cls.forward
    )


def fused_activation(activation: Any) -> str | None:
    """The operators' name of an activation, or None if it has hooks or is not torch's or transformers' own."""
    if isinstance(activation, nn.Module):
        cls = type(activation)
        known = cls in (nn.GELU, nn.ReLU, nn.SiLU) or cls.__module__ == "transformers.activations"
        changed = "forward" in activation.__dict__ or any(getattr(activation, name) for name in HOOKS)
        changed = changed or why_call(activation) is not None
        if changed or not known or not of_library(cls.forward) or not _has_own_function(activation):
            return None
    return activation_name(activation)


def _has_own_function(activation: nn.Module) -> bool:
    """Whether the attribute `act` of an activation of transformers, if there is one, holds its class's function."""
    act = activation.__dict__.get("act")
    if act is None or act is nn.functional.gelu:  # GELUActivation keeps torch's function
        return act is None or type(activation).__name__ == "GELUActivation"
    if isinstance(act, functools.partial):
        return (
            act.func is nn.functional.gelu
            and act.keywords == {"approximate": "tanh"}
            and (type(activation).__name__ in ("GELUTanh", "PytorchGELUTanh"))
        )
    return getattr(act, "__self__", None) is activation and of_library(act)

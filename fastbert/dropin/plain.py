"""What one module is: torch's own and no more, so that its parameters say all, or one that treats each token by
itself, or neither."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn as nn

from ..layers import activation_name
from ..stack.steps import usable
from .own import HOOKS, of_library

# activations of torch that look at one element at a time
ELEMENTWISE = {
    getattr(nn, name)
    for name in (
        "CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish ReLU ReLU6 SELU SiLU "
        "Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink Threshold"
    ).split()
}
# modules whose `forward`, inherited or not, treats each token by itself
BY_TOKEN = {nn.Linear, nn.Embedding, nn.Identity, nn.LayerNorm, nn.RMSNorm, nn.Dropout, *ELEMENTWISE}
# the same of other libraries: where the class is -> its names
BY_TOKEN_ELSEWHERE = {
    "peft.tuners.lora.layer": {"Linear", "Embedding"},
    "peft.tuners.adalora.layer": {"SVDLinear"},
    "peft.tuners.ia3.layer": {"Linear"},
}


def why_not_plain(module: Any, kind: type[nn.Module]) -> str | None:
    """None where `module` is torch's `kind` and no more, so that its parameters say all; else what it is."""
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
        return "it is of several dimensions"
    return why_weight(module)


def why_weight(module: nn.Module) -> str | None:
    """What stands in place of an ordinary parameter of a module, or None. A sharded one is ordinary while its module is
    called."""
    weights = (p for p in module._parameters.values() if not usable(p) and type(p).__name__ != "DTensor")
    kinds = (type(p).__name__ if p.layout is torch.strided else "sparse tensor" for p in weights)
    return next((f"its weight is a {kind}" for kind in kinds), None)


def by_token(module: Any) -> bool:
    """Is this module known to treat each token by itself, whatever the shape around it?"""
    if not isinstance(module, nn.Module):
        return fused_activation(module) is not None
    cls = type(module)
    if "forward" in module.__dict__ or not all(usable(p) for p in module.parameters()):
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
    """The operators' name of an activation that is torch's or transformers' own and that nobody listens to, or None."""
    if isinstance(activation, nn.Module):
        cls = type(activation)
        ours = cls in (nn.GELU, nn.ReLU, nn.SiLU) or cls.__module__ == "transformers.activations"
        heard = "forward" in activation.__dict__ or any(getattr(activation, name) for name in HOOKS)
        if heard or not ours or not of_library(cls.forward) or not _has_own_function(activation):
            return None
    return activation_name(activation)


def _has_own_function(activation: nn.Module) -> bool:
    """Does an activation of transformers that keeps its function as `act` keep the one that its class gave it?"""
    act = activation.__dict__.get("act")
    if act is None or act is nn.functional.gelu:  # of GELUActivation alone
        return act is None or type(activation).__name__ == "GELUActivation"
    if isinstance(act, functools.partial):
        return (
            act.func is nn.functional.gelu
            and act.keywords == {"approximate": "tanh"}
            and (type(activation).__name__ in ("GELUTanh", "PytorchGELUTanh"))
        )
    return getattr(act, "__self__", None) is activation and of_library(act)

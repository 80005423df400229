"""Weights prepared for inference: laid out for the vendor library, or several joined into one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from .. import functional as F
from ..kernels import native
from ..kernels.cpu import layouts

# Modules that are never called. A slice of one is always in training mode, so their mode means nothing.
CONTAINERS = (nn.ModuleList, nn.ModuleDict)
# where a module keeps its hooks
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def ready(linears: Iterable[nn.Linear], promised: bool = True) -> None:
    """Marks the weights of layers that are used for inference many times, see `prepack`. Unless the caller has
    `promised` not to write to them through `.data`, a weight is compared as a whole with its copy before each use of
    it.
    """
    for linear in linears:
        layouts.mark(linear.weight, promised)


def release(weights: Iterable[Tensor]) -> None:
    """Undoes `ready`, and frees the copies of these weights."""
    for weight in weights:
        layouts.unmark(weight)


class JoinedLinears:
    """Linear layers with the same input as a single product: x [..., C] -> [..., sum of their widths].

    The joined weight is made at every call, or not at all where the C++ multiplies by the parts. It is kept only for
    layers that `prepack` has marked, without gradients, and until a part changes: calling `prepack` promises not to
    write to the weights in a way that torch does not count. The layers are passed at every call and not stored.
    """

    def __init__(self):
        self._weight_and_bias: tuple[Tensor, Tensor | None] | None = None
        self._made_of: tuple = ()

    def __call__(self, x: Tensor, linears: Sequence[nn.Linear], impl: F.Impl | None = None) -> Tensor:
        if F.choose_impl(impl, x.device) == "native" and not torch.compiler.is_compiling():
            y = native.linears(x, [linear.weight for linear in linears], [linear.bias for linear in linears])
            if y is not None:
                return y
        return F.linear(x, *self.joined(linears), impl=F.products_beside(impl))

    def joined(self, linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
        """Their weights and biases, one after another: [sum of their widths, C] and [sum of their widths]."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._join(linears)
        parameters = [p for linear in linears for p in (linear.weight, linear.bias) if p is not None]
        if not all(layouts.is_promised(linear.weight) for linear in linears):
            return self._join(linears)
        if any(p.is_inference() for p in parameters):  # tensors made in inference mode do not count their changes
            return self._join(linears)
        state = tuple(map(layouts.state_of, parameters))
        if self._weight_and_bias is None or self._made_of != state:
            self._weight_and_bias, self._made_of = self._join(linears), state
            layouts.mark_joined(self._weight_and_bias[0], [linear.weight for linear in linears])
        return self._weight_and_bias

    @staticmethod
    def _join(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
        weight = torch.cat([linear.weight for linear in linears])
        return weight, None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])

    def __getstate__(self) -> dict:
        """Pickles and deep copies leave out the joined copy."""
        return {"_weight_and_bias": None, "_made_of": ()}


class FusedLinears(nn.ModuleDict):
    """`JoinedLinears` that store their layers. Each layer stays a module with its own weight and bias, so parameter
    names, checkpoints and optimisers do not change."""

    def __init__(self, linears: dict[str, nn.Linear]):
        super().__init__(linears)
        self.joined_linears = JoinedLinears()

    def forward(self, x: Tensor, impl: F.Impl | None = None) -> Tensor:
        linears: list[Any] = list(self.values())
        if not all(is_untouched(linear, nn.Linear) for linear in linears):
            return torch.cat([linear(x) for linear in linears], -1)
        return self.joined_linears(x, linears, impl)


def is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module is exactly of this class, with its own forward and without hooks, so that its parameters alone
    determine its output. PEFT's adapters, for example, are of other classes."""
    own, of_all = module.__dict__, nn.modules.module
    return type(module) is kind and not (
        "forward" in own
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or of_all._global_forward_hooks
        or of_all._global_forward_pre_hooks
        or of_all._global_backward_hooks
        or of_all._global_backward_pre_hooks
    )


def prepack(model: nn.Module) -> nn.Module:
    """Prepares the linear layers of `model` for inference, as `Encoder` does with its model; returns the model.

    Where a CPU's vendor library multiplies faster than our C++ (AMX, no AVX-512, activations other than GELU), a second
    copy of each weight is laid out for that library at the first use without gradients. Where query, key and value are
    one product, which they always are on a GPU, their joined weight is kept instead of being made in every pass.

    Training, loading other weights and moving the model are noticed. Writing to a few elements of weights or biases
    through `.data` may go unnoticed; calling `prepack` is the promise not to do that.
    """
    ready(module for module in model.modules() if isinstance(module, nn.Linear))
    return model

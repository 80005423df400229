"""Weights as inference multiplies by them: laid out for the vendor library, several joined to one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from .. import functional as F
from ..kernels import native
from ..kernels.cpu import layouts

# are never called; a slice of one is in training mode, whatever it was
CONTAINERS = (nn.ModuleList, nn.ModuleDict)
# where a module keeps its hooks
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def ready(linears: Iterable[nn.Linear], promised: bool = True) -> None:
    """Weights that are multiplied by again and again, and not trained: see `prepack`. Where it was not `promised` that
    nobody writes to them through `.data`, each is read as a whole before a copy of it is used.
    """
    for linear in linears:
        layouts.mark(linear.weight, promised)


def release(weights: Iterable[Tensor]) -> None:
    """Takes `ready` back, and the copies of these weights with it."""
    for weight in weights:
        layouts.unmark(weight)


class JoinedLinears:
    """Linear layers over one input as a single product: x [..., C] -> [..., sum of their widths].

    The joined weight is made anew at every call, or not at all where the parts are multiplied as they lie. Only that of
    parts which `prepack` has readied is kept, without gradients and until a part changes: who calls those
    promises not to write to the weights in a way that torch does not count. The layers are given at every call and not
    held.
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
        if any(p.is_inference() for p in parameters):  # made in inference mode: nothing tells when they change
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
        """A pickled or deep-copied one leaves the joined copy behind."""
        return {"_weight_and_bias": None, "_made_of": ()}


class FusedLinears(nn.ModuleDict):
    """`JoinedLinears` that hold their layers: each stays a module with its own weight and bias, so names, checkpoints
    and optimisers see what they know."""

    def __init__(self, linears: dict[str, nn.Linear]):
        super().__init__(linears)
        self.joined_linears = JoinedLinears()

    def forward(self, x: Tensor, impl: F.Impl | None = None) -> Tensor:
        linears = list(self.values())
        if not all(is_untouched(linear, nn.Linear) for linear in linears):
            return torch.cat([linear(x) for linear in linears], -1)
        return self.joined_linears(x, linears, impl)


def is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Is it exactly of this kind, and does nobody replace its forward or listen to it, so that its parameters alone say
    what a call of it would give? Adapters of PEFT, for one, are not."""
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
    """Ready the linear layers of `model` for inference; returns it. What `Encoder` does with its own.

    Where a CPU's vendor library multiplies faster than our C++ (AMX, no AVX-512, activations other than GELU), their
    weights are laid out for it at their first use without gradients, and then held twice. Where query, key and value
    are one product, on a GPU always, their joined weight is kept, which is otherwise copied together in every pass.
    Training them again, loading others or moving them is noticed; writing to a few elements of the weights or biases
    through `.data` may not be. The call is the promise that nobody does.
    """
    ready(module for module in model.modules() if isinstance(module, nn.Linear))
    return model

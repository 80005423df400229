"""Linear layers whose weights are 8-bit integers, in place of those of a model: see `kernels/cpu/int8.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn as nn
from torch import Tensor

from ..kernels.cpu import int8
from .weights import FusedLinears


def why_not() -> str | None:
    """Why this machine does not multiply 8-bit integers; None where it does."""
    return int8.why_not()


def engine() -> str:
    """What multiplies 8-bit integers on this machine, in words."""
    return int8.engine()


class Int8Linear(nn.Module):
    """y = x W^T + bias with W in 8 bits. For inference: it cannot be trained, loaded into, or moved to another device.

    Its state_dict holds the dequantised weight in the dtype of the original layer, so that a saved model can be loaded
    by any code that loads the original.
    """

    def __init__(self, linear: nn.Linear, factors: Tensor | None = None):
        super().__init__()
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, linear.weight.dtype
        self.has_bias = linear.bias is not None
        self.packed = int8.Int8Weight(linear.weight, linear.bias, factors)
        self.training = linear.training

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N], in x's dtype."""
        return self.packed.linear(x)

    @property
    def weight(self) -> Tensor:
        """[N, K], computed from the integers at each access."""
        return self.packed.weight().to(self.dtype)

    @property
    def bias(self) -> Tensor | None:
        return self.packed.bias[: self.out_features].to(self.dtype) if self.has_bias else None

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the layer holds."""
        return self.packed.nbytes

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.has_bias}, int8"

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        if self.has_bias:
            destination[f"{prefix}bias"] = self.bias


def quantise(model: nn.Module, sample: Callable[[], object] | None = None) -> nn.Module:
    """Replaces the linear layers of `model` whose sizes are multiples of 16 by `Int8Linear`. The weights are then held
    as 8-bit integers only. Returns the model, or the new layer if `model` is a linear layer itself.

    Args:
        sample: runs the model on typical inputs. The scales of the inputs' columns that it shows are then moved into
            the weights, which halves the loss of precision (`int8.balance`). None moves no scales.
    """
    if type(model) is nn.Linear:
        return Int8Linear(model) if int8.fits(model.weight) else model
    groups = _groups(model)
    mean_squares = _mean_squares([group[0] for group in groups], sample) if sample is not None else {}
    made: dict[nn.Linear, Int8Linear] = {}
    for group in groups:
        squares = mean_squares.get(group[0])
        factors = None if squares is None else int8.balance(squares, *(linear.weight.detach() for linear in group))
        made.update((linear, Int8Linear(linear, factors)) for linear in group)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if child in made:
                module.add_module(name, made[child])
    return model


def _groups(model: nn.Module) -> list[list[nn.Linear]]:
    """The linear layers that can be quantised, in groups of those that share an input."""
    joined = [
        list(module.values())
        for module in model.modules()
        if isinstance(module, FusedLinears) and all(map(_can_be, module.values()))
    ]
    seen = {linear for group in joined for linear in group}
    return joined + [[module] for module in model.modules() if module not in seen and _can_be(module)]


def _can_be(module: nn.Module) -> bool:
    return type(module) is nn.Linear and int8.fits(module.weight)


def _mean_squares(linears: Sequence[nn.Linear], sample: Callable[[], object]) -> dict[nn.Linear, Tensor]:
    """linear -> mean squares [K] float32 of the columns of its inputs, for the layers that a run of `sample` calls."""
    found: dict[nn.Linear, Tensor] = {}

    def note(linear: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        squares = inputs[0].detach().float().square().flatten(0, -2).mean(0)
        found[linear] = found.get(linear, 0.0) + squares

    with ExitStack() as hooks, torch.no_grad():
        for linear in linears:
            hooks.enter_context(_hooked(linear, note))
        sample()
    return found


@contextmanager
def _hooked(linear: nn.Linear, note: Callable[[nn.Linear, tuple[Tensor, ...]], None]):
    handle = linear.register_forward_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()

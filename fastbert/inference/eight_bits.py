"""Linear layers whose weights are 8-bit integers, in place of those of a model: see `kernels/cpu/int8.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
import torch.nn as nn
from torch import Tensor

from .. import functional as F
from ..formats.integers import Integers
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

    def __init__(
        self,
        linear: nn.Linear,
        factors: Tensor | None = None,
        packed: int8.Int8Weight | None = None,
        moments: Tensor | None = None,
    ):
        """packed: the integers to use; by default those of `Int8Weight` for the layer's weight and bias, `factors` and
        `moments`."""
        super().__init__()
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, linear.weight.dtype
        self.has_bias = linear.bias is not None
        if packed is None:
            packed = int8.Int8Weight(linear.weight, linear.bias, factors, moments=moments)
        self.packed = packed
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
            the weights, which halves the loss of precision (`int8.balance`), and the weights are rounded for these
            inputs (`int8.rounded`). None: neither.
    """
    if type(model) is nn.Linear:
        return Int8Linear(model) if int8.fits(model.weight) else model
    groups = groups_of(model)
    moments = moments_of_columns([group[0] for group in groups], sample) if sample is not None else {}
    made: dict[nn.Linear, Int8Linear] = {}
    for group in groups:
        of_group = moments.get(group[0])
        squares = None if of_group is None else of_group.diagonal(dim1=1, dim2=2).flatten()
        factors = factors_for(squares, group)
        made.update((linear, Int8Linear(linear, factors, moments=of_group)) for linear in group)
    replace_linears(model, made)
    return model


def replace_linears(model: nn.Module, made: Mapping[nn.Linear, nn.Module]) -> None:
    """Puts a module in place of each of these linear layers, wherever in the model it is."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if child in made:
                module.add_module(name, made[child])


def put_in_integers(
    model: nn.Module, found: Mapping[str, Integers], device: torch.device | str, impl: F.Impl | None
) -> None:
    """`Int8Linear` in place of the layers whose weights a checkpoint holds in 8 bits, with its very integers. Where
    this machine, the device or the implementation has no such products the float weights stay, which are what the
    integers say.

    found: name of a layer in the checkpoint, with "bert." before it or not -> its integers.
    device: where the model, still on the CPU, will be.
    """
    device = torch.device(device)
    if not found or why_not() is not None or device.type != "cpu" or F.choose_impl(impl, device) != "native":
        return
    by_name = {name.removeprefix("bert."): integers for name, integers in found.items()}
    made: dict[nn.Linear, Int8Linear] = {}
    shared: dict[bytes, Tensor] = {}  # layers side by side over one input must have the same tensor of factors
    for name, linear in model.named_modules():
        integers = by_name.get(name.removeprefix("bert."))
        if integers is None or not _can_be(linear):
            continue
        factors = integers.factors
        if factors is None:
            factors = torch.ones(linear.in_features, dtype=torch.float32, device="cpu")
        factors = shared.setdefault(factors.numpy().tobytes(), factors)
        packed = int8.Int8Weight.of_integers(integers.integers, integers.scales, linear.bias, factors)
        made[linear] = Int8Linear(linear, packed=packed)
    replace_linears(model, made)


def holds_integers(model: nn.Module) -> bool:
    """Whether a layer of the model has its weight in 8 bits."""
    return any(isinstance(module, Int8Linear) for module in model.modules())


def groups_of(model: nn.Module) -> list[list[nn.Linear]]:
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


def factors_for(squares: Tensor | None, group: Sequence[nn.Linear]) -> Tensor | None:
    """`int8.balance` for layers over one input, whose columns have these squares [K]; None: there are none.

    Of query, key and value only the last one's weight counts: its rounding changes a text's vector ten times as much.
    """
    return None if squares is None else int8.balance(squares, group[-1].weight.detach())


def moments_of_columns(linears: Sequence[nn.Linear], sample: Callable[[], object]) -> dict[nn.Linear, Tensor]:
    """linear -> the means of x x^T over the rows x of its inputs in a run of `sample`, for each group of neighbouring
    columns: [groups, group, group] float32, added up over batches."""
    found: dict[nn.Linear, Tensor] = {}

    def note(linear: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().float().flatten(0, -2)
        x = x.unflatten(1, (-1, int8.group_of(x.shape[1]))).transpose(0, 1)  # [groups, rows, group]
        found[linear] = found.get(linear, 0.0) + x.mT @ x / x.shape[1]

    _run_with_hooks(linears, note, sample)
    return found


def _run_with_hooks(
    linears: Sequence[nn.Linear],
    note: Callable[[nn.Linear, tuple[Tensor, ...]], None],
    sample: Callable[[], object],
) -> None:
    with ExitStack() as hooks, torch.no_grad():
        for linear in linears:
            hooks.callback(linear.register_forward_pre_hook(note).remove)
        sample()


def squares_of_columns(
    linears: Sequence[nn.Linear], sample: Callable[[], object], percentile: float | None = None
) -> dict[nn.Linear, Tensor]:
    """linear -> squares [K] float32 of the sizes of the columns of its inputs, of those that a run of `sample` comes
    by, added up over its batches.

    percentile: of the magnitudes in a column, what its size is; None: their root mean square.
    """
    found: dict[nn.Linear, Tensor] = {}

    def note(linear: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().float().flatten(0, -2)
        if percentile is None:
            squares = x.square().mean(0)
        else:
            squares = x.abs().kthvalue(max(1, round(percentile / 100 * len(x))), dim=0).values.square()
        found[linear] = found.get(linear, 0.0) + squares

    _run_with_hooks(linears, note, sample)
    return found

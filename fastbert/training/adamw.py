"""torch.optim.AdamW, whose step on a CPU is one pass of C++ over all parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..functional import adamw as cpp


class _Resting(NamedTuple):
    """Which blocks of a parameter have moments of zero, and the tensors and versions for which that is known."""

    mean: Tensor
    square: Tensor
    versions: tuple[int, int]
    blocks: Tensor

    def is_of(self, mean: Tensor, square: Tensor) -> bool:
        return self.mean is mean and self.square is square and self.versions == (mean._version, square._version)


class _Given(NamedTuple):
    """The tensors that one step reads and writes for the parameters of one dtype, in lists of equal length."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    means: list[Tensor]
    squares: list[Tensor]
    resting: list[Tensor | None]
    numbers: list[cpp.Numbers]


def _torchs_step() -> Callable[..., Any]:
    """torch's step without the hooks that torch wraps around the step of every optimiser class it has made an object
    of: those around our step have run already."""
    step = torch.optim.AdamW.step
    while getattr(step, "hooked", False):
        step = step.__wrapped__
    return step


class AdamW(torch.optim.AdamW):
    """torch's AdamW with the same arguments and state_dict: each can load the other's.

    On a CPU the C++ operators update all float32 or bfloat16 parameters in one pass, which reads every gradient once.
    Rows of a table that have never had a gradient keep moments of zero. For these only weight decay reads and writes
    the parameter, and a decay of 0 does nothing. Results are torch's within the rounding of a step. In all other cases
    (other devices and dtypes, amsgrad, maximize, a tensor as lr, a GradScaler that unscales in the step, no C++)
    torch's step runs.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._forget()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def _forget(self) -> None:
        self._resting: dict[Tensor, _Resting] = {}
        self._scale = 1.0

    def clip(self, max_norm: float) -> float:
        """Scales all gradients down if their joint norm is above `max_norm`, as torch.nn.utils.clip_grad_norm_ does.
        Gradients that the C++ supports are only read here, and the next step scales them; others are scaled in place.

        Returns: the norm before scaling.
        """
        self._scale = 1.0  # the scale of a step that was clipped and then skipped does not apply
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in parameters]
        # Where torch's step follows nevertheless, `_scale_gradients` scales them first.
        if torch.compiler.is_compiling() or not cpp.takes(*gradients) or len({g.dtype for g in gradients}) > 1:
            norm = nn.utils.clip_grad_norm_(parameters, max_norm)
            return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # FSDP2 gives a sharded norm
        norm = cpp.norm(gradients)
        self._scale = 1.0 if norm + 1e-6 <= max_norm else max_norm / (norm + 1e-6)
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step, as torch's."""
        if closure is not None or not self._takes_all():
            self._scale_gradients()
            loss = _torchs_step()(self, closure)
            if not torch.compiler.is_compiling():
                self._count_versions()
            return loss
        scale, self._scale = self._scale, 1.0
        of_dtypes: dict[torch.dtype, _Given] = {}
        for group in self.param_groups:
            self._gather(group, scale, of_dtypes)
        for given in of_dtypes.values():
            cpp.step(*given)
            written = [*given.parameters, *given.means, *given.squares]
            torch.autograd.graph.increment_version(written)
            for p, mean, square, blocks in zip(
                given.parameters, given.means, given.squares, given.resting, strict=True
            ):
                if blocks is not None:
                    self._resting[p] = _Resting(mean, square, (mean._version, square._version), blocks)
        return None

    def _count_versions(self) -> None:
        """Increments the versions of the tensors that torch's fused step changes without doing so. `_Resting` and
        8-bit layers in training compare versions to notice changes."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    moments = (self.state[p].get(name) for name in ("exp_avg", "exp_avg_sq"))
                    torch.autograd.graph.increment_version([p, *(t for t in moments if t is not None)])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; also drops the scale of `clip` for a step that was not taken."""
        self._scale = 1.0
        super().zero_grad(set_to_none)

    def _scale_gradients(self) -> None:
        """Applies the scale of `clip` to the gradients for a step that torch computes, as under a GradScaler."""
        scale, self._scale = self._scale, 1.0
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if scale != 1.0 and gradients:
            torch._foreach_mul_(gradients, scale)

    def _takes_all(self) -> bool:
        """Whether the C++ step supports the options of every group and all tensors."""
        if torch.compiler.is_compiling() or getattr(self, "found_inf", None) is not None:
            return False
        for group in self.param_groups:
            if any(group[name] for name in ("amsgrad", "maximize", "capturable", "differentiable")):
                return False
            if any(isinstance(number, Tensor) for number in (group["lr"], *group["betas"])):
                return False
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state.get(p, {})
                tensors = [p, p.grad, *(state[name] for name in ("exp_avg", "exp_avg_sq") if name in state)]
                if not cpp.takes(*tensors) or len({t.dtype for t in tensors}) > 1:
                    return False
        return True

    def _gather(self, group: dict[str, Any], scale: float, of_dtypes: dict[torch.dtype, _Given]) -> None:
        """Adds the parameters of a group that have a gradient to `of_dtypes`, and counts their steps."""
        parameters, gradients, means, squares, steps = [], [], [], [], []
        self._init_group(group, parameters, gradients, means, squares, [], steps)
        if not parameters:
            return
        torch._foreach_add_(steps, 1)
        of_step: dict[float, cpp.Numbers] = {}
        for p, g, mean, square, count in zip(parameters, gradients, means, squares, map(float, steps), strict=True):
            if count not in of_step:
                of_step[count] = cpp.numbers(
                    count, group["lr"], group["betas"], group["eps"], group["weight_decay"], scale
                )
            given = of_dtypes.setdefault(p.dtype, _Given([], [], [], [], [], []))
            resting = self._blocks_at_rest(p, mean, square, count) if group["eps"] > 0.0 else None
            for values, value in zip(given, (p, g, mean, square, resting, of_step[count]), strict=True):
                values.append(value)

    def _blocks_at_rest(self, p: Tensor, mean: Tensor, square: Tensor, count: float) -> Tensor:
        known = self._resting.get(p)
        if known is not None and known.is_of(mean, square):
            return known.blocks
        return cpp.at_rest(p, are_zero=count == 1.0 and not (mean.any() or square.any()))

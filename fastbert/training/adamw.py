"""torch.optim.AdamW, whose step on a CPU is one pass of C++ over all parameters."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import adamw as cpp
from ..functional import kept_gradients

MOMENTS = ("exp_avg", "exp_avg_sq")


def _choices(group: dict[str, Any]) -> tuple[bool, ...]:
    """Whether a group has each option that the C++ does not support; and last, whether rows can be at rest, which eps 0
    forbids."""
    return (
        *(bool(group[name]) for name in ("amsgrad", "maximize", "capturable", "differentiable")),
        any(isinstance(number, Tensor) for number in (group["lr"], *group["betas"])),
        group["eps"] > 0.0,
    )


class _Plan:
    """A step by the C++ operators, prepared: which tensors it updates, and how to tell that these are still the same.

    Attributes:
        parameters: all of them. has_gradient: for each, whether the step has a gradient for it.
        updated: those with a gradient; states: their dictionaries of the optimiser's state; moments: two tensors each.
        resting: for each of `updated`, see `cpp.at_rest`.
        counts: [index of a group, steps done] for each set of numbers that a step needs; kept: `cpp.Numbers.kept` of
            the last step for each of them.
        late: `cpp.Update`'s for the table whose decay is deferred, None if there is none; place: where its numbers are.
    """

    def __init__(self, optimizer: AdamW, gradients: list[Tensor | None], before: _Plan | None) -> None:
        self.parameters = _parameters(optimizer)
        self.has_gradient = [g is not None for g in gradients]
        self.choices = [_choices(group) for group in optimizer.param_groups]
        self.lengths = [len(group["params"]) for group in optimizer.param_groups]
        of_groups = [place for place, group in enumerate(optimizer.param_groups) for _ in group["params"]]
        self.indices = [i for i, has in enumerate(self.has_gradient) if has]
        self.updated = [self.parameters[i] for i in self.indices]
        self.states = [optimizer.state[p] for p in self.updated]
        self.steps = [state["step"] for state in self.states]
        self.moments = [state[name] for state in self.states for name in MOMENTS]
        self.counts: list[list[float]] = []
        self.table, self.late, self.place, self.is_late = optimizer.deferred, None, 0, False
        self.resting: list[Tensor | None] = []
        places: dict[tuple[int, float], int] = {}
        parts: dict[torch.dtype, list[int]] = {}
        of_updated = []
        for n, (i, p) in enumerate(zip(self.indices, self.updated, strict=True)):
            group, count = of_groups[i], float(self.steps[n])
            place = places.setdefault((group, count), len(places))
            if place == len(self.counts):
                self.counts.append([group, count])
            of_updated.append(place)
            may_rest = self.choices[group][-1]
            self.resting.append(self._blocks_at_rest(n, p, count, before) if may_rest else None)
            if may_rest and p is self.table:
                self.late, self.place = torch.zeros(len(p), dtype=torch.uint8, device="cpu"), place
            parts.setdefault(p.dtype, []).append(n)
        self.parts = [
            (
                of_part,
                cpp.Update(
                    *([values[n] for n in of_part] for values in (
                        self.updated, self.moments[::2], self.moments[1::2], self.steps, self.resting, of_updated,
                        [self.late if p is self.table else None for p in self.updated],
                    ))
                ),
            )
            for of_part in parts.values()
        ]  # fmt: skip
        self.kept = [cpp.NOTHING_KEPT] * len(self.counts)
        self._note_versions()

    def _note_versions(self) -> None:
        self.versions = [t._version for t in (*self.steps, *self.moments)]
        self.of_table = 0 if self.table is None else self.table._version

    def _blocks_at_rest(self, n: int, p: Tensor, count: float, before: _Plan | None) -> Tensor:
        """The blocks of the plan before if nothing else has written these moments since, else new ones."""
        mean, square = moments = self.moments[2 * n : 2 * n + 2]
        if before is not None and (known := before.blocks_of(p, moments)) is not None:
            return known
        return cpp.at_rest(p, are_zero=count == 0.0 and not (mean.any() or square.any()))

    def blocks_of(self, p: Tensor, moments: list[Tensor]) -> Tensor | None:
        """Which blocks of p are at rest, if p has these moments and only this plan has written them."""
        if not all(update.is_in_place() for _, update in self.parts):
            return None
        for n, updated in enumerate(self.updated):
            if updated is p:
                noted = self.versions[len(self.steps) + 2 * n :][:2]
                same = all(map(operator.is_, moments, self.moments[2 * n : 2 * n + 2]))
                return self.resting[n] if same and noted == [t._version for t in moments] else None
        return None

    def holds(self, optimizer: AdamW, gradients: list[Tensor | None]) -> bool:
        """Whether a step would update the same tensors, which only this plan has written, with gradients that fit."""
        state, present = optimizer.state, [g for g in gradients if g is not None]
        return (
            _same(self.parameters, _parameters(optimizer))
            and self.lengths == [len(group["params"]) for group in optimizer.param_groups]
            and self.has_gradient == [g is not None for g in gradients]
            and self.choices == [_choices(group) for group in optimizer.param_groups]
            and _same(self.states, [state.get(p) for p in self.updated])
            and _same(self.steps, [of.get("step") for of in self.states])
            and _same(self.moments, [of.get(name) for of in self.states for name in MOMENTS])
            and self.versions == [t._version for t in (*self.steps, *self.moments)]
            and all(update.takes([present[n] for n in of_part]) for of_part, update in self.parts)
        )

    def step(self, groups: list[dict[str, Any]], gradients: list[Tensor | None], scale: float) -> None:
        """Updates the parameters. The gradients are multiplied by `scale`."""
        present = [g for g in gradients if g is not None]
        by = [
            cpp.numbers(count + 1.0, group["lr"], group["betas"], group["eps"], group["weight_decay"], scale, before)
            for (group, count), before in zip(
                ((groups[int(group)], count) for group, count in self.counts), self.kept, strict=True
            )
        ]
        self._expect_unwritten()
        for of in self.counts:  # after `numbers`, which may raise
            of[1] += 1.0
        for of_part, update in self.parts:
            of_parts_gradients = [present[n] for n in of_part]
            update.step(of_parts_gradients, kept_gradients.touched_of(of_parts_gradients), by)
        self.kept = [of.kept for of in by]
        torch.autograd.graph.increment_version([*self.updated, *self.moments])
        self._note_versions()
        self.is_late = self.late is not None

    def settle(self, rows: Tensor | None) -> None:
        """Applies the deferred decay of these rows [N] of the table, or of all."""
        if self.is_late:
            self._expect_unwritten()
            cpp.settle(self.table, self.late, self.kept[self.place], rows)
            torch.autograd.graph.increment_version(self.table)
            self.is_late = rows is not None
            self.of_table = self.table._version

    def _expect_unwritten(self) -> None:
        if self.is_late and self.table._version != self.of_table:
            raise RuntimeError(
                "a table was written to while the decay of some of its rows was deferred; call the optimizer's "
                "settle() before other code reads or writes the table"
            )


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _same(known: list[Any], found: list[Any]) -> bool:
    return len(known) == len(found) and all(map(operator.is_, known, found))


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
        # `load_state_dict` calls this on an optimiser in use, `pickle` on a new one.
        deferred = self.__dict__.get("deferred")
        if deferred is not None:
            self.settle()
        if "_scale" in self.__dict__:
            self._scale_gradients()
        super().__setstate__(state)
        self._forget()
        self.deferred = deferred

    def _forget(self) -> None:
        self._plan: _Plan | None = None
        self._scale = 1.0
        self.deferred: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        self._scale_gradients()
        return super().__getstate__()

    def state_dict(self) -> dict[str, Any]:
        self.settle()
        return super().state_dict()

    def defer(self, table: Tensor) -> None:
        """From now on applies the decay of a table's rows that never had a gradient only in every eighth step, or when
        `settle` is called: for a loop that calls it before anything else reads or writes the table, or these rows."""
        self.settle()
        self.deferred, self._plan = table, None

    def settle(self, rows: Tensor | None = None) -> None:
        """Applies all decay that was deferred, or that of these rows [N] int64. The table then has the same bits as
        without `defer`."""
        if self._plan is not None:
            self._plan.settle(rows)

    def clip(self, max_norm: float) -> float:
        """Scales all gradients down if their joint norm is above `max_norm`, as torch.nn.utils.clip_grad_norm_ does.
        Gradients that the C++ supports are only read here, and the next step scales them; others are scaled in place.

        Returns: the norm before scaling.
        """
        self._scale = 1.0  # the scale of a step that was clipped and then skipped does not apply
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in parameters]
        # Where torch's step follows nevertheless, `_scale_gradients` scales them first.
        is_compiling = torch.compiler.is_compiling()
        norm = None if is_compiling else cpp.norm(gradients)
        if norm is None:
            norm = nn.utils.clip_grad_norm_(parameters, max_norm)
            return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # FSDP2 gives a sharded norm
        self._scale = 1.0 if norm + 1e-6 <= max_norm else max_norm / (norm + 1e-6)
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step, as torch's."""
        gradients = [p.grad for p in _parameters(self)]
        if closure is not None or not self._is_planned(gradients):
            self.settle()
            self._scale_gradients()
            loss = _torchs_step()(self, closure)
            if not torch.compiler.is_compiling():
                self._count_versions()
            return loss
        scale, self._scale = self._scale, 1.0
        self._plan.step(self.param_groups, gradients, scale)
        return None

    def _is_planned(self, gradients: list[Tensor | None]) -> bool:
        """Makes a plan for a step with these gradients unless there is one. False if the C++ does not support an option
        of a group, or a tensor."""
        if torch.compiler.is_compiling() or getattr(self, "found_inf", None) is not None:
            return False
        if self._plan is None or not self._plan.holds(self, gradients):
            self.settle()
            before, self._plan = self._plan, None
            if self._takes(gradients):
                self._plan = _Plan(self, gradients, before)
        return self._plan is not None

    def _takes(self, gradients: list[Tensor | None]) -> bool:
        """Whether the C++ step supports the options of every group and all tensors. If so, all have a state."""
        if any(any(_choices(group)[:-1]) for group in self.param_groups):
            return False
        parameters = _parameters(self)
        if len(set(parameters)) < len(parameters):  # torch warns of such groups, and updates p twice
            return False
        for p, g in zip(parameters, gradients, strict=True):
            if g is None:
                continue
            state = self.state.get(p, {})
            tensors = [p, g, *(state[name] for name in MOMENTS if name in state)]
            if not cpp.takes(*tensors) or len({(t.dtype, t.shape) for t in tensors}) > 1:
                return False
        for group in self.param_groups:
            self._init_group(group, [], [], [], [], [], [])
        states = [self.state[p] for p, g in zip(parameters, gradients, strict=True) if g is not None]
        return all(of["step"].dtype == torch.float32 and of["step"].is_cpu for of in states)

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
        if not set_to_none:
            super().zero_grad(False)
            return
        parameters = _parameters(self)
        kept_gradients.give_back([p.grad for p in parameters if p.grad is not None])
        for p in parameters:
            p.grad = None

    @torch.no_grad()
    def _scale_gradients(self) -> None:
        """Applies the scale of `clip` to the gradients: for a step that torch computes, as under a GradScaler, and for
        copies of the optimiser."""
        scale, self._scale = self._scale, 1.0
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if scale != 1.0 and gradients:
            torch._foreach_mul_(gradients, scale)

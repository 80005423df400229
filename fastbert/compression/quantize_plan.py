"""Which linear layers of a model are quantised to 8 bits, and with which factors, by their effect on calibration data.

Layers with the same input (query, key and value) are one group. A group's sensitivity is the relative error of the
model's outputs (logits, or hidden states without a head) on the calibration data if only this group is in 8 bits:
rms(outputs - exact) / rms(exact). With a limit for the total error, the most sensitive groups are not quantised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..inference.eight_bits import factors_for, groups_of, replace_linears, squares_of_columns
from ..inference.training_in_8_bits import TrainedInt8Linear

Outputs = Callable[[], Tensor]  # returns the model's outputs for the calibration data


@dataclass
class Plan:
    """The layers that are quantised.

    Attributes:
        factors: name of a quantised layer -> its factors [K] or None.
        kept: names of the groups that are not quantised.
        sensitivities: name of a group -> its sensitivity.
        error: relative error with all layers of the plan in 8 bits. error_of_all: with every group in 8 bits.
    """

    factors: dict[str, Tensor | None]
    kept: list[str] = field(default_factory=list)
    sensitivities: dict[str, float] = field(default_factory=dict)
    error: float = 0.0
    error_of_all: float = 0.0

    def record(self) -> dict[str, Any]:
        """The plan as JSON values, for a report."""
        return {
            "layers in 8 bits": len(self.factors), "kept": self.kept, "error": self.error,
            "error with all in 8 bits": self.error_of_all,
            "sensitivities": dict(sorted(self.sensitivities.items(), key=lambda pair: -pair[1])),
        }  # fmt: skip


def make_plan(
    model: nn.Module, outputs: Outputs, percentile: float | None = None, smooth: bool = True, error: float | None = None
) -> Plan:
    """The plan for a model in evaluation mode, which is not changed.

    Args:
        percentile: the percentile of the magnitudes in a column that counts as the column's size in the factors; None
            for their root mean square.
        smooth: whether columns have factors.
        error: the largest relative error of the outputs; None for no limit.
    """
    names = {module: name for name, module in model.named_modules()}
    groups = groups_of(model.bert.encoder if hasattr(model, "bert") else model.encoder)
    sizes = squares_of_columns([group[0] for group in groups], outputs, percentile) if smooth else {}
    with torch.no_grad():
        exact = outputs()
    titles, factors = {}, {}
    for group in groups:
        titles[names[group[0]].removesuffix(".query")] = group
        found = factors_for(sizes.get(group[0]), group)
        factors.update((names[linear], found) for linear in group)

    def error_of(chosen: Sequence[str]) -> float:
        linears = [linear for title in chosen for linear in titles[title]]
        made = {linear: TrainedInt8Linear(linear, factors[names[linear]]) for linear in linears}
        replace_linears(model, made)
        try:
            with torch.no_grad():
                found = outputs()
        finally:
            replace_linears(model, {new: old for old, new in made.items()})
        return relative_error(found, exact)

    plan = Plan(factors, error_of_all=error_of(list(titles)))
    plan.sensitivities = {title: error_of([title]) for title in titles}
    plan.error = plan.error_of_all
    left = sorted(titles, key=plan.sensitivities.__getitem__)  # the least sensitive first
    while error is not None and plan.error > error and left:
        plan.kept.append(left.pop())
        plan.error = error_of(left) if left else 0.0
    gone = {names[linear] for title in plan.kept for linear in titles[title]}
    plan.factors = {name: f for name, f in factors.items() if name not in gone}
    return plan


def relative_error(found: Tensor, exact: Tensor) -> float:
    difference = (found.double() - exact.double()).square().mean().sqrt()
    return float(difference / exact.double().square().mean().sqrt().clamp_min(1e-300))


def in_training(model: nn.Module, factors: Mapping[str, Tensor | None]) -> None:
    """Replaces the layers of a plan by layers that multiply as in inference, with the same parameters."""
    modules = dict(model.named_modules())
    replace_linears(model, {modules[name]: TrainedInt8Linear(modules[name], f) for name, f in factors.items()})

"""What changes a model's weights, or how it multiplies by them, while it is fine-tuned: pruning, 8-bit integers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .features import Window


class Shaping:
    """The places of a fine-tuning at which it is asked; each does nothing but what a run does without it."""

    def binding(self) -> dict[str, Any]:
        """What must be the same where the run goes on, as JSON has it."""
        return {}

    def prepare(self, model: nn.Module, task: Any, windows: Sequence[Window]) -> None:
        """Once, before the optimiser takes the parameters; windows: those that are trained on."""

    def begin(self, model: nn.Module) -> None:
        """Before the first step, also of a run that goes on from a checkpoint."""

    def keeps_first(self) -> bool:
        """Whether the model as it is before the first step is evaluated too, and kept where no later one is better."""
        return False

    def after_step(self, model: nn.Module, step: int, steps: int) -> None:
        """After an optimiser step; step: of those of the whole run, from 1 up."""

    def is_whole(self, step: int, steps: int) -> bool:
        """Whether all of the change is made after this step, so that the model may be kept: an evaluation before that
        is recorded, and the best model is not looked for."""
        return True

    def served(self, model: nn.Module) -> nn.Module:
        """The model that is evaluated, as whoever reads the folder will run it."""
        return model

    def save(self, model: nn.Module, out: Path, state: dict[str, Tensor]) -> None:
        """Writes config and weights; state: the parameters, whole, on the CPU."""
        model.save_pretrained(out, state)

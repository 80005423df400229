"""The interface by which pruning and 8-bit training change a model's weights or products during fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .features import Window


class Shaping:
    """The methods that a run calls. Those of this class change nothing."""

    def binding(self) -> dict[str, Any]:
        """Values that must be the same when the run is resumed; JSON values."""
        return {}

    def prepare(self, model: nn.Module, task: Any, windows: Sequence[Window]) -> None:
        """Called once, before the optimiser is made. windows: the training data."""

    def begin(self, model: nn.Module) -> None:
        """Called before the first step, also when a run is resumed."""

    def keeps_first(self) -> bool:
        """Whether the model is also evaluated before the first step, and kept if no later one is better."""
        return False

    def after_step(self, model: nn.Module, step: int, steps: int) -> None:
        """Called after an optimiser step. step: its number in the whole run, from 1."""

    def is_whole(self, step: int, steps: int) -> bool:
        """Whether the change is complete after this step, so that the model may be kept. Evaluations before that are
        recorded, but do not count for the best model."""
        return True

    def served(self, model: nn.Module) -> nn.Module:
        """The model to evaluate: as it will run after it is loaded from the folder."""
        return model

    def save(self, model: nn.Module, out: Path, state: dict[str, Tensor]) -> None:
        """Writes config and weights. state: the complete parameters on the CPU."""
        model.save_pretrained(out, state)

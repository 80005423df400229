"""The running mean of a model's weights over its last steps (Polyak and Juditsky, 1992), which varies less than the
weights of a single step.

    mean += (weights - mean) / min(k, snapshots)        after every `interval` steps, for the k-th time

The mean is first that of all weights so far, and later discounts older ones exponentially.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

SNAPSHOTS = 16  # snapshots of the weights in the mean; fewer if it spans fewer steps


class WeightAverage:
    """The means of a model's trained parameters.

    Attributes:
        means: name of a parameter -> its mean; a checkpoint saves and loads them.

    Args:
        steps: number of steps of the whole run.
        share: share of these steps that the mean spans.
    """

    def __init__(self, model: nn.Module, steps: int, share: float) -> None:
        self.model = model
        self.interval = max(1, round(share * steps / SNAPSHOTS))
        self.snapshots = min(SNAPSHOTS, max(1, round(share * steps)))
        # DDP puts "module." before the names; without it a run can be resumed with another number of processes.
        self.weights = {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}
        self.means = {name: p.detach().clone() for name, p in self.weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Updates the means after a step. step: its number, from 1."""
        if step % self.interval == 0:
            share = 1.0 / min(step // self.interval, self.snapshots)
            for name, mean in self.means.items():
                mean.lerp_(self.weights[name].detach(), share)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """A block in which the model has the means as its weights."""
        own = {name: p.detach().clone() for name, p in self.weights.items()}
        self._fill(self.means)
        try:
            yield
        finally:
            self._fill(own)

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor]) -> None:
        # After a forward without a backward FSDP2 keeps the outermost module's parameters gathered. The next forward
        # would compute with that copy.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        for name, p in self.weights.items():
            p.copy_(values[name])

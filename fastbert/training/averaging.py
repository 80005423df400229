"""The running mean of a model's weights over its last steps (Polyak and Juditsky, 1992), which is steadier than any one
step's weights.

    mean += (weights - mean) / min(k, snapshots)        after every `interval` steps, for the k-th time

So the mean begins as that of all weights so far, and then forgets older ones exponentially.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

SNAPSHOTS = 16  # of the weights that the mean looks back on; fewer where these are fewer steps


class WeightAverage:
    """Of the parameters of a model that are trained.

    Attributes:
        means: by the names of their parameters; a checkpoint writes them, and fills them.

    Args:
        steps: of the whole run.
        share: of these steps that the mean looks back on.
    """

    def __init__(self, model: nn.Module, steps: int, share: float) -> None:
        self.model = model
        self.interval = max(1, round(share * steps / SNAPSHOTS))
        self.snapshots = min(SNAPSHOTS, max(1, round(share * steps)))
        # Under DDP the names begin with "module."; without this a run goes on with another number of processes.
        self.weights = {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}
        self.means = {name: p.detach().clone() for name, p in self.weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Called after each step, counted from 1."""
        if step % self.interval == 0:
            share = 1.0 / min(step // self.interval, self.snapshots)
            for name, mean in self.means.items():
                mean.lerp_(self.weights[name].detach(), share)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the means for weights, and afterwards its own again."""
        own = {name: p.detach().clone() for name, p in self.weights.items()}
        self._fill(self.means)
        try:
            yield
        finally:
            self._fill(own)

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor]) -> None:
        # After a forward without a backward FSDP2 keeps the outermost module's parameters gathered, and the next
        # forward would compute with that copy.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        for name, p in self.weights.items():
            p.copy_(values[name])

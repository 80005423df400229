"""One step of masked-word training, whoever computes it: the batch, its labels, the optimiser, and the gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .jobs import Job
from .peer import Run
from .workloads import padded


def batch_of(job: Job) -> dict[str, Tensor]:
    ids, mask = padded(job.rows, torch.device("cpu"))
    chosen = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.15) & mask.bool()
    chosen[0, 1] = True  # a loss over nothing is NaN
    made = {"input_ids": ids, "attention_mask": mask, "labels": torch.where(chosen, ids, -100)}
    return {name: t.to(job.device) for name, t in made.items()}


def stepping(model: nn.Module, loss: Callable[[], Tensor], dtype: torch.dtype) -> Run:
    """A call that takes one step and gives the model, whose gradients stay where they are."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=dtype != torch.float64)

    def run() -> nn.Module:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()
        return model

    return run


def labelled(job: Job) -> tuple[Tensor, Tensor]:
    """[N] rows of the packed batch that have a label, and the labels."""
    batch = batch_of(job)
    labels = batch["labels"][batch["attention_mask"].bool()]
    rows = (labels != -100).nonzero().squeeze(1)
    return rows, labels[rows]


def gradients(model: nn.Module) -> list[Tensor]:
    """The gradient of all parameters as one vector, in the order of their names, which all models share but for "bert."
    before those of the encoder."""
    named = {
        name.replace("/", ".").removeprefix("weights.").removeprefix("bert."): p for name, p in model.named_parameters()
    }
    return [torch.cat([named[name].grad.flatten() for name in sorted(named)])]

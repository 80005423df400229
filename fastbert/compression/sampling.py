"""What a change of a model is measured on: the model with its head, and some of the examples of a file."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..models import heads as models
from ..storage import CheckpointError
from ..text.tokenizer import Tokenizer
from ..training.pipeline import SPEC_FILE, spec_in
from ..training.tasks import make_task
from .folders import Model


def task_model(source: Model, impl: str | None) -> tuple[nn.Module, Any]:
    """(the model in float32 on the CPU, in evaluation mode; its task). Raises: CheckpointError where it has none."""
    spec = spec_in(source.path / SPEC_FILE)
    if spec is None:
        raise CheckpointError(f"{source.name} has no {SPEC_FILE}, so it has no task: fastbert finetune comes first")
    config = source.config
    labels = [] if spec.task == "qa" else [config.id2label[i] for i in sorted(config.id2label)]
    task = make_task(spec, Tokenizer.from_pretrained(source.path), labels)
    with warnings.catch_warnings():
        # A head that is missing is an error here, below.
        warnings.filterwarnings("ignore", message=".*weights were drawn from normal.*", category=UserWarning)
        model = getattr(models, task.head).from_pretrained(
            source.path, dtype=torch.float32, device="cpu", impl=impl, seed=0
        )
    if model.initialised:
        raise CheckpointError(f"{source.name} has no {', '.join(model.initialised)}")
    return model, task


def sample(items: Sequence[Any], count: int, seed: int) -> list[Any]:
    """At most so many of them, drawn by a seed, in their order."""
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(len(items), generator=generator, dtype=torch.int64, device="cpu")[:count]
    return [items[row] for row in sorted(order.tolist())]

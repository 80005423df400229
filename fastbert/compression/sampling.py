"""The model and the examples on which a change of the model is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..storage import CheckpointError
from ..text.tokenizer import Tokenizer
from ..training.pipeline import SPEC_FILE, load_head, spec_in
from ..training.tasks import make_task
from .folders import Model


def task_model(source: Model, impl: str | None) -> tuple[nn.Module, Any]:
    """(the model in float32 on the CPU, in evaluation mode; its task). Raises: CheckpointError if it has no task."""
    spec = spec_in(source.path / SPEC_FILE)
    if spec is None:
        raise CheckpointError(f"{source.name} has no {SPEC_FILE}, so it has no task: fastbert finetune comes first")
    config = source.config
    labels = [] if spec.task == "qa" else [config.id2label[i] for i in sorted(config.id2label)]
    task = make_task(spec, Tokenizer.from_pretrained(source.path), labels)
    model = load_head(task, source.path, torch.device("cpu"), impl)
    if model.initialised:
        raise CheckpointError(f"{source.name} has no {', '.join(model.initialised)}")
    return model, task


def sample(items: Sequence[Any], count: int, seed: int) -> list[Any]:
    """At most `count` of the items, drawn by a seed, in their order."""
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(len(items), generator=generator, dtype=torch.int64, device="cpu")[:count]
    return [items[row] for row in sorted(order.tolist())]

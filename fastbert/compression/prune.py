"""`fastbert prune`: writes a smaller model, and a record of what was removed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import BertConfig
from ..text.batching import batches_within
from ..training.files import DataError
from .folders import Model, expect_free, reading, write
from .heads import Heads, importance_of, least_heads, parse_heads, shown_heads
from .prune_magnitude import NO_SPEED, masks_of, matrices, sparsity
from .prune_shapes import most_important, without_columns, without_heads, without_layers
from .sampling import sample, task_model

EXAMPLES = 1024  # examples by which heads and columns are ranked
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Request:
    """The options of `fastbert prune`, under the same names.

    heads: names of the heads to remove, or the share of heads to remove by importance.
    """

    model: str
    out: Path
    heads: str | float | None = None
    ffn: float | None = None
    layers: tuple[int, ...] = ()
    magnitude: float | None = None
    scope: str = "global"
    data: str | None = None
    examples: int = EXAMPLES
    seed: int = 0
    impl: str | None = None


def prune(request: Request) -> dict[str, Any]:
    """Writes the folder. Returns the new record in its compression.json.

    Raises: DataError, ValueError or CheckpointError, in one line; nothing is written then.
    """
    expect_free(request.out)
    if isinstance(request.heads, str):
        parse_heads(request.heads)  # raises before anything is read
    with reading(request.model) as model:
        before = {"parameters": model.parameters, "bytes": model.nbytes}
        heads, columns = chosen(request, model)
        config, state = model.config, model.state
        if heads:
            config, state = without_heads(config, state, heads)
        if columns:
            config, state = without_columns(config, state, columns)
        if request.layers:
            config, state = without_layers(config, state, request.layers)
        record: dict[str, Any] = {
            "command": "prune", "model": request.model, "heads": shown_heads(heads), "layers": list(request.layers),
            "feed-forward columns": None if not columns else [model.config.intermediate_size, len(columns[0])],
        }  # fmt: skip
        if request.magnitude is not None:
            state = with_zeros(state, request.magnitude, request.scope)
            record |= {"share of zeros": sparsity(matrices(state.items())), "zeros chosen": request.scope}
        pruned = replace(model, config=config, state={name: t.contiguous() for name, t in state.items()})
        record |= {
            "before": before, "after": {"parameters": pruned.parameters, "bytes": pruned.nbytes},
            "heads of layers": [config.heads_of(layer) for layer in range(config.num_hidden_layers)],
            "notes": notes(request, config),
        }  # fmt: skip
        write(pruned, request.out, record)
    return record


def with_zeros(state: dict[str, Tensor], share: float, scope: str) -> dict[str, Tensor]:
    """The state with this share of zeros among the layers' weights."""
    masks = masks_of(matrices(state.items()), share, scope)
    return {name: t * masks[name] if name in masks else t for name, t in state.items()}


def notes(request: Request, config: BertConfig) -> list[str]:
    """Notes for those who load the folder."""
    said = []
    if config.pruned_heads:
        said.append(
            "transformers 5 has no pruned heads and cannot read this folder; fastbert can, and so can transformers 4"
        )
        if any(config.heads_of(layer) == 0 for layer in range(config.num_hidden_layers)):
            said[-1] = "transformers cannot read this folder, in which a layer has no heads; fastbert can"
    if request.magnitude is not None:
        said.append(NO_SPEED)
    return said


# ---- by importance ---------------------------------------------------------------------------------------


def chosen(request: Request, model: Model) -> tuple[Heads, list[Tensor]]:
    """(the heads to remove, the feed-forward columns of each layer to keep, [] for all)."""
    named = parse_heads(request.heads) if isinstance(request.heads, str) else {}
    if not isinstance(request.heads, float) and request.ffn is None:
        return named, []
    if request.data is None:
        raise DataError("a share of the heads or columns is chosen by importance, which needs --data with examples")
    of_heads, of_columns = importances(request, model)
    heads = least_heads(of_heads, request.heads, model.config) if isinstance(request.heads, float) else named
    return heads, [] if request.ffn is None else most_important(of_columns, request.ffn)


def importances(request: Request, model: Model) -> tuple[list[Tensor], list[Tensor]]:
    """`importance_of` for examples of the file."""
    network, task = task_model(model, request.impl)
    examples = task.read(request.data)
    task.check(examples)
    windows = sample(task.features(examples, training=True).windows, request.examples, request.seed)
    if not windows:
        raise DataError(f"{request.data}: no example can be learnt from")
    lengths = [len(w.input_ids) for w in windows]
    order = sorted(range(len(windows)), key=lengths.__getitem__)
    batches = list(batches_within(order, lengths, BATCH_TOKENS))
    return importance_of(network, task, windows, batches, torch.device("cpu"))

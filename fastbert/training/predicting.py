"""Runs windows through a model in packed batches of similar lengths; outputs are in the order of the windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..inference.eight_bits import holds_integers
from ..packing import PackedBatch
from ..text.batching import batches_within
from .features import Window
from .metrics import Scores
from .processes import Processes


def pack(windows: Sequence[Window], names: Sequence[int], device: torch.device) -> PackedBatch:
    """A packed batch of windows. names: the number of each window, for dropout."""
    types = None if windows[0].token_type_ids is None else [w.token_type_ids for w in windows]
    return PackedBatch.from_lists([w.input_ids for w in windows], types, sequence_ids=names, device=device)


def outputs_of(
    model: nn.Module, task: Any, windows: Sequence[Window], batch_tokens: int, dtype: torch.dtype, processes: Processes
) -> list[np.ndarray]:
    """`task.by_window` of each window, the same in all processes. The model is left in evaluation mode.

    dtype: of products; a model with weights in 8 bits keeps its own.
    """
    dtype = torch.float32 if holds_integers(model) else dtype
    model.eval()
    lengths = [len(w.input_ids) for w in windows]
    order = sorted(range(len(windows)), key=lengths.__getitem__)
    batches = list(batches_within(order, lengths, batch_tokens))
    mine = batches[processes.rank :: processes.count]
    # Sharded models need all processes in each batch, so a process with fewer batches repeats one.
    rounds = -(-len(batches) // processes.count)
    found: dict[int, np.ndarray] = {}
    with torch.no_grad(), autocast(processes.device, dtype):
        for place in range(rounds):
            rows = mine[place] if place < len(mine) else batches[0]
            chosen = [windows[row] for row in rows]
            output = model(pack(chosen, rows, processes.device))
            found.update(zip(rows, task.by_window(output, chosen), strict=True))
    everything = {row: value for part in processes.gather(found) for row, value in part.items()}
    return [everything[row] for row in range(len(windows))]


def scores_of(
    model: nn.Module, task: Any, examples: Sequence[Any], windows: Sequence[Window], batch_tokens: int,
    dtype: torch.dtype, processes: Processes,
) -> Scores:  # fmt: skip
    """The task's scores of a model on examples, by their windows; see `outputs_of`."""
    found = outputs_of(model, task, windows, batch_tokens, dtype, processes)
    return task.scores(examples, task.predictions(examples, windows, found))


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast of products to `dtype`; parameters keep their dtype."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)

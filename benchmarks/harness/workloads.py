"""Which batches the suites measure: names of `fastbert.testing.WORKLOADS`, cut to what the machine can do in the time.

A cut batch keeps the first sequences, whose order is random, so it keeps the shape of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert.testing import WORKLOADS, Workload

# Tokens a case may have at most: (quick, full). A GPU takes each workload whole.
LIMITS = {
    ("cpu", "kernels"): (1024, 4096),
    ("cpu", "loss"): (160, 1024),
    ("cpu", "minilm"): (1500, 4096),
    ("cpu", "base"): (500, 1000),
    ("cpu", "large"): (400, 400),
}


def model_name(workload: str) -> str:
    return workload.split("_", 1)[0]


def fit(name: str, device: torch.device, kind: str, quick: bool) -> Workload:
    """The workload, or the first sequences of it that have at most the limit's tokens (one at least)."""
    if name not in WORKLOADS:
        raise ValueError(f"no workload {name!r}; there are {', '.join(WORKLOADS)}")
    whole = WORKLOADS[name]
    limits = LIMITS.get((device.type, kind))
    return whole if limits is None else cut(whole, limits[0] if quick else limits[1])


def cut(workload: Workload, tokens: int) -> Workload:
    lengths, total = [], 0
    for length in workload.lengths:
        if lengths and total + length > tokens:
            break
        lengths.append(min(length, tokens))
        total += lengths[-1]
    return Workload(workload.model, tuple(lengths))


def shape_of(workload: Workload) -> dict[str, int]:
    """The numbers that a row of results carries."""
    model, lengths = workload.model, workload.lengths
    return {
        "tokens": sum(lengths), "sequences": len(lengths), "longest": max(lengths), "hidden": model.hidden,
        "heads": model.heads, "intermediate": model.intermediate, "layers": model.layers, "vocab": model.vocab,
    }  # fmt: skip


def token_ids(lengths: Sequence[int], vocab: int, seed: int = 0) -> list[list[int]]:
    """Random ids of these lengths, none of them padding (0)."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randint(1, vocab, (sum(lengths),), generator=generator)
    return [row.tolist() for row in flat.split(list(lengths))]


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask [B, S], padded to the longest."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    return ids.to(device), mask.long().to(device)

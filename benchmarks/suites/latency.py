"""The latency of a single short query, such as that of a search box."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastbert.testing import MODELS, Workload

from ..harness.case import Case
from .encoder import build

CASES = (
    ("base", 16, 4, True), ("minilm", 16, 5, True), ("base", 8, 45, False), ("base", 64, 46, False),
    ("minilm", 8, 47, False),
)  # fmt: skip


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for model, length, priority, in_quick in CASES:
        if in_quick or not quick:
            workload = Workload(MODELS[model], (length,))
            yield build("latency", f"{model}_1x{length}", workload, priority, in_quick, device=device, dtype=dtype)

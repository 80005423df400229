"""Whole models: lists of token ids to vectors, real lengths, beside everybody and the matrix products alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from fastbert.testing import GRID, REAL_TEXTS, WORKLOADS, Workload

from ..harness import costs, workloads
from ..harness.case import Case
from ..harness.jobs import Job
from ..peers import encoder as peers_encoder

# workload, priority (smaller first), in --quick. First what people run; then each kind of real text; then the grid of
# full batches, where there is no padding to leave out.
CASES = (
    ("base_natural", 1, True),
    ("minilm_natural", 2, True),
    ("large_natural", 3, False),
    *((f"{model}_{kind}", 40 + n, False) for n, (kind, model) in enumerate((
        ("queries", "minilm"), ("sentences", "base"), ("paragraphs", "base"), ("documents", "minilm"),
        ("sentences", "minilm"), ("paragraphs", "minilm"), ("queries", "base"), ("documents", "base"),
    ))),
    *((f"base_{b}x{s}", 50 + n, False) for n, (b, s) in enumerate(GRID)),
    *((f"{model}_{rest}", priority, False) for model, priority in (("large", 60), ("minilm", 80))
      for rest in (*(REAL_TEXTS if model == "large" else ()), *(f"{b}x{s}" for b, s in GRID))),
)  # fmt: skip
# What a GPU also measures: 4k and 64k tokens in a batch.
ON_GPUS = tuple((f"{model}_natural{n}", 4, False) for n in (64, 1024) for model in ("base", "large"))
# What a CPU measures later: the large model takes a quarter of its time.
LATER = {"large_natural": 39}
FLOAT32 = {"base_natural": 8, "minilm_natural": 9, "large_natural": 100}


def build(
    suite: str, name: str, workload: Workload, priority: int, quick: bool, *, device: torch.device, dtype: torch.dtype
) -> Case:
    """A case of one batch of ids. Truth is plain torch in float64 for float32 rows, in float32 for lower ones."""
    job = Job(workload, dtype, device)
    exact = torch.float64 if dtype == torch.float32 else torch.float32
    return Case(
        suite, name, peers_encoder.rows(job, suite == "latency" or name.endswith("_natural")),
        functools.partial(job.truth, exact), functools.partial(job.truth, dtype),
        workloads.model_name(name), None, "forward", dtype, workloads.shape_of(workload), workload.tokens,
        costs.encoder_flops(workload), None, priority, quick, floor=peers_encoder.FLOOR,
        close=job.close,
    )  # fmt: skip


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    """A CPU leaves out sequences longer than it has tokens for, and also measures real lengths in float32."""
    for name, priority, in_quick in (*CASES, *(ON_GPUS if device.type == "cuda" else ())):
        if quick and not in_quick:
            continue
        workload = workloads.fit(name, device, workloads.model_name(name), quick)
        if workload.lengths[0] < WORKLOADS[name].lengths[0]:
            continue
        if device.type == "cpu":
            priority = LATER.get(name, priority)
        yield build("encoder", name, workload, priority, in_quick, device=device, dtype=dtype)
        if device.type == "cpu" and dtype != torch.float32 and not quick and name in FLOAT32:
            yield build("encoder", name, workload, FLOAT32[name], False, device=device, dtype=torch.float32)

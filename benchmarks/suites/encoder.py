"""Whole models, from token ids of real lengths to vectors: fastbert, other libraries, and the matrix products alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from fastbert.testing import GRID, REAL_TEXTS, WORKLOADS, Workload

from .. import peers
from ..harness import costs, workloads
from ..harness.case import Case, Row
from ..harness.jobs import Job
from ..harness.peer import PRODUCTS

# workload, priority (smaller first), in --quick. First the most common use, then each kind of real text, then a grid of
# full batches, which have no padding.
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
# Cases on GPUs only: 4k and 64k tokens in a batch.
ON_GPUS = tuple((f"{model}_natural{n}", 4, False) for n in (64, 1024) for model in ("base", "large"))
# Priorities on a CPU: the large model, which takes a quarter of the time, comes later.
LATER = {"large_natural": 39}
FLOAT32 = {"base_natural": 8, "minilm_natural": 9, "large_natural": 100}


def _fitting(job: Job) -> list[int]:
    """Sizes of batches with about 128 and 256 tokens, which are the fastest for other libraries on a CPU."""
    mean_length = job.workload.tokens / len(job.rows)
    return sorted({max(1, 2 ** round(math.log2(tokens / mean_length))) for tokens in (128, 256)})


def rows(job: Job, every: bool) -> list[Row]:
    """The rows of a case of this workload. every: include the slow ones.

    For one query, rows that only differ in their batches are left out. If not every size is measured, those that fit
    the lengths are.
    """
    single = len(job.rows) == 1
    entered = [
        p for p in peers.rows("ENCODERS")
        if job.device.type in p.devices and (p.dtypes is None or job.dtype_name in p.dtypes)
    ]  # fmt: skip
    found = {row.row: row for p in entered for row in p.rows()}
    if not (single or every):
        found |= {row.row: row for p in entered if p.fits for row in replace(p, slow=False).of_sizes(_fitting(job))}
    return [
        Row(
            p.row.split(", sorted")[0] if single else p.row, p.peer, functools.partial(p.make, job),
            package=p.package, checked=p.checked, slow=p.slow, tolerance=p.tolerance,
            settings={} if p.tolerance is None else {"tolerance": p.tolerance},
        )
        for p in found.values()
        if (p.single if single else p.many) and (every or not p.slow)
    ]  # fmt: skip


def build(
    suite: str, name: str, workload: Workload, priority: int, quick: bool, *, device: torch.device, dtype: torch.dtype
) -> Case:
    """A case of one batch of ids. The true values are plain torch's, in float64 for float32 rows, else in float32."""
    job = Job(workload, dtype, device)
    exact = torch.float64 if dtype == torch.float32 else torch.float32
    return Case(
        suite, name, rows(job, suite == "latency" or name.endswith("_natural")),
        functools.partial(job.truth, exact), functools.partial(job.truth, dtype),
        workloads.model_name(name), None, "forward", dtype, workloads.shape_of(workload), workload.tokens,
        costs.encoder_flops(workload), None, priority, quick, floor=PRODUCTS,
        close=job.close,
    )  # fmt: skip


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    """The cases of this device. On a CPU sequences longer than its limit of tokens are left out, and real lengths are
    also measured in float32."""
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

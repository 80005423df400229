"""Whole models: lists of token ids to vectors, real lengths, beside everybody and the matrix products alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from fastbert.testing import Workload

from . import costs, peers_encoder, workloads
from .case import Case
from .peers_encoder import Job

# workload, priority, in --quick
CASES = (
    ("base_natural", 1, True),
    ("minilm_natural", 2, True),
    ("large_natural", 3, False),
    ("base_sentences", 40, False),
    ("base_paragraphs", 41, False),
    ("minilm_queries", 42, False),
    ("base_32x512", 43, False),
    ("base_256x128", 44, False),
)


def build(
    suite: str, name: str, workload: Workload, priority: int, quick: bool, *, device: torch.device, dtype: torch.dtype
) -> Case:
    """A case of one batch of ids. Truth is plain torch in float64 for float32 rows, in float32 for lower ones."""
    job = Job(workload, dtype, device)
    exact = torch.float64 if dtype == torch.float32 else torch.float32
    return Case(
        suite, name, peers_encoder.rows(job, single=len(workload.lengths) == 1),
        functools.partial(job.truth, exact), functools.partial(job.truth, dtype),
        workloads.model_name(name), None, "forward", dtype, workloads.shape_of(workload), workload.tokens,
        costs.encoder_flops(workload), None, priority, quick, floor=peers_encoder.FLOOR,
    )  # fmt: skip


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    dtypes = dict.fromkeys((dtype, torch.float32)) if device.type == "cpu" and not quick else (dtype,)
    for name, priority, in_quick in CASES:
        if in_quick or not quick:
            workload = workloads.fit(name, device, workloads.model_name(name), quick)
            for working in dtypes:
                later = priority + 20 * (working != dtype)
                yield build("encoder", name, workload, later, in_quick, device=device, dtype=working)

"""One step of masked-word training on one batch: forward, loss at 15% of the tokens, backward, AdamW.

The learning rate is zero, so that every step does the same work on the same weights, and there is no dropout, so that
gradients can be compared. (The loss is not compared: torch sums it in bfloat16, whose rounding is arbitrary.)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import peers
from ..harness import costs, workloads
from ..harness.case import Case, Row
from ..harness.jobs import Job
from ..harness.peer import PRODUCTS
from ..harness.steps import gradients
from ..peers.torch import step as plain_step

# workload, priority, in --quick
CASES = (
    ("base_natural", 6, False),
    ("minilm_natural", 7, True),
    ("large_natural", 8, False),
    ("base_32x512", 46, False),
)
LATER = {"large_natural": 70}  # on a CPU
# Padding makes eight times as many, and the true values need activations of all in float32, about 50 GB.
GPU_TOKENS = {"base": 4096, "minilm": 8192, "large": 2048}


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for name, priority, in_quick in CASES:
        if quick and not in_quick:
            continue
        model = workloads.model_name(name)
        workload = workloads.fit(name, device, model, quick)
        if device.type == "cpu":  # a step takes as long as three passes and the masked words' logits
            priority = LATER.get(name, priority)
            workload = workloads.cut(workload, max(300, workload.tokens // 4))
        elif name.endswith("_natural"):
            workload = workloads.cut(workload, GPU_TOKENS[model])
        job = Job(workload, dtype, device)
        exact = torch.float64 if dtype == torch.float32 else torch.float32

        def reference(working: torch.dtype, job: Job = job) -> list[Tensor]:
            return gradients(plain_step(job, dtype=working)())

        rows = [
            Row(p.row, p.peer, functools.partial(p.make, job), package=p.package, slow=p.slow, checked=p.checked,
                outputs=gradients if p.checked else None)
            for p in peers.rows("TRAINING")
            if device.type in p.devices
        ]  # fmt: skip
        yield Case(
            "training", name, rows, functools.partial(reference, exact), functools.partial(reference, dtype),
            workloads.model_name(name), None, "step", dtype, workloads.shape_of(workload), workload.tokens,
            3 * costs.encoder_flops(workload), None, priority, in_quick, floor=PRODUCTS,
        )  # fmt: skip

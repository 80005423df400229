"""The time from the start of a process to its first result: imports, weights, compiling, one query.

Every library loads its usual files, which are written beforehand: safetensors, a fused ONNX graph, OpenVINO's IR. The
disk cache is warm, because each row runs once before, to be checked. A compiler's cache is empty if the row's name says
so; otherwise it has the entries of that first run.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator
from typing import Any

import torch

from fastbert.testing import MODELS, Workload

from .. import peers
from ..harness import timing, workloads
from ..harness.case import Case
from ..harness.children import ChildCase, Files, Said, encoders
from ..harness.jobs import Job

# model, length, priority, in --quick
CASES = (("minilm", 16, 100, True), ("base", 16, 109, False))


def finish(result: dict[str, Any], said: list[Said]) -> None:
    """Writes the time of the first result into the row, and its parts into `settings`."""
    seconds = [events["first"]["at"] for events in said]
    result |= {"seconds": seconds, "median_s": statistics.median(seconds), "spread": timing.spread(seconds)}
    result["first_call_s"] = result["median_s"]
    imported, loaded = (statistics.median(events[name]["at"] for events in said) for name in ("imported", "loaded"))
    result["settings"] = {
        **result["settings"],
        "import_s": imported, "load_s": loaded - imported, "first_s": result["median_s"] - loaded,
    }  # fmt: skip


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for model, length, priority, in_quick in CASES:
        if quick and not in_quick:
            continue
        workload = Workload(MODELS[model], (length,))
        job = Job(workload, dtype, device)
        exact = torch.float64 if dtype == torch.float32 else torch.float32
        files = Files(job)
        yield ChildCase(
            "cold", f"{model}_1x{length}", list(encoders(files, "cold", peers.rows("PROCESSES"), batch=1)),
            functools.partial(job.truth, exact), functools.partial(job.truth, dtype), model, None, "first result",
            dtype, workloads.shape_of(workload), workload.tokens, priority=priority, quick=in_quick,
            files=files, finish=finish, runs=(1, 3), warm=True,
        )  # fmt: skip

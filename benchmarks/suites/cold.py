"""From the start of a cold process to its first result: imports, weights, whatever has to be compiled, one query.

Every library loads the files that it is served from, written beforehand: safetensors, a fused ONNX graph, OpenVINO's
IR. The disk is warm: each row ran once before, to be checked. A compiler's cache is empty where the row says so, and
elsewhere holds what that run left there.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator
from typing import Any

import torch

from fastbert.testing import MODELS, Workload

from ..harness import timing, workloads
from ..harness.case import Case
from ..harness.children import ChildCase, Engine, Files, Said, encoders
from ..harness.jobs import Job
from ..peers.encoder import INT8

# model, length, priority, in --quick
CASES = (("minilm", 16, 100, True), ("base", 16, 109, False))

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


def _torch(files: Files, *, empty: bool = False, **more: Any) -> dict[str, Any]:
    folder = files.new_folder() if empty else files.shared_folder("cache")
    return {"folder": files.weights, "environment": dict.fromkeys(CACHES, folder), **more}


_EMPTY = functools.partial(_torch, empty=True)

ENGINES = (
    Engine("fastbert", "fastbert", "fastbert", _torch),
    Engine("fastbert, empty cache", "fastbert", "fastbert", _EMPTY, ("cuda",)),
    Engine("transformers sdpa", "transformers", "transformers", _torch),
    Engine("torch.compile, transformers sdpa, empty cache", "torch.compile", "transformers",
           functools.partial(_EMPTY, compile=True), package="torch", slow=True),
    Engine("torch.compile, transformers sdpa", "torch.compile", "transformers",
           functools.partial(_torch, compile=True), package="torch", slow=True),
    Engine("onnxruntime fp32", "onnxruntime", "onnxruntime", lambda files: {"file": files.onnx}, ("cpu",),
           (torch.float32,)),
    Engine(f"onnxruntime int8 (tolerance {INT8:.0%})", "onnxruntime", "onnxruntime",
           lambda files: {"file": files.onnx_int8}, ("cpu",), slow=True, tolerance=INT8),
    Engine("openvino, empty cache", "openvino", "openvino", lambda files: {"file": files.openvino}, ("cpu",)),
    Engine("openvino", "openvino", "openvino",
           lambda files: {"file": files.openvino, "cache": files.shared_folder("openvino")}, ("cpu",)),
)  # fmt: skip


def finish(result: dict[str, Any], said: list[Said]) -> None:
    """Times are those of the first result; `settings` says how they divide."""
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
            "cold", f"{model}_1x{length}", list(encoders(files, ENGINES, batch=1, memory=False)),
            functools.partial(job.truth, exact), functools.partial(job.truth, dtype), model, None, "first result",
            dtype, workloads.shape_of(workload), workload.tokens, priority=priority, quick=in_quick,
            files=files, finish=finish, runs=(1, 3), warm=True,
        )  # fmt: skip

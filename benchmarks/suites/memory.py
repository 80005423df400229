"""Peak memory of encoding, a training step, and the masked-word loss: in total, and above the loaded model.

Each figure is measured in a fresh process: on a CPU its resident memory (Linux), on a GPU the memory that torch
allocated and reserved, so only rows that allocate with torch are measured there. "Above the loaded model" counts from
the time when weights and libraries are in memory: after one short text, or in training after the weights were read.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastbert import functional as F
from fastbert.testing import MODELS, ModelShape, Workload

from .. import peers
from ..harness import workloads
from ..harness.case import Case, Row
from ..harness.child import first_layer_gradient, loss_inputs
from ..harness.children import ChildCase, Files, Launch, Said, common, encoders
from ..harness.jobs import Job
from ..harness.peer import OURS, need
from ..harness.steps import batch_of
from ..peers import fastbert
from ..peers import torch as plain_torch
from ..peers.transformers import masked_folder, masked_lm

# workload, priority, in --quick
ENCODE = (("minilm_natural", 101, True), ("base_natural", 102, False), ("minilm_documents", 107, False))
TRAIN = (("minilm_natural", 103, True), ("base_natural", 108, False))
# model, tokens with a label (quick, full), priority
LOSS = (("base", (2048, 4096), 104),)

# Most tokens of a training batch on a CPU: (quick, full). There is only one step, so more than in the training suite.
TRAIN_TOKENS = {"minilm": (700, 4000), "base": (500, 1500)}


def finish(result: dict[str, Any], said: list[Said]) -> None:
    """Writes the peak above the loaded model as `peak_memory_bytes`; the memory before and in total as `settings`."""
    done = [events["done"] for events in said]
    for name, key in (("peak", "peak_memory_bytes"), ("loaded", "loaded_bytes"), ("whole", "process_bytes")):
        value = int(statistics.median(events[name] for events in done))
        if name == "peak":
            result[key] = value
        else:
            result["settings"] = {**result["settings"], key: value}


# ---- encoding --------------------------------------------------------------------------------------------


def _case(name: str, job: Job, files: Files, rows: list[Row], truth, priority: int, quick: bool, **more) -> ChildCase:
    exact = torch.float64 if job.dtype == torch.float32 else torch.float32
    return ChildCase(
        "memory", name, rows, functools.partial(truth, exact), functools.partial(truth, job.dtype),
        dtype=job.dtype, shape=workloads.shape_of(job.workload), tokens=job.workload.tokens, priority=priority,
        quick=quick, files=files, finish=finish, runs=(1, 3), **more,
    )  # fmt: skip


def _encode(name: str, job: Job, priority: int, quick: bool) -> Case:
    files, batch = Files(job), 2 if job.device.type == "cpu" else 32  # fast sizes for the others, see the peers' files
    rows = list(encoders(files, "memory", peers.rows("PROCESSES"), batch))
    return _case(name, job, files, rows, job.truth, priority, quick, model=workloads.model_name(name))


# ---- a training step -------------------------------------------------------------------------------------


def _train(name: str, job: Job, priority: int, quick: bool) -> Case:
    """A case with the batch and the weights of the training suite."""
    files = Files(job)

    def truth(dtype: torch.dtype) -> list[Tensor]:
        model = masked_lm(job, dtype)
        model(**batch_of(job)).loss.backward()
        return [torch.from_numpy(first_layer_gradient(model))]

    def make(engine: str) -> Launch:
        need("transformers")
        tensors = {key: value.tolist() for key, value in batch_of(job).items()}
        return Launch(
            files, lambda: [{**common(job, "train", engine), "folder": masked_folder(files), "tensors": tensors}]
        )

    rows = [
        Row("fastbert.accelerate", OURS, functools.partial(make, "fastbert")),
        Row("transformers sdpa", "transformers", functools.partial(make, "transformers")),
        Row("transformers sdpa, gradient checkpointing", "transformers", functools.partial(make, "checkpointing"),
            slow=True),
        Row("torch.compile, transformers sdpa", "torch.compile", functools.partial(make, "torch.compile"),
            package="torch", slow=True),
    ]  # fmt: skip
    model = workloads.model_name(name)
    return _case(name, job, files, rows, truth, priority, quick, model=model, direction="step")


# ---- the loss --------------------------------------------------------------------------------------------


def _loss(shape: ModelShape, name: str, tokens: int, priority: int, job: Job) -> Case:
    """A case of forward and backward for every token; the gradients of hidden states, table and bias are compared."""
    files = Files(job)

    def truth(dtype: torch.dtype) -> list[Tensor]:
        inputs, labels = loss_inputs(tokens, shape.hidden, shape.vocab)
        values = [t.to(job.dtype).to(job.device, dtype).requires_grad_() for t in inputs]
        value = F.linear_cross_entropy(*values, labels.to(job.device), impl="reference")
        grads = torch.autograd.grad(value, values)
        return [torch.cat([g.float().flatten() for g in grads])]

    def make(engine: str) -> Launch:
        sizes = {"tokens": tokens, "hidden": shape.hidden, "vocab": shape.vocab}
        return Launch(files, lambda: [{**common(job, "loss", engine), **sizes}])

    rows = [
        Row("fastbert", OURS, functools.partial(make, fastbert.__name__)),
        Row("torch", "torch", functools.partial(make, plain_torch.__name__)),
    ]
    case = _case(
        f"{name}_1x{tokens}", job, files, rows, truth, priority, True, operator="linear_cross_entropy",
        direction="forward+backward", model=name,
    )  # fmt: skip
    return case


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for name, priority, in_quick in ENCODE:
        if in_quick or not quick:
            workload = workloads.fit(name, device, workloads.model_name(name), quick)
            yield _encode(name, Job(workload, dtype, device), priority, in_quick)
    for name, priority, in_quick in TRAIN:
        if in_quick or not quick:
            model = workloads.model_name(name)
            workload = workloads.fit(name, device, model, quick)
            if device.type == "cpu":
                workload = workloads.cut(workload, TRAIN_TOKENS[model][not quick])
            yield _train(name, Job(workload, dtype, device), priority, in_quick)
    for name, tokens, priority in LOSS:
        count = tokens[not quick] if device.type == "cpu" else 16384
        job = Job(Workload(MODELS[name], (count,)), dtype, device)
        yield _loss(MODELS[name], name, count, priority, job)

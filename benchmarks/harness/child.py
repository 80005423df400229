"""A fresh process that does one job and reports its progress with times: `python -m benchmarks.harness.child < JOB`.

The job is a line of JSON (see `main`). On standard output come lines of JSON: "imported", "loaded", "first" when the
first result is there, "done" with figures of memory. The engine is a module
of benchmarks/peers, which imports only what it needs, so that no library's start includes imports of another.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from .child_tools import Memory, say

Job = dict[str, Any]


def _engine(job: Job) -> Any:
    return import_module(job["engine"])


def encode(job: Job) -> np.ndarray:
    """First result, or (with "memory") one short text and then all of them under the meter."""
    run = _engine(job).in_process(job)
    say("loaded")
    if not job["memory"]:
        vectors = run(job["ids"])
        say("first")
        return vectors
    run([job["ids"][0][:16]])  # loads libraries and weights that are read at first use
    return _metered(job, functools.partial(run, job["ids"]))


def _metered(job: Job, run: Callable[[], Any]) -> Any:
    memory = Memory(job["device"])
    memory.reset()
    before = memory.now()
    result = run()
    say("done", loaded=before, peak=memory.peak() - before, whole=memory.whole())
    return result


# ---- training --------------------------------------------------------------------------------------------


def train(job: Job) -> np.ndarray:
    """One step of AdamW on a masked-word batch. Returns the gradient of the first layer, which depends on all
    others."""
    import torch
    from transformers import BertForMaskedLM

    torch.manual_seed(0)
    model = BertForMaskedLM.from_pretrained(job["folder"], dtype=getattr(torch, job["dtype"]))
    model = model.to(job["device"]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    batch = {name: torch.tensor(rows, device=job["device"]) for name, rows in job["tensors"].items()}
    changed = model
    if job["engine"] == "fastbert":
        from fastbert import accelerate

        accelerate(model)
    elif job["engine"] == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    elif job["engine"] == "torch.compile":
        changed = torch.compile(model)
    for parameter in model.parameters():
        parameter.data.sum()  # reads weights that are mapped from a file, so that they count as loaded from now on

    def step() -> None:
        changed(**batch).loss.backward()
        optimizer.step()

    _metered(job, step)
    return first_layer_gradient(model)


def first_layer_gradient(model: Any) -> np.ndarray:
    import torch

    parameters = model.bert.encoder.layer[0].parameters()
    return torch.cat([p.grad.flatten().float() for p in parameters]).cpu().numpy()


def loss(job: Job) -> np.ndarray:
    """The masked-word loss of hidden states, and the gradients of hidden states, table and bias."""
    import torch

    inputs, labels = loss_inputs(job["tokens"], job["hidden"], job["vocab"])
    values = [t.to(job["device"], getattr(torch, job["dtype"])).requires_grad_() for t in inputs]
    labels = labels.to(job["device"])
    call = _engine(job).OPERATORS["linear_cross_entropy"][0].make(labels.device)

    def run() -> list:
        return torch.autograd.grad(call(*values, labels), values)

    # First with eight words, so that imports and set-up at first use do not count as memory of the loss.
    few = [values[0], *(t[:8].detach().requires_grad_() for t in values[1:])]
    torch.autograd.grad(call(*few, labels % 8), few)
    return torch.cat([g.float().flatten() for g in _metered(job, run)]).cpu().numpy()


def loss_inputs(tokens: int, hidden: int, vocab: int) -> tuple[list, Any]:
    """([hidden states, table, bias], labels): every token has a label."""
    import torch

    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(tokens, hidden, generator=generator)
    table, bias = (0.02 * torch.randn(*shape, generator=generator) for shape in ((vocab, hidden), (vocab,)))
    return [hidden_states, table, bias], torch.randint(vocab, (tokens,), generator=generator)


WORK = {"encode": encode, "train": train, "loss": loss}


def main() -> None:
    """The job: work, engine, device, dtype, threads, memory (whether to meter), out (an .npy for the result), and what
    the work asks for: ids, folder or file, batch; or tensors; or tokens, hidden, vocab."""
    job = json.loads(sys.stdin.readline())
    result = WORK[job["work"]](job)
    np.save(job["out"], result)


if __name__ == "__main__":
    main()

"""A fresh process that does one job and says when it got where: `python -m benchmarks.harness.child < JOB`.

The job is a line of JSON (see `main`). On standard output come lines of JSON: "imported", "loaded", "first" when the
first result is there, "done" with figures of memory. Each engine imports what it needs and nothing else, so that nobody
pays for another's import; the plain array code that pads and pools here is the same for all.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Job = dict[str, Any]
Encode = Callable[[list[list[int]]], np.ndarray]  # lists of ids -> a mean-pooled vector each, [B, C] float32


def say(event: str, **more: Any) -> None:
    print(json.dumps({"event": event, **more}), flush=True)


# ---- memory ----------------------------------------------------------------------------------------------


class Memory:
    """What the process, or its GPU, holds (`now`), and the most it held since `reset`. Bytes."""

    def __init__(self, device: str):
        self.device = device

    def now(self) -> int:
        if self.device == "cuda":
            return _cuda().memory_allocated()
        return _status("VmRSS")

    def reset(self) -> None:
        """Forgets the peak so far; gives what was freed back first, or a call could use it unseen."""
        if self.device == "cuda":
            _cuda().synchronize()
            _cuda().empty_cache()
            _cuda().reset_peak_memory_stats()
            return
        with contextlib.suppress(OSError, AttributeError):  # not glibc: nothing to give back
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        if self.device == "cuda":
            _cuda().synchronize()
            return _cuda().max_memory_allocated()
        return _status("VmHWM")

    def whole(self) -> int:
        """The most that was reserved: on a GPU what its allocator took from it, on a CPU the peak itself."""
        return _cuda().max_memory_reserved() if self.device == "cuda" else self.peak()


def _cuda() -> Any:
    import torch

    return torch.cuda


def _status(name: str) -> int:
    """VmRSS or VmHWM of this process; Linux only, and the error says so."""
    return 1024 * int(re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


# ---- lists of ids to vectors -----------------------------------------------------------------------------


def padded_groups(ids: list[list[int]], size: int) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Longest first, `size` at a time: which rows, and their input_ids and attention_mask [B, S], int64."""
    order = sorted(range(len(ids)), key=lambda n: len(ids[n]), reverse=True)
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        mask = np.arange(len(ids[rows[0]])) < np.array([[len(ids[n])] for n in rows])
        padded = np.zeros(mask.shape, dtype=np.int64)
        padded[mask] = [token for n in rows for token in ids[n]]
        yield rows, padded, mask.astype(np.int64)


def mean(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return (hidden * mask[..., None].astype(np.float32)).sum(1) / mask.sum(1, keepdims=True)


def _padded(call: Callable[[np.ndarray, np.ndarray], np.ndarray], size: int) -> Encode:
    def encode(ids: list[list[int]]) -> np.ndarray:
        vectors: dict[int, np.ndarray] = {}
        for rows, padded, mask in padded_groups(ids, size):
            vectors.update(zip(rows, mean(call(padded, mask), mask), strict=True))
        return np.stack([vectors[n] for n in range(len(ids))])

    return encode


def fastbert(job: Job) -> Encode:
    """`fastbert.Encoder` without the tokeniser."""
    import torch

    from fastbert import Encoder
    from fastbert.models.bert import BertModel

    say("imported")
    dtype = getattr(torch, job["dtype"])
    model = BertModel.from_pretrained(job["folder"], dtype=dtype, device=job["device"], add_pooling_layer=False)
    encoder = Encoder(model, types.SimpleNamespace(model_max_length=None))
    return lambda ids: encoder.encode_ids(ids, encoder.token_budget()).numpy()


def transformers(job: Job) -> Encode:
    import torch
    from transformers import BertModel

    say("imported")
    model = BertModel.from_pretrained(
        job["folder"], dtype=getattr(torch, job["dtype"]), attn_implementation="sdpa", add_pooling_layer=False
    )
    model = model.to(job["device"]).eval()
    run = torch.compile(model, dynamic=True) if job.get("compile") else model

    @torch.inference_mode()
    def encode(ids: list[list[int]]) -> np.ndarray:
        # pooled where the model is: only vectors leave the device
        vectors = torch.empty(len(ids), model.config.hidden_size)
        for rows, padded, mask in padded_groups(ids, job["batch"]):
            padded, mask = (torch.from_numpy(t).to(job["device"]) for t in (padded, mask))
            real = mask[..., None].float()
            hidden = run(input_ids=padded, attention_mask=mask).last_hidden_state.float()
            vectors[rows] = ((hidden * real).sum(1) / real.sum(1)).cpu()
        return vectors.numpy()

    return encode


def onnxruntime(job: Job) -> Encode:
    import onnxruntime as ort

    say("imported")
    options = ort.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    session = ort.InferenceSession(job["file"], options, providers=["CPUExecutionProvider"])
    return _padded(lambda ids, mask: session.run(None, {"input_ids": ids, "attention_mask": mask})[0], job["batch"])


def openvino(job: Job) -> Encode:
    import openvino as ov

    say("imported")
    hint = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[job["dtype"]]
    settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": job["threads"]}
    settings["PERFORMANCE_HINT"] = "LATENCY"
    core = ov.Core()
    if "cache" in job:
        core.set_property({"CACHE_DIR": job["cache"]})
    compiled = core.compile_model(job["file"], "CPU", settings)
    return _padded(lambda ids, mask: next(iter(compiled((ids, mask)).values())), job["batch"])


ENCODERS = {f.__name__: f for f in (fastbert, transformers, onnxruntime, openvino)}


def encode(job: Job) -> np.ndarray:
    """First result, or (with "memory") one short text and then all of them under the meter."""
    run = ENCODERS[job["engine"]](job)
    say("loaded")
    if not job["memory"]:
        vectors = run(job["ids"])
        say("first")
        return vectors
    run([job["ids"][0][:16]])  # libraries and weights are read in when they are used first
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
    """One step of AdamW on a masked-word batch; gives the gradient of the first layer, which all the others feed."""
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
        parameter.data.sum()  # a weight that is mapped from its file counts from here on

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

    from benchmarks.peers.operators import linear_cross_entropy
    from fastbert import functional as F

    inputs, labels = loss_inputs(job["tokens"], job["hidden"], job["vocab"])
    values = [t.to(job["device"], getattr(torch, job["dtype"])).requires_grad_() for t in inputs]
    labels = labels.to(job["device"])
    call = F.linear_cross_entropy if job["engine"] == "fastbert" else linear_cross_entropy

    def run() -> list:
        return torch.autograd.grad(call(*values, labels), values)

    # the same with eight words: what is imported or set up on first use is not the loss's memory
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

"""One step of masked-word training: forward, loss at 15% of the tokens, backward, AdamW; a padded batch.

The learning rate is zero, so that every step does the same work on the same weights, and dropout is off, so that the
gradients can be compared. (Not the loss: in bfloat16 torch sums it in bfloat16, where its last bits are chance.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fastbert

from . import costs, peers_packed, workloads
from .case import OURS, Case, Row, Run, need
from .jobs import Job

# workload, priority, in --quick
CASES = (
    ("base_natural", 6, False),
    ("minilm_natural", 7, True),
    ("large_natural", 8, False),
    ("base_32x512", 46, False),
)
LATER = {"large_natural": 70}  # on a CPU
# Padded they are eight times as many, and the truth keeps activations of all in float32: some 50 GB.
GPU_TOKENS = {"base": 4096, "minilm": 8192, "large": 2048}


def _batch(job: Job) -> dict[str, Tensor]:
    ids, mask = workloads.padded(job.rows, torch.device("cpu"))
    chosen = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.15) & mask.bool()
    chosen[0, 1] = True  # a loss over nothing is NaN
    made = {"input_ids": ids, "attention_mask": mask, "labels": torch.where(chosen, ids, -100)}
    return {name: t.to(job.device) for name, t in made.items()}


def _model(job: Job, dtype: torch.dtype, attention: str = "sdpa") -> torch.nn.Module:
    transformers = need("transformers")
    if attention == "flash_attention_2":
        peers_packed.need_flash_attn(job)
    config = peers_packed.their_config(job, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.BertForMaskedLM(config).to(job.device, dtype).train()


def _step(
    job: Job, dtype: torch.dtype, change: Callable[[torch.nn.Module], torch.nn.Module], attention: str = "sdpa"
) -> Run:
    """A call that takes one step and gives the model, whose gradients stay where they are."""
    model, batch = _model(job, dtype, attention), _batch(job)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=dtype != torch.float64)
    changed = change(model)

    def run() -> torch.nn.Module:
        optimizer.zero_grad(set_to_none=True)
        changed(**batch).loss.backward()
        optimizer.step()
        return model

    return run


def _outputs(model: torch.nn.Module) -> list[Tensor]:
    """The gradient of all parameters as one vector."""
    return [torch.cat([p.grad.flatten() for p in model.parameters()])]


def _accelerated(model: torch.nn.Module) -> torch.nn.Module:
    fastbert.accelerate(model)
    return model


def _as_it_is(model: torch.nn.Module) -> torch.nn.Module:
    return model


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for name, priority, in_quick in CASES:
        if quick and not in_quick:
            continue
        model = workloads.model_name(name)
        workload = workloads.fit(name, device, model, quick)
        if device.type == "cpu":  # a step costs three passes, and the masked words' logits
            priority = LATER.get(name, priority)
            workload = workloads.cut(workload, max(300, workload.tokens // 4))
        elif name.endswith("_natural"):
            workload = workloads.cut(workload, GPU_TOKENS[model])
        job = Job(workload, dtype, device)
        exact = torch.float64 if dtype == torch.float32 else torch.float32

        def reference(working: torch.dtype, job: Job = job) -> list[Tensor]:
            return _outputs(_step(job, working, _as_it_is)())

        def row(label: str, peer: str, change: Callable, attention="sdpa", job: Job = job, **more) -> Row:
            step = functools.partial(_step, job, job.dtype, change, attention)
            return Row(label, peer, step, outputs=_outputs, **more)

        rows = [
            row("fastbert.accelerate", OURS, _accelerated),
            row("transformers sdpa", "transformers", _as_it_is),
            row("torch.compile, transformers sdpa", "torch.compile", torch.compile, package="torch", slow=True),
        ]
        if device.type == "cuda":
            flash = "flash_attention_2"
            rows.insert(2, row(f"transformers {flash}", "transformers", _as_it_is, flash, package="flash-attn"))
        yield Case(
            "training", name, rows, functools.partial(reference, exact), functools.partial(reference, dtype),
            workloads.model_name(name), None, "step", dtype, workloads.shape_of(workload), workload.tokens,
            3 * costs.encoder_flops(workload), None, priority, in_quick,
        )  # fmt: skip

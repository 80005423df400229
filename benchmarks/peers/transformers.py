"""transformers' BERT on padded batches, with each of its attention implementations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..harness.peer import (
    CPU_ONLY,
    GPU_ONLY,
    EncoderPeer,
    Missing,
    ProcessPeer,
    Run,
    TrainingPeer,
    need,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from ..harness.jobs import Job

PEER = "transformers"


def config_of(job: Job, **more: Any) -> Any:
    """The job's configuration as transformers' class."""
    config, _ = job.model
    numbers = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")}
    return need("transformers").BertConfig(**(numbers | more))


def model_of(job: Job, attention: str) -> nn.Module:
    """transformers' BERT with the job's weights, shared by all rows with this attention."""

    def make() -> nn.Module:
        transformers = need("transformers")
        config = config_of(job)
        config._attn_implementation = attention
        model = transformers.BertModel(config, add_pooling_layer=False)
        model.load_state_dict(job.model[1], strict=False)
        return model.to(job.device, job.dtype).eval()

    return job.once(("transformers", attention), make)


def padded(
    attention: str, size: int, by_length: bool, change: Callable[[nn.Module, Job], nn.Module] = lambda model, job: model
) -> Callable[[Job], Run]:
    """Padded batches; `change` may compile the model."""

    def make(job: Job) -> Run:
        from ..harness.jobs import padded_run

        if attention == "flex_attention" and job.device.type != "cuda":
            raise Missing("flex attention is compiled for GPUs")
        call = change(model_of(job, attention), job)
        return padded_run(
            lambda ids, mask: call(input_ids=ids, attention_mask=mask).last_hidden_state, job, size, by_length
        )

    return make


def sdpa(size: int) -> Callable[[Job], Run]:
    return padded("sdpa", size, True)


ENCODERS = (
    # On a CPU small batches are fastest: they have little padding, and activations stay in the cache. The best size
    # depends on the lengths, so several are measured. 32 is the default of sentence-transformers.
    EncoderPeer("transformers sdpa", PEER, sdpa, CPU_ONLY, sizes=(2, 4, 8), fits=True),
    EncoderPeer("transformers sdpa", PEER, sdpa, GPU_ONLY, sizes=(32, 128), slow=False),
    EncoderPeer("transformers flex, sorted, batches of 32", PEER, padded("flex_attention", 32, True), GPU_ONLY),
    EncoderPeer("transformers sdpa, sorted, batches of 32", PEER, sdpa(32), CPU_ONLY, single=False, slow=True),
    EncoderPeer("transformers sdpa, arrival order, batches of 32", PEER, padded("sdpa", 32, False), single=False),
    EncoderPeer("transformers eager, sorted, batches of 4", PEER, padded("eager", 4, True), CPU_ONLY, slow=True),
    EncoderPeer("transformers eager, sorted, batches of 32", PEER, padded("eager", 32, True), GPU_ONLY, slow=True),
    EncoderPeer("transformers eager, arrival order, batches of 32", PEER, padded("eager", 32, False), slow=True,
                single=False),
)  # fmt: skip

# ---- training --------------------------------------------------------------------------------------------


def masked_lm(job: Job, dtype: Any, attention: str = "sdpa") -> nn.Module:
    """transformers' model with its head for masked words, random weights and no dropout."""
    import torch

    transformers = need("transformers")
    config = config_of(job, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.BertForMaskedLM(config).to(job.device, dtype).train()


def step(job: Job, change: Callable[[nn.Module], nn.Module] = lambda model: model, attention: str = "sdpa") -> Run:
    """A training step of the model, with the same weights as in all other rows. `change` may compile it."""
    from ..harness.jobs import head_of_masked_words
    from ..harness.steps import batch_of, stepping

    model, batch = masked_lm(job, job.dtype, attention), batch_of(job)
    model.load_state_dict({f"bert.{name}": value for name, value in job.model[1].items()}, strict=False)
    model.load_state_dict(head_of_masked_words(job.workload.model), strict=False)
    changed = change(model)
    return stepping(model, lambda: changed(**batch).loss, job.dtype)


TRAINING = (TrainingPeer("transformers sdpa", PEER, step),)


def masked_folder(files: Any) -> str:
    """A folder with the model of `masked_lm`, which transformers loads."""
    import torch

    from fastbert.checkpoint import save_state_dict

    def write(folder: str) -> None:
        model = masked_lm(files.job, torch.float32)
        model.config.save_pretrained(folder)
        save_state_dict(folder, model.state_dict())

    return files.once("masked", write)


# ---- as a process ----------------------------------------------------------------------------------------


def weights(files: Any) -> dict[str, Any]:
    return {"folder": files.weights}


def caches(folder: str) -> dict[str, Any]:
    """The environment of a process whose Triton and torch.compile keep compiled code in this folder."""
    return {"environment": dict.fromkeys(("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"), folder)}


def in_process(job: dict[str, Any]) -> Callable[[list[list[int]]], np.ndarray]:
    import torch
    from transformers import BertModel

    from ..harness.child_tools import padded_groups, say

    say("imported")
    model = BertModel.from_pretrained(
        job["folder"], dtype=getattr(torch, job["dtype"]), attn_implementation="sdpa", add_pooling_layer=False
    )
    model = model.to(job["device"]).eval()
    run = torch.compile(model, dynamic=True) if job.get("compile") else model

    @torch.inference_mode()
    def encode(ids: list[list[int]]) -> np.ndarray:
        # pooling runs on the model's device, so only vectors are copied from it
        vectors = torch.empty(len(ids), model.config.hidden_size)
        for rows, batch, mask in padded_groups(ids, job["batch"]):
            batch, mask = (torch.from_numpy(t).to(job["device"]) for t in (batch, mask))
            real = mask[..., None].float()
            hidden = run(input_ids=batch, attention_mask=mask).last_hidden_state.float()
            vectors[rows] = ((hidden * real).sum(1) / real.sum(1)).cpu()
        return vectors.numpy()

    return encode


PROCESSES = (ProcessPeer("transformers sdpa", PEER, __name__, weights, cache=caches),)

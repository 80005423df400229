"""The rows of fastbert."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..harness.peer import (
    GPU_ONLY,
    OURS,
    AttentionPeer,
    EncoderPeer,
    OperatorPeer,
    Prepared,
    ProcessPeer,
    Run,
    SentencePeer,
    TrainingPeer,
)
from . import sentence_transformers, transformers

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from fastbert.encoding.encoder import Encoder
    from fastbert.models.bert import BertModel

    from ..harness.jobs import Job

# ---- operators -------------------------------------------------------------------------------------------


def attention(impl: str | None) -> Callable[[dict[str, Any]], Prepared]:
    def prepare(inputs: dict[str, Any]) -> Prepared:
        from fastbert import functional as F

        rest = {name: value for name, value in inputs.items() if name not in ("q", "k", "v")}
        rest["schedule"] = F.attention_schedule(rest["cu_seqlens"], inputs["q"].shape[0], impl)
        return Prepared(lambda q, k, v: F.attention(q, k, v, impl=impl, **rest))

    return prepare


def operator(name: str) -> OperatorPeer:
    def make(device: Any) -> Callable[..., Tensor]:
        from fastbert import functional as F

        return getattr(F, name)

    return OperatorPeer(OURS, OURS, make)


ATTENTION = (AttentionPeer("fastbert", OURS, attention(None)),)
OPERATORS = {
    name: (operator(name),)
    for name in ("add_layer_norm", "feed_forward", "linear_cross_entropy", "embedding_layer_norm", "pool")
}

# ---- encoders --------------------------------------------------------------------------------------------


def _model(job: Job) -> BertModel:
    from fastbert.inference.large_pages import move_to_large_pages
    from fastbert.models.bert import BertModel

    def make() -> BertModel:
        config, state = job.model
        model = BertModel(config, add_pooling_layer=False).eval()
        model.load_state_dict(state)
        # `Encoder.from_pretrained` does this too
        return move_to_large_pages(model, job.dtype) if job.device.type == "cpu" else model.to(job.device, job.dtype)

    return job.once("fastbert", make)


def encoder(job: Job) -> Encoder:
    """An Encoder without a tokenizer, because it gets ids."""
    from fastbert.encoding.encoder import Encoder

    return Encoder(_model(job), SimpleNamespace(model_max_length=None))


def encode(job: Job) -> Run:
    ours = encoder(job)
    return lambda: ours.encode_ids(job.rows, ours.token_budget())


def _graph(job: Job) -> Run:
    """One batch, packed beforehand, with the model's CUDA graphs."""
    import torch

    from fastbert import functional as F
    from fastbert.packing import PackedBatch

    model = copy.copy(_model(job)).use_cuda_graphs()  # shares the weights, but not the recorded graphs
    batch = PackedBatch.from_lists(job.rows, device=job.device)

    @torch.inference_mode()
    def run() -> Tensor:
        return F.pool(model(batch).last_hidden_state, batch.cu_seqlens).float().cpu()

    return run


def in_process(job: dict[str, Any]) -> Callable[[list[list[int]]], np.ndarray]:
    import torch

    from fastbert import Encoder
    from fastbert.models.bert import BertModel

    from ..harness.child_tools import say

    say("imported")
    dtype = getattr(torch, job["dtype"])
    model = BertModel.from_pretrained(job["folder"], dtype=dtype, device=job["device"], add_pooling_layer=False)
    ours = Encoder(model, SimpleNamespace(model_max_length=None))
    return lambda ids: ours.encode_ids(ids, ours.token_budget()).numpy()


ENCODERS = (
    EncoderPeer("fastbert", OURS, encode),
    EncoderPeer("fastbert, CUDA graph", OURS, _graph, GPU_ONLY, many=False),
)
PROCESSES = (
    ProcessPeer("fastbert", OURS, __name__, transformers.weights, cache=transformers.caches),
    ProcessPeer("fastbert, empty cache", OURS, __name__, transformers.weights, GPU_ONLY, cache=transformers.caches,
                empty=True, suites=("cold",)),
)  # fmt: skip

# ---- training --------------------------------------------------------------------------------------------


def packed_masked_lm(job: Job) -> nn.Module:
    """A module of our model and operators that returns the mean loss of masked words, with logits of these only.

    It is called with a PackedBatch, rows [N], the tokens to predict, and labels [N], their words.
    """
    from dataclasses import replace

    import torch
    from torch import nn

    from fastbert import functional as F
    from fastbert.models.bert import BertModel
    from fastbert.packing import PackedBatch

    from ..harness.jobs import head_of_masked_words

    class PackedMaskedLM(nn.Module):
        def __init__(self):
            super().__init__()
            config, state = job.model
            config = replace(config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
            self.bert = BertModel(config, add_pooling_layer=False)
            self.bert.load_state_dict(state)
            width = config.hidden_size
            transform = {"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, eps=config.layer_norm_eps)}
            head = nn.ModuleDict({"transform": nn.ModuleDict(transform)})
            bias = torch.zeros(config.vocab_size, dtype=torch.float32, device="cpu")
            head.register_parameter("bias", nn.Parameter(bias))
            self.cls = nn.ModuleDict({"predictions": head})
            self.load_state_dict(head_of_masked_words(job.workload.model), strict=False)

        def forward(self, batch: PackedBatch, rows: Tensor, labels: Tensor) -> Tensor:
            head = self.cls["predictions"]
            dense, norm = head["transform"]["dense"], head["transform"]["LayerNorm"]
            hidden = F.linear_act(self.bert(batch).last_hidden_state[rows], dense.weight, dense.bias)
            hidden = F.add_layer_norm(hidden, None, norm.weight, norm.bias, norm.eps)
            return F.linear_cross_entropy(hidden, self.bert.embeddings.word_embeddings.weight, head.bias, labels)

    return PackedMaskedLM()


def _packed_step(job: Job) -> Run:
    from fastbert.packing import PackedBatch

    from ..harness.steps import labelled, stepping

    model = packed_masked_lm(job).to(job.device, job.dtype).train()
    batch = PackedBatch.from_lists(job.rows, device=job.device)
    rows, labels = labelled(job)
    return stepping(model, lambda: model(batch, rows, labels), job.dtype)


def _accelerated_step(job: Job) -> Run:
    import fastbert

    def accelerated(model: nn.Module) -> nn.Module:
        fastbert.accelerate(model)
        return model

    return transformers.step(job, accelerated)


TRAINING = (
    TrainingPeer("fastbert.accelerate", OURS, _accelerated_step),
    TrainingPeer("fastbert, packed", OURS, _packed_step),
)

# ---- sentences -------------------------------------------------------------------------------------------


def _accelerated(folder, texts: list[str], size: int, device, dtype) -> Run:
    import fastbert

    model = fastbert.accelerate(sentence_transformers.model(folder, device).to(dtype))
    return sentence_transformers.encode(model, texts, size)


SENTENCES = (SentencePeer("accelerated", OURS, _accelerated, "sentence-transformers", (32,)),)

"""The input of every encoder: weights of a shape, and lists of ids; and how padded batches are run."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastbert.config import BertConfig
from fastbert.models.bert import BertModel
from fastbert.testing import ModelShape, Workload

from .peer import Run
from .plain_bert import HEAD, PlainBert, PlainMaskedLM
from .workloads import padded, token_ids

Padded = Callable[[Tensor, Tensor], Tensor]  # input_ids, attention_mask [B, S] -> hidden states [B, S, C]


@functools.lru_cache(maxsize=3)
def weights(shape: ModelShape, positions: int) -> tuple[BertConfig, dict[str, Tensor]]:
    """A BERT of this shape with random weights, the same in every process."""
    config = BertConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, intermediate_size=shape.intermediate, max_position_embeddings=positions,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return config, BertModel(config, add_pooling_layer=False).state_dict()


@functools.lru_cache(maxsize=3)
def head_of_masked_words(shape: ModelShape) -> dict[str, Tensor]:
    """Random weights of BERT's masked-word head, under transformers' names; its decoder is the table of words."""
    generator = torch.Generator().manual_seed(1)
    dense = torch.randn(shape.hidden, shape.hidden, generator=generator, dtype=torch.float32, device="cpu") * 0.02
    ones, zeros = (torch.full((shape.hidden,), value, dtype=torch.float32, device="cpu") for value in (1.0, 0.0))
    return {
        HEAD + "dense.weight": dense, HEAD + "dense.bias": zeros, HEAD + "LayerNorm.weight": ones,
        HEAD + "LayerNorm.bias": zeros, "cls.predictions.bias": zeros.new_zeros(shape.vocab),
    }  # fmt: skip


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="fastbert-bench-")


def scratch_folder() -> str:
    """For files that go away with the process."""
    return _scratch().name


def example(
    shape: ModelShape, positions: int, kind: type[PlainBert] = PlainBert
) -> tuple[torch.nn.Module, tuple[Tensor, Tensor]]:
    """The plain model in float32, and two sequences to trace it with."""
    config, state = weights(shape, positions)
    bert = kind(state, config.num_hidden_layers, config.num_attention_heads, config.layer_norm_eps).eval()
    return bert, padded(token_ids((7, 5), shape.vocab), torch.device("cpu"))


@dataclass(frozen=True)
class Job:
    """The input of every encoder."""

    workload: Workload
    dtype: torch.dtype
    device: torch.device

    @property
    def model(self) -> tuple[BertConfig, dict[str, Tensor]]:
        return weights(self.workload.model, max(512, *self.workload.lengths))

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def exported_as(self) -> tuple[ModelShape, int]:
        """The key of an exported graph, which does not depend on the batches: the model's shape and its positions."""
        return self.workload.model, self.model[0].max_position_embeddings

    @functools.cached_property
    def rows(self) -> list[list[int]]:
        return token_ids(self.workload.lengths, self.workload.model.vocab)

    @functools.cached_property
    def shared(self) -> dict[Any, Any]:
        """Objects that rows of the case share, such as a compiled model; `close` empties it."""
        return {}

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def close(self) -> None:
        self.shared.clear()

    def plain(self, dtype: torch.dtype) -> PlainBert:
        config, state = self.model
        bert = PlainBert(state, config.num_hidden_layers, config.num_attention_heads, config.layer_norm_eps)
        return bert.to(self.device, dtype).eval()

    def plain_masked_lm(self, dtype: torch.dtype) -> PlainMaskedLM:
        config, state = self.model
        state = {**state, **head_of_masked_words(self.workload.model)}
        model = PlainMaskedLM(state, config.num_hidden_layers, config.num_attention_heads, config.layer_norm_eps)
        return model.to(self.device, dtype).train()

    def truth(self, dtype: torch.dtype) -> list[Tensor]:
        return [padded_run(self.plain(dtype), self, 8, by_length=True)()]


def groups(job: Job, size: int, by_length: bool) -> Iterator[list[int]]:
    order = list(range(len(job.rows)))
    if by_length:
        order.sort(key=lambda n: len(job.rows[n]), reverse=True)
    for start in range(0, len(order), size):
        yield order[start : start + size]


def mean(hidden: Tensor, mask: Tensor) -> Tensor:
    real = mask[..., None].to(hidden.dtype if hidden.dtype == torch.float64 else torch.float32)
    return (hidden.to(real.dtype) * real).sum(1) / real.sum(1)


def padded_run(model: Padded, job: Job, size: int, by_length: bool) -> Run:
    """Batches of `size`, each padded to its longest."""

    @torch.inference_mode()
    def run() -> Tensor:
        vectors = None
        for group in groups(job, size, by_length):
            ids, mask = padded([job.rows[n] for n in group], job.device)
            pooled = mean(model(ids, mask), mask)
            if vectors is None:
                vectors = pooled.new_empty(len(job.rows), pooled.shape[1])
            vectors[group] = pooled
        return vectors.cpu()

    return run

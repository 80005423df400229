"""Uses of the public names for a type checker: `make lint` checks this file, and nothing runs it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import assert_type

import fastbert
from fastbert import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    Encoder,
    PackedBatch,
    Tokenizer,
)
from fastbert import functional as F


def models(folder: str, mask: Tensor) -> None:
    config = BertConfig.base(num_labels=3)
    assert_type(config.num_labels, int)
    assert_type(BertModel.from_pretrained(folder), BertModel)
    assert_type(BertForSequenceClassification.from_pretrained(folder, seed=0), BertForSequenceClassification)
    assert_type(BertForMaskedLM(config).config, BertConfig)
    assert_type(BertForQuestionAnswering.from_pretrained(folder).device, torch.device)
    batch = PackedBatch.from_padded(mask, mask, lengths=[3, 4])
    assert_type(batch.to("cpu"), PackedBatch)
    assert_type(batch.pad(mask), Tensor)


def texts(folder: str) -> None:
    tokenizer = Tokenizer.from_pretrained(folder)
    assert_type(tokenizer(["a"], max_length=8).input_ids, list[list[int]])
    assert_type(tokenizer.cls_token, str)
    assert_type(tokenizer.cls_token_id, int)
    encoder = Encoder.from_pretrained(folder, dtype="bfloat16")
    assert_type(encoder.encode(["a"], layers=[1, 2]), Tensor)
    assert_type(encoder.config, BertConfig)
    for vectors in encoder.encode_stream(iter(["a"])):
        assert_type(vectors, Tensor)


def drop_in(module: torch.nn.Module, folder: str) -> None:
    assert_type(fastbert.accelerate(module, padding="exact", impl="native"), torch.nn.Module)
    assert_type(fastbert.restore(module), torch.nn.Module)
    assert_type(fastbert.explain(module).replaced, dict[str, str])
    assert_type(fastbert.prepack(module), torch.nn.Module)
    assert_type(fastbert.pipeline(folder)(["a"]), list[dict[str, Any]])
    fastbert.accelerate(module, padding="never")  # type: ignore[arg-type]  # a wrong word is an error


def operators(x: Tensor, cu_seqlens: Tensor) -> None:
    assert_type(F.pool(x, cu_seqlens, "mean", impl="native"), Tensor)
    with fastbert.batch_invariant():
        F.linear(x, x)

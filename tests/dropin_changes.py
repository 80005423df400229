"""A small BERT of transformers, plain and accelerated."""

import copy

import pytest
import torch
import torch.nn as nn

import fastbert

transformers = pytest.importorskip("transformers", reason="its models are changed here")

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 40, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
MASK = torch.arange(9) < torch.tensor([9, 4, 1])[:, None]


def plain_model(head: str = "Model", **config) -> nn.Module:
    torch.manual_seed(0)
    return getattr(transformers, f"Bert{head}")(transformers.BertConfig(**SIZES, **config)).eval()


def accelerated(plain: nn.Module, padding: str = "auto") -> nn.Module:
    return fastbert.accelerate(copy.deepcopy(plain), impl="native", padding=padding)


def batch_of(mask: torch.Tensor = MASK) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"input_ids": torch.randint(1, 60, mask.shape) * mask, "attention_mask": mask.long()}


def assert_same(ours: nn.Module, plain: nn.Module, rows: torch.Tensor = MASK, **batch) -> None:
    batch = batch or batch_of()
    for gradients in (True, False):  # without gradients all layers may run in one call, which reads them from a list
        with torch.set_grad_enabled(gradients):
            torch.manual_seed(2)
            want = plain(**batch)[0]
            torch.manual_seed(2)
            got = ours(**batch)[0]
        torch.testing.assert_close(got[rows], want[rows], atol=1e-5, rtol=1e-4)


def hook_that_edits(model):
    model.encoder.layer[0].attention.self.query.register_forward_hook(lambda module, given, y: y * 2)

"""Recordings of launches without a GPU: a replay calls the recorded function again, on the same static buffers."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import fastbert
from fastbert.inference import graphs as recordings
from fastbert.inference.graphs import Graphs

transformers = pytest.importorskip("transformers", reason="its models are accelerated")

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
SETTINGS = {
    "RobertaModel": {"pad_token_id": 1}, "XLMRobertaModel": {"pad_token_id": 1}, "CamembertModel": {"pad_token_id": 1},
    "ElectraModel": {"embedding_size": 24}, "AlbertModel": {"embedding_size": 24},
    "DistilBertModel": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "hidden_size": None},
    "ModernBertModel": {"local_attention": 6, "global_attn_every_n_layers": 2, "pad_token_id": 0, "bos_token_id": 1,
                        "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
}  # fmt: skip


class Rerun:
    """Stands for the device: a replay calls the function once more, and the results go into the same output."""

    impls = ("triton", "native", "reference")
    error: str | None = None

    def __init__(self, device: torch.device):
        self.forgotten = 0

    def forget(self) -> None:
        self.forgotten += 1

    def busy(self) -> bool:
        return False

    def in_order(self):
        return nullcontext()

    def record(self, function):
        if self.error:
            raise RuntimeError(self.error)
        output = function()
        return (lambda: output.copy_(function())), output


def record_on_cpus(monkeypatch) -> type[Rerun]:
    """For one test, launches on a CPU are recorded by `Rerun`. A recording raises its `error`, if one is set."""
    monkeypatch.setitem(recordings.RECORDERS, "cpu", Rerun)
    monkeypatch.setattr(Rerun, "error", None)
    return Rerun


def build(name: str = "BertModel", **more) -> nn.Module:
    settings = {k: v for k, v in {**SIZES, **SETTINGS.get(name, {}), **more}.items() if v is not None}
    model = getattr(transformers, name)(getattr(transformers, name.replace("Model", "Config"))(**settings)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def pair(name: str = "BertModel", **more) -> tuple[nn.Module, nn.Module, Graphs]:
    """(model that replays, model without graphs, the recordings), both models with the same weights."""
    model = build(name, **more)
    plain = fastbert.accelerate(copy.deepcopy(model), impl="native", padding="zero")
    ours = fastbert.accelerate(model, impl="native", cuda_graphs=True, padding="zero")
    return ours, plain, ours.forward.graphs


def batch_of(*lengths: int, types: bool = True, pad: int = 0) -> dict[str, torch.Tensor]:
    width = max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    ids = torch.where(mask, torch.randint(5, 60, mask.shape), pad)
    batch = {"input_ids": ids, "attention_mask": mask.long()}
    return batch | ({"token_type_ids": torch.randint(0, 2, ids.shape)} if types else {})


def assert_same(ours: nn.Module, plain: nn.Module, batch: dict) -> None:
    with torch.no_grad():
        a, b = ours(**batch), plain(**batch)
    assert type(a) is type(b)
    assert list(a.keys()) == list(b.keys())
    for x, y in zip(a.to_tuple(), b.to_tuple(), strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)

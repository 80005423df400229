"""Run by torchrun in two gloo processes: a step of DDP and of FSDP2 has the gradients that one process has of all rows.

torchrun --nproc-per-node 2 tests/heads_in_ranks.py
"""

from __future__ import annotations

import copy
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fastbert
from fastbert import BertConfig, PackedBatch

CONFIG = BertConfig(
    vocab_size=91, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3,
    num_labels=3,
)  # fmt: skip
LENGTHS = (9, 3, 5, 9, 2, 7)


def batch_of(head: str, rows: slice) -> dict:
    """Some rows of one batch that every process draws alike, packed. The ranks have different numbers of labels."""
    torch.manual_seed(3)
    texts = [torch.randint(1, 91, (length,)).tolist() for length in LENGTHS]
    labels = [torch.randint(0, 3, (length if head == "MaskedLM" else 1,)) for length in LENGTHS]
    if head == "MaskedLM":
        for row in labels[:3]:
            row[1:] = -100
    return {"input_ids": PackedBatch.from_lists(texts[rows]), "labels": torch.cat(labels[rows])}


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for head in ("SequenceClassification", "MaskedLM"):
        torch.manual_seed(0)
        model = getattr(fastbert, f"BertFor{head}")(CONFIG, impl="native")
        whole = batch_of(head, slice(None))
        count = int((whole["labels"] != -100).sum())
        part = batch_of(head, slice(0, 3) if rank == 0 else slice(3, None))
        truth = copy.deepcopy(model)
        loss = truth(**whole).loss
        loss.backward()
        sharded = copy.deepcopy(model)
        for layer in sharded.bert.encoder["layer"]:
            fully_shard(layer)
        for name, parallel in (("DDP", DistributedDataParallel(model)), ("FSDP2", fully_shard(sharded))):
            share = parallel(**part, num_items_in_batch=count).loss
            (share * dist.get_world_size()).backward()  # DDP and FSDP average over the ranks
            total = share.detach().clone()
            dist.all_reduce(total)
            torch.testing.assert_close(total, loss.detach())
            expect_gradients(parallel, truth, f"{name} {head}")
        expect_whole_state(sharded, truth)
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # threads of torch.distributed may still run, and at an ordinary end they sometimes abort the process


def expect_gradients(parallel: torch.nn.Module, truth: torch.nn.Module, what: str) -> None:
    names = dict(truth.named_parameters())
    for name, p in parallel.named_parameters():
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        torch.testing.assert_close(
            grad, names[name.removeprefix("module.")].grad, rtol=1e-4, atol=1e-6,
            msg=lambda text, name=name: f"{what}, gradient of {name}: {text}",
        )  # fmt: skip


def expect_whole_state(sharded: torch.nn.Module, truth: torch.nn.Module) -> None:
    """The state that `save_pretrained(folder, state_dict=...)` needs from a sharded model is complete."""
    state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        missing, unexpected = truth.load_state_dict(state, strict=False)
        assert not unexpected
        assert {*missing} <= {*truth._tied_weights_keys}, missing


if __name__ == "__main__":
    main()

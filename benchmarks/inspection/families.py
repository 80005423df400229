"""Encoders of the structure of Llama and of T5 beside their own code: processor time at real lengths.

    OMP_NUM_THREADS=1 python -m benchmarks.inspection.families [eurobert embeddinggemma qwen3 t5] [--dtype bfloat16]

Shapes are those of EuroBERT-210m, EmbeddingGemma-300m, Qwen3-Embedding-0.6B and T5-base's encoder; weights are random,
the vocabulary is small and so is the number of layers (`--layers`), of which all but the embeddings is a multiple.
Texts have the lengths of real paragraphs. Both ways take turns batch by batch, and times are the process' own. Padding
is on the right but for Qwen3, whose texts are padded on the left as its tokenizer does it.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn

import fastbert
from fastbert.training.memory import keep_freed_memory
from fastbert.workloads import real_lengths

WORDS, BATCH, LONGEST = 1000, 16, 512
# name -> (class, class of its config, its settings)
SHAPES = {
    "eurobert": (
        "EuroBertModel", "EuroBertConfig",
        {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_key_value_heads": 12},
    ),
    "embeddinggemma": (
        "Gemma3TextModel", "Gemma3TextConfig",
        {"hidden_size": 768, "intermediate_size": 1152, "num_attention_heads": 3, "num_key_value_heads": 1,
         "head_dim": 256, "sliding_window": 512, "use_bidirectional_attention": True, "use_cache": False},
    ),
    "qwen3": (
        "Qwen3Model", "Qwen3Config",
        {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8,
         "head_dim": 128, "use_cache": False},
    ),
    "t5": (
        "T5EncoderModel", "T5Config",
        {"d_model": 768, "d_ff": 3072, "num_heads": 12, "d_kv": 64},
    ),
}  # fmt: skip


def build(name: str, layers: int, dtype: torch.dtype) -> nn.Module:
    cls, of, settings = SHAPES[name]
    depth = {"num_layers": layers} if name == "t5" else {"num_hidden_layers": layers}
    torch.manual_seed(0)
    config = getattr(transformers, of)(**settings, **depth, vocab_size=WORDS, pad_token_id=0)
    config._attn_implementation = "sdpa"
    return getattr(transformers, cls)(config).to(dtype).eval()


def batches(count: int, left: bool) -> list[dict[str, Tensor]]:
    lengths = [min(n, LONGEST) for n in real_lengths("paragraphs", count * BATCH)]
    made = []
    for start in range(0, len(lengths), BATCH):
        of_batch = torch.tensor(lengths[start : start + BATCH], dtype=torch.int64, device="cpu")[:, None]
        columns = torch.arange(int(of_batch.max()), dtype=torch.int64, device="cpu")
        mask = columns >= columns.numel() - of_batch if left else columns < of_batch
        ids = torch.randint(5, WORDS, mask.shape, dtype=torch.int64, device="cpu")
        made.append({"input_ids": torch.where(mask, ids, 0), "attention_mask": mask.long()})
    return made


def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).last_hidden_state


def step(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    state = model(**batch).last_hidden_state
    (state * batch["attention_mask"][..., None]).float().square().mean().backward()
    model.zero_grad(set_to_none=True)
    return state


def measure(ways: dict[str, nn.Module], run: Callable, of: list[dict[str, Tensor]]) -> dict[str, list[float]]:
    """Seconds of each way of each batch; the first batch, run once more before all, is not counted."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for batch in [of[0], *of]:
        for name, model in ways.items():
            began = time.process_time()
            run(model, batch)
            times[name].append(time.process_time() - began)
    return {name: found[1:] for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", default=list(SHAPES), choices=[*SHAPES, []])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=4)
    args = parser.parse_args()
    keep_freed_memory()
    for name in args.names:
        own = build(name, args.layers, getattr(torch, args.dtype))
        ours = fastbert.accelerate(copy.deepcopy(own), padding="zero")
        of = batches(args.batches, left=name == "qwen3")
        masks = [batch["attention_mask"] for batch in of]
        real = sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
        with torch.no_grad():
            mask = masks[0].bool()
            error = (forward(ours, of[0])[mask].float() - forward(own, of[0])[mask].float()).abs().max().item()
        for what, run in (("forward", forward), ("forward and backward", step)):
            times = measure({"transformers": own, "fastbert": ours}, run, of)
            ratios = [a / b for a, b in zip(times["transformers"], times["fastbert"], strict=True)]
            totals = ", ".join(f"{way} {sum(found):.2f} s" for way, found in times.items())
            print(
                f"{name} {args.dtype}, {args.layers} layers, {real:.0%} real, {what}: {totals}; "
                f"median ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); "
                f"largest difference {error:.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""A DeBERTa-v3-base-sized model, forward alone and with the backward pass, beside itself accelerated.

    OMP_NUM_THREADS=1 python -m benchmarks.suites.deberta [--kind sentences] [--texts 16] [--layers 12] [--repeats 3]

Random weights; a classifier's loss; texts as long as real ones of this kind, cut at --longest. Twice: in batches of
texts as they come, and in batches of texts sorted by length, which hardly need padding. The two models
take turns, and what is compared is processor time, so that other work on the machine counts little. Both must give the
same loss, and the same gradient of the table of distances, before they are timed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Sequence

import torch
import transformers
from torch import Tensor

import fastbert
from fastbert.testing import REAL_TEXTS, real_lengths, relative_rms
from fastbert.training.memory import keep_freed_memory

VOCABULARY = 8000  # the look-up is no part of what differs
DTYPES = {"float32": (torch.float32, 1e-3), "bfloat16": (torch.bfloat16, 0.15)}


def model_of(layers: int) -> torch.nn.Module:
    """microsoft/deberta-v3-base's sizes and settings."""
    config = transformers.DebertaV2Config(
        vocab_size=VOCABULARY, hidden_size=768, num_hidden_layers=layers, num_attention_heads=12,
        intermediate_size=3072, max_position_embeddings=512, relative_attention=True, position_buckets=256,
        norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
        type_vocab_size=0, layer_norm_eps=1e-7,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.DebertaV2ForSequenceClassification(config).eval()


def batches_of(lengths: Sequence[int], size: int) -> list[dict[str, Tensor]]:
    batches = []
    for start in range(0, len(lengths), size):
        rows = torch.tensor(lengths[start : start + size])
        mask = torch.arange(int(rows.max())) < rows[:, None]
        ids = torch.randint(5, VOCABULARY, mask.shape) * mask
        batches.append({"input_ids": ids, "attention_mask": mask.long(), "labels": torch.arange(len(rows)) % 2})
    return batches


def forward(model: torch.nn.Module, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    with torch.no_grad():
        return torch.stack([model(**batch).loss.float() for batch in batches])


def step(model: torch.nn.Module, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    model.zero_grad()
    for batch in batches:
        model(**batch).loss.backward()
    return model.deberta.encoder.rel_embeddings.weight.grad


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=sorted(REAL_TEXTS), default="sentences", help="default: sentences")
    parser.add_argument("--texts", type=int, default=16, help="default: 16")
    parser.add_argument("--batch", type=int, default=8, help="texts of a batch (default: 8)")
    parser.add_argument("--longest", type=int, default=512, help="longer texts are cut (default: 512)")
    parser.add_argument("--layers", type=int, default=12, help="default: 12, as the model has")
    parser.add_argument("--repeats", type=int, default=3, help="default: 3")
    args = parser.parse_args(argv)
    keep_freed_memory()
    warnings.simplefilter("ignore")
    lengths = [min(n, args.longest) for n in real_lengths(args.kind, args.texts)]
    print(f"{args.texts} {args.kind}, {sum(lengths)} tokens, {args.layers} layers, {torch.get_num_threads()} threads")
    plain = model_of(args.layers)
    for name, (dtype, tolerance) in DTYPES.items():
        theirs = plain.to(dtype)
        ours = fastbert.accelerate(copy.deepcopy(theirs))
        for order, rows in (("as they come", lengths), ("sorted", sorted(lengths))):
            batches = batches_of(rows, args.batch)
            real = sum(lengths) / sum(batch["input_ids"].numel() for batch in batches)
            for what, run in (("forward", forward), ("forward and backward", step)):
                found, expected = run(ours, batches), run(theirs, batches)
                error = relative_rms(found, expected)
                if not error <= tolerance:
                    raise SystemExit(f"{name}, {what}: {error:.1e} from the original's")
                seconds = {"ours": [], "theirs": []}
                for _ in range(args.repeats):
                    for whose, model in (("ours", ours), ("theirs", theirs)):
                        started = time.process_time()
                        run(model, batches)
                        seconds[whose].append(time.process_time() - started)
                mine, other = (statistics.median(seconds[whose]) for whose in ("ours", "theirs"))
                ratios = sorted(b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True))
                print(
                    f"{name:<9} {order:<12} {real:4.0%} real  {what:<20}  transformers {other:7.2f} s  "
                    f"fastbert {mine:7.2f} s  {other / mine:5.2f} times as fast ({ratios[0]:.2f} - {ratios[-1]:.2f})",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

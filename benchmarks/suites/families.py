"""Compares encoders of other families, in their published sizes, with themselves accelerated, with and without
backward.

    OMP_NUM_THREADS=2 python -m benchmarks.suites.families [--models deberta-v3-base qwen3-embedding-0.6b ...]
                      [--kind sentences] [--texts 96] [--batch 32] [--layers 3] [--repeats 3] [--json FILE]

Weights are random, and a model has --layers layers, since all layers take the same time. The loss depends on the mean
over the real tokens of each text. Texts are as long as real texts of --kind, cut at --longest; they are measured in
arrival order, and sorted by length, which needs little padding. The two models take turns. Wall times are compared, or
with OMP_NUM_THREADS=1 processor times, which other work on the machine disturbs little. Before that, both models must
have the same outputs and the same gradients of all parameters.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

import fastbert
from fastbert.testing import REAL_TEXTS, real_lengths, relative_rms
from fastbert.training.memory import keep_freed_memory

VOCABULARY = 8000  # small, because looking up words is the same work in both
DTYPES = {"float32": (torch.float32, 1e-3), "bfloat16": (torch.bfloat16, 0.15)}
BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
GEMMA = {
    "hidden_size": 768, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 256, "intermediate_size": 1152,
    "query_pre_attn_scalar": 256, "sliding_window": 512, "use_bidirectional_attention": True,
}  # fmt: skip
# Name of the published model: transformers' class of model, of configuration, and what the published one sets.
MODELS = {
    "deberta-v3-base": ("DebertaV2Model", "DebertaV2Config", BASE | {
        "relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0, "layer_norm_eps": 1e-7,
    }),
    "nomic-embed-text-v1.5": ("NomicBertModel", "NomicBertConfig", BASE),
    "modernbert-base": ("ModernBertModel", "ModernBertConfig", {}),
    "eurobert-210m": ("EuroBertModel", "EuroBertConfig", BASE | {"num_key_value_heads": 12}),
    "esm2-150m": ("EsmModel", "EsmConfig", {
        "hidden_size": 640, "num_attention_heads": 20, "intermediate_size": 2560, "position_embedding_type": "rotary",
        "token_dropout": False, "mask_token_id": 4,
    }),
    "t5-base": ("T5EncoderModel", "T5Config", {"d_model": 768, "num_heads": 12, "d_kv": 64, "d_ff": 3072}),
    "qwen3-embedding-0.6b": ("Qwen3Model", "Qwen3Config", {
        "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "intermediate_size": 3072,
    }),
    "embeddinggemma-300m": ("Gemma3TextModel", "Gemma3TextConfig", GEMMA),
    "clip-vit-large-patch14 (text)": ("CLIPTextModel", "CLIPTextConfig", BASE | {
        "max_position_embeddings": 512, "eos_token_id": 2, "hidden_act": "quick_gelu",
    }),
    "ettin-decoder-150m": ("ModernBertDecoderModel", "ModernBertDecoderConfig", {}),
}  # fmt: skip
PADDED_ON_THE_LEFT = ("qwen3-embedding-0.6b",)  # by their tokenizers


def model_of(name: str, layers: int) -> nn.Module:
    kind, config, settings = MODELS[name]
    count = "num_layers" if config == "T5Config" else "num_hidden_layers"
    torch.manual_seed(0)
    made = getattr(transformers, config)(vocab_size=VOCABULARY, pad_token_id=0, **{count: layers}, **settings)
    if hasattr(made, "use_cache"):
        made.use_cache = False  # an encoder needs no cache; sentence-transformers sets this too
    return getattr(transformers, kind)(made).eval()


def batches_of(lengths: Sequence[int], size: int, left: bool) -> list[dict[str, Tensor]]:
    """Batches of `size` texts of random words, padded with zeros to the longest of the batch, on the left or right."""
    batches = []
    for start in range(0, len(lengths), size):
        rows = torch.tensor(lengths[start : start + size])[:, None]
        columns = torch.arange(int(rows.max()))
        mask = columns >= len(columns) - rows if left else columns < rows
        ids = torch.randint(5, VOCABULARY, mask.shape) * mask
        batches.append({"input_ids": ids, "attention_mask": mask.long()})
    return batches


def means(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """[B, C] float32: the mean of each text's last hidden states over its real tokens."""
    mask = batch["attention_mask"][..., None]
    return (model(**batch).last_hidden_state * mask).float().sum(1) / mask.sum(1)


def forward(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    with torch.no_grad():
        return torch.cat([means(model, batch) for batch in batches])


def step(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> nn.Module:
    model.zero_grad()
    for batch in batches:
        found = means(model, batch)
        (found * torch.linspace(-1, 1, found.size(1), dtype=found.dtype, device=found.device)).sum().backward()
    return model


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def compare(theirs: nn.Module, ours: nn.Module, batches: list[dict[str, Tensor]], tolerance: float, repeats: int):
    """Yield (what, seconds of theirs, seconds of ours) of "forward" and "forward and backward", each `repeats` long."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for what, run in (("forward", forward), ("forward and backward", step)):
        found, expected = run(ours, batches), run(theirs, batches)
        if run is step:
            found, expected = gradients(found), gradients(expected)
        error = relative_rms(found, expected)
        if not error <= tolerance:
            raise SystemExit(f"{what}: {error:.1e} from the original's, at most {tolerance} expected")
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeats):
            for model, taken in zip((theirs, ours), seconds, strict=True):
                started = clock()
                run(model, batches)
                taken.append(clock() - started)
        yield what, *seconds


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="default: all")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="default: both")
    parser.add_argument("--kind", choices=sorted(REAL_TEXTS), default="sentences", help="default: sentences")
    parser.add_argument("--texts", type=int, default=96, help="default: 96")
    parser.add_argument("--batch", type=int, default=32, help="texts of a batch (default: 32)")
    parser.add_argument("--longest", type=int, default=512, help="longer texts are cut (default: 512)")
    parser.add_argument("--layers", type=int, default=3, help="default: 3")
    parser.add_argument("--repeats", type=int, default=3, help="default: 3")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args(argv)
    keep_freed_memory()
    warnings.simplefilter("ignore")
    lengths = [min(n, args.longest) for n in real_lengths(args.kind, args.texts)]
    print(f"{args.texts} {args.kind}, {sum(lengths)} tokens, {args.layers} layers, {torch.get_num_threads()} threads")
    rows = []
    for name in args.models:
        for dtype in args.dtypes:
            kind, tolerance = DTYPES[dtype]
            theirs = model_of(name, args.layers).to(kind)
            ours = fastbert.accelerate(copy.deepcopy(theirs))
            for order, of in (("as they come", lengths), ("sorted", sorted(lengths))):
                batches = batches_of(of, args.batch, left=name in PADDED_ON_THE_LEFT)
                real = sum(lengths) / sum(batch["input_ids"].numel() for batch in batches)
                for what, *seconds in compare(theirs, ours, batches, tolerance, args.repeats):
                    other, mine = map(statistics.median, seconds)
                    ratios = sorted(b / a for b, a in zip(*seconds, strict=True))
                    print(
                        f"{name:<21} {dtype:<8} {order:<12} {real:4.0%} real  {what:<20}  "
                        f"transformers {other:6.2f} s  fastbert {mine:6.2f} s  "
                        f"{other / mine:5.2f} times as fast ({ratios[0]:.2f} - {ratios[-1]:.2f})",
                        flush=True,
                    )
                    rows.append({
                        "model": name, "dtype": dtype, "order": order, "real": real, "what": what,
                        "transformers_s": seconds[0], "fastbert_s": seconds[1],
                    })  # fmt: skip
    if args.json:
        about = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "settings": vars(args) | {"json": None},
        }
        about["settings"]["threads"] = torch.get_num_threads()
        args.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

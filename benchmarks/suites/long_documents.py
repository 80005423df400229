"""Compares encoding long documents on a CPU with OpenVINO and with the matrix products alone, in turns in one process.

    python -m benchmarks.suites.long_documents --cache FOLDER [--documents 8] [--tokens 2048] [--repeats 3]
        [--models minilm base] [--precisions float32 bfloat16] [--json FILE]

The models have MiniLM's shape and BERT-base's with six layers, a longer table of positions and random weights. OpenVINO
has its throughput hint, one or two documents a batch, and the graph of eager attention or of SDPA, whichever is faster.
The linear layers' products are computed by oneDNN, from weights laid out beforehand. The time of all products is the
time of those, plus that of attention's two products at the same rate. Wrong vectors of a peer end the run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from fastbert.kernels.cpu import layouts

from .cpu_peers import SHAPES, WORDS, Ids, expect_close, in_batches, openvino, ours, save

LAYERS = {"minilm": 6, "base": 6}
LINEAR, ALL = "products of linear layers", "all products at that rate"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.suites.long_documents", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--cache", type=Path, required=True, help="folder for converted models")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of each document")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=tuple(LAYERS), default=[*LAYERS])
    parser.add_argument("--precisions", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    ids = documents(args.documents, args.tokens)
    found = []
    for name in args.models:
        for precision in args.precisions:
            found.append(compare(name, args.cache / f"{name}-{args.tokens}", ids, args.repeats, precision))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def documents(count: int, tokens: int) -> list[list[int]]:
    words = np.random.default_rng(0).integers(1000, WORDS, (count, tokens - 2))
    return [[101, *row, 102] for row in words.tolist()]


def compare(name: str, folder: Path, ids: Ids, repeats: int, precision: str) -> dict[str, object]:
    """Prints a table and returns its figures: seconds of every row, and what our time is of the others'."""
    width, _, heads, inner = SHAPES[name]
    shape, length = (width, LAYERS[name], heads, inner), len(ids[0])
    saved = folder / "model"
    if not saved.exists():
        save(shape, saved, positions=length)
    dtype = getattr(torch, precision)
    runs: dict[str, Callable[[], np.ndarray | None]] = {"fastbert": partial(ours(saved, precision), ids)}
    for attention in ("eager", "sdpa"):
        try:
            run = openvino(saved, folder, precision, attention)
        except ImportError as error:
            print(f"OpenVINO: not installed ({error})")
            break
        for count in (1, 2):
            runs[f"OpenVINO, {attention}, batches of {count}"] = partial(in_batches, run, count * length, ids)
    runs[LINEAR] = linear_products(shape, len(ids), length, dtype)
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    expected = None
    for _ in range(repeats + 1):  # the first round does not count
        for label, run in runs.items():
            start = time.perf_counter()
            vectors = run()
            seconds[label].append(time.perf_counter() - start)
            if vectors is not None:
                expected = vectors if expected is None else expected
                expect_close(label, vectors, expected)
    of_linear, of_attention = flops_of(shape, len(ids), length)
    seconds[ALL] = [t * (1 + of_attention / of_linear) for t in seconds[LINEAR]]
    threads = torch.get_num_threads()
    print(
        f"\n{name}, {shape[1]} layers, {precision}, {len(ids)} x {length} tokens, {threads} threads, {repeats} repeats"
    )
    print(f"{'':<36} {'seconds':>8} {'fastest - slowest':>19} {'time / ours':>12} {'ours / it':>10}")
    ratios = {}
    for label, (_, *taken) in seconds.items():
        pairs = zip(taken, seconds["fastbert"][1:], strict=True)
        ratios[label] = statistics.median(theirs / mine for theirs, mine in pairs)
        spread = f"{min(taken):.3f} - {max(taken):.3f}"
        of_row = f"{ratios[label]:>12.3f} {1 / ratios[label]:>10.3f}"
        print(f"{label:<36} {statistics.median(taken):>8.3f} {spread:>19} {of_row}")
    return {
        "model": name, "layers": shape[1], "precision": precision, "documents": len(ids), "tokens": length,
        "threads": threads, "seconds": {label: taken[1:] for label, taken in seconds.items()}, "time_to_ours": ratios,
    }  # fmt: skip


def flops_of(shape: Sequence[int], count: int, length: int) -> tuple[int, int]:
    """FLOPs of the linear layers, and of attention's two products."""
    width, layers, _, inner = shape
    return 4 * count * length * layers * (2 * width + inner) * width, 4 * count * length**2 * layers * width


@torch.inference_mode()
def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    packed = layouts.find(x, weight, None)
    return F.linear(x, weight) if packed is None else layouts.linear(x, packed, None)


def linear_products(shape: Sequence[int], count: int, length: int, dtype: torch.dtype) -> Callable[[], None]:
    width, layers, _, inner = shape
    x = {size: torch.randn(length, size).to(dtype) for size in (width, inner)}
    weights = []
    for columns, size in [(3 * width, width), (width, width), (inner, width), (width, inner)] * layers:
        weights.append((0.02 * torch.randn(columns, size)).to(dtype))
        layouts.mark(weights[-1])

    def run() -> None:
        for _ in range(count):
            for weight in weights:
                product(x[weight.shape[1]], weight)

    return run


if __name__ == "__main__":
    main()

"""Compares accuracy and speed of float32, bfloat16 and int8 products on this CPU, in turns.

    python -m benchmarks.suites.int8 --sick SICK_test_annotated.txt --sst2 FOLDER [--model ID_OR_PATH] [--repeats 5]

Similarity: Spearman's correlation of the cosine of two sentences' vectors with SICK's gold relatedness (test split).
Sentiment: accuracy of a logistic regression on the vectors of SST-2's dev.tsv. It is fitted once, to float32 vectors of
every seventh line of train.tsv, so rows only differ in their vectors. Cosine: that of each SICK sentence's vector with
its float32 vector. Speed: real tokens a second for the SICK sentences with tokenising, median of the repeats.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.cli.options import default_model
from fastbert.encoding.encoder import Encoder, EncodeStats

DTYPES = ("float32", "bfloat16", "int8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suites.int8", description="int8: accuracy and speed.")
    parser.add_argument("--sick", type=Path, required=True, help="SICK_test_annotated.txt")
    parser.add_argument("--sst2", type=Path, required=True, help="the folder of train.tsv and dev.tsv, as in GLUE")
    parser.add_argument("--model", default=default_model())
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    pairs = table(args.sick)
    sentences = sorted({row[side] for row in pairs for side in ("sentence_A", "sentence_B")})
    train, dev = table(args.sst2 / "train.tsv")[::7], table(args.sst2 / "dev.tsv")

    encoders = {dtype: Encoder.from_pretrained(args.model, dtype=dtype, normalize=True) for dtype in DTYPES}
    speeds = {dtype: [] for dtype in DTYPES}
    vectors = {}
    for _ in range(args.repeats + 1):  # the first round, which copies weights and makes kernels, does not count
        for dtype, encoder in encoders.items():
            encoder.stats = EncodeStats()
            vectors[dtype] = encoder.encode(sentences)
            speeds[dtype].append(encoder.stats.tokens_per_second)
    weights = logistic_regression(encoders["float32"].encode([row["sentence"] for row in train]), labels(train))
    print(f"{'':<9} {'Spearman':>9} {'SST-2':>7} {'cosine, least':>14} {'mean':>8} {'tokens/s':>9}")
    for dtype, encoder in encoders.items():
        sentiment = encoder.encode([row["sentence"] for row in dev])
        accuracy = ((with_one(sentiment) @ weights > 0) == (labels(dev) > 0)).float().mean()
        cosines = F.cosine_similarity(vectors[dtype], vectors["float32"], dim=-1)
        speed = speeds[dtype][1:]
        print(
            f"{dtype:<9} {similarity(pairs, sentences, vectors[dtype]):>9.4f} {accuracy:>7.4f} {cosines.min():>14.4f} "
            f"{cosines.mean():>8.5f} {statistics.median(speed):>9,.0f} ({min(speed):,.0f} - {max(speed):,.0f})"
        )


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))


def similarity(pairs: list[dict[str, str]], sentences: list[str], vectors: Tensor) -> float:
    """Spearman's correlation of cosine and gold. The vectors have length 1."""
    place = {sentence: i for i, sentence in enumerate(sentences)}
    a, b = (vectors[[place[row[side]] for row in pairs]] for side in ("sentence_A", "sentence_B"))
    gold = np.array([float(row["relatedness_score"]) for row in pairs])
    return float(np.corrcoef(ranks((a * b).sum(-1).numpy()), ranks(gold))[0, 1])


def ranks(values: np.ndarray) -> np.ndarray:
    """The ranks of the values, from 1 on; equal values have their mean rank."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[which]


def labels(rows: list[dict[str, str]]) -> Tensor:
    return torch.tensor([float(row["label"]) for row in rows])


def with_one(vectors: Tensor) -> Tensor:
    return torch.cat([vectors, torch.ones(len(vectors), 1)], dim=1)


def logistic_regression(vectors: Tensor, wanted: Tensor) -> Tensor:
    """The weights [C + 1] that minimise the mean log loss plus 1e-4 |w|^2."""
    x, w = with_one(vectors), torch.zeros(vectors.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(x @ w, wanted) + 1e-4 * w.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return w.detach()


if __name__ == "__main__":
    main()

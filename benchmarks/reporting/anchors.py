"""Figures that others published for their hardware and software, for comparison. None of them was measured here.

If a result file of an NVIDIA GPU has a row with the same work, the report gives our figure and its share of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

SIXTEEN_BITS = ("bfloat16", "float16")


@dataclass(frozen=True)
class Anchor:
    work: str
    figure: float
    unit: str
    hardware: str
    source: str
    like: Callable[[dict[str, Any]], bool] | None = None  # whether a row of ours has the same work; None: no row has
    ours: Callable[[dict[str, Any]], float] = lambda row: row["tflops"]


def _attention(direction: str, length: int) -> Callable[[dict[str, Any]], bool]:
    """Full sequences of this length, head_dim 64, 16 bits, no dropout."""

    def like(row: dict[str, Any]) -> bool:
        shape = row["shape"]
        return (
            (row["suite"], row["operator"], row["direction"]) == ("kernels", "attention", direction)
            and row["dtype"] in SIXTEEN_BITS
            and not shape.get("dropout_p")
            and shape["hidden"] == 64 * shape["heads"]
            and shape["longest"] == length
            and shape["tokens"] == length * shape["sequences"]
        )

    return like


def _training_of_large(row: dict[str, Any]) -> bool:
    return row["suite"] == "training" and row["model"] == "large" and row["dtype"] in SIXTEEN_BITS


def _attention_anchors(source: str, direction: str, figures: dict[int, float]) -> Iterable[Anchor]:
    for length, figure in figures.items():
        work = f"attention {direction}, head_dim 64, {length:,} tokens a sequence"
        yield Anchor(work, figure, "TFLOP/s", "H100", source, _attention(direction, length))


ANCHORS = (
    # none of our workloads has SQuAD's lengths
    Anchor("BERT-large inference, SQuAD, 99.9% of its accuracy", 7994, "samples/s a GPU", "H200",
           "MLPerf Inference v4.1"),
    Anchor("BERT-large pre-training, packed to 512 tokens", 996, "sequences/s a GPU", "H200", "MLPerf Training v4.0",
           _training_of_large, lambda row: row["tokens_per_second"] / 512),
    *_attention_anchors("FlashAttention 3", "forward", {512: 333, 1024: 392, 4096: 476}),
    *_attention_anchors("FlashAttention 2", "forward+backward", {512: 215, 1024: 254, 16384: 296}),
)  # fmt: skip


def rows(measured: Iterable[tuple[str, dict[str, Any]]]) -> list[tuple[str, ...]]:
    """The cells of the report's table. measured: (device, row of fastbert) of every GPU's results."""
    measured = list(measured)
    found = []
    for anchor in ANCHORS:
        like = anchor.like or (lambda row: False)
        best: dict[str, float] = {}
        for device, row in measured:
            if like(row):
                best[device] = max(best.get(device, 0.0), anchor.ours(row))
        ours = "; ".join(f"{device}: {value:,.3g} ({value / anchor.figure:.0%})" for device, value in best.items())
        found.append(
            (anchor.work, f"{anchor.figure:,} {anchor.unit}", anchor.hardware, anchor.source, ours or "not measured")
        )
    return found

"""FLOPs and bytes of BERT's operators: the work of the mathematics, and the least memory traffic.

FLOPs are those of matrix products on real tokens, two for a multiplication and its addition. Bytes are each input read
once and each output written once, weights once a batch; biases, statistics and ids are left out, a few parts in a
thousand. The inner activation of a feed-forward layer counts: it lies between two products, and no program of the first
holds all that one of the second needs. The floor of an operator is the longer of its two times at the ceilings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fastbert.testing import ModelShape, Workload

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
MASKED = 0.15  # share of the tokens that a masked-word model predicts


@dataclass(frozen=True)
class Work:
    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Cost:
    """One operator's work in one direction, over all of its `count` calls in a pass."""

    operator: str
    direction: str
    count: int
    work: Work
    part: str = ""  # of an operator that is several products

    def floor(self, tflops: float, gbs: float) -> tuple[float, str]:
        """(seconds, which ceiling it is)."""
        matrix, memory = self.work.flops / (tflops * 1e12), self.work.bytes / (gbs * 1e9)
        return (matrix, "matrix") if matrix >= memory else (memory, "memory")


# ---- operators -------------------------------------------------------------------------------------------
# Each gives (forward, backward) of one call; e is the bytes of an element.


def linear(rows: int, width_in: int, width_out: int, e: int) -> tuple[Work, Work]:
    """y = x W^T; dx = dy W, dW = dy^T x."""
    flops = 2.0 * rows * width_in * width_out
    x, w, y = rows * width_in * e, width_in * width_out * e, rows * width_out * e
    return Work(flops, x + w + y), Work(2 * flops, y + 2 * x + 2 * w)


def attention_flops(workload: Workload) -> float:
    """The FLOPs of one layer's forward pass: q k^T and p v, real tokens only."""
    return 4.0 * workload.model.hidden * sum(n * n for n in workload.lengths)


def attention(workload: Workload, e: int) -> tuple[Work, Work]:
    """q, k, v -> o; backward, by the usual convention, q k^T again, dv, dp, dq, dk: 2.5 times the forward."""
    flops, rows = attention_flops(workload), workload.tokens * workload.model.hidden * e
    return Work(flops, 4 * rows), Work(2.5 * flops, 8 * rows)


def layer_norm(rows: int, width: int, e: int, residual: bool = True, dropout: bool = False) -> tuple[Work, Work]:
    """x, residual -> y; dy, x, residual -> one gradient for both, or with dropout two."""
    size = rows * width * e
    return Work(0.0, (2 + residual) * size), Work(0.0, (3 + residual + (residual and dropout)) * size)


def feed_forward(rows: int, model: ModelShape, e: int, training: bool) -> dict[str, tuple[Work, Work]]:
    """up: x -> a = act(h), in training h too; dh, x -> dx, dW. down: a -> y; dy, h -> dh, dW."""
    x, inner, w = rows * model.hidden * e, rows * model.intermediate * e, model.hidden * model.intermediate * e
    flops = 2.0 * rows * model.hidden * model.intermediate
    return {
        "up": (Work(flops, x + w + inner * (1 + training)), Work(2 * flops, inner + 2 * x + 2 * w)),
        "down": (Work(flops, inner + w + x), Work(2 * flops, x + 2 * inner + 2 * w)),
    }


def embedding(rows: int, model: ModelShape, e: int) -> tuple[Work, Work]:
    """Rows of the word table -> y; dy and those rows -> a gradient of the whole table, since torch's is dense."""
    size = rows * model.hidden * e
    return Work(0.0, 2 * size), Work(0.0, 2 * size + model.vocab * model.hidden * e)


def pool(rows: int, sequences: int, width: int, e: int) -> tuple[Work, Work]:
    size = (rows + sequences) * width * e
    return Work(0.0, size), Work(0.0, size)


def cross_entropy(rows: int, model: ModelShape, e: int, counted: int | None = None) -> tuple[Work, Work]:
    """hidden, W -> loss; -> dhidden, dW from what was read for the loss. `counted`: how many rows have a label."""
    flops = 2.0 * (rows if counted is None else counted) * model.hidden * model.vocab
    size = (rows + model.vocab) * model.hidden * e
    return Work(flops, size), Work(2 * flops, size)


def of_operator(op: str, workload: Workload, e: int, training: bool, dropout: bool = False) -> tuple[Work, Work]:
    """(forward, backward) of one call of `fastbert.functional.<op>` on the inputs that `testing.INPUTS` makes."""
    m, rows = workload.model, workload.tokens
    if op == "attention":
        return attention(workload, e)
    if op == "add_layer_norm":
        return layer_norm(rows, m.hidden, e, dropout=dropout)
    if op == "feed_forward":
        up, down = feed_forward(rows, m, e, training).values()
        return up[0] + down[0], up[1] + down[1]
    if op == "linear_cross_entropy":
        return cross_entropy(rows, m, e, counted=rows - (rows + 4) // 5)  # every fifth has no label
    if op == "embedding_layer_norm":
        return embedding(rows, m, e)
    if op == "pool":
        return pool(rows, len(workload.lengths), m.hidden, e)
    raise ValueError(f"no costs of {op!r}")


# ---- a whole pass ----------------------------------------------------------------------------------------


def masked(tokens: int) -> int:
    """How many of a batch's tokens a masked-word model predicts, one at least."""
    return max(1, round(MASKED * tokens))


def of_model(workload: Workload, dtype: torch.dtype, training: bool = False) -> list[Cost]:
    """All operators of a pass over one packed batch, in the order they run: texts to vectors, or in training forward
    and backward of masked-word prediction. (The optimiser's step is no operator of the model and is left out.)"""
    m, rows, e = workload.model, workload.tokens, dtype.itemsize
    costs: list[Cost] = []

    def add(operator: str, count: int, work: tuple[Work, Work], part: str = "") -> None:
        for direction, of in zip((FORWARD, BACKWARD) if training else (FORWARD,), work, strict=False):
            costs.append(Cost(operator, direction, count, Work(count * of.flops, count * of.bytes), part))

    add("embedding", 1, embedding(rows, m, e))
    add("qkv", m.layers, linear(rows, m.hidden, 3 * m.hidden, e))
    add("attention", m.layers, attention(workload, e))
    add("attention out", m.layers, linear(rows, m.hidden, m.hidden, e))
    add("add_layer_norm", 2 * m.layers, layer_norm(rows, m.hidden, e))
    for part, work in feed_forward(rows, m, e, training).items():
        add("feed_forward", m.layers, work, part)
    if not training:
        add("pool", 1, pool(rows, len(workload.lengths), m.hidden, e))
        return costs
    n = masked(rows)
    add("head", 1, linear(n, m.hidden, m.hidden, e), "dense")
    add("head", 1, layer_norm(n, m.hidden, e, residual=False), "norm")
    forward, backward = cross_entropy(n, m, e)  # gradients are made in the forward pass
    costs.append(Cost("loss", BOTH, 1, forward + backward))
    return costs


def of_batches(batches: Sequence[Workload], dtype: torch.dtype, training: bool = False) -> list[Cost]:
    """All operators of several batches, one after the other; each batch reads the weights again."""
    first, *rest = (of_model(batch, dtype, training) for batch in batches)
    for costs in rest:
        first = [replace(a, work=a.work + b.work) for a, b in zip(first, costs, strict=True)]
    return first


def encoder_flops(workload: Workload) -> float:
    """The FLOPs of the forward pass: matrix products on real tokens, and attention."""
    return sum(cost.work.flops for cost in of_model(workload, torch.bfloat16))

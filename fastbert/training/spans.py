"""Answers from scores of tokens: the best spans over all windows of a question.

The score of a span is the sum of its first token's score as a start and its last token's score as an end. A span starts
at a token that belongs to its window (`features`), so that no span occurs twice; it ends within the same window, and
has at most `longest` tokens. The score of no answer is the lowest score of [CLS] over all windows, because only the
window with the answer can tell that there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .features import Window

KEPT = 20  # best spans of a question that are kept


class Span(NamedTuple):
    """The characters [start, end) of a context, and the score, which is a sum of two logits."""

    score: float
    start: int
    end: int


def best_spans(windows: Sequence[Window], logits: Sequence[np.ndarray], longest: int) -> tuple[list[Span], float]:
    """(the best spans of a question, the best first; the score of no answer). logits: [tokens, 2] of each window."""
    spans, null = [], np.inf
    for window, of_window in zip(windows, logits, strict=True):
        of_window = np.asarray(of_window, np.float64)
        null = min(null, float(of_window[0].sum()))
        spans += _spans_of(window, of_window, longest)
    spans.sort(key=lambda span: (-span.score, span.start, span.end))
    return spans[:KEPT], null


def _spans_of(window: Window, logits: np.ndarray, longest: int) -> list[Span]:
    starts = np.array(sorted(window.owned), dtype=np.int64)
    if not starts.size:
        return []
    last = len(window.offsets) - 2  # the last token is [SEP]
    ends = starts[:, None] + np.arange(longest)  # [starts, longest]
    scores = logits[starts, 0][:, None] + logits[np.minimum(ends, last), 1]
    scores = np.where(ends <= last, scores, -np.inf).reshape(-1)
    best = np.argpartition(-scores, KEPT)[:KEPT] if scores.size > KEPT else np.arange(scores.size)
    found = []
    for place in best[np.isfinite(scores[best])]:
        start, end = starts[place // longest], ends.reshape(-1)[place]
        found.append(Span(float(scores[place]), window.offsets[start][0], window.offsets[end][1]))
    return found


def probabilities(scores: Sequence[float]) -> np.ndarray:
    """softmax, in float64."""
    scores = np.asarray(scores, np.float64)
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()

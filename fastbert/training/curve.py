"""A picture of a run: an SVG of metrics.jsonl with the smoothed loss of each step and the metric after each epoch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ..storage import write_atomically

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 360, 60, 60, 40, 40
POINTS = 60  # most points of the loss; each is the mean of neighbouring steps, whose losses differ by chance
LOSS, METRIC = "#1f6fb4", "#c4501b"


def draw(records: Path, picture: Path, metric: str) -> None:
    """Writes the picture atomically."""
    rows = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    scores = [(row["step"], row["scores"][metric]) for row in rows if row.get("scores", {}).get(metric) is not None]
    with write_atomically(picture) as temporary:
        temporary.write_text(svg(_smooth(losses), scores, metric), encoding="utf-8")


def _smooth(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """At most POINTS means of neighbouring points."""
    size = max(1, -(-len(points) // POINTS))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def svg(losses: Sequence[tuple[float, float]], scores: Sequence[tuple[float, float]], metric: str) -> str:
    """Two lines over the steps: the loss with the left axis, the metric with the right one."""
    last = max((x for x, _ in [*losses, *scores]), default=1.0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 10}" text-anchor="middle">optimiser steps, {last:.0f} in all</text>',
        f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}V{TOP}" fill="none" stroke="#999"/>',
    ]
    for name, points, colour, side, x, anchor, inwards in (
        ("loss", losses, LOSS, LEFT, LEFT - 6, "end", "start"),
        (metric, scores, METRIC, WIDTH - RIGHT, WIDTH - RIGHT + 6, "start", "end"),
    ):
        if not points:
            continue
        parts.append(f'<text x="{side}" y="20" fill="{colour}" text-anchor="{inwards}">{escape(name)}</text>')
        low, high = min(y for _, y in points), max(y for _, y in points)
        spread = high - low or 1.0
        places = [
            (
                LEFT + (WIDTH - LEFT - RIGHT) * step / last,
                HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / spread,
            )
            for step, value in points
        ]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        if points is scores:  # a line would not show a single point
            parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in places]
        for value, y in ((low, HEIGHT - BOTTOM), (high, TOP)):
            parts.append(f'<text x="{x}" y="{y + 4}" fill="{colour}" text-anchor="{anchor}">{value:.4g}</text>')
    return "\n".join([*parts, "</svg>", ""])

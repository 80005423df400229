"""A report as a table of text, and as a picture of scores over speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from ..training.curve import BOTTOM, HEIGHT, LEFT, LOSS, METRIC, RIGHT, TOP, WIDTH
from ..training.task import Spec

LARGEST, SMALLEST = 16.0, 4.0  # radii of circles, whose areas are proportional to bytes on disk


def table(report: dict[str, Any]) -> list[str]:
    """The lines of the table: a row for each model, with units in the column heads."""
    metric = Spec(report["task"], report["metric"]).score
    head = (
        "model", "dtype", metric, "MB on disk", "MB in memory", "tokens/s", "times", "ms a text", "times faster",
    )  # fmt: skip
    rows = [head]
    for row in report["rows"]:
        rows.append((
            row["model"], row["dtype"], f"{row['scores'][metric]:.4f}", f"{row['bytes on disk'] / 1e6:.1f}",
            f"{row['bytes in memory'] / 1e6:.1f}", f"{row['tokens per second']:,.0f}",
            _range(row["times as many tokens per second"]), f"{row['milliseconds for one text']:.2f}",
            _range(row["times faster for one text"]),
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
    lines += [
        "",
        f"{metric}: {report['rows'][0]['definitions'][metric]}; of {report['rows'][0]['examples']:,} examples of "
        f"{report['data']}",
        f"speed beside {report['baseline']}: median of {report['rounds']} rounds (lowest to highest), in each of which "
        f"all models ran; {report['timed examples']:,} examples, {report['tokens at once']:,} tokens at once, "
        f"{report['threads']} threads",
    ]
    return lines


def _range(ratios: dict[str, float]) -> str:
    return f"{ratios['median']:.2f} ({ratios['lowest']:.2f} to {ratios['highest']:.2f})"


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        cell.ljust(width) if column < 2 else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]


def picture(report: dict[str, Any]) -> str:
    """SVG with tokens per second on the x axis, the score on the y axis, and a circle as large as its file for each
    model."""
    metric, rows = Spec(report["task"], report["metric"]).score, report["rows"]
    speeds, scores = [row["tokens per second"] for row in rows], [row["scores"][metric] for row in rows]
    fastest, most = max(speeds) * 1.15, max(row["bytes on disk"] for row in rows)
    known = [score for score in scores if not math.isnan(score)] or [0.0]
    low, high = min(known), max(known)
    margin = (high - low) * 0.2 or 0.01
    low, high = low - margin, high + margin
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 10}" text-anchor="middle">tokens per second; circles as large as the '
        "files</text>",
        f'<text x="{LEFT}" y="20" fill="{METRIC}">{escape(metric)}</text>',
        f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="#999"/>',
    ]
    for value, y in ((low, bottom), (high, TOP)):
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" fill="{METRIC}" text-anchor="end">{value:.3f}</text>')
    for value, x in ((0.0, LEFT), (fastest, right)):
        parts.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{value:,.0f}</text>')
    for row, speed, score in zip(rows, speeds, scores, strict=True):
        if math.isnan(score):  # an undefined correlation cannot be drawn
            continue
        x = LEFT + (right - LEFT) * speed / fastest
        y = bottom - (bottom - TOP) * (score - low) / (high - low)
        radius = max(SMALLEST, LARGEST * (row["bytes on disk"] / most) ** 0.5)
        side = "end" if x > WIDTH / 2 else "start"
        beside = x + (-radius - 4 if side == "end" else radius + 4)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{LOSS}" fill-opacity="0.5"/>')
        title = escape(f"{row['model']} {row['dtype']}")
        parts.append(f'<text x="{beside:.1f}" y="{y + 4:.1f}" text-anchor="{side}">{title}</text>')
    return "\n".join([*parts, "</svg>", ""])

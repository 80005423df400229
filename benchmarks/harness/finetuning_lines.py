"""The output of `benchmarks.suites.finetuning`: a line for each run, ratios of rows in turns, the table of all runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def line(one: dict[str, Any]) -> str:
    scores = ", ".join(f"{name} {value:.4f}" for name, value in one["scores"].items())
    return (
        f"{one['study']}, {one['row']}, seed {one['seed']}: {scores}; {one['tokens_per_second']:,.0f} tokens/s, "
        f"{one['tokens_per_processor_second']:,.0f} a second of the processor, {one['steps']:,} steps"
    )


def pairs(study: str, one: dict[str, Any], other: dict[str, Any]) -> str:
    """Two rows that took turns: each one's median tokens a second, and the median and range of the pairs' ratios."""
    lines = [f"{study}, {len(one['turns'])} turns each, threads: {one['threads']}"]
    for clock in ("clock", "processor"):
        ratios = [ours[clock] / theirs[clock] for ours, theirs in zip(one["turns"], other["turns"], strict=True)]
        speeds = [statistics.median(turn[clock] for turn in row["turns"]) for row in (one, other)]
        lines.append(
            f"  tokens a second of the {clock}: {one['row']} {speeds[0]:,.0f}, {other['row']} {speeds[1]:,.0f}; "
            f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
        )
    return "\n".join(lines)


def table(runs: Sequence[dict[str, Any]]) -> str:
    """A row for each task, length and row: median and range of its scores over seeds, and of its speed."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for one in runs:
        groups.setdefault((one["study"], one["examples"], one["epochs"], one["lr"], one["row"]), []).append(one)
    lines = [
        "| task | examples | epochs, rate | row | seeds | scores on the test set: median (range) | tokens/s | of the "
        "processor | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    speed = "tokens_per_processor_second"
    for (study, examples, epochs, lr, row), members in groups.items():
        scores = ", ".join(
            f"{name} {middle_and_range([one['scores'][name] for one in members])}" for name in members[0]["scores"]
        )
        other = groups.get((study, examples, epochs, lr, "trainer"))
        ratio = ""
        if other and row != "trainer":
            ratio = f"{statistics.median(m[speed] for m in members) / statistics.median(o[speed] for o in other):.2f}"
        lines.append(
            f"| {study} | {examples or 'all'} | {epochs}, {lr:g} | {row} | {len(members)} | {scores} | "
            f"{statistics.median(m['tokens_per_second'] for m in members):,.0f} | "
            f"{statistics.median(m[speed] for m in members):,.0f} | {ratio} |"
        )
    return "\n".join(lines)


def middle_and_range(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.4f} ({min(values):.4f} - {max(values):.4f})"

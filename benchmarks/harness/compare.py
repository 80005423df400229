"""Compares two result files: which rows became slower (or larger, in memory) or faster beyond the noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .timing import bootstrap_ratio

# Variation of a machine between runs, which the interval of one run does not contain.
TOLERANCE = 0.10
KEY = ("suite", "workload", "model", "operator", "direction", "dtype", "row")


def changes(old: dict[str, Any], new: dict[str, Any], tolerance: float = TOLERANCE) -> list[dict[str, Any]]:
    """A dict for each row that both files timed: key, ratio (new / old) with its interval, and a verdict.

    "slower" where the whole interval lies above 1 + tolerance, "faster" where it lies below 1 / (1 + tolerance), else
    "same". Rows are matched by what they measured, shape included.
    """
    before = {_key(r): r for r in old["rows"] if r["status"] == "ok"}
    found = []
    for row in new["rows"]:
        was = before.get(_key(row))
        if was is None or row["status"] != "ok":
            continue
        if row["suite"] == "memory":  # its figure is the peak, which hardly varies
            ratio = dict.fromkeys(("value", "low", "high"), row["peak_memory_bytes"] / max(was["peak_memory_bytes"], 1))
        else:
            ratio = bootstrap_ratio(row["seconds"], was["seconds"])
        verdict = (
            "slower" if ratio["low"] > 1 + tolerance else "faster" if ratio["high"] < 1 / (1 + tolerance) else "same"
        )
        found.append({"key": _key(row), "peer": row["peer"], "ratio": ratio, "verdict": verdict})
    return found


def _key(row: dict[str, Any]) -> tuple:
    return (*(row[name] for name in KEY), tuple(sorted(row["shape"].items())))


def report(old: dict[str, Any], new: dict[str, Any], say: Callable[[str], None]) -> int:
    """Prints the changes; returns how many rows of fastbert became slower."""
    if old["device"]["name"] != new["device"]["name"]:
        say(f"compare: the old results are of another machine ({old['device']['name']}); nothing is compared")
        return 0
    found = changes(old, new)
    for change in found:
        if change["verdict"] != "same":
            ratio = change["ratio"]
            name = " ".join(str(part) for part in change["key"][:-1] if part)
            say(f"  {change['verdict']}: {name}: {ratio['value']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]")
    slower = sum(c["verdict"] == "slower" and c["peer"] == "fastbert" for c in found)
    say(f"compare: {len(found)} rows in both files, {slower} of fastbert slower beyond the noise")
    return slower

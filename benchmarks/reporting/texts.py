"""The table in README.md, from the files encode-*.json of `python -m benchmarks.suites.texts`, one for each dtype."""

from __future__ import annotations

import json
from pathlib import Path

from fastbert.encoding.encoder import DTYPES

BEGIN, END = "<!-- encode: begin -->", "<!-- encode: end -->"
BASE = "in arrival order"  # part of the name of the row that ours is compared with, beside the best of the others
OURS = "fastbert"


def block(results: Path) -> str:
    """The block of README.md, with its markers: a table for each device."""
    tables = [line for folder in sorted(results.iterdir()) if folder.is_dir() for line in table(folder)]
    return "\n".join([BEGIN, "", *(tables or ["not measured", ""]), END])


def table(folder: Path) -> list[str]:
    """The table of one device: a row for each encoder, a column for each dtype."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("encode-*.json"))]
    if not found:
        return []
    results = sorted(found, key=lambda result: list(DTYPES).index(result["dtype"]), reverse=True)
    first = results[0]
    machine = f"{first['device']['cores']} cores of an {first['device']['name']}"
    title = f"{first['texts']} Python docstrings of mixed length, MiniLM-L6, {machine}"
    lines = [[title, *(f"{result['dtype']}, tokens/s" for result in results)], ["---"] * (1 + len(results))]
    speeds = [{row["row"]: row["tokens_per_second"] for row in result["rows"] if row["correct"]} for result in results]
    for name in (row["row"] for row in first["rows"]):
        bold = "**" if name.startswith(OURS) else ""
        lines.append([bold + name + bold, *(_bold(bold, of.get(name)) for of in speeds)])
    lines.append(["fastbert against arrival order", *(_ratio(of, BASE) for of in speeds)])
    lines.append(["fastbert against the best of the others", *(_ratio(of, "") for of in speeds)])
    versions = first["versions"]
    used = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "openvino") if name in versions)
    return [*("| " + " | ".join(line) + " |" for line in lines), "", f"With {used}.", ""]


def _bold(bold: str, speed: float | None) -> str:
    return "not measured" if speed is None else f"{bold}{speed:,.0f}{bold}"


def _ratio(speeds: dict[str, float], of: str) -> str:
    ours = next((speed for name, speed in speeds.items() if name.startswith(OURS)), None)
    others = [speed for name, speed in speeds.items() if not name.startswith(OURS) and of in name]
    return f"{ours / max(others):.2f}x" if ours and others else "not measured"

"""The table of `SentenceTransformer.encode` in docs/drop-in.md: a row for each way, a column for each dtype."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- sentences: begin -->", "<!-- sentences: end -->"
SUITE = "sentences"
SHOWN = ("torch", "transformers", "sentence-transformers", "openvino", "onnxruntime")


def newest(folder: Path) -> list[dict[str, Any]]:
    """For each device and dtype the newest complete result: its file with only these rows, bfloat16 first."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(folder.glob("*/*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if not result.get("complete") or "--quick" in result["command"].split():
            continue
        rows = [row for row in result["rows"] if row["suite"] == SUITE]
        for dtype in {row["dtype"] for row in rows}:
            key = (path.parent.name, dtype)
            if key not in found or found[key]["created"] < result["created"]:
                found[key] = {**result, "rows": [row for row in rows if row["dtype"] == dtype]}
    return [found[key] for key in sorted(found)]


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["median_s"] is None:
        return f"{row['status']}: {row['reason']}"
    ratio = row["ratio_to_ours"]
    slower = f" ({ratio['value']:.1f}x our time)" if ratio else ""
    return f"{row['tokens_per_second']:,.0f}{slower}"


def table(results: list[dict[str, Any]]) -> list[str]:
    """The table of one device, with a column for each result."""
    ways = dict.fromkeys(row["row"] for result in results for row in result["rows"])
    columns = [{row["row"]: row for row in result["rows"]} for result in results]
    device, texts = results[0]["device"], results[0]["rows"][0]["shape"]["sequences"]
    cores = f"{device['cores']} cores of an " if device["type"] == "cpu" else ""
    title = f"`SentenceTransformer.encode`, {texts} docstrings, MiniLM-L6, {cores}{device['name']}"
    dtypes = [f"{result['rows'][0]['dtype']}, real tokens/s" for result in results]
    lines = [[title, *dtypes], ["---"] * (1 + len(results))]
    for way in ways:
        ours = any(way in column and column[way]["peer"] == "fastbert" for column in columns)
        cells = [way, *(_cell(column.get(way)) for column in columns)]
        lines.append([f"**{cell}**" if ours and cell else cell for cell in cells])
    versions = results[0]["versions"]
    used = ", ".join(f"{name} {versions[name]}" for name in SHOWN if name in versions)
    return [*("| " + " | ".join(line) + " |" for line in lines), "", f"With {used}; each column is one run."]


def block(folder: Path) -> str:
    """The block of docs/drop-in.md, with its markers: a table for each device."""
    devices: dict[str, list[dict[str, Any]]] = {}
    for result in newest(folder):
        devices.setdefault(result["device"]["name"], []).append(result)
    tables = [line for results in devices.values() for line in ("", *table(results))]
    return "\n".join([BEGIN, *(tables or ["", "not measured"]), "", END])
